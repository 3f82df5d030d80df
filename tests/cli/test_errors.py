"""Every error a user meets is two lines and an exit code that scripts can branch on."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from io import StringIO
from pathlib import Path

import pytest

from qnext.cli.main import run_command
from tests.conftest import ROOT, Qnext


@pytest.mark.parametrize(
    ("arguments", "code", "error", "hint"),
    [
        (["frobnicate"], 2, "No such command 'frobnicate'", "qnext --help"),
        (["plan"], 2, "no MODEL", "qnext plan --all"),
        (["pull"], 2, "Missing argument 'MODEL'", "qnext pull --help"),
        (["plan", "demo", "--nope"], 2, "No such option: --nope", "qnext plan --help"),
        (["bench", "sow"], 2, "Did you mean 'show'", "qnext bench --help"),
        (["plan", "demo", "-c", "many"], 2, "--ctx-size", "qnext plan --help"),
        (["plan", "demo", "-c", "0"], 2, "--ctx-size", "qnext plan --help"),
        (["plan", "demo", "-fa", "maybe"], 2, "'maybe' is not a value of --flash-attn", "on, off, auto"),
        (["plan", "demo", "-ts", "a,b"], 2, "'a,b' is not a tensor split", "-ts 3,1"),
        (["plan", "demo", "-ot", "exps"], 2, "'exps' is not an override", "-ot"),
        (["plan", "demo", "--ram", "lots"], 2, "not a size", "24G"),
        (["plan", "demo", "-ctk", "q9"], 2, "q9", "q8_0"),
        (["bench", "run", "demo", "-p", "x"], 2, "not a list of token counts", "-p 512"),
        (["bench", "run", "demo", "-p", "0", "-n", "0"], 2, "there is no test to run", "-p 512"),
        (["bench", "show", "zzz"], 2, "no record 'zzz'", "qnext bench history"),
        (["run", "demo", "--prompt", " "], 2, "the prompt is empty", "--prompt"),
        (["run", "demo", "--json"], 2, "the prompt is empty", "--prompt"),
        (["plan", "demo", "--hardware", "nothing"], 3, "nothing", "qnext profile list"),
        (["run", "demo", "-p", "Hi", "--ram", "20M"], 4, "demo does not fit", "would fit"),
        (["plan", "nosuch.gguf"], 5, "there is no file 'nosuch.gguf'", "qnext run demo"),
        (["synth", "nosuch", "-o", "x.gguf"], 5, "nosuch", "qwen3-next-80b-a3b"),
    ],
)
def test_two_lines_and_a_code(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    error: str,
    hint: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO())
    assert run_command(arguments) == code
    told = capsys.readouterr().err
    said = [line for line in told.splitlines() if not line.startswith("qnext: ")]
    assert len(said) == 2, told
    assert said[0].startswith("error: ") and error in said[0]
    assert said[1].startswith("  try: ") and hint in said[1]


def test_the_exit_status_is_that_code(qnext: Qnext) -> None:
    done = qnext("plan", "nosuch.gguf")
    assert (done.returncode, done.stdout) == (5, "")
    assert len(done.stderr.splitlines()) == 2


def test_a_broken_file_is_one_error(qnext: Qnext, demo_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(demo_model.read_bytes()[:5000])
    done = qnext("run", str(broken), "--prompt", "Hi")
    assert done.returncode == 5
    assert done.stderr.startswith(f"error: {broken}, byte ") and len(done.stderr.splitlines()) == 2


def test_a_home_that_cannot_be_used_is_explained(qnext: Qnext, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    for arguments in (("plan", "demo"), ("bench", "history")):
        done = qnext(*arguments, env={"QNEXT_HOME": str(blocked)})
        assert done.returncode in (2, 5, 8)
        assert str(blocked) in done.stderr and "Traceback" not in done.stderr


def test_help_is_no_error(qnext: Qnext) -> None:
    bare = qnext()
    assert bare.returncode == 0 and bare.stderr == ""
    assert bare.stdout == qnext("--help").stdout == qnext("-h").stdout


def test_version_stands_anywhere_before_the_command(qnext: Qnext) -> None:
    from qnext import __version__

    for arguments in (["--version"], ["-V"], ["-v", "--version"]):
        done = qnext(*arguments)
        assert (done.returncode, done.stdout) == (0, f"qnext {__version__}\n")


@pytest.fixture(scope="module")
def without_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every installed package but the engine, for a Python that knows no other packages."""
    folder = tmp_path_factory.mktemp("packages")
    for kind in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(kind)).iterdir():
            if "llama_cpp" not in entry.name and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["plan", "demo"], 0),
        (["bench", "history"], 0),
        (["synth", "tiny-qwen3moe", "--quant", "Q8_0", "-o", "OUT"], 0),
        (["run", "demo", "--prompt", "Hi"], 7),
        (["bench", "run", "demo"], 7),
        (["worker"], 7),
    ],
)
def test_without_the_engine_everything_but_loading_works(
    without_engine: Path, tmp_path: Path, arguments: list[str], code: int
) -> None:
    done = subprocess.run(
        # -S leaves out the installed packages, so that only those of the folder are there.
        [
            sys.executable,
            "-S",
            "-m",
            "qnext",
            *(word.replace("OUT", f"{tmp_path}/x.gguf") for word in arguments),
        ],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{without_engine}"},
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    if code:
        error, hint = done.stderr.splitlines()[-2:]
        assert "llama-cpp-python is not installed" in error
        assert "./scripts/qnext" in hint
