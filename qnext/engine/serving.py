"""The parent's side of serving: requests go to the child from any thread, its events come to one function.

The child runs its loop (`qnext.engine.llama.serving`) until it is told to stop. Between, it may be idle for
days: its silence counts only while something has been asked and not answered. How it ends is told once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import cast

from qnext.engine.protocol import Message
from qnext.engine.session import EngineSession
from qnext.errors import EngineError

_ANSWERS = ("ended", "refused", "tokens", "text", "state")
"""Events after which nothing more comes for their id."""


class ServingEngine:
    """Serves on the model that `session` has open; until `stop`, the session takes nothing else.

    `deliver` gets every event (see `submit`), in order, from one thread of its own, and must not block;
    `on_end` gets an EngineError if the child dies, hangs or gives up, once, and nothing comes after it. Ids
    are the caller's; one id must not be used for two requests under way, of whatever kind.
    """

    def __init__(self, session: EngineSession) -> None:
        self._session = session
        self._lock = threading.Lock()
        self._asked: set[object] = set()
        self._at_work_since: float | None = None
        self._thread: threading.Thread | None = None
        self._error: EngineError | None = None
        self._under_way = threading.Event()
        self._stopping = False
        self.totals: Message | None = None
        """What the loop counted in all, once it was stopped."""

    def start(
        self,
        deliver: Callable[[Message], None],
        on_end: Callable[[EngineError], None],
        *,
        cache_bytes: int = 0,
        stall_s: float | None = None,
    ) -> None:
        """Begin to serve; returns when the loop runs, or has failed.

        `cache_bytes`: what copies of prompts' states may take of the host's memory. `stall_s`: for how long a
        chunk of a new prompt may hold up running texts, about.
        """
        options: Message = {"cache_bytes": cache_bytes}
        if stall_s is not None:
            options["stall_s"] = stall_s
        self._thread = threading.Thread(
            target=self._listen, args=(deliver, on_end, options), name="engine-events", daemon=True
        )
        self._thread.start()
        self._under_way.wait()

    def submit(self, message: Message) -> None:
        """Have a text continued: `message` has an `id`, `tokens` or `text`, and options; `op` is added.

        Answers: `refused` (kind, message), or `begun`, `step`s shared with others, and `ended`. Raises
        EngineError when the engine has ended or is being stopped.
        """
        self._ask({**message, "op": "submit"})

    def drop(self, request: int) -> None:
        """Nobody wants `request` any more: it ends (`dropped`) within one step, if it is under way."""
        with self._lock:
            if not self._stopping:
                self._session.send({"op": "drop", "id": request})

    def tokenize(self, request: int, text: str, *, special: bool = True, add_bos: bool = False) -> None:
        """Ask for the token ids of `text`; answered by `tokens`."""
        self._ask({"op": "tokenize", "id": request, "text": text, "special": special, "add_bos": add_bos})

    def detokenize(self, request: int, tokens: list[int]) -> None:
        """Ask for the text of `tokens`; answered by `text`."""
        self._ask({"op": "detokenize", "id": request, "tokens": tokens})

    def ask_state(self, request: int) -> None:
        """Ask for slots, queue, cache and totals; answered by `state`."""
        self._ask({"op": "state", "id": request})

    def stop(self, timeout_s: float = 10.0) -> bool:
        """End what is under way (`ended`, dropped) and the loop; the session is then free for other requests.

        False if that took longer than `timeout_s`: closing the session is what is left.
        """
        with self._lock:
            if not self._stopping and self._error is None:
                self._session.send({"op": "stop"})
            self._stopping = True
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def _ask(self, message: Message) -> None:
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._stopping:
                raise EngineError("the engine is being stopped", hint="Start it again to go on.")
            if not self._asked:
                self._at_work_since = time.monotonic()
            self._asked.add(message.get("id"))
            self._session.send(message)

    def _answered(self, request: object) -> None:
        with self._lock:
            self._asked.discard(request)
            if not self._asked:
                self._at_work_since = None

    def _listen(
        self, deliver: Callable[[Message], None], on_end: Callable[[EngineError], None], options: Message
    ) -> None:
        try:
            for message in self._session.serve(options, at_work_since=lambda: self._at_work_since):
                if message["event"] == "serving":
                    self._under_way.set()
                    continue
                if message["event"] == "done":
                    self.totals = cast(Message, message["totals"])
                    continue
                if message["event"] in _ANSWERS:
                    self._answered(message.get("id"))
                deliver(message)
        except EngineError as error:
            with self._lock:
                self._error = error
            on_end(error)
        finally:
            self._under_way.set()
