"""The trip of `qnext serve`: a planned model that answers many at once, and that starts again when it dies.

One thread does all that blocks: it plans, loads, waits for the engine's death, waits a little longer each
time, and loads again with the next safer layout where that may be at fault. Jobs come from the event loop and
never wait for that thread: while there is no engine they are told so at once.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import re
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from qnext.config import Paths
from qnext.engine.build import EngineBuild
from qnext.engine.serving import ServingEngine
from qnext.errors import EngineError, QnextError
from qnext.models.chat import chat_template, sampling_defaults
from qnext.pipeline.planning import PlannedModel
from qnext.pipeline.request import Request
from qnext.pipeline.running import Planner, RunningModel
from qnext.pipeline.serve_values import Begun, Ended, Job, Piece, Refused, ServedModel, Status, Unavailable
from qnext.pipeline.serving_jobs import Jobs
from qnext.pipeline.serving_restarts import GIVEN_UP, Restarts
from qnext.pipeline.surroundings import Notice
from qnext.plan.plan import Plan, plan_to_dict

logger = logging.getLogger(__name__)

_LOADING_RETRY_S = 5.0
_CLOSE_LIMIT_S = 15.0
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


class _Stopped(Exception):
    """The server ends while the model loads."""


class Supervisor:
    """A model that is kept running: `Backend` of `qnext.pipeline.serve_values`.

    `start` returns at once; `status` tells how far it is. Loading that fails for the first time is final:
    `error` then says why. Later deaths of the engine are answered with a restart, after 1, 2, 4 … 30 seconds,
    until there were too many (`Restarts`). `planner` as in RunningModel.
    """

    def __init__(
        self, request: Request, paths: Paths, notice: Notice, *, planner: Planner | None = None
    ) -> None:
        self._request, self._paths, self._notice, self._planner = request, paths, notice, planner
        self._jobs = Jobs()
        self._stopping = threading.Event()
        self._draining = False
        self._news: queue.SimpleQueue[EngineError | None] = queue.SimpleQueue()
        self._status = Status("loading", 0.0, "planning")
        self._engine: ServingEngine | None = None
        self._served: ServedModel | None = None
        self._restarts = Restarts()
        self._warned: set[str] = set()
        self._load_s = _LOADING_RETRY_S
        self._thread = threading.Thread(target=self._live, name="supervisor", daemon=True)
        self.planned: PlannedModel | None = None
        self.engine_pid: int | None = None
        self.error: QnextError | None = None

    def start(self) -> None:
        """Begin to plan and load."""
        self._thread.start()

    # --- Backend --------------------------------------------------------------------------------------

    @property
    def status(self) -> Status:
        """How it stands now."""
        return self._status

    @property
    def model(self) -> ServedModel | None:
        """What is served; None until it was loaded once."""
        return self._served

    async def generate(self, job: Job) -> AsyncGenerator[Begun | Piece | Ended, None]:
        """That it has begun, the pieces of the answer, its end; see `Backend.generate`."""
        engine = self._ready_engine()
        if self._jobs.suspects.is_guilty(job):
            raise Refused("bad", "the engine died twice of this very request; it is not tried again")
        running = self._jobs.submit(engine, job)
        try:
            while True:
                answer = await running.answers.get()
                if isinstance(answer, Refused | Unavailable):
                    raise answer
                yield answer
                if isinstance(answer, Ended):
                    return
        finally:
            self._jobs.drop(running)

    async def tokenize(self, text: str, *, special: bool = True, add_bos: bool = False) -> list[int]:
        """Token ids of `text`. Raises Unavailable."""
        engine = self._ready_engine()
        reply = await self._jobs.ask(
            engine, lambda number: engine.tokenize(number, text, special=special, add_bos=add_bos)
        )
        return cast("list[int]", reply["tokens"])

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`. Raises Unavailable."""
        engine = self._ready_engine()
        reply = await self._jobs.ask(engine, lambda number: engine.detokenize(number, list(tokens)))
        return str(reply["text"])

    async def state(self) -> Mapping[str, Any]:
        """Slots, queue, prompt cache and totals as the engine tells them. Raises Unavailable."""
        engine = self._ready_engine()
        reply = await self._jobs.ask(engine, engine.ask_state)
        return {name: value for name, value in reply.items() if name not in ("event", "id", "mark")}

    def _ready_engine(self) -> ServingEngine:
        status, engine = self._status, self._engine
        if self._draining:
            raise Unavailable("the server is being stopped", None)
        if status.state != "ok" or engine is None:
            raise Unavailable(status.why, None if status.state == "failed" else self._load_s)
        return engine

    @property
    def running(self) -> int:
        """Jobs that have no end yet."""
        return len(self._jobs)

    # --- the end --------------------------------------------------------------------------------------

    async def drain(self, grace_s: float) -> None:
        """Take no new jobs; give the running ones `grace_s` to end, then end them."""
        self._draining = True
        deadline = time.monotonic() + grace_s
        while len(self._jobs) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._jobs.end_all(Unavailable("the server was stopped before this answer had come to its end", None))

    def close(self) -> None:
        """End the engine, whatever it does."""
        self._draining = True
        self._stopping.set()
        self._news.put(None)
        if self._thread.is_alive():
            self._thread.join(_CLOSE_LIMIT_S)

    # --- the supervisor's own thread ------------------------------------------------------------------

    def _live(self) -> None:
        try:
            model = RunningModel(
                self._request, self._paths, self._notice, self._on_progress, planner=self._planner
            )
            with model:
                self._keep_running(model)
        except _Stopped:
            pass
        except QnextError as error:
            self._fail(error)
        except BaseException as bug:
            self._status = Status("failed", 0.0, f"a fault of qnext itself ({type(bug).__name__})")
            raise
        finally:
            self._engine = self.engine_pid = None

    def _keep_running(self, model: RunningModel) -> None:
        while (death := self._serve(model)) is not None:
            error: QnextError = death
            while True:
                wait_s = self._restarts.after_death()
                if wait_s is None:
                    raise EngineError(f"{error.message}; {GIVEN_UP}", hint=error.hint) from error
                self._notice(f"{error.message}; starting it again in {wait_s:g} s")
                self._status = Status("restarting", 0.0, f"{error.message}; the engine starts again")
                if self._stopping.wait(wait_s):
                    return
                try:
                    model.recover(error)
                except QnextError as again:
                    error = again
                else:
                    self._notice("the engine is back")
                    break

    def _serve(self, model: RunningModel) -> EngineError | None:
        """Answer until the engine dies, which is returned, or the server ends: None."""
        plan = model.planned.plan
        engine = ServingEngine(model.session)

        def on_end(error: EngineError) -> None:
            # The status first: a job that is asked for after this must not go to the dead engine.
            self._engine = self.engine_pid = None
            self._status = Status("restarting", 0.0, f"{error.message}; the engine starts again")
            self._jobs.call(self._jobs.engine_died, engine, error, self._load_s)
            self._news.put(error)

        engine.start(self._jobs.deliver, on_end, cache_bytes=prompt_cache_bytes(plan))
        self._load_s = max(1.0, model.opened.load_ns / 1e9)
        self.planned, self._served = model.planned, describe_served(model)
        for warning in model.warnings:
            if warning not in self._warned:
                self._notice(warning)
        self._warned.update(model.warnings)
        self._engine, self.engine_pid = engine, model.session.pid
        self._status = Status("ok", 1.0)
        death = self._news.get()
        if death is None:
            self._engine = self.engine_pid = None
            engine.stop()
        return death

    def _on_progress(self, share: float) -> None:
        if self._stopping.is_set():
            raise _Stopped
        state, why = self._status.state, self._status.why
        if state == "loading":
            why = "loading the model"
        self._status = replace(self._status, progress=share, why=why)

    def _fail(self, error: QnextError) -> None:
        self.error = error
        hint = f" {error.hint}" if error.hint else ""
        self._status = Status("failed", 0.0, f"{error.message}.{hint}")
        logger.info("failed: %s", error.message)


def prompt_cache_bytes(plan: Plan) -> int:
    """What the plan leaves for the states of earlier prompts: those of whole prompts and snapshots within."""
    caches = plan.caches
    return caches.prompt_cache_bytes + caches.checkpoints * caches.checkpoint_bytes * plan.placement.parallel


def describe_served(model: RunningModel) -> ServedModel:
    """What clients may know of a model that is loaded; no folders, which name the user."""
    planned, facts = model.planned, model.opened.facts
    header = planned.model.header
    bos, eos = str(facts["bos"]), str(facts["eos"])
    name = served_name(planned)
    return ServedModel(
        name=name,
        created=int(time.time()),
        context=int(str(facts["context_per_sequence"])),
        slots=planned.plan.placement.parallel,
        vocabulary=int(str(facts["vocabulary"])),
        bos=bos,
        eos=eos,
        template=chat_template(header, bos=bos, eos=eos),
        sampling=sampling_defaults(header),
        plan=_without_folders(planned, name),
        words=tuple(f"{reason.what}: {reason.because}" for reason in planned.plan.reasons),
        engine=_engine_words(model.build),
    )


def served_name(planned: PlannedModel) -> str:
    """What clients call the model: its file's name without suffix and number of the part."""
    stem = Path(planned.model.path).name.removesuffix(".gguf")
    return _SHARD.sub("", stem) or "model"


def _without_folders(planned: PlannedModel, name: str) -> dict[str, Any]:
    plan, path = plan_to_dict(planned.plan), planned.model.path
    plan["model"]["ref"] = name
    plan["llama_server_argv"] = [
        Path(path).name if word == path else word for word in plan["llama_server_argv"]
    ]
    return plan


def _engine_words(build: EngineBuild) -> str:
    commit = f" (llama.cpp {build.llama_commit})" if build.llama_commit else ""
    return f"{build.name} {build.version}{commit}, {'+'.join(build.backends)}"
