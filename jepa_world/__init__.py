"""World models on the JEPA family, trained with SIGReg and planned with in latent space.

In a checkout the component folders (encoders/, predictors/, envs/, planners/, configs/) lie beside
this package and belong to it: `encoders/` is `jepa_world.encoders`. An installed copy has them
inside.
"""

import importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from jepa_world.agent import Agent as Agent
    from jepa_world.data.trajectories import Trajectories as Trajectories
    from jepa_world.methods.world_model import WorldModel as WorldModel
    from jepa_world.methods.world_model import load_world_model as load_world_model
    from jepa_world.sigreg import SIGReg as SIGReg

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "encoders").is_dir():
    __path__.append(str(_root))

__version__ = "0.1.0"

_PUBLIC = {
    "Agent": "jepa_world.agent",
    "SIGReg": "jepa_world.sigreg",
    "Trajectories": "jepa_world.data.trajectories",
    "WorldModel": "jepa_world.methods.world_model",
    "load_world_model": "jepa_world.methods.world_model",
}
__all__ = ["Agent", "SIGReg", "Trajectories", "WorldModel", "load_world_model"]


def __getattr__(name: str) -> _Any:
    """Import a public name when it is first used: collecting processes never load torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jepa_world' has no attribute {name!r}; it has {__all__}")
    return vars(importlib.import_module(_PUBLIC[name]))[name]
