"""`qnext doctor` as a process: page, JSON, exit codes, privacy, and a terminal of 80 columns."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from qnext.hardware import machine_from_dict
from qnext.hardware.machine import facts
from tests.conftest import Qnext

DOCUMENT = {"schema", "model", "workload", "machine", "engine", "models", "findings"}
FINDING = {"id", "level", "about", "what", "because", "fix", "price", "unpriced"}


def test_json_is_the_whole_machine_with_a_source_for_every_fact(qnext: Qnext) -> None:
    done = qnext("doctor", "--json")
    document = json.loads(done.stdout)
    assert document.keys() == DOCUMENT and document["schema"] == "qnext.doctor/1"
    machine = machine_from_dict(document["machine"])
    assert {path for path, _ in facts(machine)} == set(machine.sources)
    assert all(machine.sources.values())
    assert all(finding.keys() == FINDING for finding in document["findings"])
    errors = any(finding["level"] == "error" for finding in document["findings"])
    assert done.returncode == (3 if errors else 0)


def test_a_recorded_machine_can_be_examined_and_what_it_says_read_again(qnext: Qnext) -> None:
    document = json.loads(qnext("doctor", "--hardware", "rtx4070-64gb", "--json").stdout)
    assert machine_from_dict(document["machine"]).gpus[0].name == "NVIDIA GeForce RTX 4070"
    assert document["engine"] is None and document["models"] == []


@pytest.mark.thorough
def test_warnings_end_with_3_only_when_strict(qnext: Qnext) -> None:
    arguments = ("doctor", "--hardware", "laptop-8gb")
    assert qnext(*arguments).returncode == 0
    assert qnext(*arguments, "--strict").returncode == 3


def test_a_model_that_was_named_and_cannot_run_is_an_error(qnext: Qnext) -> None:
    done = qnext("doctor", "--hardware", "laptop-8gb", "--model", "qwen3-next-80b-a3b:Q8_0")
    assert done.returncode == 3
    assert "too little RAM for Qwen3-Next-80B-A3B Q8_0" in " ".join(done.stdout.split())


def test_prices_are_for_the_model_named(qnext: Qnext, demo_model: Path) -> None:
    for model in ("demo", str(demo_model)):
        document = json.loads(qnext("doctor", "--model", model, "--json").stdout)
        assert "demo" in document["model"].lower()
        assert not any(finding["id"] == "memory-too-small" for finding in document["findings"])


@pytest.mark.parametrize("model", ["nosuch.gguf", "qwen3-next-80b-a3b:Q9_9", "qwen3-nxt"])
def test_a_model_that_is_not_there_is_one_error(qnext: Qnext, model: str) -> None:
    done = qnext("doctor", "--model", model)
    assert done.returncode in (2, 5) and done.stdout == ""
    assert len(done.stderr.splitlines()) == 2


def test_all_logical_threads_are_found_with_their_price(qnext: Qnext) -> None:
    done = qnext("doctor", "--hardware", "rtx4070-64gb", "-t", "16", env={"QNEXT_THREADS": ""})
    words = " ".join(done.stdout.split())
    assert "! 16 threads are asked for, 8 physical cores can be used" in words
    assert "decode −" in words and "Leave the threads to qnext" in words


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_page_stays_inside_the_terminal(qnext: Qnext, columns: str) -> None:
    done = qnext("doctor", "--hardware", "laptop-8gb", env={"COLUMNS": columns})
    assert max(map(len, done.stdout.splitlines())) <= int(columns)
    assert done.stderr == ""


def test_markdown_has_all_findings_and_nothing_personal(qnext: Qnext, qnext_home: Path) -> None:
    done = qnext("doctor", "--markdown")
    assert done.stdout.startswith("<details>") and done.stdout.rstrip().endswith("</details>")
    found = json.loads(qnext("doctor", "--json").stdout)["findings"]
    assert all(f"`{finding['id']}`" in done.stdout for finding in found)
    for personal in (socket.gethostname(), str(qnext_home), f"{Path.home()}/"):
        assert personal not in done.stdout


@pytest.mark.thorough
def test_a_saved_machine_can_be_planned_for(qnext: Qnext, tmp_path: Path) -> None:
    home = {"QNEXT_HOME": str(tmp_path)}
    done = qnext("doctor", "--save", "mine", env=home)
    assert done.returncode == 0, done.stderr
    again = json.loads(qnext("doctor", "--hardware", "mine", "--json", env=home).stdout)
    assert again["machine"]["memory"]["total_bytes"]
    assert qnext("plan", "demo", "--hardware", "mine", env=home).returncode == 0


def test_inherited_variables_are_told(qnext: Qnext) -> None:
    done = qnext("doctor", "--json", env={"LLAMA_ARG_CTX_SIZE": "1024", "GGML_SCHED_DEBUG": "1"})
    found = {one["what"]: one["level"] for one in json.loads(done.stdout)["findings"]}
    assert found["GGML_SCHED_DEBUG is set"] == "warning"
    assert found["LLAMA_ARG_CTX_SIZE is set"] == "info"


def test_models_in_the_shared_cache_are_told_with_whether_they_run(
    qnext: Qnext, demo_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "hub/models--someone--demo-GGUF/snapshots/0123"
    folder.mkdir(parents=True)
    (folder / "demo-Q8_0.gguf").symlink_to(demo_model)
    (folder / "other-Q4_K_M-00001-of-00002.gguf").symlink_to(demo_model)
    (folder / "broken-Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(100))
    done = qnext("doctor", "--json", env={"HF_HOME": str(tmp_path)})
    told = {model["quant"] or model["path"]: model for model in json.loads(done.stdout)["models"]}
    demo = next(model for model in told.values() if model["fits"])
    assert demo["repo"] == "someone/demo-GGUF" and demo["prediction"]["decode_tps"]["mid"] > 0
    others = [model for model in json.loads(done.stdout)["models"] if model is not demo]
    assert [model["fits"] for model in others if model["path"] != demo["path"]] == [None, None]
    assert all(model["reason"] for model in others if model["path"] != demo["path"])


@pytest.mark.thorough
def test_full_measures_ram_and_disk_and_the_next_look_remembers(qnext: Qnext, tmp_path: Path) -> None:
    home = {"QNEXT_HOME": str(tmp_path)}
    measured = json.loads(qnext("doctor", "--full", "--json", env=home).stdout)["machine"]
    remembered = json.loads(qnext("doctor", "--json", env=home).stdout)["machine"]
    for machine in (measured, remembered):
        memory = machine["memory"]
        assert memory["measured_bandwidth_bps"] > 10**8
        assert memory["bandwidth_knee_threads"] in dict(memory["bandwidth_by_threads"])
        assert machine["disk"]["read_bps"] or machine["sources"]["disk.read_bps"]
    assert remembered["memory"]["measured_bandwidth_bps"] == measured["memory"]["measured_bandwidth_bps"]
    assert remembered["sources"]["disk.read_bps"].startswith(measured["sources"]["disk.read_bps"])
