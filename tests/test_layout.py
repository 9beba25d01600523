import ast
import dataclasses
import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPONENTS = ("encoders", "predictors", "envs", "planners", "configs")
COMMON = {"config", "registry", "interfaces"}  # what any room of the core may use
MAY_IMPORT = {  # room -> rooms of ours
    "registry": set(),
    "processes": {"registry"},
    "config": {"registry"},
    "interfaces": set(),
    "policies": set(),
    "search": set(),
    "objectives": set(),
    "nn": set(),
    "sigreg": {"nn"},
    "masking": set(),
    "losses": {"nn"},
    "memory": set(),
    "checkpoint": set(),
    "testing": {"objectives", "policies"},
    "probes": {"nn", "sigreg"},
    "data": {"data"},
    "methods": {"methods", "nn", "sigreg", "masking", "losses", "checkpoint", "data", "objectives"},
    "runs": {"checkpoint"},
    "training": {"checkpoint", "memory", "probes", "methods", "nn", "runs"},
    "agent": {"methods", "objectives"},
    "evaluation": {"agent", "methods"},
    "pictures": {"masking"},
    "report": {"agent", "evaluation", "methods", "data", "pictures"},
    "encoders": {"nn", "masking"},
    "predictors": {"nn", "masking"},
    "envs": {"envs"},
    "planners": {"interfaces", "search"},
}
FILE_MAY_IMPORT = {  # a file of others holds an encoder and the predictor of its tokens
    "encoders/pretrained.py": {"predictors"},
    "jepa_world/commands/import_leworldmodel.py": {"encoders"},
}
THIRD_PARTY = {  # room -> what a component may import besides the standard library
    "encoders": {"torch", "einops", "jaxtyping"},
    "predictors": {"torch", "einops", "jaxtyping"},
    "planners": {"torch", "einops", "jaxtyping"},
    "envs": {"numpy", "gymnasium", "mujoco"},
}
OPTIONAL = {"encoders": {"transformers", "timm", "safetensors"}}  # inside functions only


def sources():
    """Return every module of the package: (room, path)."""
    for path in sorted((ROOT / "jepa_world").rglob("*.py")):
        parts = path.relative_to(ROOT / "jepa_world").with_suffix("").parts
        if parts != ("__init__",):
            yield parts[0], path
    for room in COMPONENTS:
        for path in sorted((ROOT / room).glob("*.py")):
            yield room, path


SOURCES = list(sources())


def imported(path, *, inside=True):
    """Return the modules a file imports, as dotted names; without those inside functions."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if inside else iter(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            module = node.module or ""
            yield from (
                f"{module}.{alias.name}" if module == "jepa_world" else module
                for alias in node.names
            )


def exceptions(path):
    """Return the rooms that this one file may import beyond its own room's."""
    return FILE_MAY_IMPORT.get(path.relative_to(ROOT).as_posix(), set())


def room_of(module):
    """Return the room of a module of ours, None for others."""
    words = module.split(".")
    return [*words, ""][1] if words[0] == "jepa_world" else None


@pytest.mark.parametrize(
    ("room", "path"),
    [s for s in SOURCES if s[0] != "commands"],
    ids=lambda x: getattr(x, "stem", x),
)
def test_a_room_imports_only_what_lies_below_it(room, path):
    allowed = MAY_IMPORT.get(room, set()) | (set() if room in COMPONENTS else COMMON) | {room, ""}
    rooms = {room_of(module) for module in imported(path)} - {None, "__version__"}
    allowed |= exceptions(path)
    assert rooms <= allowed, f"{path.name} imports {sorted(rooms - allowed)}"


@pytest.mark.parametrize(("room", "path"), SOURCES, ids=lambda x: getattr(x, "stem", x))
def test_components_are_loaded_by_name_except_that_commands_make_envs(room, path):
    others = set(COMPONENTS) - {room} - ({"envs"} if room == "commands" else set())
    others -= exceptions(path)
    assert not others & {room_of(module) for module in imported(path)}


@pytest.mark.parametrize(
    ("room", "path"),
    [s for s in SOURCES if s[0] in THIRD_PARTY],
    ids=lambda x: getattr(x, "stem", x),
)
def test_a_component_needs_few_libraries(room, path):
    def foreign(**options):
        tops = {module.partition(".")[0] for module in imported(path, **options)}
        return tops - set(sys.stdlib_module_names) - {"jepa_world"}

    assert foreign(inside=False) <= THIRD_PARTY[room]
    assert foreign() <= THIRD_PARTY[room] | OPTIONAL.get(room, set())


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_folder_is_flat_and_refuses_another_name(name, shell):
    assert not list((ROOT / name).glob("*/*.py"))
    ended = shell("-c", f"import {name}", PYTHONPATH=str(ROOT))
    assert ended.code == 1 and f"import jepa_world.{name}, not {name}" in ended.stderr


def test_nothing_imports_torch_before_its_time(shell):
    code = (
        "import sys, jepa_world, jepa_world.config, jepa_world.commands.collect, jepa_world.envs\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    assert shell("-c", code, PYTHONPATH=str(ROOT)).stderr == ""


def test_public_names_are_there_when_they_are_asked_for():
    import jepa_world

    assert all(getattr(jepa_world, name).__name__ == name for name in jepa_world.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Agnet'"):
        jepa_world.Agnet  # noqa: B018


def test_commands_that_run_without_arguments_have_root_scripts_of_one_shape():
    from jepa_world.commands import COMMANDS

    shape = (
        '"""`python {0}.py --help`; an installed copy has `jepa-world {0}`."""\n\n'
        'from jepa_world.commands import main\n\nif __name__ == "__main__":\n    main("{0}")\n'
    )
    at_the_root = {path.stem for path in ROOT.glob("*.py")}
    assert at_the_root <= set(COMMANDS)
    for command, name in COMMANDS.items():
        config = vars(importlib.import_module(f"jepa_world.commands.{command}"))[name]
        needs = [f for f in dataclasses.fields(config) if f.default is f.default_factory]  # neither
        assert (command in at_the_root) == (not needs), command
        if command in at_the_root:
            assert (ROOT / f"{command}.py").read_text() == shape.format(command)


def test_a_wheel_holds_what_the_checkout_has(tmp_path):
    """Built from a copy, so that the checkout stays clean."""
    copy = tmp_path / "copy"
    for name in ("jepa_world", *COMPONENTS):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    build = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    line = [sys.executable, *build, "--wheel-dir", str(tmp_path), str(copy)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == {"jepa_world/" + name for name in wanted()}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def wanted():
    """Return what a wheel must hold, below jepa_world/."""
    folders = [(ROOT / "jepa_world", ""), *((ROOT / name, f"{name}/") for name in COMPONENTS)]
    kinds = {".py", ".xml", ".yaml"}
    for folder, prefix in folders:
        for path in folder.rglob("*"):
            name = path.relative_to(folder)
            if path.suffix in kinds or name.name == "py.typed" or name.parts[0] == "checkpoints":
                if path.is_file():
                    yield prefix + name.as_posix()
