"""`python -m environment.peers ROOT VENV`: llama.cpp's own programs, to compare with.

They come from the same source distribution as the engine, through the same top CMakeLists.txt and with the
switches the installed engine was built with, so that a difference in a measurement is not one of compilers.
Kept in the cache folder (QNEXT_ENGINE_SDIST names a source distribution that is here already).
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
import sys
from pathlib import Path

from environment import engine
from environment.place import Place, find_place, hold_lock, need_free_space
from environment.problems import SetupError, explain_log
from environment.progress import run_logged, say
from environment.switches import choose_switches

PROGRAMS = ("llama-bench", "llama-server", "llama-fit-params")
_NEEDS_BYTES = 2 << 30
# After the engine's switches, so that they win: the programs, without the web page that npm would build, and
# without the second copy of the image-model library that the Python package adds for itself.
_SWITCHES = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAVA_BUILD=OFF",
)


def build_peers(place: Place) -> list[Path]:
    """Paths of PROGRAMS, built when they are not there yet. Raises SetupError."""
    note = engine.read_note(place.venv)
    if note is None:
        raise SetupError(
            "There is no engine to compare with.", "Run scripts/qnext without QNEXT_NO_ENGINE first."
        )
    switches = choose_switches(note["user"], place.env)
    key = hashlib.sha256(f"{note['switches']}\0{engine.build_key(place, switches)}".encode()).hexdigest()[:16]
    home = place.cache / "peers" / key
    built = [home / "build" / "bin" / name for name in PROGRAMS]
    with hold_lock(home.with_suffix(".lock"), "Compiling the peers") as lock:
        if not (home / "complete").exists():
            _compile(place, home, note["switches"], lock)
    return built


def _compile(place: Place, home: Path, engine_switches: str, lock: int) -> None:
    need_free_space(home, _NEEDS_BYTES, "Compiling llama.cpp's programs", "XDG_CACHE_HOME")
    engine.find_compiler(place)
    source, build, log = home / "source", home / "build", home / "compile.log"
    if not (home / "source.complete").exists():
        engine.unpack_source(engine.fetch_source(place), source)
        (home / "source.complete").touch()
    jobs = engine.count_jobs(place.env, choose_switches(engine_switches, place.env))
    say(f"compiling {', '.join(PROGRAMS)} with {engine_switches} (as long as the engine, and half again)")
    cmake = str(place.venv / "bin" / "cmake")
    configure = [
        cmake,
        "-G",
        "Ninja",
        "-S",
        str(source),
        "-B",
        str(build),
        *shlex.split(engine_switches),
        *_SWITCHES,
    ]
    compile_ = [cmake, "--build", str(build), "--parallel", str(jobs), "--target", *PROGRAMS]
    for label, argv in (("configuring", configure), (f"compiling with {jobs} jobs", compile_)):
        if not run_logged(argv, label=label, log=log, env=place.env, keep_open=(lock,)):
            raise explain_log(log, "llama.cpp's programs did not compile", place.cache)
    (home / "complete").write_text(f"{engine_switches}\n")
    shutil.rmtree(source)
    (home / "source.complete").unlink()
    for entry in build.iterdir():  # the programs find their libraries in bin, where they stay
        if entry.name != "bin":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def main() -> int:
    try:
        for program in build_peers(find_place(Path(sys.argv[1]), Path(sys.argv[2]))):
            print(program)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from there")
        return 130
    except SetupError as error:
        if error.tail:
            print(error.tail, file=sys.stderr)
        print(f"Error: {error.message}\n{error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
