"""Slices of a model: a few of its layers, each tensor in its real type, the weights random.

What a layer costs does not depend on what its weights say, so a few layers tell what all of them will cost.
Slices of several sizes share their data: the file is a split GGUF (llama.cpp's own format for large models)
whose first shard has no tensors, the second the embedding, the head and the smallest slice's layers, each
further one the layers that the next size has more. So eight layers and four take the disk space of eight.
The smallest slice can also be opened as a model that uses one expert per token: what it takes less is theirs.
Beside the slices lies a bare one: as many layers of the same kind, the weights next to nothing, so that its
time is that of starting operations and of waiting for one another.

Layers come in whole periods of the architecture (three of DeltaNet and one of attention for Qwen3-Next), as
llama.cpp tells their kind by their position. Those are taken whose sizes are nearest to the mean: quants give
some layers more bits than others.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from qnext.errors import ModelError
from qnext.models.header import ModelHeader, SkippedArray
from qnext.models.shape import ModelShape, layer_of
from qnext.models.synth.shapes import SHAPES
from qnext.models.synth.synthesise import synthesise
from qnext.models.synth.weights import Quantizer, Weights
from qnext.models.synth.writer import I32, U16, Buffer, Layout, MetaValue, TensorSpec, lay_out, write_file
from qnext.units import format_bytes

FAMILIES = frozenset(shape.arch for shape in SHAPES.values())
FEW = 1
"""Experts per token of the slice that uses few."""
_BARE = "bare.gguf"
KEPT, IN_USE_S = 2, 3600.0
"""Models whose slices are kept; those used within so many seconds in any case."""


@dataclass(frozen=True, slots=True)
class Slices:
    """Which layers of the model the layers of the largest slice stand for, and the sizes, rising."""

    layers: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WrittenSlices:
    """What to open: by number of layers, the smallest with one expert per token (None: has no more), and
    the bare one, of as many layers as the smallest."""

    paths: dict[int, Path]
    few_path: Path | None
    bare_path: Path


def layer_period(shape: ModelShape) -> int:
    """Layers after which the kinds of layers repeat. Raises ModelError where they never do."""
    kinds = list(zip(shape.recurrent, shape.sliding, strict=True))[: shape.n_layer]
    for period in range(1, shape.n_layer // 2 + 1):
        whole = shape.n_layer - shape.n_layer % period
        if all(kinds[layer] == kinds[layer % period] for layer in range(whole)):
            return period
    raise ModelError(
        f"the layers of {shape.name or shape.arch} follow no pattern that a slice could have",
        hint="qnext plan forecasts it from what is known of such machines.",
    )


def choose_slices(shape: ModelShape, sizes: Sequence[int]) -> Slices:
    """Slices of `sizes` layers, each a whole number of periods. Raises ModelError for other families."""
    if shape.arch not in FAMILIES:
        raise ModelError(
            f"no slice can be made of architecture '{shape.arch}'",
            hint=f"There are slices of {', '.join(sorted(FAMILIES))}; qnext plan forecasts the others.",
        )
    period = layer_period(shape)
    periods = [range(start, start + period) for start in range(0, shape.n_layer - period + 1, period)]
    weights = [sum(shape.layer_bytes[layer].total_bytes for layer in one) for one in periods]
    mean = sum(weights) / len(weights)
    taken: list[int] = []
    for more in (size - before for before, size in zip((0, *sizes), sizes, strict=False)):
        wanted = more // period
        # Greedily the period that brings the mean of this part nearest to the mean of all.
        part: list[int] = []
        while len(part) < wanted:
            left = [index for index in range(len(periods)) if index not in taken + part] or list(
                range(len(periods))
            )
            have = sum(weights[index] for index in part)
            part.append(min(left, key=lambda index: abs((have + weights[index]) / (len(part) + 1) - mean)))
        taken += part
    return Slices(tuple(layer for index in taken for layer in periods[index]), tuple(sizes))


def slice_layouts(header: ModelHeader, shape: ModelShape, slices: Slices) -> list[Layout]:
    """The shards with data: embedding, head and the smallest slice, then what each size has more."""
    by_layer: dict[int | None, list[TensorSpec]] = {}
    for tensor in header.tensors:
        spec = TensorSpec(tensor.name, tensor.shape, tensor.type_name)
        by_layer.setdefault(layer_of(tensor.name), []).append(spec)
    layouts = []
    for number, (begin, end) in enumerate(zip((0, *slices.sizes), slices.sizes, strict=False)):
        tensors = list(by_layer[None]) if begin == 0 else []
        for position in range(begin, end):
            source = slices.layers[position]
            tensors += [
                TensorSpec(
                    spec.name.replace(f"blk.{source}.", f"blk.{position}."), spec.shape, spec.type_name
                )
                for spec in by_layer[source]
            ]
        layouts.append(lay_out({"split.no": U16(number + 1)}, tensors))
    return layouts


def write_slices(
    header: ModelHeader,
    shape: ModelShape,
    slices: Slices,
    folder: Path,
    *,
    quantizer: Quantizer | None,
    progress: Callable[[float], None] | None = None,
) -> WrittenSlices:
    """Write the slices below `folder`, or find them there.

    `progress` gets the share written. They come into their place when complete. What a killed call
    left behind is deleted, and so are the slices of other models that were not used lately.
    Raises ModelError where the disk lacks room, EngineError without what quantises.
    """
    layouts = slice_layouts(header, shape, slices)
    total = sum(layout.file_bytes for layout in layouts)
    place = folder / slices_key(header, slices)
    few = shape.experts_used > FEW
    openings = [
        _Opening(f"{size}-layers", size, index + 1, shape.experts_used)
        for index, size in enumerate(slices.sizes)
    ]
    if few:
        openings.append(_Opening("few-experts", slices.sizes[0], 1, FEW))
    paths = [place / f"{one.name}-{_of(1, one.shards + 1)}" for one in openings]
    by_size = dict(zip(slices.sizes, paths, strict=False))
    written = WrittenSlices(by_size, paths[-1] if few else None, place / _BARE)
    if _are_whole(place, layouts):
        os.utime(place)
        return written
    shutil.rmtree(place, ignore_errors=True)
    _forget_old(folder)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ModelError(
            f"{folder} has {format_bytes(free)} free, the slices take {format_bytes(total)}",
            hint="Free some space, or set QNEXT_HOME to a folder on a larger disk.",
        )
    done = 0

    def counted(weights: Weights) -> Callable[[TensorSpec], Iterator[Buffer]]:
        def pieces(spec: TensorSpec) -> Iterator[Buffer]:
            nonlocal done
            for piece in weights.pieces(spec):
                yield piece
                done += len(piece)
                if progress is not None:
                    progress(done / total)

        return pieces

    with tempfile.TemporaryDirectory(prefix=f"{os.getpid()}-", suffix=".part", dir=folder) as part:
        for number, layout in enumerate(layouts):
            weights = Weights(layout.tensors, quantizer, seed=number)
            write_file(Path(part) / _data_name(number), layout, counted(weights))
        for one, path in zip(openings, paths, strict=True):
            metadata = _metadata(header, slices.layers[: one.layers])
            if shape.experts_used:
                metadata[f"{shape.arch}.expert_used_count"] = one.experts_used
            _link(Path(part), one, path.name, metadata, layouts)
        bare = Path(part) / _BARE
        synthesise(f"tiny-{shape.arch}", bare, quant="Q8_0", layers=slices.sizes[0], quantizer=quantizer)
        with contextlib.suppress(OSError):  # another forecast of the model was first
            Path(part).rename(place)
            Path(part).mkdir()  # for who deletes it
    return written


def _link(
    folder: Path, one: _Opening, name: str, metadata: dict[str, MetaValue], layouts: Sequence[Layout]
) -> None:
    """Write the shard that is opened, and put the data beside it under the names that llama.cpp looks for."""
    count = one.shards + 1
    counts: dict[str, MetaValue] = {
        "split.no": U16(0),
        "split.count": U16(count),
        "split.tensors.count": I32(sum(len(layout.tensors) for layout in layouts[: one.shards])),
    }
    write_file(folder / name, lay_out(metadata | counts, []), None)
    for number in range(one.shards):
        os.link(folder / _data_name(number), folder / f"{one.name}-{_of(number + 2, count)}")


def _data_name(number: int) -> str:
    return f"data-{number + 1}.gguf"


def _are_whole(place: Path, layouts: Sequence[Layout]) -> bool:
    """Whether slices are there as they were written: after a power failure files may be short."""
    return (place / _BARE).is_file() and all(
        (file := place / _data_name(number)).is_file() and file.stat().st_size == layout.file_bytes
        for number, layout in enumerate(layouts)
    )


@dataclass(frozen=True, slots=True)
class _Opening:
    """A way to open the data: files called `name`, so many layers, in so many shards with data."""

    name: str
    layers: int
    shards: int
    experts_used: int


def _forget_old(folder: Path) -> None:
    """Delete what dead processes left half-written, and the slices used longest ago: KEPT are left."""
    places = sorted(folder.glob("*"), key=lambda place: place.stat().st_mtime, reverse=True)
    parts = [place for place in places if place.suffix == ".part"]
    whole = [place for place in places if place not in parts]
    old = [place for place in whole[KEPT - 1 :] if time.time() - place.stat().st_mtime > IN_USE_S]
    for place in old + [part for part in parts if not _is_being_written(part)]:
        shutil.rmtree(place, ignore_errors=True)


def _is_being_written(part: Path) -> bool:
    process = part.name.partition("-")[0]
    return process.isdecimal() and psutil.pid_exists(int(process))


def slices_key(header: ModelHeader, slices: Slices) -> str:
    """Names the slices of a header: the same tensors and layers give the same name."""
    kinds = [(tensor.name, tensor.shape, tensor.type_name) for tensor in header.tensors]
    text = repr((kinds, slices, FEW, sorted(_metadata(header, slices.layers).items())))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _of(number: int, count: int) -> str:
    return f"{number:05d}-of-{count:05d}.gguf"


def _metadata(header: ModelHeader, layers: Sequence[int]) -> dict[str, MetaValue]:
    """The model's own metadata for these layers, with a vocabulary that is only a number."""
    arch = str(header.metadata["general.architecture"])
    blocks = header.metadata.get(f"{arch}.block_count")
    found: dict[str, MetaValue] = {"general.architecture": arch}
    if isinstance(kind := header.metadata.get("general.file_type"), int):
        found["general.file_type"] = kind
    for key, value in header.metadata.items():
        if not key.startswith(f"{arch}.") or isinstance(value, SkippedArray):
            continue
        if isinstance(value, tuple):
            found[key] = tuple(value[layer] for layer in layers) if len(value) == blocks else value
        elif isinstance(value, bool | int | float | str):
            found[key] = value
    found.pop(f"{arch}.nextn_predict_layers", None)
    rows = next(tensor.shape[1] for tensor in header.tensors if tensor.name == "token_embd.weight")
    return found | {
        f"{arch}.block_count": len(layers),
        f"{arch}.vocab_size": rows,
        "tokenizer.ggml.model": "no_vocab",
    }
