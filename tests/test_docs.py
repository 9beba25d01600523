"""What the documentation shows is run: doctests of all modules, Python blocks of the pages."""

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPONENTS = ("encoders", "predictors", "planners", "envs")
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "jepa_world").rglob("*.py")
    if path.name != "__init__.py"
) + [
    f"jepa_world.{name}.{path.stem}".removesuffix(".__init__")
    for name in COMPONENTS
    for path in sorted((ROOT / name).glob("*.py"))
]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples(module):
    """Return the doctests of a module by the name they belong to."""
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module))
    return {test.name.removeprefix(f"{module}."): test for test in found if test.examples}


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_are_true(module, capsys):
    for test in examples(module).values():
        doctest.DocTestRunner().run(test)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("module", [m for m in MODULES if m.count(".") == 2])
def test_every_public_class_of_a_component_has_an_example(module):
    if not any(f".{name}." in module for name in ("encoders", "predictors", "planners")):
        return
    public = {
        name
        for name, value in vars(importlib.import_module(module)).items()
        if isinstance(value, type) and value.__module__ == module and not name.startswith("_")
    }
    assert public and public <= set(examples(module))


def blocks(page):
    """Return the Python blocks of a page, joined in their order: later ones use earlier ones."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_of_a_page_run(page, tmp_path):
    if not blocks(page):
        return
    (tmp_path / "page.py").write_text("\n".join(blocks(page)))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "page.py"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_a_page_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    files = [link for link in links if "://" not in link]
    assert not [link for link in files if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_a_page_shows_have_the_flags_it_shows(page):
    from jepa_world.commands import COMMANDS
    from jepa_world.config import parse

    shown = re.findall(
        r"^(?:.*&& )?(?:python |jepa-world )(\w+)(?:\.py)?( --.*)?$", page.read_text(), re.MULTILINE
    )
    for command, flags in shown:
        if command not in COMMANDS or ":My" in flags:
            continue
        words = flags.partition("#")[0].split()
        if "--probe" in words:  # of a world model, as `--env` says
            assert (command, "--env" in words) == ("evaluate", True)
            command, words = "probe_world_model", [word for word in words if word != "--probe"]
        module = importlib.import_module(f"jepa_world.commands.{command}")
        words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
        parse(vars(module)[COMMANDS[command]], words, program=command)
