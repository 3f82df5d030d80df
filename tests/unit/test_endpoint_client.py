"""A server that speaks well, with known times, and servers that speak badly: every figure, every fault."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from statistics import median

import pytest

from qnext.bench.endpoint_result import EndpointResult, result_to_dict, result_warnings
from qnext.errors import EngineError, ModelError, QnextError, UsageError
from qnext.pipeline.endpoint import EndpointWatch, measure_endpoint
from qnext.pipeline.endpoint_client import MOST_WAITS, check_address
from qnext.pipeline.endpoint_load import EndpointTask
from tests.endpoint_server import EndpointServer, Manner

MS = 1_000_000
PREPARING = 3
"""Answers before the first level's warm-up: contact and two probes, while prompts are short."""


def measure(
    server: EndpointServer,
    *,
    model: str | None = None,
    concurrency: tuple[int, ...] = (1,),
    prompt: int = 40,
    generate: int = 8,
    repetitions: int = 3,
    api_key_env: str | None = None,
    deadline_s: float = 10.0,
) -> EndpointResult:
    task = EndpointTask(
        server.url, model, concurrency, prompt, generate, repetitions, api_key_env, deadline_s
    )
    return measure_endpoint(task, EndpointWatch())


def one_fault(fault: str | int, clients: int = 1) -> Callable[[int], str | int | None]:
    """The fault in the first answer that counts."""
    at = PREPARING + clients + 1
    return lambda number: fault if number == at else None


def on_a_quiet_moment(check: Callable[[], None]) -> Callable[[], None]:
    """Tries a check of times again: other work on the machine can delay one run, but no wrong figure is
    right in any of four."""

    @functools.wraps(check)
    def tried() -> None:
        for left in (3, 2, 1, 0):
            try:
                check()
                return
            except AssertionError:
                if not left:
                    raise

    return tried


@on_a_quiet_moment
def test_figures_are_those_of_the_servers_own_clock() -> None:
    with EndpointServer(Manner(first_s=0.06, gap_s=0.008)) as server:
        found = measure(server, generate=21, repetitions=4)
        counted = server.asks()[-4:]
    level = found.levels[0]
    assert found.status == "ok" and result_warnings(found) == ()
    assert level.ttft_ns and level.per_token_ns and level.gap_ns and level.decode_tps and level.prefill_tps
    first = median(one.sent_ns[0] - one.arrived_ns for one in counted)
    assert first - 2 * MS < level.ttft_ns.median < first + 40 * MS
    per_token = median((one.sent_ns[-1] - one.sent_ns[0]) / 20 for one in counted)
    assert level.per_token_ns.median == pytest.approx(per_token, rel=0.1)
    assert level.gap_ns.median == pytest.approx(8 * MS, rel=0.25)
    assert level.gap_ns.count == 4 * 20
    assert level.decode_tps.median == pytest.approx(1e9 / per_token, rel=0.1)
    round_trip = median(found.round_trip_ns)
    assert level.prefill_tps.median == pytest.approx(40e9 / (level.ttft_ns.median - round_trip), rel=0.1)


@on_a_quiet_moment
def test_several_tokens_in_a_chunk_are_counted_by_usage() -> None:
    with EndpointServer(Manner(gap_s=0.01, tokens_per_chunk=4)) as server:
        found = measure(server, generate=21)
    level = found.levels[0]
    assert [len(one.arrivals_ns) for one in level.exchanges] == [6, 6, 6]
    assert [one.output_tokens for one in level.exchanges] == [21, 21, 21]
    assert level.gap_ns and level.per_token_ns
    assert level.gap_ns.median == pytest.approx(10 * MS, rel=0.25)
    assert level.per_token_ns.median == pytest.approx(10 * MS / 4, rel=0.25)
    assert "3.5 tokens per chunk" in result_warnings(found)[0]


@on_a_quiet_moment
def test_clients_work_at_the_same_time_and_throughput_adds_up() -> None:
    with EndpointServer(Manner(first_s=0.05, gap_s=0.01)) as server:
        found = measure(server, concurrency=(1, 4), generate=11)
        assert server.most_at_once == 4
    one, four = found.levels
    assert len(four.exchanges) == 4 * 3
    assert {exchange.client for exchange in four.exchanges} == {0, 1, 2, 3}
    starts = sorted(exchange.sent_ns for exchange in four.exchanges)[:4]
    assert starts[-1] - starts[0] < 40 * MS
    assert one.output_tps and four.output_tps and one.input_tps and four.input_tps
    assert four.output_tps == pytest.approx(4 * one.output_tps, rel=0.4)
    assert four.input_tps == pytest.approx(4 * one.input_tps, rel=0.4)


def test_warm_ups_come_first_and_no_prompt_twice() -> None:
    with EndpointServer() as server:
        measure(server, concurrency=(1, 2), repetitions=2, generate=40)
        asks = server.asks()
    lengths = [one.body["max_tokens"] for one in asks[PREPARING:]]
    assert lengths == [16, 40, 40, 16, 16, 40, 40, 40, 40]
    prompts = [one.prompt for one in asks]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("wanted", [60, 300])
@pytest.mark.parametrize("per_word", [1, 3])
def test_prompts_have_the_length_asked_for(wanted: int, per_word: int) -> None:
    with EndpointServer(Manner(tokens_per_word=per_word, words_of_template=22)) as server:
        found = measure(server, prompt=wanted, repetitions=2)
    sizes = found.levels[0].prompt_tokens
    assert sizes and abs(sizes.median - wanted) <= per_word / 2 + 0.5


def test_a_server_without_optional_fields_is_asked_without_them() -> None:
    with EndpointServer(Manner(takes_extras=False, ends_after=5)) as server:
        found = measure(server)
        last = server.asks()[-1].body
    assert not found.server.extras and "ignore_eos" not in last and "stream_options" in last
    assert [one.output_tokens for one in found.levels[0].exchanges] == [5, 5, 5]
    assert "the answers had 5 tokens, not 8" in result_warnings(found)[0]


def test_fields_that_hold_an_answer_open_are_sent() -> None:
    with EndpointServer(Manner(ends_after=5)) as server:
        found = measure(server)
        body = server.asks()[-1].body
    assert (body["ignore_eos"], body["min_tokens"], body["cache_prompt"]) == (True, 8, False)
    assert found.server.extras and found.levels[0].output_tokens.median == 8  # type: ignore[union-attr]


@pytest.mark.parametrize("tokenizes", [True, False])
def test_without_usage_the_count_says_where_it_comes_from(tokenizes: bool) -> None:
    manner = Manner(takes_extras=False, takes_stream_options=False, tokenizes=tokenizes, tokens_per_chunk=2)
    with EndpointServer(manner) as server:
        found = measure(server, generate=9)
    source = "tokenize" if tokenizes else "estimate"
    assert (found.prompt_source, found.output_source) == (source, source)
    assert not found.server.usage
    expected = 9 if tokenizes else 5
    assert [one.output_tokens for one in found.levels[0].exchanges] == [expected] * 3
    assert ("/tokenize" if tokenizes else "our estimate") in result_warnings(found)[0]


def test_only_completions_will_do() -> None:
    with EndpointServer(Manner(apis=("completions",))) as server:
        found = measure(server)
    assert (found.server.api, found.status) == ("completions", "ok")


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thinking_counts_from_its_first_token(field: str) -> None:
    with EndpointServer(Manner(text_field=field)) as server:
        found = measure(server)
    assert found.status == "ok" and all(len(one.arrivals_ns) == 8 for one in found.levels[0].exchanges)


def test_a_stream_without_its_last_line_is_whole_when_it_says_it_finished() -> None:
    with EndpointServer(Manner(done_line=False)) as server:
        assert measure(server).status == "ok"


def test_cached_tokens_confound() -> None:
    with EndpointServer(Manner(cached=16)) as server:
        found = measure(server)
    assert found.status == "confounded" == result_to_dict(found)["status"]
    assert found.levels[0].exchanges[0].cached_tokens == 16


def test_a_rate_limit_is_obeyed_and_counted() -> None:
    with EndpointServer(Manner(fault=one_fault(429))) as server:
        found = measure(server)
    assert found.status == "ok"
    assert [one.rate_limited for one in found.levels[0].exchanges] == [1, 0, 0]
    assert "asked to wait (429) 1 times" in result_warnings(found)[0]


def test_an_endless_rate_limit_ends() -> None:
    with EndpointServer(Manner(fault=lambda number: 429)) as server:
        with pytest.raises(EngineError, match="HTTP 429"):
            measure(server)
        assert len(server.asks()) == MOST_WAITS + 1


def test_a_wait_beyond_the_deadline_is_not_waited_for() -> None:
    with EndpointServer(Manner(fault=lambda number: 429, retry_after="3600")) as server:
        with pytest.raises(EngineError, match="HTTP 429"):
            measure(server)
        assert len(server.asks()) == 1


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("cut", "cut"),
        ("garbage", "garbage"),
        ("not-object", "garbage"),
        ("error-event", "server-error"),
        ("html", "foreign-server"),
        (500, "server-error"),
        (503, "server-error"),
        (400, "refused"),
        ("redirect", "refused"),
    ],
)
def test_a_fault_in_the_middle_is_a_failed_request_among_good_ones(fault: str | int, status: str) -> None:
    with EndpointServer(Manner(fault=one_fault(fault))) as server:
        found = measure(server)
    level = found.levels[0]
    assert found.status == level.status == "incomplete"
    assert [one.status for one in level.exchanges] == [status, "ok", "ok"]
    assert level.exchanges[0].error and level.ttft_ns and level.ttft_ns.count == 2


@pytest.mark.parametrize("fault", ["hang", "stall"])
def test_a_hang_ends_at_the_deadline_and_ends_its_client(fault: str) -> None:
    with EndpointServer(Manner(fault=one_fault(fault, clients=2))) as server:
        found = measure(server, concurrency=(2,), deadline_s=0.5)
    level = found.levels[0]
    assert sorted(one.status for one in level.exchanges) == ["hung", "ok", "ok", "ok"]
    assert "no whole answer within 0.5 s" in result_warnings(found)[0]


def test_a_server_that_dies_ends_the_measuring_with_what_there_is() -> None:
    with EndpointServer(Manner(fault=lambda number: 500 if number > PREPARING + 4 else None)) as server:
        found = measure(server, concurrency=(1, 2, 4))
    assert [level.status for level in found.levels] == ["ok", "failed"]
    assert found.status == "failed"
    assert result_warnings(found)[-1] == "Not measured after that: 4 clients."


def free_url() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


def test_nobody_there() -> None:
    with pytest.raises(EngineError, match="nothing answers at http") as caught:
        measure_endpoint(EndpointTask(free_url()), EndpointWatch())
    assert "Start the server" in caught.value.hint


def test_a_key_is_sent_and_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIGHT_KEY", "open sesame")
    monkeypatch.setenv("WRONG_KEY", "open barley")
    monkeypatch.delenv("NO_KEY", raising=False)
    with EndpointServer(Manner(key="open sesame")) as server:
        found = measure(server, api_key_env="RIGHT_KEY")
        assert found.status == "ok" and "open sesame" not in str(result_to_dict(found))
        for name, hint in ((None, "--api-key-env NAME"), ("WRONG_KEY", "WRONG_KEY"), ("NO_KEY", "export")):
            with pytest.raises(UsageError) as caught:
                measure(server, api_key_env=name)
            assert hint in caught.value.hint and "barley" not in caught.value.message


@pytest.mark.parametrize(
    ("manner", "model", "error", "words"),
    [
        (Manner(models=None, apis=()), None, UsageError, "no chat/completions"),
        (Manner(models=("one", "two")), None, UsageError, "2 models: one, two"),
        (Manner(models=("one",), apis=()), "three", ModelError, "no model called 'three'"),
        (Manner(fault=lambda number: "html"), None, EngineError, "foreign server.*text/html"),
        (Manner(fault=lambda number: "json"), None, EngineError, "foreign server.*application/json"),
        (Manner(fault=lambda number: "redirect"), None, UsageError, "redirects to .*not followed"),
        (Manner(fault=lambda number: 503), None, EngineError, "HTTP 503: told to say 503"),
        (Manner(fault=lambda number: 400), None, EngineError, "HTTP 400: told to say 400"),
        (Manner(fault=lambda number: "cut"), None, EngineError, "closed in the middle"),
        (Manner(fault=lambda number: "garbage"), None, EngineError, "not JSON"),
        (Manner(banner=b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), None, EngineError, "foreign server.*not HTTP"),
        (Manner(banner=b""), None, EngineError, "closed without an answer"),
    ],
)
def test_what_never_works_is_one_clear_error(
    manner: Manner, model: str | None, error: type[QnextError], words: str
) -> None:
    with EndpointServer(manner) as server, pytest.raises(error, match=words) as caught:
        measure(server, model=model)
    assert caught.value.hint


def test_a_path_without_v1_is_told_about_it() -> None:
    with EndpointServer() as server, pytest.raises(UsageError) as caught:
        measure_endpoint(EndpointTask(server.url.removesuffix("/v1")), EndpointWatch())
    assert f"--url {server.url}" in caught.value.hint


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, free_url().removesuffix("/v1"))
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with EndpointServer() as server:
        assert measure(server).status == "ok"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8080/v1/", "http://localhost:1/v1", "http://[::1]:8080/v1", "http://127.8.8.8"]
)
def test_loopback_is_measured(url: str) -> None:
    assert check_address(url) == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        "http://203.0.113.5:8080/v1",
        "http://example.com/v1",
        "http://192.168.0.2/v1",
        "http://0.0.0.0:8080/v1",
        "http://localhost.example.com/v1",
        "http://127.0.0.1@example.com/v1",
        "http://127.0.0.1\\@example.com/v1",
        "http://127.0.0.1:secret@127.0.0.1/v1",
        "http://2130706433/v1",
        "https://[::ffff:203.0.113.5]/v1",
        "http://127.0.0.1:8080/v1?to=else",
        "ftp://127.0.0.1/v1",
        "127.0.0.1:8080/v1",
        "http://",
        "",
    ],
)
def test_anything_else_is_refused_before_a_byte_is_sent(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_address(url)
    assert caught.value.hint and "secret" not in caught.value.message
