"""The catalogue: models that people run, with what their files do not say before they are fetched.

One YAML file per model in `profiles/models/`; the file's name is the model's. Sizes are of files as they were
published when the entry was written: they let a plan be made offline, and the Hub's own list overrules them.
YAML is slow to parse, so a model is found by its file's name, or else only those files are parsed whose text
holds the alias or repository asked for. Reading is strict by the dataclasses' own annotations: pydantic would
take ten times as long to import as all files take to read.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qnext.errors import ModelError

ToolStyle = Literal[
    "hermes-json", "qwen-xml", "harmony", "glm", "minimax-xml", "gemma", "mistral", "deepseek"
]
"""How a model writes a call of a tool: `hermes-json` is JSON in `<tool_call>`, `qwen-xml` is
`<function=NAME><parameter=ARG>` in it, `glm` is `<arg_key>` and `<arg_value>` in it; the others are their
makers' own."""

Switch = Literal["never", "always", "default-on", "default-off", "effort"]
"""Whether a model thinks before it answers, and whether the caller can choose: `effort` sets how much."""


@dataclass(frozen=True, slots=True)
class Yarn:
    """Stretching of the context by YaRN: up to `factor` times `original_context` tokens."""

    factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the model's makers recommend for a mode of use. None where they say nothing."""

    mode: str
    temperature: float
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    repeat_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class Thinking:
    """Texts around what is thought, and how thinking is switched (`how`, for people)."""

    switch: Switch
    open: str | None = None
    close: str | None = None
    how: str | None = None


@dataclass(frozen=True, slots=True)
class BadFile:
    """Published files that do not work or are worse than their name says."""

    files: str
    reason: str
    source: str


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """One model. `repo` and `alternatives` hold GGUFs, `original` the makers' own weights, none of them GGUF.

    `arch` is llama.cpp's name. `shape` is a key of `qnext.models.synth.SHAPES` that has its dimensions.
    `experts` and `experts_used` count routed experts; `context_train` is in tokens. `sampling` has the mode
    to take by default first. `quants` are (name, bytes of all shards) of `repo`, smallest first; empty where
    no sizes are known.
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    repo: str
    original: str
    arch: str
    total_params: int
    active_params: int
    layers: int
    experts: int
    experts_used: int
    context_train: int
    thinking: Thinking
    license: str
    sources: tuple[str, ...]
    alternatives: tuple[str, ...] = ()
    shape: str | None = None
    yarn: Yarn | None = None
    sampling: tuple[Sampling, ...] = ()
    tool_style: ToolStyle | None = None
    quants: tuple[tuple[str, int], ...] = ()
    bad_files: tuple[BadFile, ...] = ()


def catalogue_names() -> tuple[str, ...]:
    """Names of the models, sorted; no file is opened."""
    return tuple(sorted(path.stem for path in _folder().glob("*.yaml")))


def load_catalogue() -> tuple[CatalogueModel, ...]:
    """Every model, by name. Raises ModelError for a file that cannot be used."""
    return tuple(read_catalogue_file(path) for path in sorted(_folder().glob("*.yaml")))


def find_model(name: str) -> CatalogueModel | None:
    """The model of that name or alias, in any case; None if there is none. Raises ModelError."""
    wanted = name.strip().lower()
    if wanted in catalogue_names():
        return read_catalogue_file(_folder() / f"{wanted}.yaml")
    return next((model for model in _mentioning(wanted) if wanted in model.aliases), None)


def matching_repo(repo: str) -> CatalogueModel | None:
    """The model whose GGUFs, or whose original weights, are in a repository `publisher/name`; else None."""
    wanted = repo.strip().lower()
    for model in _mentioning(wanted):
        if wanted in (known.lower() for known in (model.repo, *model.alternatives, model.original)):
            return model
    return None


def nearest_models(name: str, count: int = 3) -> tuple[str, ...]:
    """Names in the catalogue that a mistyped one may have meant, the nearest first."""
    names = {alias: model.name for model in load_catalogue() for alias in (model.name, *model.aliases)}
    close = difflib.get_close_matches(name.strip().lower(), names, n=2 * count, cutoff=0.6)
    return tuple(dict.fromkeys(names[alias] for alias in close))[:count]


def read_catalogue_file(path: Path) -> CatalogueModel:
    """The model that a file describes, under the file's name. Raises ModelError naming what is wrong."""
    import yaml

    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
        if not isinstance(data, dict) or "name" in data:
            raise ValueError("it has to be a mapping of keys, without a name: that is the file's")
        if "quants" in data:
            data["quants"] = sorted(data["quants"].items(), key=lambda item: item[1])
        model: CatalogueModel = _build(CatalogueModel, {"name": path.stem, **data}, "")
        return model
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ModelError(
            f"the catalogue file {path.name} cannot be used: {' '.join(str(error).split())}",
            hint="Correct it, or install qnext again. CONTRIBUTING.md says what such a file holds.",
        ) from error


@cache
def _loader() -> Any:
    """A YAML loader that refuses a key given twice: libyaml's where PyYAML has it, seven times as fast."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise ValueError(f"the key {twice!r} is there twice")
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    return Loader


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _build(kind: Any, data: Any, where: str) -> Any:
    """The dataclass from a mapping with just its fields. Raises ValueError."""
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'the file'} has to be a mapping of keys")
    hints, dot = _hints(kind), f"{where}." if where else ""
    for key in data:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            meant = f", did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"'{dot}{key}' is not a known key{meant}")
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in data:
            raise ValueError(f"'{dot}{field.name}' is missing")
    return kind(**{key: _checked(hints[key], value, f"{dot}{key}") for key, value in data.items()})


def _checked(kind: Any, value: Any, where: str) -> Any:
    """The value, if it is of the annotated kind; lists become tuples. Raises ValueError."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _checked(inner[0], value, where)  # X | None: what is not known is left out, not written
    if origin is tuple and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        parts = enumerate(zip(kinds, value, strict=True))
        return tuple(_checked(part, item, f"{where}.{at}") for at, (part, item) in parts)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    if kind is float and type(value) is int:
        return float(value)
    if (value in inner) if origin is Literal else type(value) is kind:
        return value
    wanted = "one of " + ", ".join(inner) if origin is Literal else _WANTED[origin or kind]
    raise ValueError(f"{where} has to be {wanted}, not {value!r}")


_WANTED = {str: "a text", int: "a whole number", float: "a number", tuple: "a list"}


def _mentioning(word: str) -> Iterator[CatalogueModel]:
    """The models whose file's text holds the word, which is in lower case, at all."""
    for path in sorted(_folder().glob("*.yaml")):
        if word and word in path.read_text(encoding="utf-8").lower():
            yield read_catalogue_file(path)


def _folder() -> Path:
    """`qnext/_profiles/models` in an installed wheel, `profiles/models` beside `qnext` in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_profiles"
    return (installed if installed.is_dir() else package.parent / "profiles") / "models"
