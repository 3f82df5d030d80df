"""Where qnext keeps its files, and the few settings a user sets once for good, each with its origin.

A setting comes from the first of: command-line flag, environment (`QNEXT_CONTEXT`), the user's
`config.toml`, and otherwise stays None, which leaves it to the planner. The origin is kept so that a plan
can say "context 32768, from ~/.config/qnext/config.toml" instead of leaving people to guess.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qnext.errors import UsageError
from qnext.units import parse_size

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
"""What llama.cpp accepts for `-ctk` and `-ctv` (common/arg.cpp, `kv_cache_types`)."""


@dataclass(frozen=True, slots=True)
class Paths:
    """Folders of settings, results and things that can be made again. None of them need exist."""

    config_dir: Path
    data_dir: Path
    cache_dir: Path

    @property
    def config_file(self) -> Path:
        """The user's settings."""
        return self.config_dir / "config.toml"

    @property
    def hardware_dir(self) -> Path:
        """The user's own hardware profiles, one YAML file each."""
        return self.config_dir / "hardware"

    @property
    def results_db(self) -> Path:
        """SQLite database of every measurement."""
        return self.data_dir / "results.db"

    @property
    def demo_dir(self) -> Path:
        """The generated demo model."""
        return self.cache_dir / "demo"

    @property
    def headers_dir(self) -> Path:
        """GGUF headers and dry-run answers that are dear to fetch or compute twice."""
        return self.cache_dir / "headers"

    @property
    def listings_dir(self) -> Path:
        """What repositories on the Hub held when they were last listed."""
        return self.cache_dir / "listings"

    @property
    def probes_dir(self) -> Path:
        """Answers of one-off probes, per machine and engine build."""
        return self.cache_dir / "probes"


def find_paths(environ: Mapping[str, str] | None = None) -> Paths:
    """The platform's folders (XDG on Linux); `QNEXT_HOME` moves all three under one."""
    home = (os.environ if environ is None else environ).get("QNEXT_HOME")
    if home:
        base = Path(home).expanduser().absolute()
        return Paths(base / "config", base / "data", base / "cache")
    import platformdirs

    dirs = platformdirs.PlatformDirs("qnext", appauthor=False)
    return Paths(dirs.user_config_path, dirs.user_data_path, dirs.user_cache_path)


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings in force; None leaves the choice to the planner.

    `origins` maps each name to `flag`, `environment QNEXT_…`, `file …` or `default`.
    """

    hardware: str | None = None
    ram_bytes: int | None = None
    vram_bytes: int | None = None
    context: int | None = None
    ubatch: int | None = None
    threads: int | None = None
    threads_batch: int | None = None
    ctk: str | None = None
    ctv: str | None = None
    origins: Mapping[str, str] = field(default_factory=dict)


_KEYS = {
    "hardware": "hardware",
    "ram": "ram_bytes",
    "vram": "vram_bytes",
    "context": "context",
    "ubatch": "ubatch",
    "threads": "threads",
    "threads_batch": "threads_batch",
    "ctk": "ctk",
    "ctv": "ctv",
}
"""Name in flags, environment and file -> field of `Settings`."""


def load_settings(
    flags: Mapping[str, object] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    paths: Paths | None = None,
) -> Settings:
    """Settings by the names `hardware ram vram context ubatch threads threads_batch ctk ctv`.

    `flags` holds what the command line gave; None means not given. Raises UsageError for an unknown or
    unusable entry, naming where it stands and the nearest known name.
    """
    environ = os.environ if environ is None else environ
    paths = find_paths(environ) if paths is None else paths
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    from_file = _read_file(paths.config_file)
    _refuse_unknown(given, "the flags")
    _refuse_unknown(from_file, str(paths.config_file))
    values: dict[str, Any] = {}
    origins = {}
    for name, entry in _KEYS.items():
        variable = f"QNEXT_{name.upper()}"
        layers: tuple[tuple[str, object], ...] = (
            ("flag", given.get(name)),
            (f"environment {variable}", environ.get(variable) or None),
            (f"file {paths.config_file}", from_file.get(name)),
        )
        origin, raw = next((layer for layer in layers if layer[1] is not None), ("default", None))
        origins[entry] = origin
        if raw is not None:
            values[entry] = _convert(name, raw, origin)
    return Settings(**values, origins=origins)


def _read_file(path: Path) -> dict[str, object]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", hint="Correct its rights.") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid TOML: {error}.", hint="Correct that line.") from error


def _refuse_unknown(names: Iterable[str], where: str) -> None:
    for name in names:
        if name not in _KEYS:
            import difflib

            close = difflib.get_close_matches(name, _KEYS, n=1, cutoff=0.5)
            meant = f"Did you mean '{close[0]}'? " if close else ""
            raise UsageError(
                f"'{name}' in {where} is not a setting.", hint=f"{meant}Known are {', '.join(_KEYS)}."
            )


def _convert(name: str, raw: object, origin: str) -> int | str:
    """The value in its field's type. Raises UsageError naming `origin`."""

    def refuse(expected: str) -> UsageError:
        return UsageError(f"{name} = {raw!r} ({origin}) is not {expected}.", hint=f"Give {expected}.")

    if name == "hardware":
        if not isinstance(raw, str) or not raw:
            raise refuse("a profile's name or a file")
        return raw
    if name in {"ctk", "ctv"}:
        if raw not in KV_TYPES:
            raise refuse("one of " + ", ".join(KV_TYPES))
        return str(raw)
    if name in {"ram", "vram"}:
        if isinstance(raw, str):
            try:
                return parse_size(raw)
            except UsageError:
                raise refuse("a size such as 24G") from None
        if isinstance(raw, bool) or not isinstance(raw, int) or raw < 0:
            raise refuse("a size such as 24G")
        return raw
    if isinstance(raw, str) and raw.strip().isdigit():
        raw = int(raw)
    if isinstance(raw, bool) or not isinstance(raw, int) or raw < 1:
        raise refuse("a whole number from 1")
    return raw
