"""From jobs to events: counts them, merges the choices of one request, turns bad ends into errors.

Per token there is one small object and no task: `n` choices cost a task each, one choice none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from qnext.pipeline.serve_values import Backend, Begun, Ended, Job, Piece, ServedModel, Unavailable
from qnext.serve.errors import ApiError
from qnext.serve.metrics import Meters
from qnext.serve.queue import Gate
from qnext.serve.settings import ServeSettings

Event = Begun | Piece | Ended


@dataclass(frozen=True, slots=True)
class Server:
    """What every route works with."""

    backend: Backend
    settings: ServeSettings
    gate: Gate
    meters: Meters

    def model(self) -> ServedModel:
        """The model, ready to answer. Raises Unavailable."""
        status, model = self.backend.status, self.backend.model
        if status.state != "ok" or model is None:
            wait = None if status.state == "failed" else 2.0
            raise Unavailable(status.why or f"the model is {status.state} ({status.progress:.0%})", wait)
        return model

    async def generate(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Event], None]:
        """(number of the job, event) of all jobs as they come. Raises ApiError, Refused, Unavailable.

        Closing it drops all jobs. Places in the queue are held from the first event asked for to the end.
        """
        with self.gate.pass_in(len(jobs), self.model().slots):
            if len(jobs) == 1:
                async with aclosing(self._run(jobs[0])) as events:
                    async for event in events:
                        yield 0, event
                return
            async with aclosing(self._merge(jobs)) as merged:
                async for pair in merged:
                    yield pair

    async def _run(self, job: Job) -> AsyncGenerator[Event, None]:
        meters, begun, ended = self.meters, False, False
        meters.waiting += 1
        try:
            async with aclosing(self.backend.generate(job)) as events:
                async for event in events:
                    if type(event) is not Piece:
                        if isinstance(event, Begun) and not begun:
                            begun = True
                            meters.waiting, meters.running = meters.waiting - 1, meters.running + 1
                        elif isinstance(event, Ended):
                            ended = True
                            self._judge(event)
                    yield event
        except GeneratorExit:
            meters.left += not ended
            raise
        except asyncio.CancelledError:
            meters.left += not ended
            raise
        except Unavailable:
            meters.failed += 1
            raise
        finally:
            meters.running -= begun
            meters.waiting -= not begun

    def _judge(self, ended: Ended) -> None:
        """Count an end. Raises ApiError for one that is no answer."""
        if ended.reason == "error":
            self.meters.failed += 1
            raise ApiError(500, ended.message or "the engine could not go on", code="engine_error")
        if ended.reason == "dropped":
            raise ApiError(503, "the server stopped this answer", code="stopping", retry_after_s=5.0)
        self.meters.count(ended)
        if ended.reason == "deadline":
            limit = self.settings.deadline_s
            told = f" of {limit:g} s" if limit is not None else ""
            raise ApiError(504, f"the answer was not ready within this server's limit{told}", code="deadline")

    async def _merge(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Event], None]:
        ready: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()

        async def follow(index: int, job: Job) -> None:
            try:
                async with aclosing(self._run(job)) as events:
                    async for event in events:
                        ready.put_nowait((index, event))
            finally:
                ready.put_nowait(None)

        tasks = [asyncio.create_task(follow(index, job)) for index, job in enumerate(jobs)]
        try:
            running = len(tasks)
            while running:
                pair = await ready.get()
                if pair is not None:
                    yield pair
                    continue
                running -= 1
                for task in [task for task in tasks if task.done()]:
                    task.result()
            for task in tasks:
                await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
