"""Slices: which layers stand for all, and files that share their data."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qnext.errors import ModelError
from qnext.models.gguf_reader import read_header
from qnext.models.shape import layer_of, read_shape
from qnext.models.synth.imagined import imagined_header
from qnext.models.synth.slices import choose_slices, layer_period, write_slices


@pytest.mark.parametrize(
    ("name", "period"), [("qwen3-next-80b-a3b", 4), ("gpt-oss-20b", 2), ("qwen3-30b-a3b", 1)]
)
def test_a_slice_has_whole_periods_and_layers_of_the_usual_size(name: str, period: int) -> None:
    header = imagined_header(name, "Q4_K_M")
    shape = read_shape(header)
    assert layer_period(shape) == period
    slices = choose_slices(shape, (4, 8))
    assert len(slices.layers) == 8
    assert all(source % period == position % period for position, source in enumerate(slices.layers))
    mean = sum(layer.total_bytes for layer in shape.layer_bytes[: shape.n_layer]) / shape.n_layer
    for part in (slices.layers[:4], slices.layers[4:]):
        assert sum(shape.layer_bytes[layer].total_bytes for layer in part) / 4 == pytest.approx(
            mean, rel=0.02
        )


def test_slices_of_two_sizes_are_models_that_share_their_data(tmp_path: Path) -> None:
    header = imagined_header("tiny-qwen3next", "Q8_0", 12)
    shape = read_shape(header)
    slices = choose_slices(shape, (4, 8))
    told: list[float] = []
    written = write_slices(
        header,
        shape,
        slices,
        tmp_path,
        quantizer=None,
        progress=told.append,
    )
    types = {tensor.name: (tensor.shape, tensor.type_name) for tensor in header.tensors}
    for layers, path in written.paths.items():
        cut = read_header(path)
        found = read_shape(cut)
        assert (found.n_layer, found.n_vocab, found.recurrent) == (
            layers,
            shape.n_vocab,
            shape.recurrent[:layers],
        )
        for tensor in cut.tensors:
            layer = layer_of(tensor.name)
            name = (
                tensor.name
                if layer is None
                else tensor.name.replace(f"{layer}", f"{slices.layers[layer]}", 1)
            )
            assert (tensor.shape, tensor.type_name) == types[name]
    assert written.few_path is not None
    fewer = read_shape(read_header(written.few_path))
    assert (fewer.n_layer, fewer.experts_used) == (4, 1) and shape.experts_used > 1
    data = sorted(written.paths[4].parent.glob("data-*.gguf"))
    assert [file.stat().st_nlink for file in data] == [4, 2]
    assert told == sorted(told) and 0.9 < told[-1] <= 1
    when = data[0].stat().st_mtime_ns
    assert write_slices(header, shape, slices, tmp_path, quantizer=None) == written
    assert data[0].stat().st_mtime_ns == when


def test_what_was_cut_short_is_not_believed(tmp_path: Path) -> None:
    header = imagined_header("tiny-qwen3next", "Q8_0", 12)
    shape = read_shape(header)
    slices = choose_slices(shape, (4, 8))
    path = write_slices(header, shape, slices, tmp_path, quantizer=None).paths[4]
    (path.parent / "data-1.gguf").write_bytes(b"half")
    write_slices(header, shape, slices, tmp_path, quantizer=None)
    assert read_shape(read_header(path)).n_layer == 4


def test_an_interrupted_call_leaves_nothing(tmp_path: Path) -> None:
    header = imagined_header("tiny-qwen3next", "Q8_0", 12)
    shape = read_shape(header)

    def interrupt(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_slices(
            header, shape, choose_slices(shape, (4, 8)), tmp_path, quantizer=None, progress=interrupt
        )
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_call_left_is_deleted_by_the_next(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f"{ended.pid}-x.part").mkdir()
    (tmp_path / f"{os.getpid()}-y.part").mkdir()
    header = imagined_header("tiny-qwen3next", "Q8_0", 12)
    shape = read_shape(header)
    path = write_slices(header, shape, choose_slices(shape, (4, 8)), tmp_path, quantizer=None).paths[4]
    assert {place.name for place in tmp_path.iterdir()} == {f"{os.getpid()}-y.part", path.parent.name}


def test_slices_of_models_that_were_not_used_lately_give_way(tmp_path: Path) -> None:
    for age, name in enumerate(("newest", "older", "oldest")):
        (tmp_path / name).mkdir()
        when = time.time() - 7200 - 60 * age
        os.utime(tmp_path / name, (when, when))
    header = imagined_header("tiny-qwen3next", "Q8_0", 12)
    shape = read_shape(header)
    path = write_slices(header, shape, choose_slices(shape, (4, 8)), tmp_path, quantizer=None).paths[4]
    assert {place.name for place in tmp_path.iterdir()} == {"newest", path.parent.name}


def test_other_families_are_refused_by_name() -> None:
    from dataclasses import replace

    shape = replace(read_shape(imagined_header("qwen3-4b", "Q8_0")), arch="llama")
    with pytest.raises(ModelError, match="architecture 'llama'") as refused:
        choose_slices(shape, (4, 8))
    assert "qwen3next" in str(refused.value.hint)
