"""Shared by all tests: a private home, the demo model, and the real command as a process.

Every test session gets its own QNEXT_HOME, so nothing of the user's is read or changed, and the one-off
probes (weight layout, RAM bandwidth) run once for all tests. One thread per engine: with more, llama.cpp's
barriers make a decode up to a hundred times slower when the machine has other work.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.browser import Browser

hypothesis.settings.register_profile("busy machine", deadline=None, max_examples=40)
hypothesis.settings.load_profile("busy machine")

ROOT = Path(__file__).resolve().parent.parent

Qnext = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def qnext_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The session's QNEXT_HOME; settings of the surrounding environment do not reach the tests."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("QNEXT_", "LLAMA_ARG_")):
                patch.delenv(name)
        patch.setenv("QNEXT_HOME", str(home))
        patch.setenv("QNEXT_THREADS", "1")
        patch.setenv("QNEXT_THREADS_BATCH", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # hundreds of processes would compile it all
        yield home


@pytest.fixture(scope="session")
def demo_model(qnext_home: Path) -> Path:
    """The demo GGUF, made once, where `qnext run demo` looks for it too."""
    from qnext.config import find_paths
    from qnext.models.synth import demo_path

    return demo_path(find_paths().demo_dir)


@pytest.fixture(scope="session")
def qnext(qnext_home: Path) -> Qnext:
    """The command as a real process: `qnext("plan", "demo", input="…", timeout=60, env={…})`."""

    def run(
        *arguments: str, input: str | None = None, timeout: float = 60, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "qnext", *arguments],
            input=input,
            stdin=None if input is not None else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **(env or {})},
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, for pages."""
    from tests.browser import Browser, find_chromium

    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    running = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield running
    running.close()
