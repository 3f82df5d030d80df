"""From the MODEL argument to a file and its header."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qnext.config import Paths
from qnext.errors import ModelError
from qnext.models.gguf_reader import read_header
from qnext.models.header import ModelHeader
from qnext.models.shape import ModelShape, read_shape


@dataclass(frozen=True, slots=True)
class LocatedModel:
    """A model that is on this disk, with its header and dimensions."""

    ref: str
    header: ModelHeader
    shape: ModelShape

    @property
    def path(self) -> str:
        """The file llama.cpp is given: the first shard."""
        return str(self.header.paths[0])


def locate_model(ref: str, paths: Paths) -> LocatedModel:
    """Find `demo` (made on first use) or a local GGUF, first shard or any. Raises ModelError."""
    if ref == "demo":
        from qnext.models.synth import demo_path

        path = demo_path(paths.demo_dir)
    else:
        try:
            path = Path(ref).expanduser()
            found = path.exists()
        except (OSError, RuntimeError) as error:
            raise ModelError(f"'{ref}' cannot be looked at: {error}", hint="Check the path.") from error
        if not found:
            raise _not_found(ref)
    header = read_header(path)
    return LocatedModel(ref, header, read_shape(header))


def _not_found(ref: str) -> ModelError:
    if "/" in ref and not ref.endswith(".gguf") and ref.count("/") == 1:
        return ModelError(
            f"'{ref}' is no file here, and this version of qnext does not read published models yet",
            hint="Download its GGUF, for example with `hf download`, and give its path. Or: qnext run demo",
        )
    return ModelError(
        f"there is no file '{ref}'", hint="Give the path of a GGUF file, or try: qnext run demo"
    )
