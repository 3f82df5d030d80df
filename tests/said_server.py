"""The HTTP side of `qnext serve` on loopback over answers from a list: what the demo model does not do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

import uvicorn

from qnext.models.chat import ChatTemplate
from qnext.pipeline.serve_values import Begun, Ended, Job, Piece, ServedModel, Status
from qnext.serve.app import make_app
from qnext.serve.settings import ServeSettings

TEMPLATE = (
    "{# <tool_call> \"arguments\" #}{{ tools | length if tools else '' }}{{ enable_thinking }}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
)
GIB = 2**30
DEVICE = {
    "name": "CPU",
    "kind": "host",
    "budget_bytes": 16 * GIB,
    "weights_bytes": 9 * GIB,
    "kv_bytes": 2 * GIB,
    "recurrent_bytes": GIB // 8,
    "compute_bytes": GIB // 2,
    "other_bytes": 0,
    "total_bytes": 11 * GIB + 5 * GIB // 8,
}
PLAN = {"devices": [DEVICE], "prediction": {"decode_tps": {"low": 10.0, "mid": 20.0, "high": 30.0}}}
WORDS = ("everything on the CPU: there is no device with memory beside the host", "slots 2: <b>enough</b>")
HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": [1, 2]}}\n</tool_call>'
ANSWERS = {
    "think": [
        "<think>\nTwo and ",
        "two.\n</think>\n\n",
        "It is **4**, as `2 + 2`:\n\n```py\n",
        "2 + 2\n```\nSo.",
    ],
    "hostile": [HOSTILE, "\n\n```html\n", HOSTILE, "\n```\n# ", HOSTILE],
    "call": ["<think>\nI ask.\n</think>\n\n", CALL[:40], CALL[40:]],
    "empty": [""],
}


class SaidBackend:
    """Answers a message with the pieces that ANSWERS has under its first word; `endless` never ends."""

    def __init__(self) -> None:
        self.status = Status("ok", 1.0)
        self.model = ServedModel(
            "said", 1, 4096, 2, 50, "", "", ChatTemplate(TEMPLATE), {"temperature": 0.5}, PLAN, WORDS, "b1"
        )
        self.prompts: list[str] = []
        self.refusals: list[Exception] = []
        self.fails_after: Exception | None = None
        self.open = 0

    async def generate(self, job: Job) -> AsyncGenerator[Begun | Piece | Ended, None]:
        if self.refusals:
            raise self.refusals.pop(0)
        self.prompts.append(job.text or "")
        self.open += 1
        word = (job.text or "").rpartition("<|user|>")[2].partition("<|")[0].split()[0]
        try:
            yield Begun(30, 10, 0)
            if "<|tool|>" in (job.text or ""):
                word = "result"
            for piece in ANSWERS.get(word, [f"heard {word}"]):
                await asyncio.sleep(0.02)
                yield Piece(piece, 1)
            while word == "endless":
                await asyncio.sleep(0.01)
                yield Piece(" on", 1)
            if self.fails_after:
                raise self.fails_after
            yield Ended("eos", 30, 10, 5, 2_000_000, 100_000_000, 0)
        finally:
            self.open -= 1

    async def tokenize(self, text: str, *, special: bool = True, add_bos: bool = False) -> list[int]:
        return list(range(len(text)))

    async def detokenize(self, tokens: Sequence[int]) -> str:
        return ""

    async def state(self) -> Mapping[str, Any]:
        used = {"prompt": 2000, "done": 1500, "generated": 0, "cached": 10}
        free = {"prompt": 0, "done": 0, "generated": 0, "cached": 0}
        slots = [{"slot": n, "id": n + 7 if n < self.open else None} for n in range(2)]
        return {
            "slots": [slot | (used if slot["id"] else free) for slot in slots],
            "queued": 0,
            "cache": {"bytes": GIB, "budget_bytes": 4 * GIB},
            "totals": {},
        }


@contextlib.contextmanager
def serving(backend: SaidBackend, **settings: Any) -> Iterator[str]:
    """The address of a server in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        config = uvicorn.Config(make_app(backend, ServeSettings(**settings)), log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: server.run(sockets=[bound]))
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.force_exit = server.should_exit = True
            thread.join(10)
