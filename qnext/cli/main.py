"""Entry point: assembles the commands and turns errors into exit codes.

Imports stay light: `--version` answers before Typer is loaded, and each command imports what it drives only
when it runs.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from qnext import __version__


def main() -> NoReturn:
    """Run the command line and exit: 0 ok, 1 bug, 2 usage, 3 hardware … 8 store, 130 Ctrl-C."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        sys.stdout.write(f"qnext {__version__}\n")
        sys.exit(0)
    sys.exit(_run())


def _run() -> int:
    from qnext.cli.app import app
    from qnext.errors import QnextError

    try:
        app(prog_name="qnext", standalone_mode=True)
    except QnextError as error:
        from qnext.cli.output import print_error

        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`qnext … | head`): not our failure, and nothing more to say.
        sys.stderr.close()
        return 0
    return 0
