"""`qnext bench run --url` as a process: what is printed, refused and returned."""

from __future__ import annotations

import json

import pytest

from tests.conftest import Qnext
from tests.endpoint_server import EndpointServer, Manner

SHORT = ("-p", "40", "-n", "6", "-r", "2")


def test_the_table_and_the_json_say_the_same(qnext: Qnext) -> None:
    with EndpointServer(Manner(first_s=0.03, gap_s=0.004)) as server:
        done = qnext("bench", "run", "--url", server.url, "tiny", "--concurrency", "1,2", *SHORT)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"tiny at {server.url}") and ", ok\n" in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80
        assert "2 clients: first token after" in done.stderr
        asked = qnext("bench", "run", "--url", server.url, "--concurrency", "2", *SHORT, "--json")
    found = json.loads(asked.stdout)
    assert (found["schema"], found["status"]) == ("qnext.endpoint/1", "ok")
    level = found["levels"][0]
    assert (level["requests"], level["failed"], level["output_tokens"]["median"]) == (4, 0, 6)
    assert all(len(one["arrivals_ns"]) == 6 for one in level["exchanges"])
    assert 30e6 <= level["ttft_ns"]["median"] <= 150e6


def test_a_failed_request_ends_with_1_and_its_reason(qnext: Qnext) -> None:
    with EndpointServer(Manner(fault=lambda number: 500 if number == 5 else None)) as server:
        done = qnext("bench", "run", "--url", server.url, "--concurrency", "1", *SHORT)
    assert done.returncode == 1
    assert "incomplete" in done.stdout and "HTTP 500: told to say 500" in " ".join(done.stdout.split())
    row = next(line for line in done.stdout.splitlines() if line.lstrip().startswith("1 "))
    assert row.split()[-2:] == ["2", "1"]


@pytest.mark.thorough
def test_of_two_servers_the_slower_one_is_named(qnext: Qnext) -> None:
    quick, slow = Manner(first_s=0.02, gap_s=0.002), Manner(first_s=0.3, gap_s=0.002)
    with EndpointServer(quick) as first, EndpointServer(slow) as second:
        both = ("bench", "run", "--url", first.url, "--url", second.url, "--concurrency", "1")
        done = qnext(*both, "-p", "40", "-n", "6")
        asked = qnext(*both, "-p", "40", "-n", "6", "-r", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert f"first   tiny at {first.url}" in done.stdout and f"second  tiny at {second.url}" in done.stdout
    assert "1 client: ok, 8 pairs, intervals at 99 %" in done.stdout
    rows = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines()}
    assert rows["TTFT ms"][-1] == "slower" and float(rows["TTFT ms"][4]) > 1.5
    assert rows["all out t/s"][-1] == "slower" and float(rows["all out t/s"][5]) < 1
    assert "1 client, second to first: first token" in done.stderr

    found = json.loads(asked.stdout)
    assert (found["schema"], found["status"]) == ("qnext.endpoint-pair/1", "ok")
    assert [one["url"] for one in found["servers"]] == [first.url, second.url]
    assert found["levels"][0]["comparisons"]["ttft"]["word"] == "no difference shown"
    few = "1 pair of rounds cannot show a difference at 99 %"
    assert few in asked.stderr and any(few in text for text in found["warnings"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--url", "http://203.0.113.5/v1"), "not this machine's loopback"),
        (("--url", "http://127.0.0.1:9/v1", "-ub", "512", "--ram", "8G"), "ubatch"),
        (("--url", "http://127.0.0.1:9/v1", "-d", "4096"), "n-depth"),
        (("--url", "http://127.0.0.1:9/v1", "-p", "1,2"), "one number of tokens"),
        (("--url", "http://127.0.0.1:9/v1", "-n", "0"), "one number of tokens"),
        (("--url", "http://127.0.0.1:9/v1", "--concurrency", "0"), "between 1 and 256"),
        (("--url", "http://127.0.0.1:9/v1", "--api-key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY is not set"),
        (("--url", "http://127.0.0.1:9/v1") * 3, "--url is given 3 times"),
        (("--url", "http://127.0.0.1:9/v1", "--url", "http://203.0.113.5/v1"), "not this machine's loopback"),
        (("demo", "--concurrency", "2"), "--concurrency only says something about a server"),
        ((), "Missing argument 'MODEL'"),
    ],
)
def test_what_has_no_meaning_is_refused(qnext: Qnext, arguments: tuple[str, ...], said: str) -> None:
    done = qnext("bench", "run", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and "try: " in done.stderr


def test_nobody_there_is_an_engine_error(qnext: Qnext) -> None:
    done = qnext("bench", "run", "--url", "http://127.0.0.1:9/v1")
    assert done.returncode == 7
    assert "nothing answers at http://127.0.0.1:9/v1" in done.stderr
