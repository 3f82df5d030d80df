"""What a MODEL argument means when it names something published: a repository, a quant or file of it.

Written as people copy it: `user/repo`, `user/repo:UD-Q4_K_XL` as for llama-server's `-hf`,
`hf.co/user/repo:Q4_K_M` as for Ollama, or an address from the browser.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from qnext.errors import UsageError
from qnext.models.shape import quant_in_name

_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_NAME = r"[A-Za-z0-9_][\w.-]*"
_REF = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})"
    r"(?:@(?P<revision>refs/\w+/[^/:@\s]+|[^/:@\s]+))?"
    r"(?:/(?P<path>[^:]+\.gguf))?"
    r"(?::(?P<quant>[^:/\s]+))?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class HubRef:
    """A repository on the Hub. `revision` None is its main branch; `quant` and `path` None leave it open."""

    repo: str
    revision: str | None = None
    quant: str | None = None
    path: str | None = None


def parse_ref(text: str) -> HubRef | None:
    """The repository that `text` names, None where it names a local file or another server's address.

    `user/repo` alone may be a path on this disk as well: look there first. Raises UsageError for what claims
    to be on the Hub (`hf:…`, an address of it) and is none of a model there.
    """
    split = urlsplit(text) if text.startswith(("https://", "http://")) else None
    if split is not None:
        return _from_address(text, split.netloc.lower(), unquote(split.path))
    bare = re.sub(r"^(?:hf://|hf:|hf\.co/|huggingface\.co/)", "", text)
    match = _REF.fullmatch(bare)
    if bare != text and match is None:
        raise _no_ref(text)
    if match is None or (bare == text and match["path"] is None and match["repo"].lower().endswith(".gguf")):
        return None
    quant = match["quant"]
    return HubRef(match["repo"], match["revision"], None if quant == "latest" else quant, match["path"])


def is_address(text: str) -> bool:
    """Whether `text` is a web address, for which `parse_ref` gave None: a file on another server."""
    return text.startswith(("https://", "http://"))


def _from_address(text: str, host: str, path: str) -> HubRef | None:
    mirror = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc.lower()
    if host not in _HOSTS and not (mirror and host == mirror):
        return None
    parts = [part for part in path.split("/") if part]
    if len(parts) < 2 or parts[0] in ("datasets", "spaces", "api"):
        raise _no_ref(text)
    name, _, quant = parts[1].partition(":")
    repo, rest = f"{parts[0]}/{name}", parts[2:]
    if not re.fullmatch(rf"{_NAME}/{_NAME}", repo):
        raise _no_ref(text)
    if not rest or rest[0] not in ("blob", "resolve", "raw", "tree") or len(rest) < 2:
        return HubRef(repo, quant=quant or None)
    inside = "/".join(rest[2:])
    if rest[0] == "tree":
        return HubRef(repo, rest[1], quant_in_name(f"{rest[-1]}.gguf") if inside else None)
    return HubRef(repo, rest[1], path=inside or None)


def _no_ref(text: str) -> UsageError:
    return UsageError(
        f"'{text}' names no model on the Hub",
        hint="Write USER/REPOSITORY:QUANT, for example unsloth/Qwen3-Next-80B-A3B-Instruct-GGUF:Q4_K_M.",
    )
