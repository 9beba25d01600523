"""The tables of docs/results.md, from run folders of evaluate.py and behaviour_cloning.py evaluate.

    python benchmarks/table.py runs/eval_* [--out docs/results.md]

One table a task: a row is a method, a column a protocol (where goals are, steps, tolerance); random
actions and the planner on the true simulator are rows too. A success rate is that of all models
together with its Wilson 95 % interval, then of each model. CPU-seconds of training are those in the
results.json of the models' own run folders. Below a table stands the command of every model and of
every cell, from the config.yaml of its folder. Rows of the same kind are told apart by the flags
that they were given.
"""

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import behaviour_cloning

from jepa_world.checkpoint import find_checkpoint, write_atomically
from jepa_world.commands.evaluate import Evaluate
from jepa_world.commands.train_cost import TrainCost
from jepa_world.commands.train_world_model import TrainWorldModel
from jepa_world.config import parse, read_json, read_yaml, to_dict, words_of
from jepa_world.registry import UserError

BEGIN, END = "<!-- made by benchmarks/table.py -->", "<!-- end of what it made -->"
SCRIPTS: dict[str, tuple[str, type]] = {
    "world_model": ("train_world_model.py", TrainWorldModel),
    "cost": ("train_cost.py", TrainCost),
    "behaviour_cloning": ("benchmarks/behaviour_cloning.py train", behaviour_cloning.Train),
    "checkpoint": ("evaluate.py", Evaluate),
    "policy": ("benchmarks/behaviour_cloning.py evaluate", behaviour_cloning.Evaluate),
}
PROTOCOL = {"env", "episodes", "budget", "tolerance", "ahead", "factors", "seed", "ceiling"}
UPKEEP = {"seed", "log_every", "checkpoint_every", "loop", "steps", "precision"}
Row = dict[str, str]  # by the name of a column


@dataclass(frozen=True)
class Model:
    """A model that was evaluated."""

    path: str
    method: str
    kind: str
    """What it is made of, in words."""
    config: dict[str, Any]
    """Of its training; empty where its folder does not say."""
    cpu_seconds: float | None
    commands: list[str]
    """How it was trained, if its folder says."""

    @classmethod
    def of(cls, path: str) -> "Model":
        """Read what a model is from its folder.

        Raises:
            UserError: no checkpoint there.
        """
        folder = Path(path)
        described = read_yaml(find_checkpoint(folder) / "config.yaml")
        method = str(described["method"])
        trained = (folder / "results.json").is_file() and (folder / "config.yaml").is_file()
        config = read_yaml(folder / "config.yaml") if trained else {}
        results = read_json(folder / "results.json") if trained else {}
        kind = f"behaviour cloning: {described['encoder']['name']}"
        if method == "world_model":
            parts = " + ".join(described[part]["name"] for part in ("encoder", "predictor"))
            keeps = described.get("regulariser", "sigreg")
            kind = f"{parts}, {'frozen encoder' if config.get('frozen') else keeps}"
        seconds = results.get("cpu_seconds")
        if (earlier := config.get("frozen")) and is_world_model(earlier):
            return cls.of(earlier).then("world_model", "predictor again", path, config, seconds)
        if "cost" in described and config:
            policy = config.get("policy", {"name": "none"})["name"] != "none"
            what = "learned cost" + " and policy" * policy
            return cls.of(config["checkpoint"]).then("cost", what, path, config, seconds)
        commands = [command(method, config, path)] if config else []
        return cls(path, method, kind, config, seconds, commands)

    def then(
        self, script: str, what: str, path: str, config: dict[str, Any], seconds: float | None
    ) -> "Model":
        """Return this world model with what was trained for it in a run of its own."""
        both = self.cpu_seconds and seconds and round(self.cpu_seconds + seconds, 1)
        commands = [*self.commands, command(script, config, path)]
        return Model(path, self.method, f"{self.kind}, {what}", self.config, both, commands)


def is_world_model(path: str) -> bool:
    """Return whether a folder is a run of train_world_model or train_cost, not of an encoder."""
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        return False
    return read_yaml(find_checkpoint(folder) / "config.yaml").get("method") == "world_model"


@dataclass(frozen=True)
class Cell:
    """An evaluation: a method under a protocol."""

    folder: Path
    config: dict[str, Any]
    results: dict[str, Any]
    models: list[Model]

    @classmethod
    def of(cls, folder: Path) -> "Cell":
        """Read an evaluation from its run folder.

        Raises:
            UserError: it is not one.
        """
        config, results = read_yaml(folder / "config.yaml"), read_json(folder / "results.json")
        if not {"success_end", "models", "random_floor"} <= results.keys():
            raise UserError(f"{str(folder)!r} is no run of evaluate.py or of behaviour cloning")
        return cls(folder, config, results, [Model.of(path) for path in results["models"]])

    @property
    def protocol(self) -> str:
        """Return where goals are, the steps and the tolerance."""
        ahead, drawn = self.config["ahead"], self.config["factors"]
        goals = "far" if ahead is None else f"{ahead} ahead"
        factors = f", {' '.join(drawn)} drawn" if drawn else ""
        steps, tolerance = self.results["budget"], self.results["tolerance"]
        return f"{goals}, {steps} steps, within {tolerance:g}{factors}"

    @property
    def kind(self) -> str:
        """Return what is evaluated, in words."""
        kind = self.models[0].kind
        planner = self.config.get("planner", {}).get("name", "cem")
        return kind if planner == "cem" else f"{kind}, {planner}"

    @property
    def settings(self) -> dict[str, str]:
        """Return the flags that make the method what it is."""
        script = "checkpoint" if "checkpoint" in self.config else "policy"
        planning = {k: v for k, v in self.config.items() if k not in {*PROTOCOL, script}}
        model = self.models[0]
        training = {k: v for k, v in model.config.items() if k not in UPKEEP}
        return flat(planning) | flat(training)

    def commands(self) -> list[str]:
        """Return how its models were trained, and how they were evaluated."""
        script = "checkpoint" if "checkpoint" in self.config else "policy"
        trained = [line for model in self.models for line in model.commands]
        return [*trained, command(script, self.config, str(self.folder))]


def command(kind: str, given: dict[str, Any], folder: str) -> str:
    """Return the command line of a run: what differs from the defaults."""
    script, config_class = SCRIPTS[kind]
    chosen = [name for name in ("encoder", "predictor", "planner") if name in given]
    parts = [word for name in chosen for word in (f"--{name}", given[name]["name"])]
    defaults = to_dict(parse(config_class, parts, program=script))
    words = [*parts, *words_of(difference(given, defaults)), "--run-dir", folder]
    return f"python {script} {shlex.join(words)}"


def difference(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return what is given otherwise than by default, group by group."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            value, default = difference(value, default), {}
        if value != default:
            found[key] = value
    return found


def flat(values: dict[str, Any], prefix: str = "--") -> dict[str, str]:
    """Return the text behind every flag."""
    found: dict[str, str] = {}
    for key, value in values.items():
        flag = prefix + key.replace("_", "-")
        if isinstance(value, dict):
            found |= flat(value, f"{flag}.")
        else:
            found[flag] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return found


def page(folders: Iterable[Path]) -> str:
    """Return the tables of all tasks, in the order in which their folders are given."""
    cells = [Cell.of(folder) for folder in folders]
    tasks = dict.fromkeys(cell.results["env"] for cell in cells)
    return "\n\n".join(
        section(task, [cell for cell in cells if cell.results["env"] == task]) for task in tasks
    )


def section(task: str, cells: list[Cell]) -> str:
    """Return the table of a task and the commands of its cells.

    Raises:
        UserError: two evaluations of the same method under the same protocol.
    """
    names = names_of(cells)
    rows: dict[str, Row] = {}
    for cell, name in zip(cells, names, strict=True):
        row = rows.setdefault(name, {"method": name, "CPU-s of training": training_seconds(cell)})
        filled = measured(cell)
        if twice := row.keys() & filled.keys():
            raise UserError(f"{str(cell.folder)!r} is {name!r} again: {min(twice)}")
        row |= filled
    columns = [key for cell in cells for key in measured(cell)]
    columns = ["method", *dict.fromkeys(columns), "CPU-s of training"]
    every = [*rows.values(), *others(cells)]
    lines = [columns, ["---"] * len(columns)]
    lines += [[row.get(column, "-") for column in columns] for row in every]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    commands = "\n".join(dict.fromkeys(line for cell in cells for line in cell.commands()))
    return f"### {task}\n\n{table}\n\n```\n{commands}\n```"


def names_of(cells: list[Cell]) -> list[str]:
    """Return the row of every cell: its kind, and flags that tell it from its like, if any."""
    names: list[str] = []
    for cell in cells:
        alike = [other for other in cells if other.kind == cell.kind]
        told = [
            f"`{flag} {value}`"
            for flag, value in cell.settings.items()
            if any(differ(flag, one, two) for one in alike for two in alike)
        ]
        names.append(" ".join([cell.kind, *told]))
    return names


def differ(flag: str, one: Cell, two: Cell) -> bool:
    """Return whether two evaluations under one protocol were given a flag otherwise."""
    return one.protocol == two.protocol and one.settings.get(flag) != two.settings.get(flag)


def measured(cell: Cell) -> Row:
    """Return what a row says under a protocol."""
    models = list(cell.results["models"].values())
    milliseconds = 1000 * cell.results["plan_seconds"]["median"]
    return {
        f"{cell.protocol}: at the end": success(cell.results, "success_end", models),
        f"{cell.protocol}: ever": success(cell.results, "success_ever", models),
        f"{cell.protocol}: CPU-ms a plan": f"{milliseconds:.1f}",
    }


def success(results: dict[str, Any], name: str, models: list[dict[str, Any]]) -> str:
    """Return a rate in percent, its interval, its n, and the rate of every model."""
    rate, low, high = (100 * results[name][key] for key in ("rate", "low", "high"))
    alone = " / ".join(f"{100 * model[name]['rate']:.1f}" for model in models)
    said = f"{rate:.1f} % ({low:.1f} to {high:.1f}; n {results[name]['n']})"
    return f"{said}: {alone}" if len(models) > 1 else said


def others(cells: list[Cell]) -> Iterator[Row]:
    """Yield the rows of the floor and the ceilings, from the evaluation with the most episodes."""
    rows: dict[str, Row] = {}
    for cell in sorted(cells, key=lambda cell: len(cell.results["seeds"])):
        planner = cell.config.get("planner", {}).get("name")
        for name, key in (
            (f"{planner} on the true simulator", "simulator_ceiling"),
            ("random actions", "random_floor"),
        ):
            if key in cell.results:
                row = rows.setdefault(name, {"method": name})
                for words, rate in (("at the end", "success_end"), ("ever", "success_ever")):
                    row[f"{cell.protocol}: {words}"] = success(cell.results[key], rate, [])
    yield from sorted(rows.values(), key=lambda row: row["method"] == "random actions")


def training_seconds(cell: Cell) -> str:
    """Return the CPU-seconds that each model of a cell was trained for."""
    seconds = [model.cpu_seconds for model in cell.models]
    return " / ".join("-" if time is None else f"{time:.0f}" for time in seconds)


def write(page: str, path: Path) -> None:
    """Put the tables between the two marks of a page, and leave the rest.

    Raises:
        UserError: no such page, or not both marks in it.
    """
    text = path.read_text() if path.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{str(path)!r} has not the lines {BEGIN!r} and {END!r}")
    whole = f"{before}{BEGIN}\n\n{page}\n\n{END}{after}"
    write_atomically(path, lambda part: part.write_text(whole))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of evaluations")
    parser.add_argument("--out", type=Path, help="page whose two marks the tables go between")
    arguments = parser.parse_args()
    try:
        made = page(arguments.runs)
        if arguments.out is not None:
            write(made, arguments.out)
    except UserError as error:
        print(f"table: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if arguments.out is None:
        print(made)


if __name__ == "__main__":
    main()
