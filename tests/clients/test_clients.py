"""Programs that people use, installed from the package index, against `qnext serve` as a process.

What the demo model cannot do (it says one sentence) comes from a server of the same code whose answers are
in a list: calls of tools, thinking.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qnext.engine.rpc import free_port
from qnext.models.synth import DEMO_SENTENCE
from tests.said_server import SaidBackend, serving

pytestmark = [pytest.mark.engine, pytest.mark.thorough, pytest.mark.timeout(600)]

HERE = Path(__file__).parent


def programs(name: str) -> Path:
    """The folder of programs of an environment with `requirements/NAME.txt`, kept in the user's cache.

    One for each client: some of them want other versions of the same package.
    """
    requirements = HERE / "requirements" / f"{name}.txt"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    version = hashlib.sha256(f"{requirements.read_text()}{sys.version_info[:2]}".encode()).hexdigest()[:16]
    folder = cache / "qnext" / "clients" / f"{name}-{version}"
    done = folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [folder / "bin" / "pip", "install", "-q", "--disable-pip-version-check", "-r", requirements]
        made = subprocess.run(install, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr[-2000:]
        done.touch()
    return folder / "bin"


@pytest.fixture(scope="module")
def demo(demo_model: Path) -> Iterator[str]:
    """The address of a `qnext serve demo`."""
    command = [sys.executable, "-m", "qnext", "serve", str(demo_model), "-c", "4096", "-np", "4", "--json"]
    process = subprocess.Popen([*command, "--port", str(free_port())], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


@pytest.fixture(scope="module")
def listed() -> Iterator[str]:
    """The address of a server that answers from a list."""
    with serving(SaidBackend()) as address:
        yield address


def run(*command: str | Path, seconds: float = 300) -> str:
    """What the command says; the test fails when it does."""
    quiet = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=quiet,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.parametrize("client", ["openai", "anthropic", "langchain", "qwen_agent"])
def test_a_client_works_unchanged(client: str, demo: str, listed: str) -> None:
    run(programs(client) / "python", HERE / f"with_{client}.py", demo, listed, DEMO_SENTENCE)


def test_no_request_that_schemathesis_makes_of_the_document_is_a_fault_of_the_server(
    demo: str, tmp_path: Path
) -> None:
    (tmp_path / "schemathesis.toml").write_text("")
    said = run(
        programs("schemathesis") / "schemathesis",
        "--config-file",
        tmp_path / "schemathesis.toml",
        "run",
        f"{demo}/openapi.json",
        "--checks",
        "not_a_server_error,status_code_conformance,content_type_conformance",
        "--max-examples",
        "25",
        "--seed",
        "1",
        "--request-timeout",
        "60",
    )
    assert "no issues found" in said.lower() or "passed" in said, said[-2000:]
