"""The Typer application. Only the command that runs is imported; the others are known by their summary.

Building all commands costs a third of a second on a slow machine, for options that nobody asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from qnext.cli.verbose import Verbose

COMMANDS = {
    "run": "Chat with a model, or answer one --prompt.",
    "plan": "Show what goes where in memory, and how fast it should be.",
    "forecast": "Measure a few layers here, and state the speed of the whole model.",
    "pull": "Fetch a model from the Hugging Face Hub, resumable and verified.",
    "doctor": "Tell what limits this machine, and what each fault costs.",
    "profile": "Look at hardware profiles, and keep one of this machine.",
    "serve": "Serve a model to OpenAI-compatible programs.",
    "bench": "Measure speeds, and look at what was measured.",
    "synth": "Write a model file of true shape with random weights.",
    "worker": "Lend this machine's memory to qnext on another one.",
}
"""Name -> what `qnext --help` says. The module `qnext.cli.NAME` holds the command: a function of that name,
or a group of commands called `app`."""

SETTINGS = {"help_option_names": ["-h", "--help"]}


def make_app(arguments: Sequence[str]) -> typer.Typer:
    """The application with the one command that `arguments` name, and stand-ins for the others."""
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    app = typer.Typer(
        name="qnext",
        help="Plan, run and measure mixture-of-experts models through llama.cpp.\n\n"
        'Start with: qnext run demo --prompt "Hello"',
        epilog="More about a command: qnext COMMAND --help",
        # The list of commands needs no panels, and Rich's help would double the time it takes to appear.
        rich_markup_mode=None if wanted is None else "rich",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings=SETTINGS,
    )
    app.callback()(_root)
    for name, summary in COMMANDS.items():
        if name != wanted:
            app.command(name, help=summary)(_stand_in)
            continue
        module = import_module(f"qnext.cli.{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            app.command(name, context_settings=SETTINGS)(getattr(module, name))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        from qnext import __version__

        typer.echo(f"qnext {__version__}")
        raise typer.Exit


def _root(
    verbose: Verbose = False,
    version: Annotated[
        bool,
        typer.Option(
            "-V",
            "--version",
            metavar="",
            is_eager=True,
            callback=_print_version,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Options before the command's name; their callbacks do the work."""


def _stand_in() -> None:
    raise AssertionError("the wanted command is always a real one")
