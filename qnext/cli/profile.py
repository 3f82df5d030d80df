"""`qnext profile list | show | save`."""

from __future__ import annotations

from typing import Annotated

import typer

from qnext.cli.output import note, print_json, print_table

app = typer.Typer(
    name="profile",
    help="Look at hardware profiles, and keep one of this machine.\n\nStart with: qnext profile list",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Json = Annotated[bool, typer.Option("--json", metavar="", help="Print it as JSON.")]


@app.command("list")
def list_(json_output: _Json = False) -> None:
    """List the machines that --hardware NAME takes: your own, and those that come with qnext.

    Example: qnext profile list
    """
    from qnext.config import find_paths
    from qnext.errors import HardwareError
    from qnext.hardware.recorded import find_profiles, list_profiles, read_machine

    rows = []
    shipped = list_profiles()
    for profile in find_profiles(find_paths().hardware_dir):
        if profile.own and profile.name in shipped:
            note(f"{profile.path} is not used: a profile of that name comes with qnext; rename the file")
            continue
        try:
            rows.append((read_machine(profile.path, profile.name), profile))
        except HardwareError as error:
            note(f"{error.message} {error.hint}")
    if json_output:
        print_json(
            {
                "schema": "qnext.profiles/1",
                "profiles": [
                    {
                        "name": profile.name,
                        "own": profile.own,
                        "cpu": machine.cpu.model,
                        "physical_cores": machine.cpu.physical_cores,
                        "usable_cores": machine.cpu.usable_cores,
                        "ram_bytes": machine.memory.total_bytes,
                        "ram_limit_bytes": machine.memory.limit_bytes,
                        "rated_bandwidth_bps": machine.memory.rated_bandwidth_bps,
                        "measured_bandwidth_bps": machine.memory.measured_bandwidth_bps,
                        "unified_memory": machine.unified_memory,
                        "gpus": [
                            {"name": gpu.name, "kind": gpu.kind, "vram_total_bytes": gpu.vram_total_bytes}
                            for gpu in machine.gpus
                        ],
                    }
                    for machine, profile in rows
                ],
            }
        )
        return
    from qnext.report.profile_view import profiles_view

    print_table(profiles_view([(machine, profile.own) for machine, profile in rows]))
    if not any(profile.own for _, profile in rows):
        note("keep this machine as a profile with: qnext profile save NAME")


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name that qnext profile list shows.")],
    json_output: _Json = False,
) -> None:
    """Print a profile as --hardware reads it, with its sources: copy it, change it, plan for it.

    Example: qnext profile show rtx4090-64gb > my-box.yaml
    """
    import sys

    from qnext.config import find_paths
    from qnext.hardware import machine_to_dict
    from qnext.hardware.recorded import find_profile, read_machine

    profile = find_profile(name, find_paths().hardware_dir)
    machine = read_machine(profile.path, profile.name)
    if json_output:
        print_json({"schema": "qnext.profile/1", "own": profile.own, "machine": machine_to_dict(machine)})
    else:
        sys.stdout.write(profile.path.read_text(encoding="utf-8"))


@app.command("save")
def save(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call it, for example my-box.")],
    force: Annotated[
        bool, typer.Option("--force", metavar="", help="Replace your own profile of that name.")
    ] = False,
    json_output: _Json = False,
) -> None:
    """Keep this machine as a profile: no serial numbers, no names of people, hosts or folders.

    Nothing is measured; qnext doctor --full --save NAME keeps measured speeds too.

    Example: qnext profile save my-box
    """
    from qnext.config import find_paths
    from qnext.engine.build import installed_build
    from qnext.hardware import detect_machine, save_profile
    from qnext.pipeline.engine_devices import add_engine_gpus

    paths = find_paths()
    machine, build = detect_machine(paths.data_dir), installed_build()
    if build is not None:
        machine = add_engine_gpus(machine, build)
    path = save_profile(machine, name, paths.hardware_dir, force=force)
    if json_output:
        print_json({"schema": "qnext.saved-profile/1", "name": name, "path": str(path)})
    else:
        note(f"saved {path}; plan for it anywhere: qnext plan MODEL --hardware {name}")
