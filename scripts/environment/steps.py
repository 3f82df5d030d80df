"""The set-up itself: virtual environment, packages, engine, stamp; each step done only where it is missing.

The stamp that scripts/environment.sh looks for is taken away first and written last, so an interrupted
set-up is never used. What it left is judged by the files: a package whose RECORD does not match the disk, or
a Python that does not start, and the environment is made anew; otherwise pip adds what is missing.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from environment import engine
from environment.place import Place, find_place, hold_lock, need_free_space, read_pins
from environment.problems import SetupError, explain_log
from environment.progress import run_logged, say, spell_duration
from environment.switches import choose_switches

_VENV_NEEDS_BYTES = 1 << 30
_ENTRY = """\
import sys

from qnext.cli.main import main

sys.exit(main())
"""


def make_environment(root: Path, venv: Path) -> None:
    """Bring `venv` to what constraints.txt, CMAKE_ARGS and QNEXT_NO_ENGINE ask for. Raises SetupError."""
    place = find_place(root, venv)
    began = time.monotonic()
    _refuse_foreign_folder(place)
    venv.mkdir(parents=True, exist_ok=True)
    with hold_lock(venv / "qnext.lock", f"Set-up of {venv}") as lock:
        if _is_ready(place):
            return
        wants_engine = not place.env.get("QNEXT_NO_ENGINE")
        scratch = venv / "qnext-scratch"
        place = replace(place, env={**place.env, "TMPDIR": str(scratch)})
        (venv / "qnext-ready").unlink(missing_ok=True)
        compiling = ", then llama.cpp is compiled, 4 to 8 minutes on 2 cores; only this once"
        say(
            f"setting up its private environment in {venv}: packages about 1 minute{compiling * wants_engine}"
        )
        _make_venv(place)
        shutil.rmtree(scratch, ignore_errors=True)  # pip leaves its temporary folders when it is killed
        scratch.mkdir()
        _install_packages(place, lock)
        _link_checkout(place)
        note = _install_engine(place, lock) if wants_engine else _intact_engine(place)
        shutil.rmtree(scratch, ignore_errors=True)
        _write_stamp(place, note)
        say(f"ready in {spell_duration(time.monotonic() - began)}")


def _refuse_foreign_folder(place: Place) -> None:
    """A folder that is neither empty nor an environment of ours is someone's data: leave it alone."""
    venv = place.venv
    if venv == place.root / ".venv" or not venv.exists() or (venv / "qnext.lock").exists():
        return
    if not venv.is_dir() or any(venv.iterdir()):
        raise SetupError(
            f"QNEXT_VENV={venv} exists and was not made by qnext.", "Name a new or an empty folder."
        )


def _stamp_lines(place: Place, note: dict[str, str] | None) -> str:
    return f"{place.root}\n{'engine' if note else 'none'}\n{note['user'] if note else ''}\n"


def _is_ready(place: Place) -> bool:
    """The same question as in environment.sh, asked again once the lock is held."""
    if place.env.get("QNEXT_REBUILD_ENGINE"):
        return False
    note = engine.read_note(place.venv)
    wanted_user = place.env.get("CMAKE_ARGS", note["user"] if note else "")
    try:
        stamp = (place.venv / "qnext-ready").read_text()
        same_pins = (place.venv / "qnext-constraints.txt").read_bytes() == place.constraints.read_bytes()
    except FileNotFoundError:
        return False
    engine_fits = bool(place.env.get("QNEXT_NO_ENGINE")) or (note is not None and note["user"] == wanted_user)
    return same_pins and engine_fits and stamp == _stamp_lines(place, note) and place.python.exists()


def _write_stamp(place: Place, note: dict[str, str] | None) -> None:
    shutil.copyfile(place.constraints, place.venv / "qnext-constraints.txt")
    fresh = place.venv / "qnext-ready.new"
    fresh.write_text(_stamp_lines(place, note))
    fresh.replace(place.venv / "qnext-ready")


def _make_venv(place: Place) -> None:
    fault = _find_fault(place)
    if fault is None:
        return
    if (place.venv / "pyvenv.cfg").exists():
        say(f"the environment there is not whole ({fault}); making it anew")
    need_free_space(place.venv, _VENV_NEEDS_BYTES, "The environment", "QNEXT_VENV")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    missing_part = SetupError(
        f"{sys.executable} cannot make virtual environments (its venv or ensurepip part is missing).",
        f"Install it: sudo apt install {version}-venv (Debian, Ubuntu), sudo dnf install {version} (Fedora).",
    )
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise missing_part
    for entry in place.venv.iterdir():
        if entry.name != "qnext.lock":
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    # The resolved path names the exact Python: when the system moves to another version the environment's
    # python no longer starts, and the environment is made anew instead of running without its packages.
    argv = [os.path.realpath(sys.executable), "-m", "venv", str(place.venv)]
    made = run_logged(argv, label=f"making the environment with {version}", log=place.log, env=place.env)
    if not made or not (place.venv / "bin" / "pip").exists():
        raise missing_part
    # Its .pth file costs every start of Python a few milliseconds, and nothing needs it.
    run_logged(
        place.pip("uninstall", "--yes", "setuptools"), label="trimming it", log=place.log, env=place.env
    )


def _find_fault(place: Place) -> str | None:
    """Why the environment there cannot be kept; None when it can."""
    if not (place.venv / "pyvenv.cfg").exists() or not place.python.exists():
        return "no Python in it"
    asked = [str(place.python), "-c", "import sys, pip; print(sys.version_info[:2] >= (3, 11))"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False, env=dict(place.env))
    if answer.stdout.strip() != "True":
        return "its Python or pip does not start"
    packages = site_packages(place)
    if packages is None:
        return "no packages folder"
    for entry in packages.iterdir():
        if entry.name.startswith("~"):
            return f"an interrupted installation left {entry.name}"
        if entry.suffix == ".dist-info" and not _record_is_true(entry):
            return f"{entry.name.removesuffix('.dist-info')} is not complete"
    return None


def site_packages(place: Place) -> Path | None:
    return next(place.venv.glob("lib/python3.*/site-packages"), None)


def _record_is_true(dist_info: Path) -> bool:
    """Every file that the package's RECORD lists with a size is on the disk with that size."""
    try:
        rows = list(csv.reader((dist_info / "RECORD").read_text().splitlines()))
    except OSError:
        return False
    sized = [row for row in rows if len(row) == 3 and row[2] and not row[0].startswith("..")]
    try:
        return all((dist_info.parent / name).stat().st_size == int(size) for name, _, size in sized)
    except OSError:
        return False


def _install_packages(place: Place, lock: int) -> None:
    pins = {name: block for name, block in read_pins(place.constraints).items() if name != engine.NAME}
    wanted = place.venv / "qnext-packages.txt"
    wanted.write_text("".join(pins.values()))
    argv = place.pip(
        "install", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--requirement", str(wanted)
    )
    log = place.log
    log.write_text("")
    label = f"installing {len(pins)} packages"
    if not run_logged(argv, label=label, log=log, env=place.env, keep_open=(lock,)):
        raise explain_log(log, "The packages were not installed", place.cache)


def _link_checkout(place: Place) -> None:
    """Make the checkout importable and give it its command, without building anything."""
    packages = site_packages(place)
    assert packages is not None
    (packages / "qnext-checkout.pth").write_text(f"{place.root}\n")
    entry = place.venv / "bin" / "qnext"
    entry.write_text(f"#!{place.python}\n{_ENTRY}")
    entry.chmod(0o755)


def _intact_engine(place: Place) -> dict[str, str] | None:
    """The note of the engine that is installed, whole and of the pinned version; None without one.

    An engine that was installed by hand, with RPC, is taken over as one built with unknown CMAKE_ARGS.
    """
    packages = site_packages(place)
    assert packages is not None
    version = engine.pinned_version(place)
    dist_info = packages / f"llama_cpp_python-{version}.dist-info"
    if not dist_info.exists() or not _record_is_true(dist_info):
        return None
    note = engine.read_note(place.venv)
    if note is None and any((packages / "llama_cpp" / "lib").glob("*ggml-rpc*")):
        note = {"version": version, "user": "", "switches": "-DGGML_RPC=on"}
        (place.venv / "qnext-engine.json").write_text(json.dumps(note, indent=1) + "\n")
    return note if note is not None and note["version"] == version else None


def _install_engine(place: Place, lock: int) -> dict[str, str] | None:
    installed = _intact_engine(place)
    known = engine.read_note(place.venv)
    user = place.env.get("CMAKE_ARGS", known["user"] if known else "")
    rebuild = bool(place.env.get("QNEXT_REBUILD_ENGINE"))
    if installed is not None and installed["user"] == user and not rebuild:
        return installed
    switches = choose_switches(user, place.env)
    for reason in switches.because:
        say(f"llama.cpp: {reason}")
    say(f"llama.cpp: CMake switches {switches.command_line}")
    wheel = engine.prepare_wheel(place, switches, rebuild=rebuild)
    engine.install_wheel(place, wheel, switches, lock)
    return engine.read_note(place.venv)
