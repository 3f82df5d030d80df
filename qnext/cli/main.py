"""Entry point: runs the command and turns every way of ending into an exit code.

Imports stay light: `--version` answers before Typer is loaded, and only the command that runs is imported.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import NoReturn

from qnext import __version__

INTERRUPTED = 130


def main() -> NoReturn:
    """Run the command line and exit: 0 ok, 1 bug, 2 usage, 3 hardware … 8 store, 130 Ctrl-C."""
    # Start-up makes many objects and no garbage: collecting among them costs a tenth of `qnext plan`.
    gc.set_threshold(100_000)
    if sys.argv[1:] in (["--version"], ["-V"]):
        sys.stdout.write(f"qnext {__version__}\n")
        sys.exit(0)
    try:
        code = run_command(sys.argv[1:] or ["--help"])
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write("\nqnext: stopped\n")
        code = INTERRUPTED
    except BrokenPipeError:
        code = _reader_gone()
    except SystemExit as ended:
        # Typer's own answer to a closed pipe is to exit with 1.
        if not isinstance(ended.__context__, BrokenPipeError):
            raise
        code = _reader_gone()
    sys.exit(code)


def run_command(arguments: list[str]) -> int:
    """Run `qnext ARGUMENTS` in this process and return its exit code. Raises KeyboardInterrupt for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal or file that is not Unicode shows '?' for what it lacks instead of ending the program.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    import typer

    from qnext.cli.app import make_app
    from qnext.errors import QnextError

    try:
        # Not standalone: Typer would end the process by itself, with panels of its own for usage errors.
        result = make_app(arguments)(args=arguments, prog_name="qnext", standalone_mode=False)
    except QnextError as error:
        from qnext.cli.output import print_error

        print_error(error)
        return error.exit_code
    except typer.TyperException as error:
        return _usage(error)
    if result == INTERRUPTED:
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def _usage(error: Exception) -> int:
    """Typer's complaints about the command line, in our two lines. Bare `qnext bench` has shown its help."""
    from qnext.cli.output import print_error
    from qnext.errors import UsageError

    context = getattr(error, "ctx", None)
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if message:
        command = context.command_path if context is not None else "qnext"
        print_error(UsageError(message.rstrip(".").replace("\n", " "), hint=f"{command} --help"))
    return UsageError.exit_code


def _reader_gone() -> int:
    """The reader of our output has left (`qnext … | head`): not our failure, and nothing more to say."""
    # Python flushes stdout once more at exit; give it a place to go.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0
