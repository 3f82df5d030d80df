"""`qnext plan` with `--format`, `--what-if` and `--compare-fit`: what goes where, and what is refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

from qnext.models.synth import synthesise
from qnext.units import GIB
from tests.conftest import Qnext

DESK = ("--hardware", "rtx4070-64gb")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models of Jürgen") / "tiny.gguf"
    synthesise("tiny-qwen3next", path, quant="Q4_K_M", header_only=True)
    return path


def test_yaml_says_what_json_says(qnext: Qnext, model: Path) -> None:
    said = json.loads(qnext("plan", str(model), *DESK, "--format", "json").stdout)
    assert said["schema"] == "qnext.plan/1" and said["fits"]
    assert yaml.safe_load(qnext("plan", str(model), *DESK, "--format", "yaml").stdout) == said
    assert "what_if" not in said and "fit" not in said


def test_exports_name_the_model_by_its_whole_path(qnext: Qnext, model: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(model)
    ran = qnext("plan", str(tmp_path / "model.gguf"), *DESK, "--format", "argv")
    words = ran.stdout.split("\n")
    assert words[words.index("-m") + 1] == str(tmp_path / "model.gguf")  # the link's name, not what is behind


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_paths_survive_any_locale(qnext: Qnext, model: Path, locale: str) -> None:
    ran = qnext(
        *("plan", str(model), *DESK, "--format", "llama-server"),
        env={"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    assert shlex.quote(str(model)) in ran.stdout


def test_notes_of_a_shell_line_go_to_stderr_and_comments_stay_in_the_text(qnext: Qnext, model: Path) -> None:
    docker = qnext("plan", str(model), *DESK, "--format", "docker")
    assert docker.stdout.startswith("docker run") and "Container Toolkit" in docker.stderr
    swap = qnext("plan", str(model), *DESK, "--format", "llama-swap")
    assert swap.stdout.startswith("# ") and not swap.stderr


def test_a_plan_that_does_not_fit_is_not_exported(qnext: Qnext, model: Path) -> None:
    ran = qnext("plan", str(model), *DESK, "--ram", "1M", "--vram", "1M", "--format", "systemd")
    assert (ran.returncode, ran.stdout) == (4, "")


@pytest.mark.parametrize(
    "flags",
    [
        ("--format", "toml"),
        ("--format", "systemd", "--json"),
        ("--format", "docker", "--compare-fit"),
        ("--what-if", "vrm=24G"),
    ],
)
def test_what_has_no_meaning_is_a_usage_error(qnext: Qnext, model: Path, flags: tuple[str, ...]) -> None:
    ran = qnext("plan", str(model), *DESK, *flags)
    assert ran.returncode == 2 and ran.stdout == "" and "try:" in ran.stderr


def test_a_plan_for_a_changed_machine_says_so(qnext: Qnext, model: Path) -> None:
    ran = qnext("plan", str(model), *DESK, "--what-if", "vram=24G,ram=16G", "--json")
    said = json.loads(ran.stdout)
    assert len(said["what_if"]) == 2 and "24.00 GiB" in said["what_if"][1]
    assert any("changed machine" in warning and "24.00 GiB" in warning for warning in said["warnings"])
    budgets = {device["name"]: device["budget_bytes"] for device in said["devices"]}
    assert 20 * GIB < budgets["CUDA0"] < 24 * GIB and budgets["CPU"] < 16 * GIB
    shown = qnext("plan", str(model), *DESK, "--what-if", "vram=24G").stdout
    assert "planned for a changed machine" in shown


def test_nothing_runs_on_a_changed_machine(qnext: Qnext, model: Path) -> None:
    ran = qnext("run", str(model), "--what-if", "vram=24G", "--prompt", "Hello")
    assert ran.returncode == 2 and "--what-if" in ran.stderr


def test_fit_on_a_machine_that_is_not_here_is_refused(qnext: Qnext, model: Path) -> None:
    ran = qnext("plan", str(model), *DESK, "--compare-fit", env={"PATH": ""})
    assert ran.returncode in (2, 7) and ("scripts/peers" in ran.stderr or "CUDA0" in ran.stderr)
