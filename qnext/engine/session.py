"""A session on the engine: one child process, its messages, its log, and its end.

The parent never loads native code. It waits for messages with a deadline that every sign of life renews,
keeps the last lines of the child's log, and turns any way of dying into one explained error. Three threads do
the blocking: one writes requests (a stopped child does not read them), one reads answers, one the log.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, BinaryIO, Self, cast

from qnext.engine.child import child_environment, silence_limit
from qnext.engine.child_log import ChildLog
from qnext.engine.crash import EngineCrashError, explain_exit, interesting_tail
from qnext.engine.log_reader import BufferSize, read_buffer_sizes
from qnext.engine.protocol import Message, frame, read_message, write_frame
from qnext.errors import EngineError
from qnext.plan.values import Placement

logger = logging.getLogger(__name__)

SILENT_TOKENS = 600
"""What a benchmark may decode within the limit on silence: one token a second by default."""
LOG_GRACE_S = 30.0
"""How long the log may come behind an answer."""
CANCEL_GRACE_S = 0.7
"""How long a cancelled operation may take to come back before the child is ended: Ctrl-C acts within 1 s."""

_TIMED_OUT = object()
_ENDED = object()
_FINAL = ("done", "failed", "cancelled")


class EngineSession:
    """One engine child. Use as a context manager; `close` always leaves no process behind.

    `environment` entries are added to the child's environment; `LLAMA_ARG_*` never reaches it.
    `silence_limit_s` ends a child that sends nothing for that long while it works (default 600, or
    QNEXT_ENGINE_TIMEOUT). One request at a time: an answer that streams must be read to its end or closed
    before the next request. Raises EngineError when the child cannot be started.
    """

    def __init__(
        self, *, environment: dict[str, str] | None = None, silence_limit_s: float | None = None
    ) -> None:
        self._silence_limit_s = silence_limit() if silence_limit_s is None else silence_limit_s
        self._log = ChildLog()
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._batch = 0
        self._busy = False
        self._ended_because: str | None = None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "qnext.engine.llama.worker"],
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
        """Load `model` as placed. `on_progress` gets the share loaded, 0 to 1.

        Returns what is active: context, context_per_sequence, batch, ubatch (tokens), threads, threads_batch,
        flash_attention (`on`, `off`, None where the log does not say); facts of the model and the build:
        vocabulary (tokens), bos, eos, model_desc, system_info; and load_ns.
        """
        self._log.forget()
        request: Message = {
            "op": "open",
            "model": model,
            "placement": asdict(placement),
            "context": context,
        }
        return self._active(self._request("loading the model", request, on_progress=on_progress))

    def renew(self, placement: Placement, *, context: int | None = None) -> Message:
        """A new context on the open model, made from the context part of `placement`; returns as `open` does.

        The model part (`qnext.engine.llama.params.model_part`) must be that of the open model, or this is
        refused and nothing changes. `context` replaces the total of tokens. The old context is freed first,
        since both may not fit; when llama.cpp cannot make the new one, that is an EngineCrashError of kind
        `refused`, the model stays open, and another `renew` may follow. What the first use of a context costs
        is not paid here: call `warm_up` before timing. `size_lines` tell what is allocated now.
        """
        self._log.forget_context()
        request: Message = {"op": "renew", "placement": asdict(placement), "context": context}
        return self._active(self._request("making a context", request))

    def _active(self, facts: Message) -> Message:
        self._batch = int(str(facts["batch"]))
        return {**facts, "flash_attention": self._log.flash_attention}

    def warm_up(self) -> None:
        """Decode a few tokens and forget them, so that a layout that crashes does so now."""
        self._request("trying the first tokens", {"op": "warm_up"})

    def dry_run(self, model: str, placement: Placement) -> list[BufferSize]:
        """Simulate the allocation without reading weights; returns what a load would allocate (weights 0)."""
        self._log.forget()
        request: Message = {"op": "dry_run", "model": model, "placement": asdict(placement)}
        compute = self._request("planning memory", request)["compute"]
        sizes = read_buffer_sizes(self.size_lines)
        if compute is None:
            return sizes
        reserved = cast("list[tuple[str, int]]", compute)
        return [
            *(size for size in sizes if size.part != "compute"),
            *(BufferSize(buffer, "compute", size) for buffer, size in reserved),
        ]

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
        yield from self._run("benchmarking", request, silence_limit_s=self._batch_silence_limit_s)

    def turn(
        self,
        *,
        depth_tokens: list[int],
        prompt_tokens: list[int],
        generate: int,
        limit_s: float | None = None,
        depth_limit_s: float | None = None,
        sampling: dict[str, float] | None = None,
    ) -> Message:
        """One timed turn on the present context, which is empty before and after it.

        `depth_tokens` come first and are not timed as part of the turn: they are evaluated once, and their
        state is kept in the child's memory and put back for later turns with the same depth, across `renew`
        and across `open` of the same file (the latest two, for contexts alike in cache types, flash
        attention, sequences and sliding windows). Then `prompt_tokens` (at least one) are evaluated in
        batches, then `generate` tokens one by one, each what the model says next (greedy, or as `sampling`
        with its `seed` has it), with no regard to end-of-generation tokens.

        Returns
        - depth_ns: time to evaluate the depth, None when there is none or its state was put back;
        - prefill_ns: from the first prompt token until the last is computed; `prompt`: tokens evaluated;
        - token_ns: one time per decode step: sampling a token, evaluating it, waiting until it is computed;
        - tokens: the ids of those tokens, of which the first comes out of the prefill;
        - rss_bytes: the child's memory in RAM at the end, kept states and mapped files included;
        - major_faults: of the child from prefill to end (pages waited for on disk), None where not told;
        - stopped: whether `limit_s` ran out (prefill and decode together) or `depth_limit_s` (the depth).

        Prefill and decode are llama-bench's pp and tg, up to these: the prompt is given, each step samples,
        and the threads are those of `generate`, where llama-bench has a pool of its own. When stopped,
        `prompt` counts the tokens of whole batches evaluated within prefill_ns (None when the depth was not
        finished), and token_ns holds the steps that were finished. The CPU stops within a moment, a device
        after its batch. Ctrl-C cancels as in `bench`. A turn that does not fit into the context is refused
        (EngineCrashError of kind `refused`).
        """
        request: Message = {
            "op": "turn",
            "depth_tokens": depth_tokens,
            "prompt_tokens": prompt_tokens,
            "generate": generate,
            "limit_s": limit_s,
            "depth_limit_s": depth_limit_s,
            "sampling": sampling,
        }
        return self._request("timing a turn", request, silence_limit_s=self._batch_silence_limit_s)

    @property
    def _batch_silence_limit_s(self) -> float:
        """A batch is decoded in one call that cannot speak meanwhile: the limit counts for so many tokens."""
        return self._silence_limit_s * max(1.0, self._batch / SILENT_TOKENS)

    def time_copies(self, device: str, *, limit_s: float, **options: Any) -> Message:
        """Time copies between host and `device` (`engine.llama.link`); the child is ended after `limit_s`."""
        request = {"op": "time_copies", "device": device, **options}
        *_, done = self._run("timing copies", request, silence_limit_s=limit_s)
        return done

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

    def _request(
        self,
        doing: str,
        request: Message,
        *,
        on_progress: Callable[[float], None] | None = None,
        silence_limit_s: float | None = None,
    ) -> Message:
        for message in self._run(doing, request, silence_limit_s=silence_limit_s):
            if message["event"] == "done":
                return message
            if message["event"] == "progress" and on_progress is not None:
                on_progress(float(cast(float, message["share"])))
        raise EngineError("the engine ended its answer early", hint="Run the command again with -v.")

    def _run(
        self, doing: str, request: Message, *, silence_limit_s: float | None = None
    ) -> Iterator[Message]:
        """Send a request and yield its events up to `done`; raises on failure, death or silence.

        Abandoning the iterator early (Ctrl-C included) cancels the operation.
        """
        if self._busy:
            raise RuntimeError("the request before this one was neither read to its end nor closed")
        if not self.alive:
            raise self._death(doing)
        self._busy, finished = True, False
        try:
            self._outbox.put(frame(request))
            while not finished:
                message = self._expect(doing, silence_limit_s=silence_limit_s)
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
        self, doing: str, *, only: str | None = None, silence_limit_s: float | None = None
    ) -> Message:
        limit = self._silence_limit_s if silence_limit_s is None else silence_limit_s
        message = self._next_message(limit)
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
    "context": "Not enough memory for it: try a smaller --ctx-size or --ubatch, or -ctk q8_0 -ctv q8_0.",
    "model_part": "Open the model again with it: only a context's settings can change without a load.",
    "empty": "Give a prompt of at least one character.",
    "context_full": "Start afresh with /reset, or give more room with --ctx-size.",
}

_LOG_TELLS = ("load", "context", "decode")
