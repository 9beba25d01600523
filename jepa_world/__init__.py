"""World models on the JEPA family, trained with SIGReg and planned with in latent space.

In a checkout the component folders (encoders/, predictors/, envs/, planners/, configs/) lie beside this
package and belong to it: `encoders/` is `jepa_world.encoders`. An installed copy has them inside.
"""

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "encoders").is_dir():
    __path__.append(str(_root))

__version__ = "0.1.0"
