"""`python -m environment ROOT VENV`: make the environment, or end with two lines and a status."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from environment.problems import SetupError
from environment.progress import say
from environment.steps import make_environment


def main() -> int:
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    try:
        make_environment(Path(sys.argv[1]), Path(sys.argv[2]))
    except KeyboardInterrupt:
        say("set-up stopped; what is done is kept, the same command goes on from there")
        return 130
    except SetupError as error:
        if error.tail:
            print(error.tail, file=sys.stderr)
        print(f"Error: {error.message}\n{error.hint}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"Error: set-up cannot use {error.filename or sys.argv[2]}: {error.strerror}.", file=sys.stderr)
        print("Make it writable and free some space, or name other places: QNEXT_VENV=DIR (environment), "
              "XDG_CACHE_HOME=DIR (compiled engine).", file=sys.stderr)  # fmt: skip
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
