"""One engine child: its process, its messages, its log, and its end.

The parent never loads native code. It waits for messages with a deadline that every sign of life renews,
keeps the last lines of the child's log, and turns any way of dying into one explained error. Three threads do
the blocking: one writes requests (a stopped child does not read them), one reads answers, one the log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import BinaryIO, Self, cast

from qnext.engine.child import child_environment, silence_limit
from qnext.engine.child_log import ChildLog
from qnext.engine.crash import EngineCrashError, explain_exit, interesting_tail
from qnext.engine.protocol import Message, frame, read_message, write_frame
from qnext.errors import EngineError

logger = logging.getLogger(__name__)

LOG_GRACE_S = 30.0
"""How long the log may come behind an answer."""
CANCEL_GRACE_S = 0.7
"""How long a cancelled operation may take to come back before the child is ended: Ctrl-C acts within 1 s."""

_TIMED_OUT = object()
_ENDED = object()
_FINAL = ("done", "failed", "cancelled")


class EngineProcess:
    """A running child that takes requests, one at a time; `EngineSession` says which.

    Use as a context manager; `close` always leaves no process behind. `environment` entries are added to the
    child's environment; `LLAMA_ARG_*` never reaches it. `silence_limit_s` ends a child that sends nothing for
    that long while it works (default 600, or QNEXT_ENGINE_TIMEOUT). A `bound` child ends with the thread that
    starts it even when it is stopped (Linux). Raises EngineError when the child cannot be started.
    """

    def __init__(
        self,
        *,
        environment: dict[str, str] | None = None,
        silence_limit_s: float | None = None,
        bound: bool = False,
    ) -> None:
        self._silence_limit_s = silence_limit() if silence_limit_s is None else silence_limit_s
        self._log = ChildLog()
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._busy = False
        self._ended_because: str | None = None
        try:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "qnext.engine.llama.worker"),
                    *([str(os.getpid())] if bound else []),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**child_environment(), **(environment or {})},
                start_new_session=True,
            )
        except OSError as error:
            raise EngineError(
                f"the engine's process cannot be started: {error.strerror}",
                hint="Free memory, or raise the limit on processes (ulimit -u), then try again.",
            ) from error
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._read_messages, self._read_log, self._write_requests)
        ]
        for thread in self._threads:
            thread.start()
        try:
            self._expect("starting", only="ready")
        except BaseException:
            self.kill()
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    @property
    def log(self) -> tuple[str, ...]:
        """The last lines of the engine's log, up to the latest answer at least."""
        return self._log.lines

    @property
    def size_lines(self) -> tuple[str, ...]:
        """Log lines that state sizes: of the model's weights, and of the context made last."""
        return self._log.size_lines

    @property
    def alive(self) -> bool:
        """Whether the child still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the child: closing its input is the request, killing it the guarantee."""
        self._ended_because = self._ended_because or "it was closed"
        self._outbox.put(None)
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.kill()
        self._finish_threads()

    def kill(self) -> None:
        """End the child at once."""
        self._end("it was ended")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- messages -------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Send something to an operation under way that listens (`serve`), from any thread."""
        self._outbox.put(frame(message))

    def _request(
        self,
        doing: str,
        request: Message,
        *,
        on_progress: Callable[[float], None] | None = None,
        silence_limit_s: float | None = None,
    ) -> Message:
        with contextlib.closing(self._run(doing, request, silence_limit_s=silence_limit_s)) as messages:
            for message in messages:
                if message["event"] == "done":
                    return message
                if message["event"] == "progress" and on_progress is not None:
                    on_progress(float(cast(float, message["share"])))
        raise EngineError("the engine ended its answer early", hint="Run the command again with -v.")

    def _run(
        self,
        doing: str,
        request: Message,
        *,
        silence_limit_s: float | None = None,
        at_work_since: Callable[[], float | None] | None = None,
    ) -> Generator[Message, None, None]:
        """Send a request and yield its events up to `done`; raises on failure, death or silence.

        Silence counts from `at_work_since` at the earliest, and not at all while that is None; where it is
        not given, the child is always at work. Abandoning the iterator early (Ctrl-C included) cancels the
        operation.
        """
        if self._busy:
            raise RuntimeError("the request before this one was neither read to its end nor closed")
        if not self.alive:
            raise self._death(doing)
        self._busy, finished = True, False
        try:
            self._outbox.put(frame(request))
            while not finished:
                message = self._expect(doing, silence_limit_s=silence_limit_s, at_work_since=at_work_since)
                if message["event"] == "alive":
                    continue
                finished = message["event"] in _FINAL
                if message["event"] == "failed":
                    raise self._refusal(message)
                yield message
        except EngineError:
            finished = True
            raise
        finally:
            if not finished:
                self._cancel()
            self._busy = False

    def _cancel(self) -> None:
        """Stop the running operation; a child that does not obey in time is ended."""
        obeyed = False
        try:
            self._outbox.put(frame({"op": "cancel"}))
            deadline = time.monotonic() + CANCEL_GRACE_S
            while not obeyed and (remaining := deadline - time.monotonic()) > 0:
                message = self._next_message(remaining)
                if message is _ENDED:
                    return
                if isinstance(message, dict) and message["event"] in _FINAL:
                    self._log.wait_for(_mark(message), CANCEL_GRACE_S)
                    obeyed = True
        finally:
            if not obeyed:
                self._end("it did not stop when asked")

    def _expect(
        self,
        doing: str,
        *,
        only: str | None = None,
        silence_limit_s: float | None = None,
        at_work_since: Callable[[], float | None] | None = None,
    ) -> Message:
        limit = self._silence_limit_s if silence_limit_s is None else silence_limit_s
        message = self._next_message(limit)
        while message is _TIMED_OUT and at_work_since is not None:
            since = at_work_since()
            patience = limit if since is None else since + limit - time.monotonic()
            if patience <= 0:
                break
            message = self._next_message(patience)
        if message is _TIMED_OUT:
            self._end("it gave no sign of life")
            self._finish_threads()
            raise explain_exit(-signal.SIGKILL, self.log, doing=doing, killed_for_hang=limit)
        if message is _ENDED or not isinstance(message, dict):
            raise self._death(doing)
        if only is not None and message["event"] != only:
            raise EngineError(f"the engine answered '{message['event']}' while {doing}")
        self._log.wait_for(_mark(message), LOG_GRACE_S)
        return message

    def _next_message(self, timeout_s: float) -> object:
        try:
            message = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return _TIMED_OUT
        if message is _ENDED:
            self._inbox.put(_ENDED)  # whoever asks next must hear it too
        return message

    def _end(self, because: str) -> None:
        self._ended_because = self._ended_because or because
        self._process.kill()
        self._process.wait()

    def _death(self, doing: str) -> EngineCrashError:
        """The explained error for a child whose stream ended."""
        try:
            returncode = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._end("it closed its output but lived on")
        self._finish_threads()
        if self._ended_because is not None:
            return EngineCrashError(
                f"the engine is not running any more ({self._ended_because}), needed for {doing}",
                hint="Open the model again.",
                kind="ended",
                log_tail=interesting_tail(self.log),
            )
        return explain_exit(returncode, self.log, doing=doing, amx_in_use=self._log.amx_in_use)

    def _refusal(self, message: Message) -> EngineCrashError:
        """The error for a request that llama.cpp answered with no, without dying."""
        kind = str(message["kind"])
        return EngineCrashError(
            str(message["message"]),
            hint=_HINTS.get(kind, "Run the command again with -v to see the engine's log."),
            kind="missing" if kind == "missing" else "refused",
            log_tail=interesting_tail(self.log) if kind in _LOG_TELLS else (),
        )

    # --- threads --------------------------------------------------------------------------------------

    def _write_requests(self) -> None:
        stream = cast(BinaryIO, self._process.stdin)
        with contextlib.suppress(OSError, ValueError):  # a dead child shows itself where answers are read
            while (request := self._outbox.get()) is not None:
                write_frame(stream, request)
        with contextlib.suppress(OSError):
            stream.close()

    def _read_messages(self) -> None:
        stream = cast(BinaryIO, self._process.stdout)
        try:
            while (message := read_message(stream)) is not None:
                self._inbox.put(message)
        except ValueError as error:
            logger.warning("the engine sent %s", error)
        finally:
            self._inbox.put(_ENDED)

    def _read_log(self) -> None:
        self._log.read(cast(BinaryIO, self._process.stderr))

    def _finish_threads(self) -> None:
        self._outbox.put(None)
        for thread in self._threads:
            thread.join(timeout=2)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None and not any(thread.is_alive() for thread in self._threads):
                stream.close()


def _mark(message: Message) -> int:
    return cast(int, message.get("mark", 0))


_HINTS = {
    "missing": "Install the engine: ./scripts/qnext sets it up, or pip install 'qnext[engine]'.",
    "load": "The engine's last log lines above say why; `qnext plan` checks the file and the memory.",
    "device": "Check -ot, --rpc and --device-memory against what this engine has.",
    "context": "The log lines above say why; short of memory: a smaller --ctx-size or -ub, or -ctk q8_0.",
    "model_part": "Open the model again with it: only a context's settings can change without a load.",
    "empty": "Give a prompt of at least one character.",
    "context_full": "Start afresh with /reset, or give more room with --ctx-size.",
}

_LOG_TELLS = ("load", "context", "decode")
