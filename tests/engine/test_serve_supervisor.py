"""A served model as its jobs see it: it says how far it is, answers, survives crashes, and stops in order."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Coroutine, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from qnext.config import Paths, find_paths
from qnext.errors import DoesNotFitError
from qnext.models.synth import DEMO_SENTENCE
from qnext.pipeline import serving_restarts
from qnext.pipeline.request import Request
from qnext.pipeline.serve_values import Begun, Ended, Job, Piece, Refused, Status, Unavailable
from qnext.pipeline.serving import Supervisor
from qnext.units import MIB

pytestmark = pytest.mark.engine

QUESTION = "<|im_start|>user\nWhat can you do?<|im_end|>\n<|im_start|>assistant\n"
REQUEST = Request(model="demo", context=2048, parallel=2, threads=1, threads_batch=1)
ASKED = Job(text=QUESTION, max_tokens=60, sampling={"temperature": 0})
LONG = Job(text=QUESTION, max_tokens=900, ignore_eos=True, sampling={"temperature": 0})
WAIT_S = 20.0


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_restarts, "FIRST_WAIT_S", 0.02)


@pytest.fixture(scope="module")
def notices() -> list[str]:
    return []


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Paths:
    """A copy of the session's caches: crashes here must not teach other tests a safer layout."""
    shared, own = find_paths(), tmp_path_factory.mktemp("supervisor")
    shutil.copytree(shared.cache_dir, own / "cache")
    return replace(shared, cache_dir=own / "cache")


@pytest.fixture(scope="module")
def seen(notices: list[str]) -> list[Status]:
    return []


@pytest.fixture(scope="module")
def supervisor(paths: Paths, notices: list[str], seen: list[Status]) -> Iterator[Supervisor]:
    running = Supervisor(REQUEST, paths, notices.append)
    seen.append(running.status)
    running.start()
    while running.status.state == "loading":
        seen.append(running.status)
        time.sleep(0.001)
    yield running
    running.close()


async def answer(supervisor: Supervisor, job: Job) -> tuple[str, Ended]:
    pieces = [event async for event in supervisor.generate(job)]
    assert isinstance(pieces[0], Begun) and isinstance(pieces[-1], Ended)
    return "".join(piece.text for piece in pieces if isinstance(piece, Piece)), pieces[-1]


async def until_ok(supervisor: Supervisor) -> None:
    deadline = time.monotonic() + WAIT_S
    while supervisor.status.state != "ok":
        assert supervisor.status.state == "restarting" and time.monotonic() < deadline, supervisor.status
        await asyncio.sleep(0.01)


async def lost(supervisor: Supervisor, job: Job, number: int) -> Unavailable:
    """What a running job hears when the engine's process gets a signal."""
    async with aclosing(supervisor.generate(job)) as events:
        assert isinstance(await anext(events), Begun)
        await anext(events)
        assert supervisor.engine_pid is not None
        os.kill(supervisor.engine_pid, number)
        with pytest.raises(Unavailable) as caught:
            async for _ in events:
                pass
    return caught.value


def run(trip: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(trip, 60))


def test_it_is_known_how_far_loading_is_and_jobs_are_told_to_wait(
    supervisor: Supervisor, seen: list[Status], paths: Paths
) -> None:
    assert supervisor.status == Status("ok", 1.0)
    assert seen[0].why == "planning" and all(status.state == "loading" for status in seen)
    shares = [status.progress for status in seen]
    assert shares == sorted(shares) and shares[-1] > 0.5 and seen[-1].why == "loading the model"

    async def ask_too_early() -> None:
        with pytest.raises(Unavailable) as caught:
            await answer(Supervisor(REQUEST, paths, print), ASKED)
        assert caught.value.why == "planning" and caught.value.retry_after_s

    run(ask_too_early())


def test_it_answers_and_tells_what_is_served_without_folders(supervisor: Supervisor, paths: Paths) -> None:
    async def trip() -> None:
        text, end = await answer(supervisor, ASKED)
        assert (text, end.reason) == (DEMO_SENTENCE, "eos")
        assert end.generated and end.decode_ns and end.prompt_tokens > end.cached_tokens
        assert await supervisor.detokenize(await supervisor.tokenize(DEMO_SENTENCE)) == DEMO_SENTENCE
        assert supervisor.planned is not None
        caches = supervisor.planned.plan.caches
        cache = (await supervisor.state())["cache"]
        assert (
            cache["budget_bytes"]
            == caches.prompt_cache_bytes + 2 * caches.checkpoints * caches.checkpoint_bytes
        )
        assert cache["budget_bytes"] > 100 * MIB

    run(trip())
    model = supervisor.model
    assert model is not None and (model.slots, model.context) == (2, 1024)
    assert model.template is not None and model.words and model.plan["fits"]
    assert str(paths.cache_dir) not in repr((model.plan, model.words, model.name))


def test_eight_at_once_say_what_one_says_alone(supervisor: Supervisor) -> None:
    async def trip() -> None:
        answers = await asyncio.gather(*(answer(supervisor, ASKED) for _ in range(8)))
        assert {text for text, _ in answers} == {DEMO_SENTENCE}

    run(trip())


def test_an_answer_that_nobody_reads_on_frees_its_slot(supervisor: Supervisor) -> None:
    async def trip() -> None:
        async with aclosing(supervisor.generate(LONG)) as events:
            await anext(events)
            assert any(slot["id"] for slot in (await supervisor.state())["slots"])
        assert supervisor.running == 0
        state = await supervisor.state()  # asked after the drop, so answered after it
        assert not any(slot["id"] for slot in state["slots"])

    run(trip())


def test_what_cannot_be_begun_is_refused_with_its_numbers(supervisor: Supervisor) -> None:
    async def trip() -> None:
        with pytest.raises(Refused) as caught:
            await answer(supervisor, replace(ASKED, text="word " * 3000))
        assert caught.value.kind == "context_full"
        assert caught.value.numbers["prompt_tokens"] > caught.value.numbers["context"] == 1024
        with pytest.raises(Refused):
            await supervisor.detokenize([10**9])
        assert (await answer(supervisor, ASKED))[0] == DEMO_SENTENCE

    run(trip())


def test_a_killed_engine_ends_its_jobs_with_the_reason_and_comes_back(
    supervisor: Supervisor, notices: list[str]
) -> None:
    async def trip() -> None:
        before = supervisor.engine_pid
        for _ in range(2):  # killed from outside twice at the same job: not the job's fault
            told = await lost(supervisor, LONG, signal.SIGKILL)
            assert "SIGKILL" in told.why and "starts again" in told.why and told.retry_after_s
            assert "very request" not in told.why
            with pytest.raises(Unavailable, match="SIGKILL"):
                await answer(supervisor, ASKED)
            await until_ok(supervisor)
        assert (await answer(supervisor, ASKED))[0] == DEMO_SENTENCE
        assert supervisor.engine_pid not in (None, before)

    run(trip())
    assert any("starting it again" in notice for notice in notices) and "the engine is back" in notices


def test_a_crash_moves_to_a_safer_layout_and_a_job_that_crashes_twice_is_named_and_refused(
    paths: Paths,
) -> None:
    async def trip(supervisor: Supervisor) -> None:
        told = await lost(supervisor, LONG, signal.SIGSEGV)
        assert "SIGSEGV" in told.why and "very request" not in told.why
        await until_ok(supervisor)
        assert supervisor.planned is not None and supervisor.planned.surroundings.repack == "off"
        told = await lost(supervisor, LONG, signal.SIGSEGV)
        assert "very request" in told.why
        await until_ok(supervisor)
        with pytest.raises(Refused, match="died twice"):
            await answer(supervisor, LONG)
        assert (await answer(supervisor, replace(ASKED, text="Hello")))[1].generated

    supervisor = Supervisor(replace(REQUEST, repack="experts"), paths, print)
    supervisor.start()
    try:
        while supervisor.status.state == "loading":
            time.sleep(0.01)
        run(trip(supervisor))
    finally:
        supervisor.close()


def test_a_server_that_keeps_dying_gives_up_and_says_why(paths: Paths) -> None:
    supervisor = Supervisor(REQUEST, paths, print)
    supervisor.start()

    async def trip() -> None:
        deadline = time.monotonic() + WAIT_S
        killed = None
        while supervisor.status.state != "failed" and time.monotonic() < deadline:
            if supervisor.engine_pid not in (None, killed):
                killed = supervisor.engine_pid
                os.kill(killed, signal.SIGKILL)
            await asyncio.sleep(0.005)
        with pytest.raises(Unavailable) as caught:
            await answer(supervisor, ASKED)
        assert "given up after 5 crashes" in caught.value.why and "SIGKILL" in caught.value.why
        assert caught.value.retry_after_s is None

    try:
        run(trip())
    finally:
        supervisor.close()


def test_a_model_that_does_not_fit_fails_with_the_planners_error(paths: Paths) -> None:
    supervisor = Supervisor(replace(REQUEST, ram=MIB), paths, print)
    supervisor.start()
    deadline = time.monotonic() + WAIT_S
    while supervisor.status.state == "loading" and time.monotonic() < deadline:
        time.sleep(0.01)
    supervisor.close()
    assert supervisor.status.state == "failed" and "does not fit" in supervisor.status.why
    assert isinstance(supervisor.error, DoesNotFitError) and supervisor.model is None


@pytest.mark.parametrize("moment", ["planning", "loading the model"])
def test_stopping_while_it_loads_is_quick_and_leaves_nothing(moment: str, paths: Paths) -> None:
    children = set(psutil.Process().children(recursive=True))
    supervisor = Supervisor(REQUEST, paths, print)
    supervisor.start()
    while supervisor.status.why != moment and supervisor.status.state == "loading":
        time.sleep(0.001)
    began = time.monotonic()
    supervisor.close()
    assert time.monotonic() - began < 8
    assert set(psutil.Process().children(recursive=True)) <= children


def test_stopping_lets_running_answers_end_and_then_ends_them(supervisor: Supervisor) -> None:
    """The last test of this supervisor: it is drained here."""

    async def trip() -> None:
        running = asyncio.create_task(answer(supervisor, ASKED))
        endless = asyncio.create_task(answer(supervisor, LONG))
        while supervisor.running < 2:
            await asyncio.sleep(0.001)
        draining = asyncio.create_task(supervisor.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="being stopped"):
            await answer(supervisor, ASKED)
        assert (await running)[0] == DEMO_SENTENCE
        assert not draining.done()
        draining.cancel()
        await supervisor.drain(0)
        with pytest.raises(Unavailable, match="before this answer had come to its end"):
            await endless

    run(trip())
