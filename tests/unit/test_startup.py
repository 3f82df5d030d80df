"""What a start imports: sets of modules, not times, so that the rule holds on a busy machine too."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from qnext.cli.app import COMMANDS

_REPORT = """
import atexit, sys
atexit.register(lambda: print(*sys.modules, file=sys.stderr, sep="\\n"))
sys.argv = ["qnext", *sys.argv[1:]]
from qnext.cli.main import main
main()
"""


def _modules(*arguments: str) -> set[str]:
    """Every module loaded at the end of `qnext ARGUMENTS`, parents included."""
    done = subprocess.run(
        [sys.executable, "-c", _REPORT, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["--version"], ["-V"]])
def test_version_loads_nothing_but_itself(arguments: list[str]) -> None:
    loaded = _modules(*arguments)
    assert {name for name in loaded if name.startswith("qnext")} <= {"qnext", "qnext.cli", "qnext.cli.main"}
    assert not loaded & {"typer", "rich", "pydantic", "numpy", "psutil", "argparse", "json", "logging"}


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_loads_no_command_and_no_heavy_package(arguments: list[str]) -> None:
    loaded = _modules(*arguments)
    heavy = {
        "numpy",
        "pydantic",
        "psutil",
        "yaml",
        "huggingface_hub",
        "sqlite3",
        "llama_cpp",
        "jinja2",
        "gguf",
        "rich.table",
    }
    assert not loaded & heavy
    rooms = {name.split(".")[1] for name in loaded if name.startswith("qnext.")}
    assert rooms <= {"cli", "errors"}
    assert not loaded & {f"qnext.cli.{name}" for name in COMMANDS}


def test_plan_leaves_out_what_only_running_needs(demo_model: Path) -> None:
    loaded = _modules("plan", str(demo_model), "--hardware", "rtx4070-64gb")
    assert not loaded & {"numpy", "jinja2", "asyncio", "multiprocessing", "llama_cpp", "sqlite3", "http"}
    assert "qnext.cli.run" not in loaded


@pytest.mark.parametrize("name", COMMANDS)
def test_summary_in_the_help_is_the_commands_own(name: str) -> None:
    module = import_module(f"qnext.cli.{name}")
    own = module.app.info.help if hasattr(module, "app") else inspect.getdoc(getattr(module, name))
    assert own.startswith(COMMANDS[name].rstrip("."))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_fits_80_columns_and_shows_an_example(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qnext", name, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "qnext " + name in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
