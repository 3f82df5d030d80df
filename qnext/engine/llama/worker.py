"""The engine child: reads requests on standard input, drives llama.cpp, answers on its real standard output.

Run as `python -m qnext.engine.llama.worker [PARENT]`; with the parent's process id it is bound to it (see
`EngineProcess`). Two threads: this one does the work, the other reads requests, so that a cancel is seen
while a decode runs, and ends the process when the parent's end of the pipe closes. The parent thereby takes
the child with it however it dies, `kill -9` included. No core file is left behind a crash: it would hold the
whole model.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

from qnext.engine.child import dying_with
from qnext.engine.llama.binding import EngineFailure
from qnext.engine.llama.runtime import Runtime
from qnext.engine.llama.signals import Cancelled
from qnext.engine.protocol import LOG_MARK, Message, frame, read_message, write_frame


class Channel:
    """The child's end of the message stream. `reply` marks the log so that the parent can line it up."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO) -> None:
        self._requests = requests
        self._replies = replies
        self._marks = 0
        self.inbox: queue.Queue[Message] = queue.Queue()

    def reply(self, event: str, **fields: object) -> None:
        """Send one event. Everything logged so far is in the parent's hands before it."""
        self._marks += 1
        os.write(2, f"{LOG_MARK}{self._marks}\n".encode())
        write_frame(self._replies, frame({"event": event, "mark": self._marks, **fields}))

    def stream(self, event: str, **fields: object) -> None:
        """Send one event without marking the log (tokens, progress)."""
        write_frame(self._replies, frame({"event": event, **fields}))

    def read_forever(self, cancel: Callable[[], None], arm: Callable[[], None]) -> None:
        """Queue requests as they come; call `cancel` for cancels; end the process with the parent.

        `arm` forgets an earlier cancel. It is called here, not when the request starts, because a cancel may
        follow its request before the other thread has picked it up.
        """
        try:
            while (message := read_message(self._requests)) is not None:
                if message.get("op") == "cancel":
                    cancel()
                else:
                    arm()
                    self.inbox.put(message)
        finally:
            os._exit(0)


def main() -> None:
    """Serve requests until the parent goes away."""
    for parent in sys.argv[1:]:
        if (bind := dying_with(int(parent))) is not None:
            bind()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _forbid_core_files()
    channel = Channel(sys.stdin.buffer, replies)
    runtime = Runtime(channel.stream, channel.inbox)
    cancel = (runtime.signals.abort, runtime.signals.arm)
    threading.Thread(target=channel.read_forever, args=cancel, daemon=True).start()
    channel.reply("ready", pid=os.getpid())
    while True:
        request = channel.inbox.get()
        if "id" in request or request["op"] == "stop":
            continue  # meant for a serving loop that has ended meanwhile
        started = time.perf_counter_ns()
        try:
            result = runtime.handle(request)
        except Cancelled:
            channel.reply("cancelled")
        except EngineFailure as error:
            channel.reply("failed", kind=error.kind, message=str(error))
        else:
            channel.reply("done", elapsed_ns=time.perf_counter_ns() - started, **result)


def _forbid_core_files() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


if __name__ == "__main__":
    main()
