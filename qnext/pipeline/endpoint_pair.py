"""The trip of `bench run --url A --url B`: two servers by one ruler, paired in one run.

Per level both are warmed up. Then come rounds: all clients send one request each to one server at once, while
the other is idle, and then to the other; who goes first is drawn. What the machine does meanwhile (clocks,
heat, other programs) meets both alike, which two runs one after the other cannot say.

Before each half of a round nothing is asked for a moment. A server that has just answered may not be at rest:
it frees slots and keeps states, and where llama.cpp has threads of its own (built without OpenMP) they spin
through 6.5 million pauses before they sleep (`ggml_graph_compute_poll_for_work`), a tenth of a second or
more. All that would take cores from the other server.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from qnext.bench.endpoint_pair import (
    SIDES,
    PairLevel,
    Round,
    draw_order,
    gone,
    make_pair_level,
)
from qnext.bench.endpoint_pair_result import PairResult, PairSide
from qnext.bench.prompts import PromptMaker
from qnext.pipeline.endpoint_client import Answer, EndpointClient
from qnext.pipeline.endpoint_load import EndpointTask, ServerLoad, get_to_know, make_client


@dataclass(frozen=True, slots=True)
class PairTask:
    """What to compare: the server of `first`, the baseline, with that at `second_url`, asked the same.

    `first.repetitions` is the number of rounds per level: each is a request by every client to both, and
    fewer than `bench.endpoint_pair.FEWEST_PAIRS` cannot show a difference. The same address twice is allowed:
    it shows what the ruler makes of none. `rest_s` is how long nothing is asked before each half of a round.
    """

    first: EndpointTask
    second_url: str
    rest_s: float = 0.2


@dataclass(frozen=True, slots=True)
class PairWatch:
    """What to call as it goes: with the share done and words, and with every level that has ended."""

    on_progress: Callable[[float, str], None] = lambda share, words: None
    on_level: Callable[[PairLevel], None] = lambda level: None


def measure_pair(task: PairTask, watch: PairWatch) -> PairResult:
    """Compare two servers.

    Raises as `measure_endpoint` does, for each of the two. Once the first level runs, failures are in the
    result: a round with one is no pair, and a server that no longer answers ends its level and the run.
    """
    asked = task.first, replace(task.first, url=task.second_url)
    return asyncio.run(_measure(task, [(make_client(one), one) for one in asked], watch))


async def _measure(
    pair: PairTask, servers: list[tuple[EndpointClient, EndpointTask]], watch: PairWatch
) -> PairResult:
    task = pair.first
    when = datetime.now(UTC).isoformat(timespec="seconds")
    seed = secrets.randbits(64)
    # One maker for both: where both addresses are one server, no prompt comes twice either.
    maker = PromptMaker(seed)
    async with AsyncExitStack() as stack:
        loads: list[ServerLoad] = []
        for name, (client, asked) in zip(SIDES, servers, strict=True):
            await stack.enter_async_context(client)
            watch.on_progress(0.0, f"getting to know the {name} server")
            loads.append(await get_to_know(client, asked, maker))
        levels: list[PairLevel] = []
        for count in task.concurrency:
            levels.append(await _run_level(pair, loads, count, levels, seed, watch))
            watch.on_level(levels[-1])
            if levels[-1].status in ("failed", "stopped"):
                break
    first, second = (
        PairSide(load.server, load.prompt_source, load.output_source, load.round_trips_ns) for load in loads
    )
    return PairResult(
        when=when,
        sides=(first, second),
        prompt=task.prompt,
        generate=task.generate,
        repetitions=task.repetitions,
        concurrency=task.concurrency,
        seed=seed,
        levels=tuple(levels),
    )


async def _run_level(
    pair: PairTask,
    loads: list[ServerLoad],
    clients: int,
    before: list[PairLevel],
    seed: int,
    watch: PairWatch,
) -> PairLevel:
    """Warm up both servers, run the rounds until one is gone, and put together what was seen."""
    task, words = pair.first, f"{clients} at once"
    done = 2 * sum(level.concurrency for level in before) * task.repetitions
    total = 2 * sum(task.concurrency) * task.repetitions
    watch.on_progress(done / total, f"{words}: warming up")
    prompts = [
        [[await load.prompt() for _ in range(clients)] for load in loads] for _ in range(task.repetitions)
    ]
    for load in loads:
        await load.warm_up(clients, first=not before)

    async def ask(side: int, prompt: str, number: int, place: str) -> tuple[str, Answer]:
        nonlocal done
        answer = await loads[side].client.ask(prompt, task.generate, client=number)
        done += 1
        watch.on_progress(done / total, f"{words}, {place}")
        return prompt, answer

    rounds: list[Round] = []
    started_ns = time.perf_counter_ns()
    for begun_by in draw_order(seed, clients, task.repetitions):
        place = f"round {len(rounds) + 1} of {task.repetitions}"
        seen: dict[int, list[tuple[str, Answer]]] = {}
        for side in (begun_by, 1 - begun_by):
            await asyncio.sleep(pair.rest_s)
            asked = enumerate(prompts[len(rounds)][side])
            seen[side] = await asyncio.gather(
                *(ask(side, prompt, number, f"{place}, {SIDES[side]} server") for number, prompt in asked)
            )
        first, second = [tuple(await load.counted(seen[side])) for side, load in enumerate(loads)]
        rounds.append(Round(begun_by, (first, second)))
        if gone(rounds):
            break
    return make_pair_level(clients, started_ns, rounds, task.repetitions)
