"""llama.cpp's own account of a placement's memory, without reading any weights, kept in the cache.

With `no_alloc` the engine builds its graphs and sizes every buffer from metadata alone, a few hundred
milliseconds even for the 80B model. The compute buffers are not those of its log, which are off with two
devices or more, but those of a real load's reservation (`qnext.engine.llama.reserve`). The answer depends on
the tensor table, the placement, the engine build and how it is asked, so it is cached under a hash of these.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from qnext.engine.build import EngineBuild
from qnext.engine.cache import write_atomically
from qnext.engine.log_reader import BufferSize
from qnext.engine.session import EngineSession
from qnext.errors import EngineError
from qnext.models.header import ModelHeader
from qnext.plan.values import Placement

_METHOD = "compute of a real load's reservation"
"""How the engine is asked: answers got in another way are not taken for these."""


def header_digest(header: ModelHeader) -> str:
    """Hash of everything memory depends on: architecture metadata and the tensor table, not the weights."""
    state = hashlib.sha256()
    for key in sorted(header.metadata):
        if not key.startswith(("tokenizer.", "general.")) or key == "general.architecture":
            state.update(f"{key}={header.metadata[key]!r}\n".encode())
    for tensor in header.tensors:
        state.update(f"{tensor.name} {tensor.shape} {tensor.type_name}\n".encode())
    return state.hexdigest()[:24]


class DryRunner:
    """Runs and remembers dry runs. Starts an engine child only when an answer is not in the cache.

    For a model that is not on this disk the engine is given a stand-in: its header, and a hole.
    """

    def __init__(self, header: ModelHeader, build: EngineBuild, cache_dir: Path) -> None:
        self._header = header
        self._stand_in = cache_dir / "stand-ins" / f"{header_digest(header)}.gguf"
        self._key = f"{header_digest(header)}:{build.digest}:{_METHOD}"
        self._folder = cache_dir / "dry-runs"
        self._session: EngineSession | None = None

    def measure(self, placement: Placement) -> list[BufferSize]:
        """KV, recurrent, compute and output buffers of `placement` (weights read 0). Raises EngineError."""
        text = json.dumps([self._key, asdict(placement)], sort_keys=True)
        entry = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
        with contextlib.suppress(OSError, ValueError, TypeError):
            return [BufferSize(*row) for row in json.loads(entry.read_text())]
        if self._session is None or not self._session.alive:
            self.close()
            self._session = EngineSession()
        sizes = self._session.dry_run(str(self._file()), placement)
        if not any(size.part == "compute" for size in sizes):
            raise EngineError(
                "the engine's dry run did not tell its compute buffers",
                hint="See why with -v.",
            )
        write_atomically(entry, json.dumps([[size.buffer, size.part, size.bytes] for size in sizes]))
        return sizes

    def _file(self) -> Path:
        if self._header.paths and self._header.paths[0].exists():
            return self._header.paths[0]
        from qnext.models.synth.stand_in import write_stand_in

        write_stand_in(self._header, self._stand_in)
        return self._stand_in

    def close(self) -> None:
        """End the engine child, if one was started."""
        if self._session is not None:
            self._session.close()
