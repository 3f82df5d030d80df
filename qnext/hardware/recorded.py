"""Recorded machines: a JSON or YAML file, a shipped profile (`profiles/hardware`), or one of the user's own.

A recording has the keys of `Machine`; facts it leaves out are None. Sizes may be written for people
(`total_bytes: 128GiB`). A name means the same machine everywhere, so the user's own profiles cannot take a
shipped one's name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnext import __version__
from qnext.errors import HardwareError, UsageError
from qnext.hardware.machine import UNNAMED, Machine, Sources, facts, machine_to_dict
from qnext.hardware.strict_reading import machine_from_dict, nearest, read_recording

_SUFFIXES = {".json", ".yaml", ".yml"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Profile:
    """A recorded machine that has a name. `own` is False for those that come with qnext."""

    name: str
    path: Path
    own: bool


def find_profiles(own_folder: Path | None = None) -> tuple[Profile, ...]:
    """The user's own profiles, if `own_folder` is given, then the shipped ones, each sorted by name.

    An own one with the name of a shipped one is listed too, but `load_machine` gives the shipped one.
    """
    folders = [(_shipped_folder(), False)] if own_folder is None else [
        (own_folder, True), (_shipped_folder(), False)
    ]  # fmt: skip
    return tuple(
        Profile(path.stem, path, own) for folder, own in folders for path in sorted(folder.glob("*.yaml"))
    )


def list_profiles() -> tuple[str, ...]:
    """Names of the shipped machines, sorted."""
    return tuple(profile.name for profile in find_profiles())


def find_profile(name: str, own_folder: Path | None = None) -> Profile:
    """The shipped profile of that name, else the user's own. Raises HardwareError."""
    known = find_profiles(own_folder)
    found = [profile for profile in known if profile.name == name]
    if not found:
        names = [profile.name for profile in known]
        raise HardwareError(
            f"There is no hardware profile '{name}'.",
            hint=f"{nearest(name, names)}Give a file, or one that `qnext profile list` shows.",
        )
    return found[-1]


def load_machine(name_or_path: str, own_folder: Path | None = None) -> Machine:
    """A recorded machine by profile name, or from a `.json`, `.yaml` or `.yml` file.

    `own_folder` holds the user's own profiles. Needs at least `memory.total_bytes` and `cpu.physical_cores`;
    what a running machine would say about its present state is filled in as idle (everything usable) and
    marked so in `sources`. Raises HardwareError.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix.lower() in _SUFFIXES or len(path.parts) > 1:
        return read_machine(path, path.stem)
    profile = find_profile(name_or_path, own_folder)
    return read_machine(profile.path, profile.name)


def read_machine(path: Path, name: str) -> Machine:
    """The machine in a file, called `name` unless the file names it, as if idle. Raises HardwareError."""
    data = read_recording(path, "Give a recorded machine's file, or a name that `qnext profile list` shows.")[
        1
    ]
    named = data.get("name", UNNAMED) != UNNAMED
    machine = machine_from_dict(data if named else {**data, "name": name}, str(path))
    if not machine.memory.total_bytes or not machine.cpu.physical_cores:
        raise HardwareError(
            f"{path} lacks memory.total_bytes or cpu.physical_cores.", hint="Add them: no plan without them."
        )
    return _fill_idle(machine)


def save_profile(machine: Machine, name: str, folder: Path, *, force: bool = False) -> Path:
    """Write the redacted `machine` to `folder` (`Paths.hardware_dir`) under `name`; returns the file.

    Raises UsageError for a name that is none, is a shipped profile's, or is taken and `force` is not given,
    HardwareError when the machine lacks what a plan needs or the file cannot be written.
    """
    import os
    import tempfile

    from qnext.hardware.redact import redact_machine

    path = path_for(name, folder, force=force)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=folder, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(machine_to_yaml(redact_machine(machine)))
            read_machine(Path(unfinished), name)  # what cannot be loaded is not worth keeping
            Path(unfinished).replace(path)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    except OSError as error:
        raise HardwareError(
            f"{path} cannot be written: {error.strerror}.",
            hint="Free the disk or correct the folder's rights.",
        ) from error
    return path


def path_for(name: str, folder: Path, *, force: bool = False) -> Path:
    """The file that a profile called `name` would be kept in. Raises UsageError as `save_profile` does."""
    _check_name(name)
    path = folder / f"{name}.yaml"
    if path.exists() and not force:
        raise UsageError(f"there is a profile '{name}' already: {path}", hint="Add --force to replace it.")
    return path


def machine_to_yaml(machine: Machine) -> str:
    """The machine as YAML that `--hardware` reads: without what is None and its name, which is the file's."""
    from datetime import date

    import yaml

    class Dumper(yaml.SafeDumper):
        def represent_sequence(
            self, tag: str, sequence: Any, flow_style: bool | None = None
        ) -> yaml.SequenceNode:
            scalars = not any(isinstance(item, Mapping | list) for item in sequence)
            return super().represent_sequence(tag, sequence, flow_style=scalars)

    data = _stated(machine_to_dict(machine))
    data.pop("name", None)
    text = yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)
    return (
        f"# Recorded by qnext {__version__} on {date.today()}. Names of people and machines, ids and paths\n"
        f"# are left out, and what was free or busy at that moment: it is loaded as idle.\n{text}"
    )


def _fill_idle(machine: Machine) -> Machine:
    """A recording made by hand knows what is there, not what is free: take it as idle, and say so."""
    cpu, memory = machine.cpu, machine.memory
    ceiling = min(size for size in (memory.total_bytes, memory.limit_bytes) if size is not None)
    filled = dataclasses.replace(
        machine,
        cpu=dataclasses.replace(
            cpu,
            usable_cores=cpu.usable_cores or _under_quota(cpu.physical_cores, cpu.quota_cores),
            usable_logical_cores=cpu.usable_logical_cores or _under_quota(cpu.logical_cores, cpu.quota_cores),
        ),
        memory=dataclasses.replace(
            memory,
            available_bytes=_first(memory.available_bytes, memory.total_bytes),
            usable_bytes=_first(memory.usable_bytes, min(_first(memory.available_bytes, ceiling), ceiling)),
            swap_free_bytes=_first(memory.swap_free_bytes, memory.swap_total_bytes),
            hugepages_free_bytes=_first(memory.hugepages_free_bytes, memory.hugepages_total_bytes),
        ),
        gpus=tuple(
            dataclasses.replace(
                gpu,
                index=_first(gpu.index, position),
                vram_free_bytes=_first(gpu.vram_free_bytes, gpu.vram_total_bytes),
            )
            for position, gpu in enumerate(machine.gpus)
        ),
    )
    stated, sources = dict(facts(machine)), Sources(machine.sources)
    for path, value in facts(filled):
        assumed = stated[path] is None and value is not None
        if path not in sources or assumed:
            kind = "assumed of an idle machine, not stated by" if assumed else "stated by"
            sources.record(path, value, f"{kind} the recording {machine.name}")
            if value is None:
                sources[path] = f"not stated by the recording {machine.name}"
    return dataclasses.replace(filled, sources=dict(sources))


def _first(value: int | None, otherwise: int | None) -> Any:
    return otherwise if value is None else value


def _under_quota(count: int | None, quota: float | None) -> int | None:
    return count if count is None or quota is None else min(count, max(1, int(quota)))


def _stated(value: Any) -> Any:
    """The data without keys that are None or hold nothing; empty lists stay, they say "none"."""
    if isinstance(value, dict):
        kept = {key: _stated(inner) for key, inner in value.items() if inner is not None}
        return {key: inner for key, inner in kept.items() if inner != {}}
    if isinstance(value, list):
        return [_stated(inner) for inner in value]
    return value


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name.lower().endswith((".json", ".yaml", ".yml")):
        raise UsageError(
            f"'{name}' cannot be a profile's name",
            hint="Use letters, digits, '-', '_' and '.', for example my-box, without a folder or .yaml.",
        )
    if name.lower() in list_profiles():
        raise UsageError(f"'{name}' is a profile that comes with qnext", hint=f"Take another name: my-{name}")


def _shipped_folder() -> Path:
    """`qnext/_profiles/hardware` in an installed wheel, `profiles/hardware` beside `qnext` in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_profiles"
    return (installed if installed.is_dir() else package.parent / "profiles") / "hardware"
