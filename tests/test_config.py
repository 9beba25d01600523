import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from jepa_world.checkpoint import write_yaml
from jepa_world.commands import COMMANDS
from jepa_world.config import Part, parse, part_options, read_yaml, to_dict
from jepa_world.registry import UserError, load_class

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Settings:
    """Settings of every type a command has."""

    planner: Part = Part("cem", {"samples": 32})
    """A part whose default presets an option."""
    encoder: Part = Part("conv")
    """A part."""
    masked_predictor: Part = Part("transformer")
    """A part whose kind has two words."""
    steps: int = 10
    """A number."""
    rate: float = 0.5
    """Another."""
    limit: int | None = None
    """A number or nothing."""
    ceiling: bool = True
    """A switch."""
    precision: Literal["no", "bf16"] = "bf16"
    """A choice."""
    checkpoint: tuple[Path, ...] = ()
    """Some files."""
    run_dir: Path | None = None
    """A folder."""


def settings(*words):
    return parse(Settings, [str(word) for word in words], program="settings")


def yaml_file(folder, text):
    (folder / "given.yaml").write_text(text)
    return folder / "given.yaml"


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--limit", 3, "--no-ceiling", "--rate", -1.5, "--checkpoint", "runs/a", "runs/b"),
        ("--planner", "random_shooting", "--encoder.hidden", 7, "--precision", "no"),
        ("--encoder", "vit", "--encoder.size", "small", "--planner.std", 1e-7),
        ("--masked-predictor", "transformer", "--masked-predictor.depth", 3),
    ],
)
def test_a_configuration_written_as_yaml_reads_back_as_itself(words, tmp_path):
    config = settings(*words)
    write_yaml(tmp_path / "config.yaml", to_dict(config))
    again = settings("--config", tmp_path / "config.yaml")
    assert to_dict(again) == to_dict(config)
    assert again.checkpoint == config.checkpoint and again.limit == config.limit


def test_every_value_is_written_out():
    values = to_dict(settings())
    known = {option.name for option in part_options("planner", "cem")}
    assert set(values) == {item.name for item in dataclasses.fields(Settings)} - {"run_dir"}
    assert set(values["planner"]) == {"name", *known}


def test_flags_of_the_user_win_over_the_file_wherever_they_stand(tmp_path):
    file = yaml_file(tmp_path, "steps: 1\nrate: 0.25\nceiling: false\n")
    for words in (("--steps", 2, "--config", file), ("--config", file, "--steps", 2)):
        config = settings(*words)
        assert (config.steps, config.rate, config.ceiling) == (2, 0.25, False)
    assert settings("--config", file, "--ceiling").ceiling


def test_a_later_file_wins_over_an_earlier_one(tmp_path):
    first = yaml_file(tmp_path, "steps: 1\nrate: 0.25\n")
    (tmp_path / "second.yaml").write_text("steps: 2\n")
    config = settings("--config", first, "--config", tmp_path / "second.yaml")
    assert (config.steps, config.rate) == (2, 0.25)


def test_equals_signs_and_underscores_are_as_good_as_blanks_and_hyphens(tmp_path):
    file = yaml_file(tmp_path, "planner: {min_std: 0.25}\n")
    config = settings(f"--config={file}", "--steps=3", "--planner.keep_elites=1", "--run_dir=a=b")
    assert config.planner.options["min_std"] == 0.25
    assert config.planner.options["keep_elites"] == 1
    assert (config.steps, config.run_dir) == (3, Path("a=b"))


def test_the_options_a_default_part_presets_hold_until_another_class_is_chosen():
    assert settings().planner.options["samples"] == 32
    assert settings("--planner.std", 1.0).planner.options["samples"] == 32
    other = settings("--planner", "random_shooting").planner.options["samples"]
    defaults = {
        option.name: option.default for option in part_options("planner", "random_shooting")
    }
    assert other == defaults["samples"]


def test_another_class_drops_the_options_of_the_one_in_the_file(tmp_path):
    file = yaml_file(tmp_path, "encoder: {name: conv, width: 4, stages: 2}\nsteps: 3\n")
    config = settings("--config", file, "--encoder", "vit", "--encoder.patch", 4)
    assert config.encoder.name == "vit" and config.encoder.options["patch"] == 4
    assert "stages" not in config.encoder.options and config.steps == 3


def test_the_same_class_keeps_the_options_of_the_file(tmp_path):
    file = yaml_file(tmp_path, "encoder: {name: conv, width: 4}\n")
    config = settings("--config", file, "--encoder", "conv", "--encoder.stages", 2)
    assert (config.encoder.options["width"], config.encoder.options["stages"]) == (4, 2)


def test_an_option_may_stand_before_the_name_of_its_part(tmp_path):
    assert settings("--encoder.patch", 4, "--encoder", "vit").encoder.options["patch"] == 4
    file = yaml_file(tmp_path, "encoder: {patch: 4, name: vit}\n")
    assert settings("--config", file).encoder.options["patch"] == 4


def test_an_option_of_a_class_that_was_not_chosen_is_refused():
    with pytest.raises(UserError, match=r"--encoder\.stages"):
        settings("--encoder.stages", 2, "--encoder", "vit")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--stepps", 3), r"--stepps.*nearest.*--steps"),
        (("--planner.eliets", 3), r"--planner\.eliets.*nearest.*--planner\.elites"),
        (("--steps", "many"), "steps.*many"),
        (("--steps",), "steps"),
        (("--precision", "f16"), "f16.*no.*bf16"),
        (("--planner.samples", 1.5), r"planner\.samples.*1\.5"),
        (("stray",), "stray"),
        (("--planner", "cme"), "unknown planner 'cme'; nearest: cem"),
        (("--planner",), "planner"),
        (("--config",), "--config"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line(words, message):
    with pytest.raises(UserError, match=message) as error:
        settings(*words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 3\n", r"--stepps.*nearest.*--steps"),
        ("planner: {name: cem, eliets: 3}\n", r"eliets.*nearest.*elites"),
        ("steps: many\n", "steps.*many"),
        ("steps: {a: 3}\n", r"--steps\.a"),
        ("- steps\n", "list, expected keys and values"),
        ("", "NoneType, expected keys and values"),
        ("steps: [\n", "not a YAML file"),
        ("steps: !!python/object:os.system {}\n", "not a YAML file"),
        ("steps: &a {b: *a}\n", "alias"),
        ("steps: &a [*a]\n", "alias"),
        ("steps: " + 2000 * "[" + "\n", "not a YAML file"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(text, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        settings("--config", yaml_file(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_or_not_text_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read.*No such file"):
        settings("--config", tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="not a YAML file"):
        settings("--config", tmp_path / "bytes.yaml")


def test_help_lists_the_options_of_the_chosen_part(capsys):
    def helped(*words):
        with pytest.raises(SystemExit) as stop:
            settings(*words, "--help")
        assert not stop.value.code
        return capsys.readouterr().out

    assert "--encoder.stages" in helped() and "Side of a patch" not in helped()
    assert "Side of a patch in pixels" in helped("--encoder", "vit")


MINE = '''
class Mine:
    """Plan my way.

    Args:
        low: Lower bound.
        high: Upper bound.
        horizon: Steps.
        patience: How long I wait.
    """

    def __init__(self, low, high, horizon, *, patience: int = 3, pair: tuple[int, int] = (1, 2)):
        self.patience, self.pair = patience, pair


class Untyped:
    def __init__(self, low, high, horizon, *, patience=3):
        pass


class Failing:
    def __init__(self, low, high, horizon, *, patience: int = 3):
        raise RuntimeError("two\\nlines")
'''


@pytest.fixture
def own_parts(tmp_path, monkeypatch):
    """A working directory with a module of parts of one's own, imported for one test only."""
    (tmp_path / "own_parts_of_test_config.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    yield "own_parts_of_test_config"
    import sys

    sys.modules.pop("own_parts_of_test_config", None)


def test_a_part_of_ones_own_is_configured_like_any_other(own_parts, tmp_path, capsys):
    words = ("--planner", f"{own_parts}:Mine", "--planner.pair", 4, 5)
    with pytest.raises(SystemExit):
        settings(*words, "--help")
    assert "How long I wait" in capsys.readouterr().out
    config = settings(*words)
    write_yaml(tmp_path / "config.yaml", to_dict(config))
    words = ("--config", tmp_path / "config.yaml", "--trust", own_parts)
    assert settings(*words) == config
    assert config.planner.build("planner", None, None, 3).pair == (4, 5)


def test_an_option_without_a_type_is_refused(own_parts):
    with pytest.raises(UserError, match="'patience' needs a type and a default"):
        settings("--planner", f"{own_parts}:Untyped")


def test_a_constructor_that_fails_is_named_in_one_line(own_parts):
    with pytest.raises(UserError, match="Failing' cannot be built: RuntimeError: two lines"):
        Part(f"{own_parts}:Failing").build("planner", None, None, 3)


def test_an_option_that_a_part_does_not_have_is_refused_in_python():
    with pytest.raises(UserError, match=r"has no option 'eliets'; it has:.*'elites'"):
        Part("cem", {"eliets": 3}).build("planner", None, None, 3)


def command_of(file):
    """Return the command that a file of configs/ belongs to: its own name or its first line's."""
    first = file.read_text().splitlines()[0]
    named = [name for name in COMMANDS if name in first or name.replace("_", "-") in first]
    return max(named or [n for n in COMMANDS if file.stem.startswith(n)], key=len)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_file_in_configs_is_a_command_line(file):
    command = command_of(file)
    config_class = load_class("command", f"jepa_world.commands.{command}:{COMMANDS[command]}")
    config = parse(config_class, ["--config", str(file)], program=command)
    given = read_yaml(file)
    assert given.keys() <= to_dict(config).keys()
    assert yaml.safe_load(yaml.safe_dump(to_dict(config))) == to_dict(config)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_20_fields_at_most_and_each_is_explained(command):
    config_class = load_class("command", f"jepa_world.commands.{command}:{COMMANDS[command]}")
    assert len(dataclasses.fields(config_class)) <= 20
    lines = [line for base in config_class.__mro__[:-1] for line in source(base)]
    for item in dataclasses.fields(config_class):
        places = [i for i, line in enumerate(lines) if line.startswith(f"    {item.name}: ")]
        assert any(lines[at + 1].startswith('    """') for at in places), item.name


def source(config_class):
    import inspect

    return inspect.getsource(config_class).splitlines()
