"""`qnext pull`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.output import note, print_json, print_table, stderr_console

if TYPE_CHECKING:
    from rich.console import Group

    from qnext.models.download import OnProgress, Progress
    from qnext.models.held import Place
    from qnext.pipeline.pulling import Wanted

_LABEL_WIDTH = 42


def pull(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="What to fetch: USER/REPO:QUANT, as on the Hub, or a catalogue name. Without QUANT: "
            "the one that qnext plan takes on this machine.",
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Show files, sizes and what is here; fetch nothing.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", metavar="", help="Read again what is here; fetch nothing.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", metavar="", help="Read again what is here, and fetch what is bad.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", metavar="", help="Print the result as JSON.")
    ] = False,
) -> None:
    """Fetch a model from the Hugging Face Hub, resumable and verified.

    It goes into the cache that all programs share, on from where an earlier download stopped; a file gets its
    name only once its SHA-256 is right. stdout gets the path of the file to load.

    Example: qnext pull unsloth/Qwen3-Next-80B-A3B-Instruct-GGUF:Q4_K_M
    """
    from qnext.config import find_paths
    from qnext.errors import UsageError
    from qnext.pipeline.pulling import check_wanted, describe, find_wanted

    if dry_run + verify + repair > 1:
        raise UsageError("--dry-run, --verify and --repair exclude each other.", hint="Give one of them.")
    paths = find_paths()

    def choose() -> str:
        from qnext.cli.fetch import header_bar
        from qnext.cli.flags import PlanFlags
        from qnext.cli.making_request import make_request
        from qnext.pipeline.pulling import choose_here

        nonlocal model
        with header_bar(f"planning {Path(model).name}", silent=json_output) as read:
            quant = choose_here(make_request(model, PlanFlags()), paths, note, read)
        model = f"{model}:{quant}"  # what is named from here on is what was chosen
        return quant

    # What to check is what is there, which need not be what would be taken now.
    wanted = find_wanted(model, paths, choose=None if verify or repair else choose)
    if dry_run:
        if json_output:
            print_json({"schema": "qnext.pull/1", **describe(wanted)})
        else:
            print_table(_files_table(wanted))
        _check_room(wanted)
        return
    bad: tuple[Place, ...] = ()
    if verify or repair:
        with transfer_bar("checking") as show:
            good = check_wanted(wanted, show)
        bad = tuple(place for place, right in good.items() if not right)
        if verify:
            if json_output:
                print_json({"schema": "qnext.pull/1", **describe(wanted, good)})
            else:
                print_table(_files_table(wanted, good))
            _complain(model, wanted, bad)
            return
        for place in bad:
            note(f"{place.file.path} has wrong contents; fetching it again")
    _fetch(model, wanted, bad, json_output=json_output)


def _fetch(model: str, wanted: Wanted, again: tuple[Place, ...], *, json_output: bool) -> None:
    from qnext.pipeline.pulling import fetch_wanted
    from qnext.units import format_bytes

    count, size = len(wanted.places), wanted.quant.size_bytes
    files = "1 file" if count == 1 else f"{count} files"
    whole = wanted.complete and not again
    if not whole:
        right = wanted.bytes_here - sum(place.bytes_here() for place in again)
        here = f", {format_bytes(right)} of it here" if right else ""
        note(f"fetching {wanted.quant.quant}: {files}, {format_bytes(size)}{here}, into {wanted.cache}")
    try:
        with transfer_bar("fetching") as show:
            report = fetch_wanted(wanted, show, again=again)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        kept = f"{format_bytes(wanted.bytes_here)} of {format_bytes(size)} are here and kept"
        note(f"{kept}; go on with: qnext pull {model}")
        raise
    if whole:
        note(f"{files}, {format_bytes(size)}: all here already (--verify reads the contents again)")
    else:
        seconds = max(report["elapsed_s"], 0.001)
        rate = format_bytes(int(report["fetched_bytes"] / seconds))
        note(f"fetched {format_bytes(report['fetched_bytes'])} in {_clock(seconds)}, {rate}/s; SHA-256 right")
    if json_output:
        print_json({"schema": "qnext.pull/1", **report})
    else:
        typer.echo(wanted.path)


def _check_room(wanted: Wanted) -> None:
    from qnext.pipeline.pulling import check_room

    check_room(wanted)


def _complain(model: str, wanted: Wanted, bad: tuple[Place, ...]) -> None:
    """Raise DownloadError unless all files are here and good."""
    from qnext.errors import DownloadError

    if bad:
        raise DownloadError(
            "Wrong contents: " + ", ".join(place.file.path for place in bad),
            hint=f"qnext pull {model} --repair  (the old file is replaced once the new one is verified)",
        )
    missing = [place.file.path for place in wanted.places if place.state() != "here"]
    if missing:
        raise DownloadError(f"Not here as a whole: {', '.join(missing)}", hint=f"qnext pull {model}")


def _files_table(wanted: Wanted, good: dict[Place, bool] | None = None) -> Group:
    """Files with size and what is here of each, and with `good` whether its contents are right."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from qnext.units import format_bytes

    quant = wanted.quant
    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("here" if good is None else "contents", justify="right", no_wrap=True)
    for place in wanted.places:
        if good is None:
            state = _here_words(place)
        else:
            state = {True: "right", False: "WRONG", None: "not here"}[good.get(place)]
        style = "bold red" if state == "WRONG" else ""
        table.add_row(Text(place.file.path), format_bytes(place.file.size_bytes), Text(state, style=style))
    if len(wanted.places) > 1:
        total = format_bytes(wanted.bytes_here) if good is None else ""
        table.add_row("all", format_bytes(quant.size_bytes), total)
    # Beside the table, not its title and caption: those are wrapped to the width of its columns.
    title = f"{quant.repo}:{quant.quant} at {quant.revision[:12]}"
    missing = quant.size_bytes - wanted.bytes_here
    where = f"in {wanted.cache}"
    if missing:
        where = (
            f"{format_bytes(missing)} to fetch into {wanted.cache} ({format_bytes(wanted.free_bytes)} free)"
        )
    return Group(Text(title, style="italic"), table, Text(where, style="dim"))


def _here_words(place: Place) -> str:
    from qnext.units import format_bytes

    match place.state():
        case "here":
            return "all of it"
        case "wrong size":
            return "wrong size"
    return format_bytes(place.bytes_here()) if place.bytes_here() else "no"


@contextmanager
def transfer_bar(label: str) -> Iterator[OnProgress]:
    """A bar on stderr with bytes, rate and time left, in a terminal only; what is waited for is its label."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    from qnext.units import format_bytes

    label_column = Column(max_width=_LABEL_WIDTH, no_wrap=True, overflow="ellipsis")
    text = TextColumn("{task.description}", markup=False, table_column=label_column)
    numbers = TextColumn("{task.fields[numbers]}", markup=False)
    bar = Bar(text, BarColumn(bar_width=None), numbers, console=stderr_console(), transient=True,
              redirect_stdout=False, expand=True)  # fmt: skip
    task = bar.add_task(label, total=None, numbers="")

    def show(progress: Progress) -> None:
        numbers = f"{format_bytes(progress.done_bytes)} of {format_bytes(progress.total_bytes)}"
        if progress.rate_bps >= 1 and not progress.remark:
            left = (progress.total_bytes - progress.done_bytes) / progress.rate_bps
            numbers += f"  {format_bytes(int(progress.rate_bps))}/s  {_clock(left)} left"
        bar.update(
            task,
            completed=progress.done_bytes,
            total=progress.total_bytes,
            description=progress.remark or label,
            numbers=numbers,
        )

    with bar:
        yield show


def _clock(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`; days for what hardly moves."""
    if seconds >= 86400:
        return f"{seconds / 86400:.0f} days"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
