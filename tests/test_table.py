import json
import shlex
import sys
from dataclasses import asdict

import pytest
import table
import yaml

from jepa_world.checkpoint import write_json, write_yaml
from jepa_world.commands.train_cost import TrainCost
from jepa_world.commands.train_world_model import TrainWorldModel
from jepa_world.config import parse, to_dict
from jepa_world.evaluation import Rate


def rate(percent, n):
    return asdict(Rate.of(number < percent * n / 100 for number in range(n)))


def rates(end, n):
    return {"success_end": rate(end, n), "success_ever": rate(min(100, end + 10), n)}


def trained(folder, seconds, *words, kind="world_model"):
    """Make the run folder of a training that never was."""
    config = to_dict(parse(table.SCRIPTS[kind][1], list(map(str, words)), program="train"))
    write_yaml(folder / "config.yaml", config)
    names = {"encoder", "predictor"} & config.keys()
    described = {"method": kind, **{name: config[name] for name in names}}
    if kind == "world_model":
        described["regulariser"] = config["regulariser"]["name"]
    write_yaml(folder / "checkpoint" / "config.yaml", described)
    (folder / "checkpoint" / "model.safetensors").touch()
    write_json(folder / "results.json", {"cpu_seconds": seconds})
    return folder


def evaluated(folder, runs, ends, *words, kind="checkpoint"):
    """Make the run folder of an evaluation that never was: 100 episodes of each model."""
    given = [f"--{kind}", *map(str, runs), *map(str, words)]
    config = to_dict(parse(table.SCRIPTS[kind][1], given, program="evaluate"))
    write_yaml(folder / "config.yaml", config)
    results = {
        "env": config["env"],
        **rates(sum(ends) / len(ends), 100 * len(ends)),
        "random_floor": rates(2, 100),
        "plan_seconds": {"median": 0.0167, "p95": 0.02},
        "tolerance": config["tolerance"] or 0.05,
        "budget": config["budget"] or 15,
        "seeds": list(range(100)),
        "models": {str(run): rates(end, 100) for run, end in zip(runs, ends, strict=True)},
    }
    if kind == "checkpoint":
        results["simulator_ceiling"] = rates(98, 100)
    write_json(folder / "results.json", results)
    return folder


AHEAD = ("--ahead", 25, "--budget", 50)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = [trained(tmp_path / f"m{seed}", 200 + seed, "--seed", seed) for seed in range(2)]
    words = ("--regulariser.name", "vicreg", "--encoder.dim", 64)
    vicreg = trained(tmp_path / "v", 310.4, *words)
    cloned = trained(tmp_path / "c", 99, "--steps", 7, kind="behaviour_cloning")
    return [
        evaluated(tmp_path / "e1", models, (90, 80), *AHEAD),
        evaluated(tmp_path / "e2", models, (50, 60), "--tolerance", 0.02),
        evaluated(tmp_path / "e3", [vicreg], (40,), *AHEAD),
        evaluated(tmp_path / "e4", [cloned], (30,), *AHEAD, kind="policy"),
        evaluated(tmp_path / "e5", [cloned], (20,), "--env", "push", *AHEAD, kind="policy"),
    ]


def table_of(text):
    """Return rows of a Markdown table by their first column, each by the names of columns."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(names, row, strict=True)) for row in rows}


def test_a_row_is_a_method_and_a_column_a_protocol(folders):
    reach, push = table.page(folders).split("### push")
    rows = table_of(reach)
    ahead, far = "25 ahead, 50 steps, within 0.05", "far, 15 steps, within 0.02"
    assert list(rows) == [
        *("conv + mlp, sigreg", "conv + mlp, vicreg", "behaviour cloning: conv"),
        *("cem on the true simulator", "random actions"),
    ]
    ours = rows["conv + mlp, sigreg"]
    assert ours[f"{ahead}: at the end"] == "85.0 % (79.4 to 89.3; n 200): 90.0 / 80.0"
    assert ours[f"{ahead}: ever"] == "95.0 % (91.0 to 97.3; n 200): 100.0 / 90.0"
    assert ours[f"{far}: at the end"].startswith("55.0 % (")
    assert ours[f"{far}: CPU-ms a plan"] == "16.7"
    assert ours["CPU-s of training"] == "200 / 201"
    assert rows["conv + mlp, vicreg"]["CPU-s of training"] == "310"
    assert rows["conv + mlp, vicreg"][f"{far}: ever"] == "-"
    assert rows["behaviour cloning: conv"][f"{ahead}: at the end"].startswith("30.0 % (")
    assert rows["random actions"][f"{far}: at the end"].startswith("2.0 % (")
    assert rows["cem on the true simulator"][f"{ahead}: ever"].startswith("100.0 % (")
    assert list(table_of(push)) == ["behaviour cloning: conv", "random actions"]


def test_commands_below_a_table_are_the_configurations_of_the_folders(folders):
    shown = [line for line in table.page(folders).splitlines() if line.startswith("python ")]
    assert len(shown) == len(set(shown)) + 1  # the cloned policy is in both tables
    found = {}
    for line in shown:
        script, config_class = next(
            value for value in table.SCRIPTS.values() if line.startswith(f"python {value[0]} ")
        )
        *words, _, folder = shlex.split(line.removeprefix(f"python {script} "))
        found[folder] = to_dict(parse(config_class, words, program=script))
    expected = [*folders, *(folders[0].parent / name for name in ("m0", "m1", "v", "c"))]
    assert found == {
        str(folder): yaml.safe_load((folder / "config.yaml").read_text()) for folder in expected
    }
    assert any("--regulariser.name vicreg" in line and "--seed" not in line for line in shown)


def test_methods_of_one_kind_are_told_apart_by_their_flags_and_the_same_twice_is_refused(
    folders, tmp_path
):
    wide = trained(tmp_path / "w", 300, "--predictor.width", 512, "--seed", 5)
    folders.append(evaluated(tmp_path / "e6", [wide], (70,), *AHEAD, "--horizon", 5))
    rows = table_of(table.page(folders).split("### push")[0])
    names = [name for name in rows if name.startswith("conv + mlp, sigreg")]
    assert names == [
        "conv + mlp, sigreg `--horizon None` `--predictor.width 256`",
        "conv + mlp, sigreg `--horizon 5` `--predictor.width 512`",
    ]
    assert sum(cell != "-" for cell in rows[names[0]].values()) == 8  # both protocols
    again = evaluated(tmp_path / "e7", [wide], (70,), *AHEAD, "--horizon", 5)
    with pytest.raises(table.UserError, match="e7' is 'conv"):
        table.page([*folders, again])


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["table.py", *map(str, words)])
    table.main()


def test_a_page_keeps_its_prose_and_is_made_again(folders, tmp_path, monkeypatch, capsys):
    page = tmp_path / "results.md"
    page.write_text(f"# Results\n\nbefore\n\n{table.BEGIN}\n{table.END}\n\nafter\n")
    for _ in range(2):
        run(monkeypatch, *folders[:3], "--out", page)
    run(monkeypatch, *folders[:3])
    made = capsys.readouterr().out.strip()
    expected = f"{table.BEGIN}\n\n{made}\n\n{table.END}\n\nafter\n"
    assert page.read_text() == f"# Results\n\nbefore\n\n{expected}" and "### reach" in made


def test_what_is_no_evaluation_or_no_page_is_refused(folders, tmp_path, monkeypatch, capsys):
    for words in ([tmp_path / "m0"], [folders[0], "--out", tmp_path / "none.md"], [tmp_path]):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *words)
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_real_evaluation_is_a_table(tiny_run, call, tmp_path):
    words = ("--checkpoint", tiny_run, "--episodes", 2, "--budget", 2, "--horizon", 3)
    ended = call("evaluate", *words, "--planner.samples", 8, "--run-dir", tmp_path / "eval")
    assert ended.code == 0, ended.stderr
    rows = table_of(table.page([tmp_path / "eval"]))
    seconds = json.loads((tiny_run / "results.json").read_text())["cpu_seconds"]
    assert rows["conv + mlp, sigreg"]["CPU-s of training"] == f"{seconds:.0f}"
    assert "; n 2)" in rows["random actions"]["far, 2 steps, within 0.05: at the end"]


def test_a_learned_cost_is_a_row_with_the_time_and_the_commands_of_both_trainings(tmp_path):
    base, cost = trained(tmp_path / "m", 200), tmp_path / "cost"
    words = ["--checkpoint", str(base), "--seed", "1"]
    write_yaml(cost / "config.yaml", to_dict(parse(TrainCost, words, program="train_cost")))
    described = yaml.safe_load((base / "checkpoint" / "config.yaml").read_text())
    write_yaml(cost / "checkpoint" / "config.yaml", {**described, "cost": {"name": "temporal"}})
    (cost / "checkpoint" / "model.safetensors").touch()
    write_json(cost / "results.json", {"cpu_seconds": 50})
    page = table.page([evaluated(tmp_path / "e", [cost], (90,))])
    assert table_of(page)["conv + mlp, sigreg, learned cost"]["CPU-s of training"] == "250"
    first, second, third = (line for line in page.splitlines() if line.startswith("python "))
    assert first.startswith("python train_world_model.py") and "evaluate.py" in third
    assert second == f"python train_cost.py --seed 1 --checkpoint {base} --run-dir {cost}"
    words += ["--policy", "cloned", "--policy.width", "16"]
    write_yaml(cost / "config.yaml", to_dict(parse(TrainCost, words, program="train_cost")))
    page = table.page([tmp_path / "e"])
    assert "conv + mlp, sigreg, learned cost and policy" in table_of(page)
    assert "--policy.name cloned --policy.width 16 --policy.depth 3" in page

    again, words = tmp_path / "again", ["--frozen", str(cost), "--data", "data/a", "data/b"]
    write_yaml(again / "config.yaml", to_dict(parse(TrainWorldModel, words, program="train")))
    write_yaml(again / "checkpoint" / "config.yaml", described | {"cost": {"name": "temporal"}})
    (again / "checkpoint" / "model.safetensors").touch()
    write_json(again / "results.json", {"cpu_seconds": 7})
    page = table.page([evaluated(tmp_path / "f", [again], (90,))])
    row = table_of(page)["conv + mlp, sigreg, learned cost and policy, predictor again"]
    assert row["CPU-s of training"] == "257"
    assert f"--data data/a data/b --frozen {cost} --run-dir {again}" in page
