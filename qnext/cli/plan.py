"""`qnext plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from qnext.cli.flags import MODEL_HELP, PlanFlags, make_request, takes_plan_flags
from qnext.cli.output import note, print_json, print_table


@takes_plan_flags
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    flags: PlanFlags,
    prompt: Annotated[
        int, typer.Option("-p", "--n-prompt", min=0, metavar="TOKENS", help="Prompt to forecast for.")
    ] = 512,
    generate: Annotated[
        int, typer.Option("-n", "--n-gen", min=0, metavar="TOKENS", help="Answer to forecast for.")
    ] = 128,
    depth: Annotated[
        int,
        typer.Option("-d", "--n-depth", min=0, metavar="TOKENS", help="Conversation that went before it."),
    ] = 0,
    json_output: Annotated[bool, typer.Option("--json", metavar="", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what goes where in memory, and how fast it should be. Nothing is loaded.

    Example: qnext plan model.gguf --vram 12G -c 65536
    """
    from qnext.config import find_paths
    from qnext.pipeline.planning import plan_model, require_fit
    from qnext.plan.plan import plan_to_dict
    from qnext.plan.values import Workload

    request = make_request(model, flags, Workload(prompt, generate, depth))
    planned = plan_model(request, find_paths(), note)
    if json_output:
        print_json({"schema": "qnext.plan/1", **plan_to_dict(planned.plan)})
    else:
        from qnext.report.plan_view import plan_view

        print_table(plan_view(planned.plan))
    require_fit(planned.plan)
