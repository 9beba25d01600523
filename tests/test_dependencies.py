"""Dependencies: bounded below, met by pins and by what is installed, without known holes."""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DECLARED = [
    Requirement(line)
    for lines in (
        PROJECT["build-system"]["requires"],
        PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"].values(),
    )
    for line in lines
]
PINNED = {
    canonicalize_name(name): pin
    for name, _, pin in (
        line.partition("==") for line in (ROOT / "constraints.txt").read_text().split("\n")
    )
    if pin
}
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


def least(requirement):
    """Return the lower bound of a requirement."""
    return max(
        (Version(one.version) for one in requirement.specifier if one.operator == ">="),
        default=None,
    )


@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_a_dependency_is_bounded_below_and_met_by_its_pin_and_by_what_is_installed(requirement):
    assert least(requirement) is not None
    pin = PINNED.get(canonicalize_name(requirement.name))
    if pin is not None:
        assert requirement.specifier.contains(pin)
    if requirement.marker is not None and not requirement.marker.evaluate():
        return
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return  # of an extra
    assert requirement.specifier.contains(installed, prereleases=True)


@pytest.mark.parametrize(("name", "fixed", "cve"), UNSAFE)
def test_no_version_with_a_known_hole_is_allowed(name, fixed, cve):
    bounds = [least(one) for one in DECLARED if canonicalize_name(one.name) == name]
    assert bounds and min(bounds) >= Version(fixed), cve


def test_what_is_always_installed_is_pinned():
    """So that a checkout that is set up as README says has versions that were tested."""
    names = {canonicalize_name(Requirement(d).name) for d in PROJECT["project"]["dependencies"]}
    assert names <= PINNED.keys()
