"""`qnext forecast`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qnext.cli.flags import MODEL_HELP, PlanFlags, takes_plan_flags
from qnext.cli.making_request import make_request, workload_named
from qnext.cli.output import note, print_json, print_table, progress_bar, write_file
from qnext.errors import UsageError


@takes_plan_flags
def forecast(
    flags: PlanFlags,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    workload: Annotated[
        str, typer.Option("--workload", metavar="NAME", help="Typical turn: chat, code, documents or agent.")
    ] = "chat",
    depth: Annotated[
        int | None,
        typer.Option("-d", "--n-depth", min=0, metavar="TOKENS", help="Conversation that went before it."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write an HTML page with charts.")
    ] = None,
    clean: Annotated[
        bool, typer.Option("--clean", metavar="", help="Delete the slices kept so far.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", metavar="", help="Print the forecast as JSON.")
    ] = False,
) -> None:
    """Measure a few layers here, and state the speed of the whole model before it is downloaded.

    Example: qnext forecast unsloth/Qwen3-Next-80B-A3B-Instruct-GGUF:Q4_K_M
    """
    from qnext.config import find_paths
    from qnext.pipeline.forecasting import clean_slices, run_forecast
    from qnext.pipeline.slice_measuring import ForecastWatch
    from qnext.units import format_bytes

    paths = find_paths()
    if clean:
        note(f"slices of {format_bytes(clean_slices(paths))} deleted")
        if model is None:
            return
    if model is None:
        raise UsageError("nothing to forecast: no MODEL", hint="Name one, or give --clean alone.")
    request = make_request(model, flags, workload_named(workload, depth=depth))
    if request.hardware is not None:
        raise UsageError(
            "a slice has to run on the machine itself, --hardware names another",
            hint=f"For other machines: qnext plan {model} --hardware {request.hardware}",
        )
    with progress_bar("writing slices") as progress:
        found = run_forecast(
            request,
            paths,
            note,
            ForecastWatch(
                on_write=progress,
                on_load=lambda share: progress(share, "loading slices"),
                on_measure=lambda what, share: progress(share, f"measuring: {what}"),
            ),
        )
    if output is not None:
        from qnext.report.forecast_page import forecast_page

        write_file(output, forecast_page(found))
        note(f"wrote {output}")
    if json_output:
        from qnext.report.forecast_view import forecast_to_dict

        print_json({"schema": "qnext.forecast/1", **forecast_to_dict(found)})
        return
    from qnext.report.forecast_view import forecast_view

    print_table(forecast_view(found))
