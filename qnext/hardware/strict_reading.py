"""A recorded machine's file, read so strictly that no mistake in it plans for another machine.

A misspelt key, a key given twice, a free memory above the total or a GPU kind that does not exist is refused
with the place and, where there is one, the nearest right name. The file may come from anyone, so it is
bounded before it is parsed, YAML aliases are refused (nine levels of them expand to a billion nodes), numbers
have to be possible for hardware, and texts must be safe to print.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnext.errors import HardwareError, UsageError
from qnext.hardware.machine import Cpu, Disk, Gpu, Machine, Memory, NumaNode
from qnext.units import parse_size

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_MOST_FILE_BYTES = 256 << 10
_MOST_TEXT = 1000
_MOST_PROBLEMS = 6

_SECTIONS: dict[str, type[Any]] = {
    "cpu": Cpu, "memory": Memory, "gpus": Gpu, "disk": Disk, "numa_nodes": NumaNode,
}  # fmt: skip
"""Key -> the class whose fields may stand below it."""

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number that hardware can have",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text, in quotes if it looks like a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "missing": "a list of pairs [threads, bytes per second]",
    "too_long": "a list of pairs [threads, bytes per second]",
    "dataclass_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
}
"""pydantic's type of error -> what should stand there."""

_LARGEST = (
    ("_bytes", 1 << 60),
    ("_bps", 10**15),
    ("bandwidth_by_threads", 10**15),
    ("_mhz", 100_000),
    ("_mtps", 100_000),
    ("", 1 << 16),
)
"""End of a key -> the largest figure that is one. PCIe generations and widths are bounded by `_SETS`."""

_SETS: dict[str, tuple[object, ...]] = {
    "kind": ("cuda", "rocm", "vulkan", "metal", "sycl"),
    **{f"pcie_gen{end}": tuple(range(1, 9)) for end in ("", "_max", "_card_max", "_slot_max", "_loaded")},
    **{
        f"pcie_width{end}": (1, 2, 4, 8, 12, 16, 32)
        for end in ("", "_max", "_card_max", "_slot_max", "_loaded")
    },
}
"""Key -> all it may be: an unknown kind would be taken for CUDA, a wrong generation for any speed."""

_NOT_ABOVE = (
    ("available_bytes", "total_bytes"),
    ("usable_bytes", "total_bytes"),
    ("swap_free_bytes", "swap_total_bytes"),
    ("hugepages_free_bytes", "hugepages_total_bytes"),
    ("vram_free_bytes", "vram_total_bytes"),
    ("free_bytes", "total_bytes"),
    ("usable_cores", "physical_cores"),
    ("usable_logical_cores", "logical_cores"),
)


def machine_from_dict(data: Mapping[str, Any], origin: str = "The recorded machine") -> Machine:
    """The inverse of `machine_to_dict`.

    Raises HardwareError naming `origin`, the bad keys and the nearest known ones.
    """
    from pydantic import ValidationError

    try:
        machine = _adapter().validate_json(json.dumps(_with_sizes(data)))
        problems = list(_impossible(machine))
    except ValidationError as error:
        problems = [
            _explain(item["loc"], item["input"], item["msg"], item["type"]) for item in error.errors()
        ]
    except RecursionError:
        problems = ["it is nested too deeply"]
    except (TypeError, ValueError) as error:
        problems = [str(error)]
    else:
        if not problems:
            return machine
    more = [f"and {len(problems) - _MOST_PROBLEMS} more"] if len(problems) > _MOST_PROBLEMS else []
    raise HardwareError(
        f"{origin} cannot be read: " + "; ".join(problems[:_MOST_PROBLEMS] + more),
        hint="Compare with a shipped profile: qnext profile show rtx5080-128gb",
    )


@cache
def _adapter() -> TypeAdapter[Machine]:
    from pydantic import TypeAdapter

    return TypeAdapter(Machine)  # ten milliseconds to make


def read_recording(path: Path, hint: str) -> tuple[str, dict[str, Any]]:
    """(text, top-level mapping) of a JSON or YAML file.

    Of what `qnext doctor --json` or `qnext profile show --json` printed, the mapping is the machine's.
    Raises HardwareError, with `hint` where the file cannot be opened.
    """
    import yaml

    try:
        with path.open("rb") as file:
            content = file.read(_MOST_FILE_BYTES + 1)
    except OSError as error:
        raise HardwareError(f"{path} cannot be read: {error.strerror}.", hint=hint) from error
    if len(content) > _MOST_FILE_BYTES:
        raise HardwareError(
            f"{path} is too large to be a recorded machine.", hint="Give a JSON or YAML file."
        )
    try:
        text = content.decode("utf-8-sig")
        data = _parse_json(text) if path.suffix.lower() == ".json" else _parse_yaml(text)
    except RecursionError as error:
        raise HardwareError(
            f"{path} is not valid: nested too deeply.", hint="Start from a shipped profile."
        ) from error
    except (ValueError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())
        raise HardwareError(f"{path} is not valid: {line}", hint="Correct the file at that place.") from error
    if isinstance(data, dict) and str(data.get("schema", "")).startswith("qnext."):
        data = data.get("machine")
    if not isinstance(data, dict):
        raise HardwareError(f"{path} does not hold a mapping of keys.", hint="Start from a shipped profile.")
    return text, data


def nearest(word: str, known: Iterable[str]) -> str:
    """`Did you mean 'memory'? ` or nothing."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'? " if close else ""


def _parse_json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_twice(key for key, _ in pairs)
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a number")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def _parse_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not allowed here")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            _refuse_twice(str(key.value) for key, _ in node.value)
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader=Loader)


def _refuse_twice(keys: Iterable[str]) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"the key {_printable(key)!r} is there twice")
        seen.add(key)


def _with_sizes(value: Any, key: str = "") -> Any:
    """The data with texts under `*_bytes` keys read as sizes."""
    if isinstance(value, Mapping):
        odd = [name for name in value if not isinstance(name, str)]
        if odd:
            raise ValueError(f"the key {odd[0]!r} is not a text")
        return {
            name: inner if name == "sources" else _with_sizes(inner, name) for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_with_sizes(inner) for inner in value]
    if isinstance(value, str) and key.endswith("_bytes"):
        try:
            return parse_size(value)
        except UsageError as error:
            raise ValueError(f"{key}: {error.message}") from None
        except OverflowError:
            raise ValueError(f"{key} is larger than any memory") from None
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError(f"{key or 'a number in a list'} is larger than hardware can have")
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"{key}: {value!r} is neither a text nor a number")


def _explain(location: tuple[int | str, ...], given: object, message: str, kind: str) -> str:
    where = _printable(".".join(str(part) for part in location))
    if kind in {"unexpected_keyword_argument", "extra_forbidden"}:
        holders = [_SECTIONS[part] for part in location[:-1] if isinstance(part, str) and part in _SECTIONS]
        names = [entry.name for entry in dataclasses.fields(holders[-1] if holders else Machine)]
        return f"'{where}' is not a known key. {nearest(str(location[-1]), names)}".strip()
    if kind not in _EXPECTED:
        return f"{where}: {message}"
    shown = _printable(json.dumps(given, ensure_ascii=False))
    return f"{where} has to be {_EXPECTED[kind]}, not {shown}"


def _impossible(machine: Machine) -> Iterator[str]:
    """What is wrong with values that have the right type."""
    for path, value in _leaves("", machine):
        key = next(part for part in reversed(path.split(".")) if not part.isdigit())
        if isinstance(value, str):
            if not value.isprintable() or len(value) > _MOST_TEXT:
                yield f"{_printable(path)} is too long or holds characters that cannot be printed"
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int | float):
            most = next(most for end, most in _LARGEST if key.endswith(end))
            if isinstance(value, float) and not math.isfinite(value):
                yield f"{path} has to be a finite number, not {value}"
            elif value < 0:
                yield f"{path} is below zero"
            elif value > most:
                yield f"{path} is larger than hardware can have"
        if value is not None and not path.startswith("sources.") and value not in _SETS.get(key, (value,)):
            known = ", ".join(str(choice) for choice in _SETS[key])
            yield f"{path} has to be one of {known}, not {_printable(str(value))}"
    parts: list[tuple[str, object]] = [
        ("cpu", machine.cpu), ("memory", machine.memory), ("disk", machine.disk),
        *((f"gpus.{position}", gpu) for position, gpu in enumerate(machine.gpus)),
    ]  # fmt: skip
    for prefix, part in parts:
        for low, high in _NOT_ABOVE:
            smaller, larger = getattr(part, low, None), getattr(part, high, None)
            if smaller is not None and larger is not None and smaller > larger:
                yield f"{prefix}.{low} is above {prefix}.{high}"


def _leaves(path: str, value: object) -> Iterator[tuple[str, object]]:
    """Every single value with its dotted path, positions in lists included."""
    dot = f"{path}." if path else ""
    if dataclasses.is_dataclass(value):
        for entry in dataclasses.fields(value):
            yield from _leaves(f"{dot}{entry.name}", getattr(value, entry.name))
    elif isinstance(value, tuple):
        for position, inner in enumerate(value):
            yield from _leaves(f"{dot}{position}", inner)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield f"{dot}{name}", name
            yield f"{dot}{name}", inner
    else:
        yield path, value


def _printable(text: str) -> str:
    """The text as it may go into a message: short, and nothing that a terminal would obey."""
    short = text if len(text) <= 80 else text[:79] + "…"
    return short if short.isprintable() else ascii(short)
