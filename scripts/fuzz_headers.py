#!/usr/bin/env python3
"""Breaks GGUF headers in thousands of ways and sees that the reader answers each with a header or an error.

    scripts/fuzz_headers.py [--count 20000] [--seed 1]

The cases run in a child process whose address space is limited to what it has after start-up plus a fixed
margin, each under a time limit. A case fails when anything but ModelError comes out, when it takes longer
than LIMIT_S, more memory than the file's size plus EXTRA_BYTES, or when an accepted header cannot be true.
Case N of a seed is always the same: `--only N` repeats it alone. Needs a Unix (address-space limits).
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qnext.errors import ModelError  # noqa: E402
from qnext.models.gguf_reader import read_header  # noqa: E402
from qnext.models.header import ModelHeader  # noqa: E402
from tests.gguf_writing import (  # noqa: E402
    Built,
    Field,
    build,
    sample_metadata,
    sample_shards,
    sample_tensors,
    u32,
    write_shards,
)

LIMIT_S = 2.0
EXTRA_BYTES = 1 << 20
ADDRESS_MARGIN = 64 << 20
EDGES = (
    0,
    1,
    2,
    3,
    7,
    8,
    31,
    32,
    255,
    1024,
    1025,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63,
    2**64 - 1,
)


class TooSlowError(BaseException):
    """Raised by the alarm; not an Exception, so that nothing on the way can take it for an answer."""


def flip_bits(rng: random.Random, built: Built) -> bytes:
    """One to eight bits anywhere in the header."""
    data = bytearray(built.data)
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(built.header_bytes)] ^= 1 << rng.randrange(8)
    return bytes(data)


def overwrite(rng: random.Random, built: Built) -> bytes:
    """A few bytes replaced by random ones, by zeros or by 0xff."""
    data, at, length = bytearray(built.data), rng.randrange(built.header_bytes), rng.randint(1, 64)
    data[at : at + length] = rng.choice([rng.randbytes(length), bytes(length), b"\xff" * length])
    return bytes(data)


def cut(rng: random.Random, built: Built) -> bytes:
    """The end is missing, half the time inside the header."""
    return bytes(built.data[: rng.randrange(rng.choice([built.header_bytes, len(built.data)]))])


def insert_or_delete(rng: random.Random, built: Built) -> bytes:
    """Everything after some byte moves."""
    data, at, length = bytearray(built.data), rng.randrange(built.header_bytes), rng.randint(1, 40)
    data[at : at + rng.choice([0, length])] = rng.choice([b"", rng.randbytes(length)])
    return bytes(data)


def copy_within(rng: random.Random, built: Built) -> bytes:
    """A piece of the header is written over another."""
    data, length = bytearray(built.data), rng.randint(8, 200)
    source, target = rng.randrange(built.header_bytes), rng.randrange(built.header_bytes)
    piece = data[source : source + length]
    data[target : target + len(piece)] = piece
    return bytes(data)


def change_field(rng: random.Random, built: Built) -> bytes:
    """A count, length, type, size or offset gets a value at an edge or near its own."""
    data = bytearray(built.data)
    fields = [field for field in built.fields if field.kind != "text"]
    kind = rng.choice(sorted({field.kind for field in fields}))  # lengths of tokens would drown the rest
    for field in rng.choices([f for f in fields if f.kind == kind], k=rng.choice([1, 1, 2])):
        own = int.from_bytes(data[field.at : field.at + field.size], "little")
        near = (own - 1, own + 1, own * 2, own ^ 0x80, len(data) - field.at, len(data))
        value = rng.choice(EDGES + near) % (1 << 8 * field.size)
        data[field.at : field.at + field.size] = value.to_bytes(field.size, "little")
    return bytes(data)


def swap_fields(rng: random.Random, built: Built) -> bytes:
    """Two fields of one size change places: names become twins, offsets cross, types wander."""
    data = bytearray(built.data)
    one = rng.choice(built.fields)
    two = rng.choice([field for field in built.fields if field.size == one.size])
    first, second = (bytes(data[f.at : f.at + f.size]) for f in (one, two))
    data[two.at : two.at + two.size] = first
    if rng.random() < 0.5:
        data[one.at : one.at + one.size] = second
    return bytes(data)


def break_text(rng: random.Random, built: Built) -> bytes:
    """A key, name or string stops being UTF-8, or grows past its place."""
    data = bytearray(built.data)
    texts: list[Field] = [field for field in built.fields if field.kind == "text" and field.size]
    field = rng.choice(texts)
    if rng.random() < 0.5:
        data[field.at + rng.randrange(field.size)] = rng.choice([0x00, 0x80, 0xC3, 0xFF])
    else:
        data[field.at - 8 : field.at] = struct.pack("<Q", rng.choice([field.size - 1, field.size + 1, 0, 64]))
    return bytes(data)


MUTATIONS: tuple[Callable[[random.Random, Built], bytes], ...] = (
    flip_bits,
    overwrite,
    cut,
    insert_or_delete,
    copy_within,
    change_field,
    change_field,
    swap_fields,
    break_text,
)


def base_sets() -> list[list[Built]]:
    """The sound models to break: v3, v2, another alignment, a split set, one with nothing but metadata."""
    aligned = {**sample_metadata(), "general.alignment": u32(64)}
    return [
        [build(sample_metadata(), sample_tensors())],
        [build(sample_metadata(), sample_tensors(), version=2)],
        [build(aligned, sample_tensors(range(6)), alignment=64)],
        sample_shards(3),
        [build(sample_metadata())],
    ]


def untruth(header: ModelHeader) -> str | None:
    """What in an accepted header cannot be true."""
    ends: dict[int, int] = {}
    for tensor in header.tensors:
        if tensor.offset < ends.get(tensor.shard, 24) or tensor.nbytes <= 0:
            return f"tensor {tensor.name!r} overlaps what is before it"
        ends[tensor.shard] = tensor.offset + tensor.nbytes
    for shard, end in ends.items():
        if end > header.paths[shard].stat().st_size:
            return f"shard {shard} is shorter than its tensors"
    if len({tensor.name for tensor in header.tensors}) != len(header.tensors):
        return "two tensors of one name"
    return None


def try_case(folder: Path, bases: list[list[Built]], seed: int, number: int) -> dict[str, object]:
    """Breaks one file of one base and reads it. `fault` is None when the reader kept its word."""
    rng = random.Random(f"{seed}:{number}")
    which = rng.randrange(len(bases))
    base, mutate = bases[which], rng.choice(MUTATIONS)
    broken = rng.randrange(len(base))
    data = mutate(rng, base[broken])
    paths = [folder / str(which) / f"m-{n + 1:05d}-of-{len(base):05d}.gguf" for n in range(len(base))]
    paths[broken].write_bytes(data)
    if len(base) > 1 and rng.random() < 0.05:
        paths[broken].unlink()
    fault, accepted = None, False
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    started = time.perf_counter_ns()
    try:
        header = read_header(paths[0])
        accepted = True
        fault = untruth(header)
    except ModelError as error:
        if str(folder) not in error.message or not error.hint:
            fault = f"an error without file or hint: {error.message}"
    except TooSlowError:
        fault = f"took longer than {LIMIT_S} s"
    except Exception as error:  # noqa: BLE001 - any other exception is what this script looks for
        fault = f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    elapsed = time.perf_counter_ns() - started
    extra = tracemalloc.get_traced_memory()[1] - before
    size = sum(len(built.data) for built in base) + len(data)
    if fault is None and extra > size + EXTRA_BYTES:
        fault = f"took {extra} bytes for {size} bytes of files"
    paths[broken].write_bytes(base[broken].data)
    return {"number": number, "mutation": mutate.__name__, "base": which, "accepted": accepted,
            "fault": fault, "elapsed_ns": elapsed, "extra": extra}  # fmt: skip


def run_cases(numbers: range, seed: int) -> dict[str, object]:
    """All cases in this process, under the limits."""
    import resource

    def too_slow(signum: int, frame: FrameType | None) -> None:
        raise TooSlowError

    signal.signal(signal.SIGALRM, too_slow)
    bases = base_sets()
    accepted, slowest, peak = 0, 0, 0
    faults: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="qnext-fuzz-") as name:
        folder = Path(name)
        for which, base in enumerate(bases):
            (folder / str(which)).mkdir()
            read_header(write_shards(folder / str(which), base)[0])  # sound, and everything is imported now
        statm = Path("/proc/self/statm")
        if statm.exists():
            limit = int(statm.read_text().split()[0]) * resource.getpagesize() + ADDRESS_MARGIN
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        tracemalloc.start()
        for number in numbers:
            case = try_case(folder, bases, seed, number)
            accepted += bool(case["accepted"])
            slowest = max(slowest, int(str(case["elapsed_ns"])))
            peak = max(peak, int(str(case["extra"])))
            if case["fault"] is not None:
                faults.append(case)
    return {
        "tried": len(numbers),
        "accepted": accepted,
        "rejected": len(numbers) - accepted,
        "crashes": len(faults),
        "slowest_ms": round(slowest / 1e6, 1),
        "peak_extra_bytes": peak,
        "faults": faults[:10],
    }


def run(count: int, seed: int) -> dict[str, object]:
    """Tries `count` cases in a child process. Keys: tried, accepted, rejected, crashes, slowest_ms,
    peak_extra_bytes (the most Python memory one case took), faults (the first ten)."""
    return _run_child(0, count, seed)


def _run_child(first: int, count: int, seed: int) -> dict[str, object]:
    command = [sys.executable, __file__, "--child", str(first), "--count", str(count), "--seed", str(seed)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=60 + count * LIMIT_S / 10)
        fault = f"the child ended with {child.returncode}: {child.stderr[-2000:]}"
    except subprocess.TimeoutExpired:
        child, fault = None, "the child did not end in time"
    if child is not None and child.returncode == 0:
        result: dict[str, object] = json.loads(child.stdout)
        return result
    return {"tried": 0, "accepted": 0, "rejected": 0, "crashes": 1, "slowest_ms": 0.0,
            "peak_extra_bytes": 0, "faults": [fault]}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="N", help="repeat case N of the seed alone")
    parser.add_argument("--child", type=int, metavar="FIRST", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        numbers = range(options.child, options.child + options.count)
        print(json.dumps(run_cases(numbers, options.seed)))
        return 0
    result = (
        _run_child(options.only, 1, options.seed)
        if options.only is not None
        else run(options.count, options.seed)
    )
    print(
        "headers tried {tried}: accepted {accepted}, rejected {rejected}, crashes {crashes}, "
        "slowest {slowest_ms} ms, most memory {peak_extra_bytes} bytes".format(**result)
    )
    for fault in result["faults"]:  # type: ignore[attr-defined]
        print(fault, file=sys.stderr)
    return 1 if result["crashes"] or not result["tried"] else 0


if __name__ == "__main__":
    sys.exit(main())
