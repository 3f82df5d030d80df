"""A session on the engine: one child process, its messages, its log, and its end.

The parent never loads native code. It waits for messages with a deadline that every sign of life renews,
keeps the last lines of the child's log, and turns any way of dying into one explained error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, BinaryIO, Self, cast

from qnext.engine.crash import EngineCrashError, explain_exit
from qnext.engine.protocol import LOG_MARK, Message, read_message, write_message
from qnext.errors import EngineError
from qnext.plan.values import Placement

logger = logging.getLogger(__name__)

LOG_LINES_KEPT = 2000
DEFAULT_SILENCE_LIMIT_S = 600.0
CANCEL_GRACE_S = 0.7
"""How long a cancelled operation may take to come back before the child is ended: Ctrl-C acts within 1 s."""

_TIMED_OUT = object()
_ENDED = object()


class EngineSession:
    """One engine child. Use as a context manager; `close` always leaves no process behind.

    `environment` entries are added to the child's environment; `LLAMA_ARG_*` never reaches it.
    `silence_limit_s` ends a child that sends nothing for that long while it works (default 600, or
    QNEXT_ENGINE_TIMEOUT).
    """

    def __init__(
        self, *, environment: dict[str, str] | None = None, silence_limit_s: float | None = None
    ) -> None:
        if silence_limit_s is None:
            silence_limit_s = float(os.environ.get("QNEXT_ENGINE_TIMEOUT", DEFAULT_SILENCE_LIMIT_S))
        self._silence_limit_s = silence_limit_s
        self._log: deque[str] = deque(maxlen=LOG_LINES_KEPT)
        self._mark_seen = 0
        self._mark_condition = threading.Condition()
        self._inbox: queue.Queue[object] = queue.Queue()
        self._amx_in_use = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qnext.engine.llama.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**child_environment(), **(environment or {})},
            start_new_session=True,
        )
        self._threads = [
            threading.Thread(target=self._read_messages, daemon=True),
            threading.Thread(target=self._read_log, daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self._expect("starting", only="ready")

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    @property
    def log(self) -> tuple[str, ...]:
        """The last lines of the engine's log."""
        return tuple(self._log)

    @property
    def alive(self) -> bool:
        """Whether the child still runs."""
        return self._process.poll() is None

    def describe(self, rpc_servers: tuple[str, ...] = ()) -> Message:
        """Devices, buffer types and build features of the installed engine."""
        return self._request("looking at the engine", {"op": "describe", "rpc_servers": list(rpc_servers)})

    def open(
        self,
        model: str,
        placement: Placement,
        *,
        context: int | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> Message:
        """Load `model` as placed. `on_progress` gets the share loaded, 0 to 1. Returns the active sizes."""
        self._log.clear()
        request: Message = {
            "op": "open",
            "model": model,
            "placement": asdict(placement),
            "context": context,
        }
        return self._request("loading the model", request, on_progress=on_progress)

    def dry_run(self, model: str, placement: Placement) -> list[str]:
        """Simulate the allocation without reading weights; returns the log lines that state it."""
        self._log.clear()
        self._request("planning memory", {"op": "dry_run", "model": model, "placement": asdict(placement)})
        return list(self._log)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, control tokens recognised."""
        reply = self._request("tokenising", {"op": "tokenize", "text": text})
        return cast("list[int]", reply["tokens"])

    def generate(
        self, text: str, *, max_tokens: int, sampling: dict[str, float], **options: Any
    ) -> Iterator[Message]:
        """Continue `text`: yields `prefill` and `token` events, last a `done` event with the counts."""
        request = {"op": "generate", "text": text, "max_tokens": max_tokens, "sampling": sampling, **options}
        yield from self._run("generating", request)

    def bench(
        self, *, prompt: int, generate: int, depth: int, repetitions: int, **options: Any
    ) -> Iterator[Message]:
        """Time one test: yields `sample` events (ns) as runs end, last a `done` event with all of them."""
        request = {
            "op": "bench",
            "prompt": prompt,
            "generate": generate,
            "depth": depth,
            "repetitions": repetitions,
            **options,
        }
        yield from self._run("benchmarking", request)

    def cancel(self) -> bool:
        """Stop the running operation. True if the child obeyed in time, False if it had to be ended."""
        with contextlib.suppress(OSError, ValueError):
            self._send({"op": "cancel"})
        deadline = time.monotonic() + CANCEL_GRACE_S
        while (remaining := deadline - time.monotonic()) > 0:
            message = self._next_message(remaining)
            if message is _ENDED:
                return False
            if isinstance(message, dict) and message["event"] in ("cancelled", "done", "failed"):
                return True
        self.kill()
        return False

    def close(self) -> None:
        """End the child: closing its input is the request, killing it the guarantee."""
        with contextlib.suppress(OSError):
            cast(BinaryIO, self._process.stdin).close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.kill()
        self._finish_reading()

    def kill(self) -> None:
        """End the child at once."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- messages -------------------------------------------------------------------------------------

    def _request(
        self, doing: str, request: Message, *, on_progress: Callable[[float], None] | None = None
    ) -> Message:
        for message in self._run(doing, request):
            if message["event"] == "done":
                return message
            if message["event"] == "progress" and on_progress is not None:
                on_progress(float(cast(float, message["share"])))
        raise EngineError("the engine ended its answer early", hint="Run the command again with -v.")

    def _run(self, doing: str, request: Message) -> Iterator[Message]:
        """Send a request and yield its events up to `done`; raises on failure, death or silence.

        Abandoning the iterator early (Ctrl-C included) cancels the operation.
        """
        try:
            self._send(request)
        except (OSError, ValueError):
            raise self._death(doing) from None
        finished = False
        try:
            while not finished:
                message = self._expect(doing)
                finished = message["event"] in ("done", "failed", "cancelled")
                if message["event"] == "failed":
                    raise EngineCrashError(
                        str(message["message"]),
                        hint=_HINTS.get(
                            str(message["kind"]), "Run the command again with -v to see the engine's log."
                        ),
                        kind="missing" if message["kind"] == "missing" else "refused",
                        log_tail=self.log[-6:],
                    )
                yield message
        except EngineError:
            finished = True
            raise
        finally:
            if not finished and self.alive:
                self.cancel()

    def _expect(self, doing: str, *, only: str | None = None) -> Message:
        message = self._next_message(self._silence_limit_s)
        if message is _TIMED_OUT:
            self.kill()
            self._finish_reading()
            raise explain_exit(-9, self.log, doing=doing, killed_for_hang=self._silence_limit_s)
        if message is _ENDED or not isinstance(message, dict):
            raise self._death(doing)
        if only is not None and message["event"] != only:
            raise EngineError(f"the engine answered '{message['event']}' while {doing}")
        if "mark" in message:
            self._wait_for_log(cast(int, message["mark"]))
        return message

    def _next_message(self, timeout_s: float) -> object:
        try:
            return self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return _TIMED_OUT

    def _send(self, request: Message) -> None:
        write_message(cast(BinaryIO, self._process.stdin), request)

    def _death(self, doing: str) -> EngineCrashError:
        """The explained error for a child whose stream ended."""
        try:
            returncode = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.kill()
            returncode = -9
        self._finish_reading()
        return explain_exit(returncode, self.log, doing=doing, amx_in_use=self._amx_in_use)

    # --- reading threads ------------------------------------------------------------------------------

    def _read_messages(self) -> None:
        stream = cast(BinaryIO, self._process.stdout)
        while (message := read_message(stream)) is not None:
            self._inbox.put(message)
        self._inbox.put(_ENDED)

    def _read_log(self) -> None:
        for raw in cast(BinaryIO, self._process.stderr):
            line = raw.decode(errors="replace").rstrip("\n")
            if line.startswith(LOG_MARK):
                with self._mark_condition:
                    self._mark_seen = int(line[1:])
                    self._mark_condition.notify_all()
                continue
            if _AMX_BUFFER.search(line):
                self._amx_in_use = True
            self._log.append(line)
            logger.debug("engine: %s", line)

    def _wait_for_log(self, mark: int) -> None:
        with self._mark_condition:
            self._mark_condition.wait_for(lambda: self._mark_seen >= mark, timeout=2)

    def _finish_reading(self) -> None:
        for thread in self._threads:
            thread.join(timeout=2)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None and not any(thread.is_alive() for thread in self._threads):
                stream.close()


_AMX_BUFFER = re.compile(r"\bAMX model buffer size")

_HINTS = {
    "missing": "Install the engine: ./scripts/qnext sets it up, or pip install 'qnext[engine]'.",
    "load": "The engine's last log lines above say why; `qnext plan` checks the file and the memory.",
    "context": "Not enough memory for it: try a smaller --ctx-size or --ubatch, or -ctk q8_0 -ctv q8_0.",
    "context_full": "Start afresh with /reset, or give more room with --ctx-size.",
}


def child_environment() -> dict[str, str]:
    """Environment for an engine child: ours without LLAMA_ARG_*, and with the same qnext importable."""
    import qnext

    root = os.path.dirname(os.path.dirname(os.path.abspath(qnext.__file__)))  # noqa: PTH100, PTH120
    known = os.environ.get("PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{known}" if known else root
    return environment
