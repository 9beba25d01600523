import os
import subprocess
import sys
from pathlib import Path

import pytest

from jepa_world.registry import PARTS, UserError, class_path, load_class, load_function

ROOT = Path(__file__).resolve().parents[1]
MINE = "class Mine:\n    def __init__(self, low, high, horizon): ...\n"


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in PARTS.items() for name in names]
)
def test_a_short_name_is_a_class_or_a_function_of_the_package(kind, name):
    load = load_function if kind == "objective" else load_class
    found = load(kind, name)
    assert class_path(kind, name) == f"{found.__module__}:{found.__name__}"
    assert load(kind, class_path(kind, name)) is found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cme", r"unknown planner 'cme'; nearest: cem; known: .*package\.module:Name"),
        ("zzz", "unknown planner 'zzz'; known: cem"),
        ("jepa_world.planners.cem:CME", "no class 'CME'; nearest: CEM"),
        ("jepa_world.planners.cem:torch", "no class 'torch'"),
        ("jepa_world.planners.none:CEM", "cannot be imported: No module named"),
        ("no_such_module_anywhere:CEM", "cannot be imported: No module named"),
        (":CEM", "not of the form"),
        ("module:", "not of the form"),
        (".relative:CEM", "not of the form"),
        ("a:b:C", "not of the form"),
        ("my-module:CEM", "not of the form"),
    ],
)
def test_a_wrong_name_is_refused_in_one_line(name, message):
    with pytest.raises(UserError, match=message) as error:
        load_class("planner", name)
    assert "\n" not in str(error.value)


def test_a_function_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="no function 'efort'; nearest: effort"):
        load_function("objective", "jepa_world.objectives:efort")


def test_a_module_that_is_not_python_is_refused_with_file_and_line(tmp_path, monkeypatch):
    (tmp_path / "own_broken_module.py").write_text("class Mine:\n    def (\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"own_broken_module\.py, line 2"):
        load_class("planner", "own_broken_module:Mine")


def load_in_a_process(folder, name, *, before=""):
    """Load a part as a root script of the checkout does, with `folder` as working directory."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); {before}\n"
        "from jepa_world.registry import load_class\n"
        f"found = load_class('planner', {name!r})\n"
        "print(sys.modules[found.__module__].__file__)\n"
        "import jepa_world.envs, jepa_world.planners, jepa_world.predictors\n"
    )
    line = [sys.executable, "-P", "-c", code]
    done = subprocess.run(line, cwd=folder, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.mark.parametrize("init", [True, False], ids=["with __init__.py", "without"])
@pytest.mark.parametrize("package", ["planners", "envs", "configs"])
def test_a_users_folder_may_have_the_name_of_one_of_ours(tmp_path, package, init):
    for name in ("envs", "predictors", "planners", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text("from planners import helper\n" + MINE)
        (tmp_path / name / "helper.py").write_text("")
        if init:
            (tmp_path / name / "__init__.py").write_text("")
    found = load_in_a_process(tmp_path, f"{package}.mine:Mine")
    assert found == tmp_path / package / "mine.py"


def test_a_module_in_the_working_directory_is_found_last(tmp_path):
    (tmp_path / "yaml.py").write_text("raise RuntimeError('the user shadows a library')\n")
    (tmp_path / "own.py").write_text("import yaml\n" + MINE)
    assert load_in_a_process(tmp_path, "own:Mine", before="import os") == tmp_path / "own.py"


def test_a_user_may_stand_in_the_checkout():
    found = load_in_a_process(ROOT, "jepa_world.planners.cem:CEM")
    assert found.name == "cem.py"


def test_the_module_itself_may_import_a_component_by_its_right_name(tmp_path):
    text = "from jepa_world.planners.cem import CEM\nclass Mine(CEM): ...\n"
    (tmp_path / "planners.py").write_text(text)
    assert load_in_a_process(tmp_path, "planners:Mine") == tmp_path / "planners.py"
