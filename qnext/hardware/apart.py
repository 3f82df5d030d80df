"""Measurements in a process of their own, followed line by line.

A measurement may take gigabytes, hang on a dead disk, or be chosen by the kernel when memory runs out. In a
child it can be killed at any moment, gives everything back, and takes no one with it. It writes one JSON line
per reading as soon as it has it, so what was measured before the deadline counts. Its standard input is a
pipe that nobody writes to: when the parent goes, however it dies, the pipe ends and the child with it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import IO, Any

from qnext.errors import HardwareError

_CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from qnext.hardware.apart import answer
answer(sys.argv[2], sys.argv[3])
"""
_GRACE_S = 0.2
"""How long a killed child may take to go; one that a dead disk holds in the kernel is left behind."""


def measure_apart(module: str, question: Mapping[str, Any], limit_s: float) -> Generator[dict[str, Any]]:
    """Entries that `measure(question)` of `module` yields in a child, killed after `limit_s` seconds.

    Raises HardwareError after the last entry when the child was late, failed or died; entries up to there
    are good. Close the iterator (`contextlib.closing`) to end the child early.
    """
    import os
    import queue
    import subprocess
    import tempfile
    import threading

    root = str(Path(__file__).resolve().parents[2])
    argv = [sys.executable, "-P", "-c", _CHILD, root, module, json.dumps(question)]
    # Without this, importing numpy starts a thread per core for matrix products that nobody asks for.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    ends = time.monotonic() + limit_s
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    with tempfile.TemporaryFile() as errors:
        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                encoding="utf-8",
            )
        except OSError as error:
            raise _failed(f"the measuring process did not start: {error.strerror}") from error
        reader = threading.Thread(target=_follow, args=(child.stdout, lines), daemon=True)
        reader.start()
        try:
            while (line := lines.get(timeout=max(0.0, ends - time.monotonic()))) is not None:
                entry = json.loads(line)
                if "problem" in entry:
                    raise _failed(entry["problem"])
                yield entry
            if status := child.wait(max(0.0, ends - time.monotonic())):
                errors.seek(0)
                said = errors.read().decode("utf-8", "replace").strip().splitlines()
                raise _failed(f"the measuring process ended with status {status}: {(said or ['silent'])[-1]}")
        except (queue.Empty, subprocess.TimeoutExpired):
            raise _failed(f"the measurement did not end within {limit_s:g} s") from None
        finally:
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE_S)
            reader.join(_GRACE_S)
            if not reader.is_alive():  # else it holds the pipe's lock until the child lets go
                for pipe in (child.stdin, child.stdout):
                    if pipe is not None:
                        pipe.close()


def _follow(pipe: IO[str], lines: Any) -> None:
    for line in pipe:
        if line.endswith("}\n"):  # one cut off by a kill says nothing
            lines.put(line)
    lines.put(None)


def _failed(message: str) -> HardwareError:
    return HardwareError(message, hint="Free some memory, let other programs finish, and try again.")


def answer(module: str, question: str) -> None:
    """The child's whole life."""
    import importlib
    import os
    import threading

    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for entry in importlib.import_module(module).measure(json.loads(question)):
            _tell(entry)
    except (OSError, MemoryError, ImportError, HardwareError) as error:
        _tell({"problem": getattr(error, "strerror", None) or str(error) or type(error).__name__})
    os._exit(0)  # the thread on standard input never returns, and the kernel frees memory fastest


def _end_with_parent() -> None:
    import os

    while os.read(sys.stdin.fileno(), 1024):
        pass
    os._exit(1)


def _tell(entry: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(entry) + "\n")
    sys.stdout.flush()
