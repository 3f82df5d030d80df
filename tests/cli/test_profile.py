"""`qnext profile` as a person and a program see it: list, show, save, and planning for what was saved."""

from __future__ import annotations

import getpass
import json
import platform
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qnext.config import find_paths
from qnext.hardware import list_profiles
from tests.conftest import Qnext


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"QNEXT_HOME": str(tmp_path / "home")}


def test_the_list_shows_every_shipped_machine_in_80_columns(qnext: Qnext, home: dict[str, str]) -> None:
    done = qnext("profile", "list", env={**home, "COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    names = {line.split()[0] for line in lines if line.rstrip().endswith("qnext")}
    assert names == set(list_profiles())
    row = next(line for line in lines if line.startswith("rtx5080-128gb"))
    assert re.split(r"\s{2,}", row.strip()) == [
        *("rtx5080-128gb", "Ryzen 9 9950X", "16", "125G", "77", "RTX 5080 16G", "qnext"),
    ]
    assert "2 x RTX 3090 24G" in done.stdout
    assert "qnext profile save NAME" in done.stderr


@pytest.mark.thorough
def test_a_saved_machine_is_listed_shown_planned_for_and_not_overwritten(
    qnext: Qnext, home: dict[str, str], demo_model: Path
) -> None:
    saved = qnext("profile", "save", "my-box", env=home)
    assert saved.returncode == 0, saved.stderr
    path = find_paths(home).hardware_dir / "my-box.yaml"
    assert str(path) in saved.stderr and "qnext plan MODEL --hardware my-box" in saved.stderr
    first, *_ = json.loads(qnext("profile", "list", "--json", env=home).stdout)["profiles"]
    assert (first["name"], first["own"]) == ("my-box", True)
    assert "my-box" in qnext("profile", "list", env=home).stdout
    shown = qnext("profile", "show", "my-box", env=home)
    assert shown.stdout == path.read_text()
    names = {getpass.getuser(), platform.node()} - {"root"}
    assert not [name for name in names if re.search(rf"\b{re.escape(name)}\b", shown.stdout)]
    planned = qnext("plan", str(demo_model), "--hardware", "my-box", env=home)
    assert planned.returncode == 0, planned.stderr
    again = qnext("profile", "save", "my-box", env=home)
    assert again.returncode == 2 and "--force" in again.stderr
    forced = qnext("profile", "save", "my-box", "--force", "--json", env=home)
    assert forced.returncode == 0 and json.loads(forced.stdout)["path"] == str(path)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("save", "rtx5080-128gb"), 2, "comes with qnext"),
        (("save", "../box"), 2, "cannot be a profile's name"),
        (("save", ""), 2, "cannot be a profile's name"),
        (("show", "rtx5080"), 3, "Did you mean 'rtx5080-128gb'?"),
    ],
)
def test_what_cannot_be_done_says_why(
    qnext: Qnext, home: dict[str, str], arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = qnext("profile", *arguments, env=home)
    assert done.returncode == code
    assert said in done.stderr and "  try: " in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_what_is_shown_is_what_hardware_reads(
    qnext: Qnext, home: dict[str, str], demo_model: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    shown = qnext("profile", "show", "rtx4090-rtx3060", *flags, env=home).stdout
    copy = tmp_path / ("copy.json" if flags else "copy.yaml")
    copy.write_text(shown)
    plans = [
        json.loads(qnext("plan", str(demo_model), "--hardware", hardware, "--json", env=home).stdout)
        for hardware in ("rtx4090-rtx3060", str(copy))
    ]
    assert plans[0]["placement"] == plans[1]["placement"] and plans[0]["devices"] == plans[1]["devices"]


def test_own_files_that_are_broken_or_hidden_are_named_and_do_not_stop_the_list(
    qnext: Qnext, home: dict[str, str]
) -> None:
    folder = find_paths(home).hardware_dir
    folder.mkdir(parents=True)
    (folder / "broken.yaml").write_text("cpu: {cors: 8}\n")
    (folder / "dgx-spark.yaml").write_text("cpu: {physical_cores: 8}\nmemory: {total_bytes: 8G}\n")
    done = qnext("profile", "list", "--json", env=home)
    assert done.returncode == 0
    assert "cpu.cors" in done.stderr and "broken.yaml" in done.stderr
    assert "dgx-spark.yaml is not used" in done.stderr
    profiles = json.loads(done.stdout)["profiles"]
    assert [profile["name"] for profile in profiles] == list(list_profiles())
    assert not any(profile["own"] for profile in profiles)


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_gets_whole_lines(terminal: Callable[..., object], columns: int) -> None:
    shown = terminal("profile", "list", columns=columns)
    assert shown.wait() == 0  # type: ignore[attr-defined]
    lines = shown.text.splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= columns
    assert any("RX 7900 XTX 24G" in line for line in lines)
