"""Recorded machines: a JSON or YAML file, or a profile shipped under `profiles/hardware`.

A recording has the keys of `Machine`; facts it leaves out are None. It is read strictly: a misspelt key
would silently plan for another machine. Sizes may be written for people (`total_bytes: 128GiB`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qnext.errors import HardwareError, UsageError
from qnext.hardware.machine import UNNAMED, Cpu, Disk, Gpu, Machine, Memory, Sources, facts
from qnext.units import parse_size

_SUFFIXES = {".json", ".yaml", ".yml"}
_MOST_FILE_BYTES = 1 << 20


def list_profiles() -> tuple[str, ...]:
    """Names of the shipped machines, sorted."""
    return tuple(sorted(path.stem for path in _profiles_folder().glob("*.yaml")))


def load_machine(name_or_path: str) -> Machine:
    """A recorded machine by profile name, or from a `.json`, `.yaml` or `.yml` file.

    Needs at least `memory.total_bytes` and `cpu.physical_cores`; what a running machine would say about its
    present state is filled in as idle (everything usable) and marked so in `sources`. Raises HardwareError.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix.lower() in _SUFFIXES or len(path.parts) > 1:
        name = path.stem
    else:
        name, path = name_or_path, _profiles_folder() / f"{name_or_path}.yaml"
        if not path.is_file():
            raise HardwareError(
                f"There is no hardware profile '{name}'.",
                hint=f"{_nearest(name, list_profiles())}Give one of {', '.join(list_profiles())}, or a file.",
            )
    data = _read_mapping(path)
    named = data.get("name", UNNAMED) != UNNAMED
    machine = machine_from_dict(data if named else {**data, "name": name})
    if not machine.memory.total_bytes or not machine.cpu.physical_cores:
        raise HardwareError(
            f"{path} lacks memory.total_bytes or cpu.physical_cores.", hint="Add them: no plan without them."
        )
    return _fill_idle(machine)


def machine_from_dict(data: Mapping[str, Any]) -> Machine:
    """The inverse of `machine_to_dict`. Raises HardwareError naming every bad key and the nearest known."""
    from pydantic import TypeAdapter, ValidationError

    try:
        machine = TypeAdapter(Machine).validate_json(json.dumps(_with_sizes(data)))
        negative = [path for path, value in facts(machine) if isinstance(value, int) and value < 0]
        if negative:
            raise ValueError(f"{', '.join(negative)} is below zero")
        return machine
    except (TypeError, ValueError, RecursionError) as error:
        problems = (
            [_explain(item["loc"], item["msg"], item["type"]) for item in error.errors()]
            if isinstance(error, ValidationError)
            else [str(error)]
        )
    raise HardwareError(
        "The recorded machine cannot be read: " + "; ".join(problems),
        hint="Compare with a shipped profile: the keys are those of `qnext doctor --json`.",
    )


def _fill_idle(machine: Machine) -> Machine:
    """A recording made by hand knows what is there, not what is free: take it as idle, and say so."""
    cpu, memory = machine.cpu, machine.memory
    ceiling = min(size for size in (memory.total_bytes, memory.limit_bytes) if size is not None)
    filled = dataclasses.replace(
        machine,
        cpu=dataclasses.replace(
            cpu,
            usable_cores=cpu.usable_cores or cpu.physical_cores,
            usable_logical_cores=cpu.usable_logical_cores or cpu.logical_cores,
        ),
        memory=dataclasses.replace(
            memory,
            available_bytes=_first(memory.available_bytes, memory.total_bytes),
            usable_bytes=_first(memory.usable_bytes, min(_first(memory.available_bytes, ceiling), ceiling)),
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


def _with_sizes(value: Any, key: str = "") -> Any:
    """The data with texts under `*_bytes` keys read as sizes."""
    if isinstance(value, Mapping):
        return {
            name: inner if name == "sources" else _with_sizes(inner, str(name))
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_with_sizes(inner) for inner in value]
    if isinstance(value, str) and key.endswith("_bytes"):
        try:
            return parse_size(value)
        except UsageError as error:
            raise ValueError(f"{key}: {error.message}") from None
    return value


def _explain(location: tuple[int | str, ...], message: str, kind: str) -> str:
    where = ".".join(str(part) for part in location)
    if kind not in {"unexpected_keyword_argument", "extra_forbidden"}:
        return f"{where}: {message}"
    known: type[Any] = {"cpu": Cpu, "memory": Memory, "gpus": Gpu, "disk": Disk}.get(
        str(location[0]), Machine
    )
    holder = known if len(location) > 1 else Machine
    names = [entry.name for entry in dataclasses.fields(holder)]
    return f"'{where}' is not a known key. {_nearest(str(location[-1]), names)}".strip()


def _nearest(word: str, known: Iterator[str] | tuple[str, ...] | list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'? " if close else ""


def _read_mapping(path: Path) -> dict[str, Any]:
    """The file's top-level mapping. Raises HardwareError when it cannot be read or is none."""
    import yaml

    try:
        if path.stat().st_size > _MOST_FILE_BYTES:
            raise HardwareError(
                f"{path} is too large to be a recorded machine.", hint="Give a JSON or YAML file."
            )
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise HardwareError(
            f"{path} cannot be read: {error.strerror}.",
            hint=f"Give a recorded machine's file, or a profile: {', '.join(list_profiles())}.",
        ) from error
    except (ValueError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())
        raise HardwareError(f"{path} is not valid: {line}", hint="Correct the file at that place.") from error
    if not isinstance(data, dict):
        raise HardwareError(f"{path} does not hold a mapping of keys.", hint="Start from a shipped profile.")
    return data


def _profiles_folder() -> Path:
    """`qnext/_profiles/hardware` in an installed wheel, `profiles/hardware` beside `qnext` in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_profiles"
    return (installed if installed.is_dir() else package.parent / "profiles") / "hardware"
