"""Other engines of this machine: what stands on PATH, which version it is, which devices it sees.

llama.cpp's programs answer `--version` and `--list-devices` at once and are asked. Others are only looked
for: vLLM takes seconds to say its version (its distribution's folder name tells it without), KoboldCpp
unpacks itself for it, `lms` may start LM Studio. A program may hang, print without end, or leave children
behind that hold its output open: each runs in a session of its own that is ended as a whole at the deadline,
and of its output the first 64 KiB are read. All are asked at the same time.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, cast

from qnext.engine.build import show_path

DEADLINE_S = 1.0
MOST_OUTPUT_BYTES = 64 << 10
_END_GRACE_S = 0.2
"""How long after their end the programs' output may take to arrive."""

_LLAMA_CPP = ("llama-server", "llama-cli", "llama-bench")
_VERSION_OF = {
    **dict.fromkeys(_LLAMA_CPP, re.compile(r"^version: *(\S[^\r\n]{0,79})", re.MULTILINE)),
    "ollama": re.compile(r"version is v?(\d[\w.+-]{0,39})"),
    "llamafile": re.compile(r"^llamafile v?(\d[\w.+-]{0,39})", re.MULTILINE),
}
"""What `PROGRAM --version` prints. Only these are run."""
_NOT_RUN = {
    "koboldcpp": "not asked: it unpacks itself to say its version",
    "lms": "not asked: it may start LM Studio",
}
_PACKAGES = ("vllm", "sglang")
_DEVICE = re.compile(r"^ {2}(\w+: .{1,120}?) \((\d+) MiB, (\d+) MiB free\)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class OtherEngine:
    """A program or package. `path` shows the home folder as `~`; None for a package of this environment.

    `project` is what it belongs to (`llama.cpp`, `ik_llama.cpp`, `ollama`, …). Where `version` is None
    `reason` says why. `devices` are the GPUs a llama.cpp program lists (`CUDA0: NVIDIA GeForce RTX 4090`):
    asked of one program per folder, None where not asked or not answered.
    """

    name: str
    project: str
    path: str | None
    version: str | None
    reason: str = ""
    devices: tuple[str, ...] | None = None


def find_other_engines(
    environ: Mapping[str, str] | None = None, deadline_s: float = DEADLINE_S
) -> tuple[OtherEngine, ...]:
    """The engines on PATH and in this Python environment, besides qnext's own. Never raises.

    Takes at most `deadline_s` and a moment. The programs get `environ` without LLAMA_ARG_* (a bad value
    makes them fail) and an OLLAMA_HOST where nobody listens: `ollama` would ask that host for its version.
    """
    environ = os.environ if environ is None else environ
    given = {name: value for name, value in environ.items() if not name.startswith("LLAMA_ARG_")}
    given["OLLAMA_HOST"] = "127.0.0.1:9"
    found = {
        name: path for name in (*_VERSION_OF, *_NOT_RUN, *_PACKAGES) if (path := _on_path(name, environ))
    }
    folders: set[Path] = set()
    asked: dict[str, _Run] = {}
    listing: dict[str, _Run] = {}
    for name in _VERSION_OF.keys() & found:
        asked[name] = _Run([str(found[name]), "--version"], given)
    for name in _LLAMA_CPP:
        if name in found and found[name].parent not in folders:
            folders.add(found[name].parent)
            listing[name] = _Run([str(found[name]), "--list-devices"], given)
    _finish([*asked.values(), *listing.values()], deadline_s)
    engines = [_describe(name, path, asked.get(name), listing.get(name)) for name, path in found.items()]
    return (*engines, *_find_packages(found))


def _on_path(name: str, environ: Mapping[str, str]) -> Path | None:
    """The program PATH names. Relative folders are left out: they would run what lies in the current one."""
    folders = [
        folder for folder in environ.get("PATH", os.defpath).split(os.pathsep) if Path(folder).is_absolute()
    ]
    path = shutil.which(name, path=os.pathsep.join(folders)) if folders else None
    return Path(path) if path else None


def _describe(name: str, path: Path, asked: _Run | None, listing: _Run | None) -> OtherEngine:
    shown = show_path(path)
    if name in _PACKAGES:
        version = _package_beside(path, name)
        reason = "" if version else "not asked: it takes seconds to say its version"
        return OtherEngine(name, name, shown, version, reason)
    if asked is None:
        return OtherEngine(name, name, shown, None, _NOT_RUN[name])
    project = name if name not in _LLAMA_CPP else "ik_llama.cpp" if _is_ik(path) else "llama.cpp"
    match = _VERSION_OF[name].search(asked.text)
    version = match[1].strip() if match and match[1].isprintable() else None
    reason = "" if version else asked.reason or "its answer to --version is not understood"
    devices = None if listing is None else _read_devices(listing.text)
    return OtherEngine(name, project, shown, version, reason, devices)


def _read_devices(text: str) -> tuple[str, ...] | None:
    """The devices after the line `Available devices:`; None without that line."""
    _, heading, listed = text.partition("Available devices:")
    return tuple(match[1] for match in _DEVICE.finditer(listed)) if heading else None


def _is_ik(path: Path) -> bool:
    """ik_llama.cpp names its programs as llama.cpp does; only the folder it was built in tells."""
    try:
        return "ik_llama" in str(path.resolve())
    except (OSError, RuntimeError):
        return False


def _package_beside(program: Path, package: str) -> str | None:
    """Version of the distribution in the environment of `program` (`bin/vllm`), by its folder's name."""
    with contextlib.suppress(OSError, RuntimeError):
        environment = program.resolve().parent.parent
        for folder in environment.glob(f"lib/python3*/site-packages/{package}-*.dist-info"):
            return folder.name.removeprefix(f"{package}-").removesuffix(".dist-info")
    return None


def _find_packages(found: Mapping[str, Path]) -> list[OtherEngine]:
    engines = []
    for name in _PACKAGES:
        if name not in found:
            with contextlib.suppress(metadata.PackageNotFoundError):
                engines.append(OtherEngine(name, name, None, metadata.version(name)))
    return engines


@dataclass(slots=True)
class _Run:
    """One program, started on construction. `text` is what it said so far, `reason` why that may not do."""

    argv: list[str]
    environ: Mapping[str, str]
    reason: str = ""
    _process: subprocess.Popen[bytes] | None = None
    _reader: threading.Thread | None = None
    _output: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        try:
            self._process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=dict(self.environ),
                start_new_session=True,
            )
        except OSError as error:
            self.reason = f"cannot be started: {error.strerror}"
            return
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def text(self) -> str:
        return bytes(self._output).decode(errors="replace")

    def _read(self) -> None:
        """Read up to the limit, then close: a program that goes on printing gets SIGPIPE."""
        assert self._process is not None
        with contextlib.suppress(OSError, ValueError), cast(BinaryIO, self._process.stdout) as stream:
            while (room := MOST_OUTPUT_BYTES - len(self._output)) > 0:
                chunk = os.read(stream.fileno(), room)
                if not chunk:
                    break
                self._output += chunk

    def wait(self, deadline: float) -> None:
        """Wait until the program ends or the clock says `deadline`."""
        if self._process is None:
            return
        try:
            status = self._process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.reason = "it did not answer in time"
        else:
            self.reason = f"it ended with {_spell_status(status)}" if status else ""

    def end(self) -> None:
        """End whatever still runs of it, children included."""
        if self._process is None:
            return
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()

    def collect(self, deadline: float) -> None:
        """Wait for the rest of the output and of the process, until `deadline` at most: what left its session
        may hold the output open for ever."""
        if self._process is None or self._reader is None:
            return
        self._reader.join(timeout=max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=max(0.0, deadline - time.monotonic()))


def _spell_status(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"


def _finish(runs: list[_Run], deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    for run in runs:
        run.wait(deadline)
    for run in runs:
        run.end()
    ended = time.monotonic()
    for run in runs:
        run.collect(ended + _END_GRACE_S)
