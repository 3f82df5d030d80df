"""A file that llama.cpp can plan memory with in place of one that is not here: its header, and a hole.

Weights are never read for that, and of the vocabulary only its size counts, which llama.cpp also takes as a
number (`no_vocab`). Tensors, dimensions and types are those of the real header.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from qnext.models.header import ModelHeader, SkippedArray
from qnext.models.synth.writer import MetaValue, TensorSpec, lay_out, write_file

_EMBEDDING = "token_embd.weight"


def write_stand_in(header: ModelHeader, path: Path) -> None:
    """Write the stand-in for `header` to `path`, sparse, unless it is there. Raises ModelError."""
    if path.exists():
        return
    arch = header.metadata.get("general.architecture")
    rows = next((tensor.shape[1] for tensor in header.tensors if tensor.name == _EMBEDDING), 0)
    metadata = {
        key: value
        for key, value in header.metadata.items()
        if not key.startswith(("tokenizer.", "split.", "general.")) and not isinstance(value, SkippedArray)
    }
    metadata |= {"general.architecture": arch, "tokenizer.ggml.model": "no_vocab", f"{arch}.vocab_size": rows}
    tensors = [TensorSpec(tensor.name, tensor.shape, tensor.type_name) for tensor in header.tensors]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lay_out(cast("dict[str, MetaValue]", metadata), tensors), None)
