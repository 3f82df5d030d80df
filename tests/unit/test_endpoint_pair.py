"""Two servers in pairs of rounds: which is faster in what, what is left out, and who goes first."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random

import pytest

from qnext.bench.endpoint import Exchange
from qnext.bench.endpoint_pair import (
    FEWEST_PAIRS,
    METRICS,
    PairLevel,
    Round,
    draw_order,
    make_pair_level,
    round_figures,
)
from qnext.bench.endpoint_pair_result import (
    PairResult,
    PairSide,
    few_pairs_words,
    pair_to_dict,
    pair_warnings,
)
from qnext.bench.endpoint_result import EndpointServer as Served
from qnext.bench.verdict import CONFIDENCE, compare_paired
from qnext.errors import EngineError
from qnext.pipeline.endpoint_load import EndpointTask
from qnext.pipeline.endpoint_pair import PairTask, PairWatch, measure_pair
from tests.endpoint_server import Asked, EndpointServer, Manner

MS = 1_000_000


def answer(client: int = 0, first: float = 100, gap: float = 10, chunks: int = 11, sent: int = 0) -> Exchange:
    """A whole answer to 50 tokens, one token per chunk; times in milliseconds."""
    arrivals = tuple(round((sent + first + gap * number) * MS) for number in range(chunks))
    return Exchange(
        client, "ok", sent * MS, arrivals[-1], arrivals,
        prompt_tokens=50, cached_tokens=0, output_tokens=chunks, http_status=200,
    )  # fmt: skip


def level(*rounds: tuple[list[Exchange], list[Exchange]], asked: int | None = None) -> PairLevel:
    done = [Round(0, (tuple(first), tuple(second))) for first, second in rounds]
    return make_pair_level(len(rounds[0][0]), 0, done, asked or len(rounds))


def noisy(random: Random, *, first: float = 1.0, gap: float = 1.0, clients: int = 2) -> list[Exchange]:
    """Answers of `clients` with a few percent of noise, times this factor."""
    factors = [(first * random.uniform(0.97, 1.03), gap * random.uniform(0.97, 1.03)) for _ in range(clients)]
    return [answer(number, 100 * one, 10 * two) for number, (one, two) in enumerate(factors)]


def result(found: PairLevel, repetitions: int = 8) -> PairResult:
    side = PairSide(
        Served("http://127.0.0.1:1/v1", None, "tiny", None, "chat", True, True),
        "usage",
        "usage",
        (1,),
    )
    return PairResult(
        "2026-01-01T00:00:00+00:00", (side, side), 50, 11, repetitions, (found.concurrency,), 7, (found,)
    )


def words(found: PairLevel) -> dict[str, str]:
    return {metric: one.word for metric, one in found.comparisons.items()}


def test_a_round_takes_median_clients_the_longest_gap_and_all_tokens() -> None:
    late = replace(answer(2, first=400, gap=20, sent=10), arrivals_ns=(410 * MS, 420 * MS, 500 * MS))
    found = round_figures([answer(0), answer(1, first=120, gap=30), late])
    assert found.ttft_ns == 120 * MS
    assert found.gap_ns == 80 * MS
    assert found.per_token_ns == 10 * MS
    assert found.output_tps == pytest.approx(3 * 11 / 0.5)


def test_twice_the_time_to_the_first_token_is_slower_there_alone() -> None:
    random = Random(1)
    found = level(*((noisy(random), noisy(random, first=2)) for _ in range(8)))
    assert words(found) == {
        "ttft": "slower", "gap": "no difference shown", "per_token": "no difference shown",
        "output_tps": "slower",
    }  # fmt: skip
    assert found.comparisons["ttft"].ratio == pytest.approx(2, rel=0.05)
    # 200 ms against 300 ms for the same tokens: a ratio of speeds is under 1 where the second is slower.
    speed = found.comparisons["output_tps"]
    assert speed.ratio == pytest.approx(2 / 3, rel=0.05) and speed.low <= speed.ratio <= speed.high < 1


def test_half_the_time_per_token_is_faster_and_a_speed_above_1() -> None:
    random = Random(2)
    found = level(*((noisy(random), noisy(random, gap=0.5)) for _ in range(8)))
    assert words(found) == {
        "ttft": "no difference shown", "gap": "faster", "per_token": "faster", "output_tps": "faster"
    }  # fmt: skip
    assert found.comparisons["per_token"].ratio == pytest.approx(0.5, rel=0.05)
    assert found.comparisons["output_tps"].low > 1
    first, second = found.medians
    assert first.per_token_ns == pytest.approx(10 * MS, rel=0.05)
    assert second.per_token_ns == pytest.approx(5 * MS, rel=0.05)


def test_equal_servers_show_no_difference() -> None:
    random = Random(3)
    found = level(*((noisy(random), noisy(random)) for _ in range(12)))
    assert found.status == "ok" and set(words(found).values()) == {"no difference shown"}
    same = level(*(([answer()], [answer()]) for _ in range(8)))
    assert {one.ratio for one in same.comparisons.values()} == {1.0}


def test_a_failure_on_either_side_drops_its_round_and_is_said() -> None:
    broken = replace(answer(1, first=1), status="cut", error="gone")
    waited = replace(answer(1), rate_limited=2)
    good = [answer(0), answer(1)]
    rounds = [(good, good)] * 8 + [([answer(0), broken], good), (good, [answer(0), broken]), (good, [waited])]
    found = level(*rounds)
    assert (found.status, len(found.rounds), len(found.pairs)) == ("incomplete", 11, 8)
    assert {one.pairs for one in found.comparisons.values()} == {8}
    assert {one.ratio for one in found.comparisons.values()} == {1.0}
    said = " ".join(pair_warnings(result(found)))
    assert "first: 1 of 22 requests failed (1 cut); the first: gone." in said
    assert (
        "second: 1 of 21 requests failed" in said and "second: the server asked to wait (429) 2 times" in said
    )
    assert "3 of 11 rounds are no pair" in said


def test_a_server_that_is_gone_ends_the_level_with_what_there_is() -> None:
    dead = replace(answer(), status="unreachable", error="no connection", arrivals_ns=())
    found = level(([answer()], [answer()]), ([answer()], [dead]), asked=8)
    assert (found.status, found.stopped_by, len(found.pairs)) == ("stopped", "second", 1)
    said = " ".join(pair_warnings(result(found)))
    assert "the second server no longer answers (no connection): ended after 2 of 8 rounds." in said
    nothing = level(([dead], [answer()]), asked=8)
    assert (nothing.status, nothing.stopped_by, nothing.comparisons) == ("failed", "first", {})


def test_what_is_not_equal_besides_the_servers_confounds() -> None:
    rounds = [([answer()], [replace(answer(), cached_tokens=32)])] * 8
    assert level(*rounds).status == "confounded"
    assert "second: CONFOUNDED: up to 32 prompt tokens" in pair_warnings(result(level(*rounds)))[0]
    short = level(*[([answer()], [answer(chunks=9)])] * 8)
    assert short.status == "confounded"
    said = "1 client: CONFOUNDED: the answers had 11 tokens on the first, 9 on the second."
    assert said in pair_warnings(result(short))
    longer = level(*[([answer()], [replace(answer(), prompt_tokens=52)])] * 8)
    assert longer.status == "confounded"
    assert level(*[([answer()], [replace(answer(), prompt_tokens=51)])] * 8).status == "ok"


def test_one_token_has_neither_gap_nor_time_per_token() -> None:
    found = level(*[([answer(chunks=1)], [answer(chunks=1)])] * 8)
    assert set(found.comparisons) == {"ttft", "output_tps"}
    assert pair_to_dict(result(found))["levels"][0]["comparisons"]["gap"] is None


def test_the_fewest_pairs_are_those_that_can_show_a_difference() -> None:
    def shown(pairs: int) -> bool:
        return compare_paired([2.0] * pairs, [1.0] * pairs).p_value <= 1 - CONFIDENCE

    assert shown(FEWEST_PAIRS) and not shown(FEWEST_PAIRS - 1)
    assert few_pairs_words(FEWEST_PAIRS) is None
    assert (
        few_pairs_words(5)
        == "5 pairs of rounds cannot show a difference at 99 %, however large it is: 8 can."
    )
    assert few_pairs_words(5) in pair_warnings(result(level(*[([answer()], [answer()])] * 5)))[-1]


def test_each_server_goes_first_about_as_often_and_in_no_pattern() -> None:
    orders = [draw_order(seed, 1, 8) for seed in range(400)]
    assert 0.45 < sum(map(sum, orders)) / 3200 < 0.55
    assert len(set(orders)) > 150
    assert (
        draw_order(5, 1, 8) == orders[5] and len({draw_order(5, clients, 32) for clients in (1, 2, 4)}) == 3
    )


def test_the_json_has_raw_exchanges_of_both_sides_and_null_for_what_is_unknown() -> None:
    broken = replace(answer(), status="cut", error="gone", arrivals_ns=())
    found = pair_to_dict(result(level(*[([answer(sent=5)], [answer()])] * 8, ([answer()], [broken]))))
    assert found["schema"] == "qnext.endpoint-pair/1" and json.loads(json.dumps(found)) == found
    one = found["levels"][0]
    assert set(one["comparisons"]) == set(METRICS) and set(one["medians"]) == {"first", "second"}
    assert set(one["comparisons"]["ttft"]) == {
        "ratio", "low", "high", "confidence", "p_value", "pairs", "word"
    }  # fmt: skip
    first, last = one["rounds"][0], one["rounds"][-1]
    assert (first["order"], first["pair"]) == (["first", "second"], True)
    assert first["first"]["exchanges"][0]["sent_ns"] == 5 * MS
    assert first["second"]["figures"]["ttft_ns"] == 100 * MS
    assert last["pair"] is False and last["second"]["figures"] is None
    assert last["second"]["exchanges"][0]["error"] == "gone"


def compare(
    first: EndpointServer, second: EndpointServer, concurrency: tuple[int, ...] = (2,), repetitions: int = 8
) -> PairResult:
    task = EndpointTask(
        first.url, None, concurrency, prompt=40, generate=5, repetitions=repetitions, deadline_s=5
    )
    return measure_pair(PairTask(task, second.url, rest_s=0.0), PairWatch())


def spans(asks: list[Asked], clients: int) -> list[tuple[int, int]]:
    """(first arrival, last chunk) of each round's requests to a server, in turn."""
    rounds = [asks[at : at + clients] for at in range(0, len(asks), clients)]
    return [(min(one.arrived_ns for one in asked), max(one.sent_ns[-1] for one in asked)) for asked in rounds]


def test_both_servers_get_as_many_requests_never_at_once_and_in_the_order_drawn() -> None:
    with EndpointServer(Manner(gap_s=0.001)) as one, EndpointServer(Manner(gap_s=0.001)) as two:
        found = compare(one, two)
        counted = [server.asks()[-2 * 8 :] for server in (one, two)]
        assert (one.most_at_once, two.most_at_once) == (2, 2)
        assert len(one.asks()) == len(two.asks())
        prompts = [asked.prompt for server in (one, two) for asked in server.asks()[1:]]
    assert len(set(prompts)) == len(prompts)
    firsts, seconds = (spans(asked, 2) for asked in counted)
    for done, first, second in zip(found.levels[0].rounds, firsts, seconds, strict=True):
        early, late = (first, second) if done.begun_by == 0 else (second, first)
        assert early[1] < late[0]
    assert tuple(done.begun_by for done in found.levels[0].rounds) == draw_order(found.seed, 2, 8)


def test_prompts_have_the_same_tokens_however_each_server_counts() -> None:
    with EndpointServer(Manner(words_of_template=22)) as one, EndpointServer(Manner(tokenizes=True)) as two:
        found = compare(one, two, repetitions=2)
    lengths = {one.prompt_tokens for done in found.levels[0].rounds for side in done.sides for one in side}
    assert lengths == {40} and found.levels[0].status == "ok"


def test_a_server_that_hangs_ends_the_run_and_one_that_never_works_is_an_error() -> None:
    with (
        EndpointServer() as one,
        EndpointServer(Manner(fault=lambda number: "hang" if number > 6 else None)) as two,
    ):
        task = EndpointTask(one.url, None, (1, 2), prompt=40, generate=5, repetitions=8, deadline_s=0.4)
        found = measure_pair(PairTask(task, two.url, rest_s=0.0), PairWatch())
        assert (found.status, len(found.levels)) == ("stopped", 1)
        assert (len(found.levels[0].rounds), len(found.levels[0].pairs)) == (3, 2)
        assert "Not measured after that: 2 clients." in pair_warnings(found)
        two.manner.fault = lambda number: 503
        with pytest.raises(EngineError, match=f"{two.url}: HTTP 503"):
            compare(one, two)
