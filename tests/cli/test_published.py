"""Published models from `plan` to `run`, as processes, against a local server that speaks the Hub's API."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("pseudo-terminals are POSIX", allow_module_level=True)

from qnext.models.synth import synthesise
from tests.cli.conftest import Terminal
from tests.conftest import Qnext
from tests.hub_server import HubServer, hub  # noqa: F401 - the fixture

REPO = "someone/Tiny-Next-GGUF"
QUANTS = ("Q2_K", "Q4_K_M", "Q8_0")


@pytest.fixture
def ladder(hub: HubServer, tmp_path: Path) -> HubServer:  # noqa: F811
    """A repository with a demo that speaks, and one with three quants of a tiny model."""
    files = {}
    for quant in QUANTS:
        files[f"Tiny-Next-{quant}.gguf"] = tmp_path / f"{quant}.gguf"
        synthesise("tiny-qwen3next", tmp_path / f"{quant}.gguf", quant=quant, header_only=True)
    hub.add_repo(REPO, files)
    return hub


def test_a_repository_is_planned_from_its_headers_alone(qnext: Qnext, ladder: HubServer) -> None:
    done = qnext("plan", REPO, "--hardware", "rtx4070-64gb", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert {one["quant"] for one in plan["candidates"]} == set(QUANTS)
    best = [one["quality"] for one in plan["candidates"]]
    assert best == sorted(best, reverse=True)
    assert plan["model"]["ref"].startswith(f"{REPO}:")
    assert any(reason["what"].startswith("quant ") for reason in plan["reasons"])
    assert all(one["fits"] and one["decode_tps"] and one["context_ceiling"] for one in plan["candidates"])
    assert "/snapshots/" in plan["llama_server_argv"][plan["llama_server_argv"].index("-m") + 1]
    sent = sum(entry.sent for entry in ladder.log)
    assert sent < 12 << 20


@pytest.mark.thorough
def test_preferences_take_the_ends_of_the_ladder(qnext: Qnext, ladder: HubServer) -> None:
    taken = {
        prefer: json.loads(
            qnext("plan", REPO, "--hardware", "rtx4070-64gb", "--prefer", prefer, "--json").stdout
        )["model"]["quant"]
        for prefer in ("quality", "speed")
    }
    assert taken["quality"] == "Q8_0" and taken["speed"] != "Q8_0"


def test_the_table_marks_what_is_taken_and_stays_in_80_columns(qnext: Qnext, ladder: HubServer) -> None:
    done = qnext("plan", REPO, "--hardware", "rtx4070-64gb", env={"COLUMNS": "80"})
    table = done.stdout.split("quality: published")[0]
    assert sum(line.startswith("> ") for line in table.splitlines()) == 1
    assert max(map(len, table.splitlines())) <= 80


def test_one_quant_of_a_repository_is_planned_alone(qnext: Qnext, ladder: HubServer) -> None:
    plan = json.loads(qnext("plan", f"{REPO}:q8_0", "--hardware", "rtx4070-64gb", "--json").stdout)
    assert plan["model"]["quant"] == "Q8_0" and plan["candidates"] == []
    done = qnext("plan", f"{REPO}:Q6_K", "--hardware", "rtx4070-64gb")
    assert done.returncode in (2, 5) and "Q8_0" in done.stderr


def test_offline_works_from_what_was_read_before(qnext: Qnext, ladder: HubServer) -> None:
    arguments = ("plan", REPO, "--hardware", "rtx4070-64gb", "--json")
    before = json.loads(qnext(*arguments).stdout)
    after = qnext(*arguments, env={"HF_HUB_OFFLINE": "1"})
    assert json.loads(after.stdout)["candidates"] == before["candidates"]
    never = qnext("plan", "someone/never-seen-GGUF", env={"HF_HUB_OFFLINE": "1"})
    assert never.returncode == 5 and "offline" in never.stderr


@pytest.mark.parametrize("for_scripts", [False, True])
def test_a_terminal_shows_that_headers_are_read_and_scripts_see_nothing(
    terminal: Callable[..., Terminal], ladder: HubServer, for_scripts: bool
) -> None:
    ladder.latency_s = 0.5
    json_flag = ("--json",) if for_scripts else ()
    shown = terminal("plan", REPO, "--hardware", "rtx4070-64gb", *json_flag)
    assert shown.wait() == 0
    assert ("planning Tiny-Next-GGUF" in shown.text) is not for_scripts


@pytest.mark.thorough
@pytest.mark.engine
def test_run_fetches_what_it_planned_and_the_next_run_has_it(
    qnext: Qnext,
    hub: HubServer,  # noqa: F811
    demo_model: Path,
    tmp_path: Path,
) -> None:
    hub.add_repo("someone/demo-GGUF", {"demo-Q8_0.gguf": demo_model})
    refused = qnext("run", "someone/demo-GGUF", "--prompt", "Hello")
    assert refused.returncode == 5 and "--yes" in refused.stderr
    answered = qnext("run", "someone/demo-GGUF", "--prompt", "Hello", "--yes")
    assert answered.returncode == 0, answered.stderr
    again = qnext("run", "someone/demo-GGUF", "--prompt", "Hello", env={"HF_HUB_OFFLINE": "1"})
    assert again.stdout == answered.stdout
    found = list((tmp_path / "hf-home").rglob("*.incomplete"))
    assert not found
    asked = len(hub.log)
    named = qnext("run", "someone/demo-GGUF:q8_0", "--prompt", "Hello")
    assert named.stdout == answered.stdout and len(hub.log) == asked  # nothing is left to ask
    left_open = qnext("run", "someone/demo-GGUF", "--prompt", "Hello")
    assert left_open.stdout == answered.stdout
    assert [one.path for one in hub.log[asked:]] == ["/api/models/someone/demo-GGUF"]


@pytest.mark.engine
def test_compute_buffers_of_a_published_model_come_from_the_dry_run(
    qnext: Qnext, ladder: HubServer, tmp_path: Path
) -> None:
    far = json.loads(qnext("plan", f"{REPO}:Q8_0", "--json").stdout)
    near = json.loads(qnext("plan", str(tmp_path / "Q8_0.gguf"), "--json").stdout)
    assert far["compute_source"] == near["compute_source"] == "dry run"
    assert far["devices"][0]["total_bytes"] == near["devices"][0]["total_bytes"]


def test_a_name_that_is_none_names_the_nearest(qnext: Qnext) -> None:
    done = qnext("plan", "qwen3-nxt-80b")
    assert done.returncode == 5 and "qwen3-next-80b-a3b" in done.stderr


@pytest.mark.thorough
def test_pull_takes_the_quant_that_plan_takes_here(qnext: Qnext, ladder: HubServer) -> None:
    planned = json.loads(qnext("plan", REPO, "--json").stdout)
    shown = json.loads(qnext("pull", REPO, "--dry-run", "--json").stdout)
    assert shown["quant"] == planned["model"]["quant"] and not shown["complete"]
    done = qnext("pull", REPO)
    assert done.returncode == 0, done.stderr
    (why,) = (line for line in done.stderr.splitlines() if "taking" in line)
    assert shown["quant"] in why and "quality" in why
    assert Path(done.stdout.strip()).name == f"Tiny-Next-{shown['quant']}.gguf"
    # What is checked is not chosen anew: the machine may have less memory free than it had.
    checked = qnext("pull", REPO, "--verify")
    assert checked.returncode == 5 and "Name one" in checked.stderr


@pytest.mark.thorough
def test_pull_refuses_where_no_quant_fits_unless_one_is_named(qnext: Qnext, ladder: HubServer) -> None:
    refused = qnext("pull", REPO, env={"QNEXT_RAM": "16M"})
    assert refused.returncode == 4 and f"qnext pull {REPO}:" in refused.stderr
    assert qnext("pull", f"{REPO}:Q8_0", "--dry-run", env={"QNEXT_RAM": "16M"}).returncode == 0


@pytest.mark.parametrize("name", ["gpt-oss-20b", "GPT-oss:q4_k_m"])
def test_pull_knows_names_and_aliases_of_the_catalogue(
    qnext: Qnext, ladder: HubServer, tmp_path: Path, name: str
) -> None:
    files = {f"gpt-oss-20b-{quant}.gguf": tmp_path / f"{quant}.gguf" for quant in QUANTS}
    ladder.add_repo("unsloth/gpt-oss-20b-GGUF", files)
    shown = qnext("pull", name, "--dry-run", "--json")
    assert shown.returncode == 0, shown.stderr
    report = json.loads(shown.stdout)
    assert report["repo"] == "unsloth/gpt-oss-20b-GGUF"
    assert report["quant"] == "Q4_K_M" or "taking" in shown.stderr


def test_pull_names_what_was_meant(qnext: Qnext, hub: HubServer) -> None:  # noqa: F811
    mistyped = qnext("pull", "qwen3-nxt-80b")
    assert mistyped.returncode == 2 and "qwen3-next-80b-a3b" in mistyped.stderr
    original = qnext("pull", "Qwen/Qwen3-Next-80B-A3B-Instruct")
    assert original.returncode == 5 and "-GGUF" in original.stderr
    assert not hub.log
