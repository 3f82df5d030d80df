"""From arrival times to figures: what is counted, what is left out, what cannot be told."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.bench.endpoint import (
    Exchange,
    make_level,
    per_token_ns,
    prefill_tps,
    quantile,
    spread,
    tokens_until,
)
from qnext.bench.endpoint_result import (
    EndpointResult,
    EndpointServer,
    display_name,
    result_to_dict,
    result_warnings,
)
from qnext.bench.prompts import Length, PromptMaker, fit_length
from qnext.bench.stream import AnswerReading

MS = 1_000_000
SERVER = EndpointServer("http://127.0.0.1:1/v1", None, "tiny", None, "chat", True, True)


def answer(
    client: int = 0, sent: int = 0, first: int = 100, gap: int = 10, chunks: int = 11, tokens: int = 11
) -> Exchange:
    """An answer to 50 tokens; times in milliseconds."""
    arrivals = tuple((sent + first + gap * number) * MS for number in range(chunks))
    return Exchange(
        client,
        "ok",
        sent * MS,
        arrivals[-1],
        arrivals,
        prompt_tokens=50,
        cached_tokens=0,
        output_tokens=tokens,
        finish_reason="length",
        http_status=200,
    )


def result(*exchanges: Exchange, prompt: int = 50, generate: int = 11) -> EndpointResult:
    level = make_level(1, 0, exchanges, 0)
    return EndpointResult(
        "2026-01-01T00:00:00+00:00", SERVER, prompt, generate, len(exchanges), (1,), 7,
        "usage", "usage", (1, 2, 3), (level,),
    )  # fmt: skip


def test_prefill_leaves_out_the_round_trip_and_what_was_cached() -> None:
    one = answer(first=110)
    assert prefill_tps(one, 10 * MS) == pytest.approx(500)
    assert prefill_tps(replace(one, cached_tokens=40), 10 * MS) == pytest.approx(100)
    assert prefill_tps(one, 110 * MS) is None
    assert prefill_tps(replace(one, prompt_tokens=None), 0) is None


def test_decode_counts_tokens_and_not_chunks() -> None:
    assert per_token_ns(answer()) == 10 * MS
    assert per_token_ns(answer(chunks=11, tokens=41)) == 2.5 * MS
    level = make_level(1, 0, [answer(tokens=41)], 0)
    assert level.decode_tps is not None and level.decode_tps.median == pytest.approx(400)
    assert level.gap_ns is not None and level.gap_ns.median == 10 * MS
    assert level.tokens_per_chunk == pytest.approx(41 / 11)


def test_one_token_or_one_chunk_has_no_decode_speed() -> None:
    assert per_token_ns(answer(chunks=1, tokens=1)) is None
    assert per_token_ns(answer(chunks=1, tokens=30)) is None


def test_throughput_is_taken_until_the_first_client_is_done() -> None:
    early = [answer(0), answer(0, sent=200)]
    late = [answer(1), answer(1, sent=300)]
    level = make_level(2, 0, early + late, 0)
    assert level.steady_ns == 400 * MS
    # All of three answers; of the last one its prompt, and the chunk that came at that moment.
    assert level.input_tps == pytest.approx(4 * 50 / 0.4)
    assert level.output_tps == pytest.approx((3 * 11 + 1) / 0.4)


def test_a_failed_request_is_counted_and_in_no_figure() -> None:
    broken = replace(answer(sent=300, first=1), status="cut", error="gone")
    level = make_level(1, 0, [answer(), broken], 0)
    assert (level.status, len(level.failed)) == ("incomplete", 1)
    assert level.ttft_ns is not None and (level.ttft_ns.count, level.ttft_ns.median) == (1, 100 * MS)
    assert make_level(1, 0, [broken], 0).status == "failed"
    assert "1 of 2 requests failed (1 cut); the first: gone." in result_warnings(result(answer(), broken))[0]


def test_a_cache_hit_makes_the_result_confounded() -> None:
    found = result(replace(answer(), cached_tokens=32))
    assert found.status == "confounded"
    assert "CONFOUNDED: up to 32 prompt tokens" in result_warnings(found)[0]


def test_a_level_that_was_not_reached_fails_the_result() -> None:
    found = replace(result(answer()), concurrency=(1, 2, 4))
    assert found.status == "failed"
    assert result_warnings(found)[-1] == "Not measured after that: 2, 4 clients."


def test_other_lengths_than_asked_are_said() -> None:
    assert result_warnings(result(answer())) == ()
    said = " ".join(result_warnings(result(answer(), prompt=60, generate=20)))
    assert "the prompts had 50 tokens, not 60" in said and "the answers had 11 tokens, not 20" in said


@pytest.mark.parametrize(("count", "p95", "p99"), [(19, False, False), (20, True, False), (100, True, True)])
def test_a_percentile_needs_enough_values(count: int, p95: bool, p99: bool) -> None:
    found = spread(range(1, count + 1))
    assert found is not None
    assert (found.p95 is not None, found.p99 is not None) == (p95, p99)


def test_quantile_is_numpys() -> None:
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    for share in (0.0, 0.3, 0.95, 1.0):
        assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)))


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 500), st.integers(1, 200), st.integers(1, 20)), min_size=1
    ),
    st.integers(0, 2000),
    st.integers(0, 500),
)
def test_tokens_worked_off_grow_with_time_and_never_beyond_all(
    made: list[tuple[int, int, int, int]], end: int, more: int
) -> None:
    exchanges = [
        answer(client, sent, first, chunks=count, tokens=count) for client, sent, first, count in made
    ]
    read, written = tokens_until(exchanges, end * MS)
    later = tokens_until(exchanges, (end + more) * MS)
    assert 0 <= read <= later[0] + 1e-9 and 0 <= written <= later[1] + 1e-9
    assert later[0] <= 50 * len(made) + 1e-9 and later[1] <= sum(one[3] for one in made) + 1e-9


def test_the_json_counts_from_the_start_of_its_level() -> None:
    found = result_to_dict(result(answer(sent=5)))
    assert found["schema"] == "qnext.endpoint/1" and json.loads(json.dumps(found)) == found
    level = found["levels"][0]
    assert level["exchanges"][0]["sent_ns"] == 5 * MS
    assert level["ttft_ns"]["median"] == 100 * MS and level["ttft_ns"]["p95"] is None


def test_no_folder_of_a_person_is_in_a_models_name() -> None:
    assert display_name("/home/ada/models/tiny.gguf") == "tiny.gguf"
    assert display_name(r"C:\Users\ada\tiny.gguf") == "tiny.gguf"
    assert display_name("Qwen/Qwen3-Next") == "Qwen/Qwen3-Next"


def test_length_is_read_from_two_prompts() -> None:
    length = fit_length((16, 16 * 3 + 20), (80, 80 * 3 + 20))
    assert (length.tokens_per_word, length.added) == (3, 20)
    assert length.words_for(320) == 100
    assert length.words_for(5) == 1
    assert fit_length((16, 9), (80, 9)) == Length()


def test_the_same_seed_makes_the_same_prompts_and_never_one_twice() -> None:
    maker, again = PromptMaker(5), PromptMaker(5)
    prompts = [maker.text(maker.words(20)) for _ in range(200)]
    assert prompts == [again.text(again.words(20)) for _ in range(200)]
    openings = {" ".join(prompt.split()[:4]) for prompt in prompts}
    assert len(openings) == 200


@pytest.mark.parametrize(
    ("data", "status"),
    [
        ("{", "garbage"),
        ("[1]", "garbage"),
        ("null", "garbage"),
        ('{"error": "out of memory"}', "server-error"),
        ('{"choices": "no list", "usage": 3, "timings": []}', None),
        ('{"choices": [{"delta": {"content": 5}}]}', None),
    ],
)
def test_an_odd_event_is_named_and_never_a_crash(data: str, status: str | None) -> None:
    reading = AnswerReading()
    failure = reading.take(data, 1)
    assert (failure[0] if failure else None) == status
    assert reading.arrivals_ns == []


@pytest.mark.parametrize("field", ["content", "reasoning_content", "reasoning"])
def test_thought_counts_as_first_token_and_a_role_does_not(field: str) -> None:
    reading = AnswerReading()
    reading.take('{"choices": [{"delta": {"role": "assistant", "content": ""}}]}', 1)
    reading.take(json.dumps({"choices": [{"delta": {field: "so"}}]}), 2)
    assert reading.arrivals_ns == [2]
