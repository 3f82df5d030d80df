"""What is pinned and what is shipped: constraints.txt, and the wheel that `pip install .` makes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qnext

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PINS = dict(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", CONSTRAINTS, re.MULTILINE))


def _declared() -> list[str]:
    project, groups = PROJECT["project"], PROJECT["dependency-groups"]
    return [
        *project["dependencies"],
        *project["optional-dependencies"]["engine"],
        *groups["engine-build"],
        *groups["dev"],
    ]


@pytest.mark.parametrize("declared", _declared())
def test_every_declared_dependency_is_pinned_to_a_version_it_allows(declared: str) -> None:
    requirement = Requirement(declared)
    pin = PINS.get(canonicalize_name(requirement.name))
    assert pin is not None, f"scripts/lock has to be run: {requirement.name} is not in constraints.txt"
    assert requirement.specifier.contains(pin)


def test_pins_name_versions_and_hashes_but_no_place() -> None:
    entries = re.split(r"^(?=[a-z])", CONSTRAINTS, flags=re.MULTILINE)[1:]
    assert len(entries) == len(PINS)
    for entry in entries:
        assert re.fullmatch(
            r"[a-z0-9-]+==\S+( ; [^\n]+?)?( \\\n    --hash=sha256:[0-9a-f]{64})+\n*", entry
        ), entry
    assert not re.search(r"://|@|index|files\.|\.org|\.com", CONSTRAINTS.split("\n", 2)[2])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    argv = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_rooms_and_the_profiles_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    profiles = {
        f"qnext/_profiles/{path.relative_to(ROOT / 'profiles')}"
        for path in (ROOT / "profiles").rglob("*") if path.suffix in {".json", ".yaml"}
    }  # fmt: skip
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "qnext").rglob("*.py")}
    assert profiles | modules <= set(names)
    assert all(name.startswith(("qnext/", f"qnext-{qnext.__version__}.dist-info/")) for name in names)


def test_the_installed_wheel_is_the_package(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    argv = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
        str(target),
    ]
    subprocess.run([*argv, str(wheel)], capture_output=True, text=True, check=True)
    shown = "import qnext; print(qnext.__version__, qnext.__file__)"
    ran = subprocess.run(
        [sys.executable, "-P", "-c", shown], env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout.split() == [PROJECT["project"]["version"], str(target / "qnext" / "__init__.py")]
