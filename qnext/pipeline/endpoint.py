"""The trip of `bench run --url`: get to know a server, load it with more and more clients, count.

Per level every client warms up once at full prompt length (new batch shapes compile graphs, pages come in);
then all start together and each sends its requests one after the other.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from qnext.bench.endpoint import Level, make_level
from qnext.bench.endpoint_result import EndpointResult
from qnext.bench.prompts import PromptMaker
from qnext.pipeline.endpoint_client import Answer, EndpointClient
from qnext.pipeline.endpoint_load import EndpointTask, ServerLoad, get_to_know, make_client


@dataclass(frozen=True, slots=True)
class EndpointWatch:
    """What to call as it goes: with the share done and words, and with every level that has ended."""

    on_progress: Callable[[float, str], None] = lambda share, words: None
    on_level: Callable[[Level], None] = lambda level: None


def measure_endpoint(task: EndpointTask, watch: EndpointWatch) -> EndpointResult:
    """Measure the server at `task.url`.

    Raises UsageError for an address that is not on loopback, for a wrong path, a missing or refused key, and
    when the model has to be named; ModelError for a model that is not served; EngineError when the server is
    not there, fails, hangs or speaks something else. Once the first level runs, failures are in the result.
    """
    return asyncio.run(_measure(task, make_client(task), watch))


async def _measure(task: EndpointTask, client: EndpointClient, watch: EndpointWatch) -> EndpointResult:
    when = datetime.now(UTC).isoformat(timespec="seconds")
    seed = secrets.randbits(64)
    async with client:
        watch.on_progress(0.0, "getting to know the server")
        load = await get_to_know(client, task, PromptMaker(seed))
        levels: list[Level] = []
        for clients in task.concurrency:
            levels.append(await _run_level(load, clients, levels, watch))
            watch.on_level(levels[-1])
            if levels[-1].status == "failed":
                break
    return EndpointResult(
        when=when,
        server=load.server,
        prompt=task.prompt,
        generate=task.generate,
        repetitions=task.repetitions,
        concurrency=task.concurrency,
        seed=seed,
        prompt_source=load.prompt_source,
        output_source=load.output_source,
        round_trip_ns=load.round_trips_ns,
        levels=tuple(levels),
    )


async def _run_level(load: ServerLoad, clients: int, before: list[Level], watch: EndpointWatch) -> Level:
    """Warm up, start all clients together, and put together what they saw."""
    task, words = load.task, f"{clients} at once"
    done = sum(level.concurrency for level in before) * task.repetitions
    total = sum(task.concurrency) * task.repetitions
    watch.on_progress(done / total, f"{words}: warming up")
    prompts = [[await load.prompt() for _ in range(task.repetitions)] for _ in range(clients)]
    await load.warm_up(clients, first=not before)
    together = asyncio.Barrier(clients)
    seen: list[tuple[str, Answer]] = []

    async def work(number: int) -> None:
        await together.wait()
        for prompt in prompts[number]:
            answer = await load.client.ask(prompt, task.generate, client=number)
            seen.append((prompt, answer))
            watch.on_progress(
                (done + len(seen)) / total, f"{words}: {len(seen)} of {clients * task.repetitions} answers"
            )
            if answer.exchange.status in ("hung", "unreachable"):
                break

    await asyncio.gather(*(work(number) for number in range(clients)))
    exchanges = await load.counted(seen)
    started_ns = min(one.sent_ns for one in exchanges)
    return make_level(clients, started_ns, exchanges, load.round_trip_ns)
