"""Files of others run no code, take no memory that they do not have, and leave no folder."""

import ast
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from jepa_world.checkpoint import save_tensors, write_yaml
from jepa_world.commands.plan import Plan
from jepa_world.commands.probe import load_encoder
from jepa_world.commands.train_world_model import TrainWorldModel
from jepa_world.config import parse, read_yaml
from jepa_world.methods.world_model import load_world_model
from jepa_world.registry import UserError

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("jepa_world", "encoders", "predictors", "envs", "planners", "benchmarks")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {  # the end of a call's name -> what it must be given to read plain data
    "torch.load": ("weights_only", True),
    "load_state_dict_from_url": ("weights_only", True),
    "models.load_state_dict": ("weights_only", True),
    "yaml.load": (1, "_PlainLoader"),
}
FORBIDDEN = (
    "eval",
    "exec",
    "yaml.unsafe_load",
    "yaml.full_load",
    "pandas.read_pickle",
    "os.system",
)


def dotted(node):
    """Return the dotted name of an expression, as far as it is one."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def given(call, argument):
    """Return an argument of a call by its place or its name, as a constant or a name."""
    nodes = [word.value for word in call.keywords if word.arg == argument]
    nodes += call.args[argument : argument + 1] if isinstance(argument, int) else []
    return [node.value if isinstance(node, ast.Constant) else dotted(node) for node in nodes]


def dangers(text):
    """Yield what in a source could make an object of a file's own choice."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = getattr(node, "module", None)
            yield from UNPICKLERS & {n.partition(".")[0] for n in names if not module}
            if module in UNPICKLERS:  # of an error that is caught nothing is made
                yield from set(names) - {"UnpicklingError"}
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if (
            name in FORBIDDEN
            or given(node, "shell") == [True]
            or given(node, "allow_pickle") == [True]
        ):
            yield name
        for end, (argument, value) in CALLS.items():
            if f".{name}".endswith(f".{end}") and given(node, argument) != [value]:
                yield name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_makes_objects_of_a_files_choice(path):
    assert list(dangers(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "np.load(f, allow_pickle=True)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "yaml.load(f, yaml.Loader)",
        "subprocess.run(x, shell=True)",
        "eval(x)",
    ],
)
def test_the_search_for_dangers_finds_them(line):
    assert list(dangers(line))


def requirements():
    """Return what pyproject.toml asks for: of the package, and with the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    core = [Requirement(line) for line in project["dependencies"]]
    return core, [Requirement(line) for lines in extras.values() for line in lines]


def test_the_versions_that_are_tested_lie_in_the_ranges_that_are_allowed():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    core, extras = requirements()
    for need in core:
        assert need.name.lower() in pinned, need
    for need in core + extras:
        if version := pinned.get(need.name.lower()):
            assert need.specifier.contains(version), f"{need} leaves out {version}"


def lower_bound(need):
    """Return the least version that a requirement allows."""
    bounds = [Version(one.version) for one in need.specifier if one.operator == ">="]
    assert bounds, f"{need} has no lower bound"
    return max(bounds)


def test_a_dependency_is_bounded_below_and_what_is_installed_is_allowed():
    for need in (*requirements()[0], *requirements()[1]):
        assert lower_bound(need)
        if need.marker is None or need.marker.evaluate():
            for found in metadata.distributions(name=need.name):  # none, of an extra
                assert need.specifier.contains(found.version, prereleases=True), need


UNSAFE = [  # the first version without the hole; https://nvd.nist.gov/vuln/detail/<CVE> has each
    ("torch", "2.6.0", "CVE-2025-32434"),  # code runs from .pt files read with weights_only
    ("torch", "2.10.0", "CVE-2026-24747"),  # memory is corrupted by .pt files, weights_only too
    ("pillow", "10.0.1", "CVE-2023-4863"),  # heap overflow by WebP pictures
    ("pillow", "10.2.0", "CVE-2023-50447"),  # code runs from expressions of ImageMath
    ("pillow", "10.3.0", "CVE-2024-28219"),  # buffer overflow by colour profiles
    ("pillow", "11.3.0", "CVE-2025-48379"),  # heap overflow by DDS pictures
    ("pillow", "12.1.1", "CVE-2026-25990"),  # writes out of bounds by PSD pictures
    ("pillow", "12.2.0", "CVE-2026-40192"),  # memory is used up by FITS pictures
    ("pyyaml", "5.4", "CVE-2020-14343"),  # code runs from YAML files, by full_load
    ("tqdm", "4.66.3", "CVE-2024-34062"),  # code runs from arguments of its command
    ("setuptools", "78.1.1", "CVE-2025-47273"),  # files written outside the folder
    ("pyarrow", "14.0.1", "CVE-2023-47248"),  # code runs from IPC and Parquet files
    ("scikit-learn", "1.5.0", "CVE-2024-5206"),  # words of the training data are kept
    ("transformers", "4.48.0", "CVE-2024-11393"),  # code runs from checkpoints of MaskFormer
]


@pytest.mark.parametrize(("name", "fixed", "cve"), UNSAFE)
def test_no_version_with_a_hole_that_is_known_is_allowed(name, fixed, cve):
    needs = [need for part in requirements() for need in part]
    bounds = [lower_bound(need) for need in needs if canonicalize_name(need.name) == name]
    assert bounds and min(bounds) >= Version(fixed), cve


def imports(node):
    """Return the modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_every_import_of_the_package_is_declared():
    owners = metadata.packages_distributions()
    declared = {canonicalize_name(need.name) for needs in requirements() for need in needs}
    used = {
        name.partition(".")[0]
        for path in SOURCES
        if "benchmarks" not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        for name in imports(node)
    }
    for name in used - {"jepa_world"}:
        there = {canonicalize_name(owner) for owner in owners.get(name, [])}
        assert not there or there & declared, f"{name} comes with {there}, which is not declared"


@pytest.fixture
def hostile(tiny_run, tmp_path):
    """Return the folder of a good checkpoint with another description."""

    def make(**changes):
        description = read_yaml(tiny_run / "checkpoint" / "config.yaml")
        write_yaml(tmp_path / "config.yaml", description | changes)
        weights = (tiny_run / "checkpoint" / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(weights)
        return tmp_path

    return make


HUGE = 10**9
CONV = {"name": "conv", "dim": 8, "width": 4, "stages": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder": CONV | {"dim": HUGE}},
        {"encoder": CONV | {"width": 3 * 10**5}},
        {"encoder": CONV | {"stages": HUGE}},
        {"encoder": CONV | {"dim": float("nan")}},
        {"encoder": CONV | {"dim": float("inf")}},
        {"encoder": CONV | {"dim": "8; touch ran"}},
        {"encoder": CONV | {"dim": -1}},
        {"encoder": CONV | {"dim": [[8]]}},
        {"encoder": {"name": "vit", "depth": HUGE}},
        {"encoder": {"name": "vit", "patch": 1, "dim": 4096, "heads": 1}},
        {"encoder": {"name": ["conv"]}},
        {"encoder": "conv"},
        {"encoder": {"name": "$(touch ran)"}},
        {"encoder": {"name": "os:system"}},
        {"predictor": {"name": "mlp", "depth": HUGE}},
        {"predictor": {"name": "jepa_world.registry:Path"}},
        {"predictor": None},
        {"observation_shape": [1, 3, 10**6, 10**6]},
        {"observation_shape": [1, 3, 32]},
        {"observation_shape": [1, 3, 32, float("inf")]},
        {"observation_shape": {"a": 1}},
        {"action_dim": 10**12},
        {"action_dim": float("inf")},
        {"action_dim": True},
        {"stride": 0},
        {"stride": "two"},
        {"method": ["world_model"]},
    ],
    ids=str,
)
def test_a_hostile_description_is_refused_in_one_line(hostile, changes, monkeypatch):
    folder = hostile(**changes)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as refused:
        load_world_model(folder)
    assert "\n" not in str(refused.value) and not (folder / "ran").exists()
    if not {"predictor", "action_dim", "stride", "method"} & changes.keys():
        with pytest.raises(UserError):
            load_encoder(folder, (1, 3, 32, 32), ())


BOMB = "a: &a [1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"alias .*write the value out"),
        ("a: &a {b: 1}\nc: {<<: [*a, *a]}", "alias"),
        ("a: &a [*a]", "alias"),
        ("[" * 100_000, "recursion"),
        ("a: " + "9" * 5000, "is not a YAML file"),
        ("a: !!timestamp abc", "is not a YAML file"),
        ("a: !!python/object/apply:os.system [touch ran]", "could not determine a constructor"),
        ("#" * 2**19, "more than 262144 bytes"),
        ("a: \0", "is not a YAML file"),
        ("- a", "holds list"),
    ],
    ids=["bomb", "merge", "itself", "deep", "digits", "date", "python", "long", "null", "list"],
)
def test_a_hostile_yaml_file_is_refused(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_yaml(tmp_path / "a.yaml")


def test_a_file_without_end_is_refused():
    with pytest.raises(UserError, match="'/dev/zero' has more than"):
        read_yaml(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder": {"name": "evil.deep:Encoder"}}, "add --trust evil$"),
        ({"encoder": "evil:Encoder"}, "add --trust evil$"),
        ({"encoder.name": "evil:Encoder"}, "add --trust evil$"),
        ({"trust": ["evil"]}, "for the command line alone"),
        ({"steps": [1, "--encoder", "evil:Encoder"]}, "'--encoder', which is a flag"),
        ({"steps": 1, "data": "--trust"}, "'--trust', which is a flag"),
        ({"data --trust": "evil"}, "has the key 'data --trust'"),
        ({"data": "a\0b"}, "is a flag or no text"),
    ],
    ids=str,
)
def test_a_configuration_file_does_not_choose_code(values, message, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\nclass Encoder: ...\n")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        parse(TrainWorldModel, ["--config", "config.yaml"], program="train_world_model")
    (tmp_path / "run").mkdir()
    (tmp_path / "config.yaml").rename("run/config.yaml")
    with pytest.raises(UserError, match=message):
        parse(TrainWorldModel, ["--run-dir", "run", "--resume"], program="train_world_model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("values", [{"env": "evil:A-v0"}, {"objective": ["effort", "evil:f=0.1"]}])
def test_an_environment_and_an_objective_are_code_too(values, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    words = ["--config", str(tmp_path / "config.yaml")]
    with pytest.raises(UserError, match=r"names 'evil:.*add --trust evil"):
        parse(Plan, words, program="plan")
    assert parse(Plan, [*words, "--trust", "evil"], program="plan").trust == ("evil",)


def test_the_command_line_names_code_by_using_it(tmp_path, monkeypatch):
    (tmp_path / "own_fine_part.py").write_text(
        "class Encoder:\n    def __init__(self, shape, *, width: int = 1): ...\n"
    )
    values = {"encoder": {"name": "own_fine_part:Encoder", "width": 3}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    for own in (["--trust", "own_fine_part"], ["--encoder", "own_fine_part:Encoder"]):
        words = ["--config", "config.yaml", *own]
        config = parse(TrainWorldModel, words, program="train_world_model")
        assert config.encoder.options == {"width": 3}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(hostile, value):
    from jepa_world.checkpoint import load_tensors

    folder = hostile()
    tensors, facts = load_tensors(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight"))
    tensors[name].view(-1)[0] = value
    save_tensors(folder / "model.safetensors", tensors, facts)
    with pytest.raises(
        UserError, match=re.escape(repr(name)) + " holds numbers that are not finite"
    ):
        load_world_model(folder)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000000]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"facts":"[1]"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"facts":"' + b"[" * 50_000 + b'"}}',
        b"[" * 50_000,
    ],
    ids=["shape", "offsets", "negative", "dtype", "facts", "deep facts", "deep"],
)
def test_a_header_of_safetensors_that_lies_is_refused(hostile, header):
    folder = hostile()
    content = len(header).to_bytes(8, "little") + header + b"\0\0\x80?"
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged|holds unknown|lacks|many times larger"):
        load_world_model(folder)
