"""The Typer application and its commands."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from qnext.cli import bench, plan, run, synth, worker

app = typer.Typer(
    name="qnext",
    help="Plan, run and measure mixture-of-experts models through llama.cpp.\n\n"
    "Example: [bold]qnext run demo --prompt Hello[/bold]",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _configure(
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Show the engine's log on stderr.")
    ] = False,
    _version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if verbose:
        logging.basicConfig(level=logging.DEBUG, format="%(message)s")


app.command("plan")(plan.plan)
app.command("run")(run.run)
app.command("synth")(synth.synth)
app.command("worker")(worker.worker)
app.add_typer(bench.app, name="bench")
