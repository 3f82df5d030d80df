"""Where things are: the checkout, its environment, the cache folder, and the surroundings programs run in."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from environment.problems import SetupError
from environment.progress import say

# Settings of someone else's pip or Python that would send files elsewhere than into the environment.
_MISLEADING = (
    "PYTHONPATH",
    "PYTHONHOME",
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_USER",
    "PIP_CONSTRAINT",
    "PIP_REQUIRE_HASHES",
)


@dataclass(frozen=True, slots=True)
class Place:
    """`env` is what every program of the set-up runs with."""

    root: Path
    venv: Path
    cache: Path
    env: Mapping[str, str]

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def constraints(self) -> Path:
        return self.root / "constraints.txt"

    @property
    def log(self) -> Path:
        return self.venv / "qnext-setup.log"

    def pip(self, *arguments: str) -> list[str]:
        return [str(self.python), "-P", "-m", "pip", *arguments]


def find_place(root: Path, venv: Path) -> Place:
    env = {name: value for name, value in os.environ.items() if name not in _MISLEADING}
    env.setdefault("PIP_RETRIES", "2")
    env.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PIP_USER="0")
    env["PATH"] = f"{venv}/bin{os.pathsep}{env.get('PATH', os.defpath)}"
    return Place(root, venv, _find_cache(env), env)


def _find_cache(env: Mapping[str, str]) -> Path:
    """The cache folder that qnext itself uses: QNEXT_HOME moves it, else the platform's."""
    if env.get("QNEXT_HOME"):
        return Path(env["QNEXT_HOME"]).expanduser().absolute() / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qnext"
    return Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qnext"


@contextmanager
def hold_lock(path: Path, busy_with: str) -> Iterator[int]:
    """Hold an exclusive lock, waiting for whoever has it; yields its descriptor.

    The kernel drops the lock when its last holder is gone, however it ended, so there is none to clean up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{busy_with} is under way in another process; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle.fileno()


def need_free_space(folder: Path, need_bytes: int, what_for: str, variable: str) -> None:
    """Raise SetupError when the disk of `folder` has less than `need_bytes` free."""
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < need_bytes:
        raise SetupError(
            f"{what_for} needs {need_bytes / 2**30:.1f} GiB in {folder}; {free / 2**30:.1f} GiB are free.",
            f"Free some space, or name another place: {variable}=/path/with/space before the command.",
        )


def read_pins(constraints: Path) -> dict[str, str]:
    """Each package's block of constraints.txt (its pin, marker and hashes), by name."""
    blocks = re.split(r"^(?=[A-Za-z0-9])", constraints.read_text(), flags=re.MULTILINE)
    return {block.split("==")[0].strip(): block for block in blocks if "==" in block and block[0] != "#"}
