"""`jepa_world.envs`: gymnasium environments on MuJoCo, registered when this package is imported.

One domain is one `.py` beside one `.xml`. Nothing heavy is imported until an environment is made.
"""

import os
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
from gymnasium.envs.registration import EnvSpec, load_env_creator

if __name__ != "jepa_world.envs":
    raise ImportError(f"import jepa_world.envs, not {__name__}: a second copy is another class")

SHORT_NAMES = {
    "reach": "jepa_world/Reach-v0",
    "reach_torque": "jepa_world/ReachTorque-v0",
    "push": "jepa_world/Push-v0",
    "push_square": "jepa_world/PushSquare-v0",
    "maze": "jepa_world/Maze-v0",
    "maze_medium": "jepa_world/MazeMedium-v0",
    "maze_large": "jepa_world/MazeLarge-v0",
    "rooms": "jepa_world/Rooms-v0",
    "arm": "jepa_world/Arm-v0",
    "arm_joint": "jepa_world/ArmJoint-v0",
    "cube": "jepa_world/Cube-v0",
}

EXTRAS = {"imageio": "gymnasium", "ogbench": "ogbench"}  # module that is missing -> what brings it


class Quantity(NamedTuple):
    """A number that an environment reports: its name, its unit, and where an angle repeats."""

    name: str
    unit: str
    period: float = 0.0
    """Of an angle, in its unit; 0 for what does not repeat."""


class EnvError(RuntimeError):
    """A mistake the user can mend (unknown environment, no OpenGL), said in one line."""


def make(name: str, **options: Any) -> gymnasium.Env:
    """Make an environment by short name (`reach`), Gymnasium id, or `module:Id-v0`.

    `options` are the environment's own (`size=96`). OpenGL is chosen before MuJoCo is imported. A
    module is searched in the user's working directory last, whichever launcher started Python.
    MuJoCo environments of Gymnasium (`Reacher-v5`) and OGBench's come with the adapters that show
    pictures and goals. The name of a robot of MuJoCo Menagerie (`franka_emika_panda`) makes that
    robot's.

    Raises:
        EnvError: unknown name or option, or no OpenGL.

    Example:
        >>> env = make("reach", size=32)
        >>> env.reset(seed=0)[0].shape
        (32, 32, 3)
    """
    from jepa_world.envs.rendering import choose_gl

    choose_gl()
    before = list(sys.path)
    if ":" in name:
        # a checkout's root holds folders named envs and planners, as a user's own may
        checkout = str(Path(__file__).resolve().parent.parent)
        sys.path[:] = [entry for entry in before if entry != checkout] + [os.getcwd()]
    try:
        return _make(SHORT_NAMES.get(name, name), options)
    except ImportError as error:
        extra = EXTRAS.get(error.name or "")
        hint = f": pip install 'jepa-world[{extra}]'" if extra else _nearest(name)
        raise EnvError(f"env {name!r} cannot be imported, {error}{hint}") from error
    except gymnasium.error.Error as error:
        raise EnvError(f"unknown env {name!r}{_nearest(name)}; {error}") from error
    except (TypeError, ValueError) as error:
        refused = f" does not take options {options!r}" if options else ""
        raise EnvError(f"env {name!r}{refused}: {error}") from error
    finally:
        sys.path[:] = [*before, *(entry for entry in sys.path if entry not in before)]


def robots() -> list[str]:
    """Return the names of MuJoCo Menagerie's robots; none where its package is not installed."""
    try:
        return import_module("mujoco_menagerie").names()
    except ImportError:
        return []


def drawn(factors: Iterable[str]) -> str | dict[str, str]:
    """Return the option `factors` that draws these at random in every episode; `all`: all."""
    names = list(factors)
    return "random" if names == ["all"] else dict.fromkeys(names, "random")


def _make(name: str, options: dict[str, Any]) -> gymnasium.Env:
    module, _, plain = name.rpartition(":")
    if module:
        import_module(module)
    spec = gymnasium.registry.get(plain)
    if spec is None and plain in robots():
        plain, options = "jepa_world/Robot-v0", {"robot": plain, **options}
    if spec is not None and _is_of_gymnasium(spec):
        from jepa_world.envs.adapters import picture_env

        return picture_env(spec, options)
    env = gymnasium.make(plain, **options)
    if type(env.unwrapped).__module__.startswith("ogbench."):
        from jepa_world.envs.adapters import KeptGoal

        return KeptGoal(env)
    return env


def _is_of_gymnasium(spec: EnvSpec) -> bool:
    """Return whether an environment is one of Gymnasium's class for MuJoCo."""
    creator = spec.entry_point
    if isinstance(creator, str):
        creator = load_env_creator(creator)
    return isinstance(creator, type) and any(
        base.__name__ == "MujocoEnv" and base.__module__.startswith("gymnasium.")
        for base in creator.__mro__
    )


def _nearest(name: str) -> str:
    known = [*SHORT_NAMES, *gymnasium.registry, *robots()]
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; nearest: {near[0]}" if near else ""
    robot = "a robot of MuJoCo Menagerie (pip install 'jepa-world[menagerie]')"
    return f"{hint}; known: {', '.join(SHORT_NAMES)}, any Gymnasium id, module:Id-v0, or {robot}"


_TASKS = (  # id, module, class, options
    ("Reach", "reach", "ReachEnv", {"control": "velocity"}),
    ("ReachTorque", "reach", "ReachEnv", {"control": "torque"}),
    ("Push", "push", "PushEnv", {"block": "t"}),
    ("PushSquare", "push", "PushEnv", {"block": "square"}),
    ("Maze", "maze", "MazeEnv", {"layout": "small"}),
    ("MazeMedium", "maze", "MazeEnv", {"layout": "medium"}),
    ("MazeLarge", "maze", "MazeEnv", {"layout": "large"}),
    ("Rooms", "rooms", "RoomsEnv", {}),
    ("Arm", "arm", "ArmEnv", {"control": "tip"}),
    ("ArmJoint", "arm", "ArmEnv", {"control": "joint"}),
    ("Cube", "cube", "CubeEnv", {}),
    ("Robot", "robot", "RobotEnv", {}),
)
for _id, _module, _class, _options in _TASKS:
    gymnasium.register(
        f"jepa_world/{_id}-v0",
        entry_point=f"jepa_world.envs.{_module}:{_class}",
        max_episode_steps=100,
        kwargs=_options,
    )
