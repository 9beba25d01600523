"""Short names of parts, as `package.module:Class` strings: nothing is imported before its time."""

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, cast

PARTS: dict[str, dict[str, str]] = {
    "encoder": {
        "conv": "jepa_world.encoders.conv:ConvEncoder",
        "resnet": "jepa_world.encoders.resnet:ResNetEncoder",
        "vit": "jepa_world.encoders.vit:ViTEncoder",
        "leworldmodel": "jepa_world.encoders.leworldmodel:LeWorldModelEncoder",
        "vit_pooled": "jepa_world.encoders.vit:PooledViTEncoder",
        "transformers": "jepa_world.encoders.foreign:TransformersEncoder",
        "timm": "jepa_world.encoders.foreign:TimmEncoder",
    },
    "predictor": {
        "mlp": "jepa_world.predictors.mlp:MLPPredictor",
        "adaln": "jepa_world.predictors.adaln:AdaLNPredictor",
        "block_causal": "jepa_world.predictors.block_causal:BlockCausalPredictor",
        "concat": "jepa_world.predictors.concat:ConcatPredictor",
        "gru": "jepa_world.predictors.gru:GRUPredictor",
        "leworldmodel": "jepa_world.predictors.leworldmodel:LeWorldModelPredictor",
        "prefix": "jepa_world.predictors.prefix:PrefixPredictor",
    },
    "masked_predictor": {
        "transformer": "jepa_world.predictors.masked:MaskedTransformer",
        "cross": "jepa_world.predictors.masked:CrossMaskedTransformer",
    },
    "planner": {
        "cem": "jepa_world.planners.cem:CEM",
        "icem": "jepa_world.planners.icem:ICEM",
        "mppi": "jepa_world.planners.mppi:MPPI",
        "predictive_sampling": "jepa_world.planners.predictive_sampling:PredictiveSampling",
        "gradient": "jepa_world.planners.gradient:Gradient",
        "cem_gradient": "jepa_world.planners.cem:CEMGradient",
        "grasp": "jepa_world.planners.grasp:GRASP",
        "random_shooting": "jepa_world.planners.random_shooting:RandomShooting",
    },
    "cost": {"temporal": "jepa_world.objectives:TemporalDistance"},
    "policy": {
        "cloned": "jepa_world.methods.temporal_distance:GoalPolicy",
        "none": "builtins:object",  # never built
    },
    "objective": {
        "summed_distance": "jepa_world.objectives:summed_distance",
        "effort": "jepa_world.objectives:effort",
        "smoothness": "jepa_world.objectives:smoothness",
    },
}


class UserError(Exception):
    """A mistake the user can mend: a command prints its one line and exits with code 2."""


class Stopped(Exception):
    """A command was asked to end and left its work whole: it says so and exits with code 143."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; nearest: X" for the closest known word, then the list of all."""
    known = sorted(known)
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return (f"; nearest: {near[0]}" if near else "") + f"; known: {', '.join(known)}"


def class_path(kind: str, name: str) -> str:
    """Return the `package.module:Name` string of a short name, or the string itself if it is one.

    Raises:
        UserError: unknown short name.
    """
    if ":" in name:
        return name
    known = PARTS[kind]
    if name not in known:
        hint = did_you_mean(name, list(known))
        raise UserError(f"unknown {kind} {name!r}{hint}; or give package.module:Name")
    return known[name]


def require_trust(source: str, class_path: str, trusted: Sequence[str]) -> None:
    """Refuse a class path that a file names, lies outside jepa_world and is not trusted.

    Args:
        source: The file, as the error calls it.
        class_path: `package.module:Name`; short names are always trusted.
        trusted: Packages that the user has named on the command line.

    Raises:
        UserError: naming the flag that grants the import.
    """
    package = class_path.partition(":")[0].partition(".")[0]
    if ":" in class_path and package not in ("jepa_world", *trusted):
        raise UserError(
            f"{source} names {class_path!r}: importing it runs its code;"
            f" if you trust it, add --trust {package}"
        )


def load_class(kind: str, name: str) -> type:
    """Import the class of a part by its short name or `package.module:Class`.

    The user's working directory is searched last, so that `my_module:MyPredictor` beside the user's
    data is found whichever launcher started Python.

    Raises:
        UserError: unknown name, module that does not import, class that is not there.
    """
    found = _load(kind, name, "class", lambda value: isinstance(value, type))
    return cast(type, found)


def load_function(kind: str, name: str) -> Callable[..., Any]:
    """Import a function by its short name or `package.module:function`, as `load_class` does.

    Raises:
        UserError: unknown name, module that does not import, function that is not there.
    """
    found = _load(kind, name, "function", callable)
    return cast(Callable[..., Any], found)


def _load(kind: str, name: str, what: str, fits: Callable[[object], bool]) -> object:
    module_name, _, attribute = class_path(kind, name).partition(":")
    if not all(word.isidentifier() for word in (*module_name.split("."), attribute)):
        raise UserError(f"{kind} {name!r} is not of the form package.module:Name")
    try:
        module = _import_from_working_directory(module_name)
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{kind} {name!r} cannot be imported: {error}") from error
    found = vars(module).get(attribute)
    if not fits(found):
        hint = did_you_mean(attribute, [key for key, value in vars(module).items() if fits(value)])
        raise UserError(f"{kind} {name!r}: module {module_name} has no {what} {attribute!r}{hint}")
    return found


def _import_from_working_directory(module_name: str) -> ModuleType:
    """Import a module, searching the user's working directory last.

    A checkout's root holds folders named `envs` and `predictors`, as a user's own may: it is taken
    off the search path meanwhile, unless the user stands in it.
    """
    before = list(sys.path)
    here, checkout = str(Path.cwd()), str(Path(__file__).resolve().parent.parent)
    sys.path[:] = [entry for entry in before if entry != checkout] + [here]
    try:
        return importlib.import_module(module_name)
    finally:
        sys.path[:] = before if here in before else [*before, here]
