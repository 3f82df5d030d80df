"""`qnext pull` as a process: stdout is the path of the file to load, everything else is stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("pseudo-terminals are POSIX", allow_module_level=True)

from tests.cli.conftest import CTRL_C, Terminal
from tests.conftest import Qnext
from tests.hub_faults import REPO, Fault, FaultyHub, corrupt_files, make_quant, serve_faults, slow
from tests.hub_server import TOKEN, Asked, Reply

SIZES = [3_000_000, 1_000_000]


hub = pytest.fixture(serve_faults)


def test_stdout_is_the_path_of_the_first_shard(hub: FaultyHub, qnext: Qnext) -> None:
    quant, contents = make_quant(hub, SIZES)
    first = qnext("pull", f"{REPO}:q4")
    assert (first.returncode, first.stderr.count("\n")) == (0, 2), first.stderr
    path = Path(first.stdout.rstrip("\n"))
    assert path.read_bytes() == contents[quant.files[0].path]
    assert "2 files" in first.stderr and "SHA-256 right" in first.stderr
    again = qnext("pull", f"{REPO}:Q4", "--json")
    report = json.loads(again.stdout)
    assert (report["schema"], report["path"]) == ("qnext.pull/1", str(path))
    assert (report["complete"], report["fetched_bytes"]) == (True, 0)
    assert "all here already" in again.stderr


def test_a_dry_run_shows_files_and_bytes_and_fetches_none(hub: FaultyHub, qnext: Qnext) -> None:
    make_quant(hub, SIZES)
    shown = qnext("pull", REPO, "--dry-run")
    assert shown.returncode == 0
    assert "Q4/model-Q4-00002-of-00002.gguf" in shown.stdout and "3.8 MiB to fetch" in shown.stdout
    assert hub.sent("resolve") == 0 and not any(one.at == "cdn" for one in hub.log)
    report = json.loads(qnext("pull", REPO, "--dry-run", "--json").stdout)
    assert [one["state"] for one in report["files"]] == ["absent", "absent"]
    assert (report["size_bytes"], report["bytes_here"]) == (sum(SIZES), 0)


def test_a_dry_run_names_repository_and_cache_on_lines_of_their_own(hub: FaultyHub, qnext: Qnext) -> None:
    quant, _ = make_quant(hub, SIZES)
    lines = qnext("pull", REPO, "--dry-run", env={"COLUMNS": "80"}).stdout.splitlines()
    assert lines[0] == f"{REPO}:{quant.quant} at {quant.revision[:12]}"
    assert [line.split()[0] for line in lines[1:5]] == ["file", *(file.path for file in quant.files), "all"]


@pytest.mark.thorough
def test_verify_names_the_bad_file_and_repair_replaces_it(hub: FaultyHub, qnext: Qnext) -> None:
    make_quant(hub, SIZES)
    missing = qnext("pull", REPO, "--verify")
    assert missing.returncode == 6 and "Not here" in missing.stderr
    path = Path(qnext("pull", REPO).stdout.strip())
    assert qnext("pull", REPO, "--verify").returncode == 0
    with path.open("r+b") as file:
        file.write(b"oops")
    bad = qnext("pull", REPO, "--verify")
    assert bad.returncode == 6
    assert "Wrong contents: Q4/model-Q4-00001-of-00002.gguf" in bad.stderr and "--repair" in bad.stderr
    assert qnext("pull", REPO, "--repair").returncode == 0
    assert qnext("pull", REPO, "--verify").returncode == 0


def test_several_quants_want_one_named(hub: FaultyHub, qnext: Qnext) -> None:
    hub.add_repo(REPO, {"m-Q4_K_M.gguf": b"GGUF" * 9, "m-Q8_0.gguf": b"GGUF" * 20})
    asked = qnext("pull", REPO)
    assert asked.returncode == 5
    assert "Q8_0, Q4_K_M" in asked.stderr and f"qnext pull {REPO}:Q4_K_M" in asked.stderr
    assert qnext("pull", "model.gguf").returncode == 2


def test_a_proxy_is_used_and_a_token_not_shown(hub: FaultyHub, qnext: Qnext) -> None:
    make_quant(hub, SIZES)
    hub.repos[REPO].access = "private"
    mirror = {
        "HF_ENDPOINT": "http://hub.invalid",
        "HTTP_PROXY": hub.endpoint,
        "NO_PROXY": "127.0.0.1",
        "HF_TOKEN": TOKEN,
        "HF_DEBUG": "1",
    }
    through = qnext("-v", "pull", REPO, env=mirror)
    assert through.returncode == 0, through.stderr
    assert TOKEN not in through.stderr + through.stdout
    refused = qnext("-v", "pull", REPO, env={**mirror, "HF_TOKEN": "hf_that_is_not_good"})
    assert refused.returncode != 0
    assert "hf_that_is_not_good" not in refused.stderr + refused.stdout


def test_without_a_network_it_says_so_in_seconds(hub: FaultyHub, qnext: Qnext) -> None:
    began = time.monotonic()
    offline = qnext("pull", f"{REPO}:Q4", env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert offline.returncode in (5, 6)
    assert "http://127.0.0.1:9" in offline.stderr and "Traceback" not in offline.stderr
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("silent", [False, True])
def test_ctrl_c_ends_within_a_second_and_says_how_to_go_on(
    silent: bool,
    hub: FaultyHub,
    qnext: Qnext,
    terminal: Callable[..., Terminal],
    tmp_path: Path,
) -> None:
    make_quant(hub, SIZES)

    def wait(asked: Asked, reply: Reply, server: object) -> None:
        time.sleep(8)

    hub.fault = Fault("", "verified", wait) if silent else Fault("", "verified", slow(1e6))
    screen = terminal("pull", f"{REPO}:Q4")
    screen.wait_for("0 B of 3.8 MiB" if silent else "MiB/s")
    screen.type(CTRL_C)
    began = time.monotonic()
    assert screen.wait() == 130
    assert time.monotonic() - began < 1.5  # a second, and the interpreter's end on a busy machine
    assert "are here and kept; go on with: qnext pull" in " ".join(screen.text.split())
    assert "Traceback" not in screen.text
    hub.fault = None
    assert qnext("pull", f"{REPO}:Q4").returncode == 0
    assert corrupt_files(tmp_path / "hf" / "hub") == []


def test_the_bar_fits_80_columns(hub: FaultyHub, terminal: Callable[..., Terminal]) -> None:
    make_quant(hub, SIZES)
    hub.fault = Fault("", "verified", slow(2e6))
    screen = terminal("pull", f"{REPO}:Q4", columns=80)
    assert screen.wait() == 0
    frames = [
        line for line in screen.raw.replace("\r", "\n").split("\n") if "MiB/s" in line and "left" in line
    ]
    assert frames
    # A frame that wraps would need more than one line cleared before the next.
    assert "\x1b[1A\x1b[2K\x1b[1A\x1b[2K" not in screen.raw
