"""A machine or a text without what names a person or one particular box.

Facts about hardware say nothing of its owner; what surrounds them may. Control groups carry user and
container ids, mounts and folders carry names, a UUID or MAC address is one box alone. Sensors are careful,
but this is the last gate before something is saved or pasted into a bug report, so it trusts none of them
and goes over every text. A bracketed word stands for what was there: `(path)`, `(user)`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from typing import Any

from qnext.hardware.machine import Machine, facts

_MOST_NOTE_CHARACTERS = 240

_TELLS_NOTHING = frozenset(
    {
        *("root", "localhost", "user", "host", "path", "id", "address", "serial", "none", "unknown"),
        *("linux", "ubuntu", "debian", "fedora", "darwin", "windows", "amd", "intel", "nvidia", "apple"),
    }
)
"""User and host names that are no secret, and that hardware and our own words are full of."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose names to leave out: host and user names (each also in any case) and home folders."""

    hosts: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    homes: tuple[str, ...] = ()


def this_owner() -> Owner:
    """The names of this machine and of who runs this process. Asks no network."""
    import platform

    environ = os.environ
    hosts = {platform.node(), environ.get("HOSTNAME", ""), environ.get("COMPUTERNAME", "")}
    users = {environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    homes = {environ.get("HOME", ""), environ.get("USERPROFILE", "")}
    try:
        import pwd

        entry = pwd.getpwuid(os.getuid())
        users |= {entry.pw_name, entry.pw_gecos.partition(",")[0]}
        homes.add(entry.pw_dir)
    except (ImportError, KeyError):  # Windows, or a container's user without an entry
        pass
    hosts |= {host.partition(".")[0] for host in hosts}
    return Owner(*(tuple(sorted(names - {""})) for names in (hosts, users, homes)))


def redact_machine(machine: Machine, owner: Owner | None = None) -> Machine:
    """`machine` for keeping: idle, and with nothing personal in any text.

    What changes by itself is left out (free and available memory, what other programs hold, clocks and what
    throttles them): a profile describes the box, and whoever loads it takes it as idle. Limits, quotas,
    link states, disk space and everything measured stay, and so do PCI bus ids, which only say where a card
    is plugged in. Notes in `sources` are redacted and shortened; those of other paths than facts are dropped.
    """
    owner = this_owner() if owner is None else owner
    idle = dataclasses.replace(
        machine,
        memory=dataclasses.replace(
            machine.memory,
            available_bytes=None,
            usable_bytes=None,
            swap_free_bytes=None,
            hugepages_free_bytes=None,
        ),
        gpus=tuple(
            dataclasses.replace(
                gpu,
                vram_free_bytes=None,
                vram_others_bytes=None,
                processes=None,
                core_clock_mhz=None,
                memory_clock_mhz=None,
                throttle_reasons=None,
            )
            for gpu in machine.gpus
        ),
    )
    before = dict(facts(machine))
    sources = {
        path: "left out: it changes by itself"
        if value is None and before[path] is not None
        else redact_text(machine.sources[path], owner)[:_MOST_NOTE_CHARACTERS]
        for path, value in facts(idle)
        if path in machine.sources
    }
    cleaned: Machine = _clean(dataclasses.replace(idle, sources={}), owner)
    return dataclasses.replace(cleaned, sources=sources)


def _clean(value: Any, owner: Owner) -> Any:
    """The value with every text in it redacted, however deep."""
    if isinstance(value, str):
        return redact_text(value, owner)
    if isinstance(value, tuple):
        return tuple(_clean(inner, owner) for inner in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {
            entry.name: _clean(getattr(value, entry.name), owner) for entry in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **changes)
    return value


_START, _END = r"(?<![^\W_])", r"(?![^\W_])"
"""Edges of a word; unlike `\\b` these part words at an underscore too, as in `pod_anna`."""

_IN_PATH = r"[^\s'\"`,;:()\[\]{}<>|]"
_SYSTEM_FOLDER = rf"(?:proc|sys|dev|etc|usr|lib|lib64|bin|sbin|\.dockerenv|run/\.containerenv)(?:/|{_END})"

_PATH = re.compile(
    rf"{_START}[a-z]:[\\/]{_IN_PATH}*"  # a drive of Windows
    rf"|\\\\[^\s\\]+\\{_IN_PATH}*"  # a share of Windows
    rf"|(?<![\w/.])~[\w.-]*[\\/]{_IN_PATH}*"  # a home folder
    rf"|(?<![\w./~)-])/(?!{_SYSTEM_FOLDER})(?!/){_IN_PATH}+",
    re.IGNORECASE,
)
"""Paths that people chose. Those of the system stay: they say where a figure was read."""

_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), shown)
    for pattern, shown in (
        # System folders whose contents are named after people, containers or disks.
        (rf"/sys/fs/cgroup/{_IN_PATH}+", "/sys/fs/cgroup/…"),
        (rf"/dev/(disk|mapper|mqueue|shm)/{_IN_PATH}+", r"/dev/\1/…"),
        (rf"/proc/\d+({_IN_PATH}*)", r"/proc/self\1"),
        # Ids of one box, one container, one disk.
        (rf"[0-9a-f]{{8}}([-_])[0-9a-f]{{4}}(?:\1[0-9a-f]{{4}}){{2}}\1[0-9a-f]{{12}}{_END}", "(id)"),
        (rf"{_START}(?:0x)?(?=[0-9]*[a-f])(?=[a-f]*[0-9])[0-9a-f]{{12,}}{_END}", "(id)"),
        # MAC and InfiniBand, IPv6, mail, IPv4 other than loopback and "any".
        (rf"{_START}[0-9a-f]{{2}}([:-])[0-9a-f]{{2}}(?:\1[0-9a-f]{{2}}){{4,}}{_END}", "(address)"),
        (rf"{_START}(?<!:)(?:[0-9a-f]{{0,4}}:){{3,7}}[0-9a-f]{{1,4}}(?:%\w+)?{_END}(?!:)", "(address)"),
        (rf"{_START}[\w.+-]+@[\w-]+(?:\.[\w-]+)+", "(address)"),
        (
            r"(?<![\d.])(?!127\.|0\.0\.0\.0)(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}"
            r"(?:25[0-5]|2[0-4]\d|1?\d?\d)(?!\.?\d)",
            "(address)",
        ),
        (
            rf"{_START}(serial(?:[ _-]?(?:number|no))?|s/n)(\s*[:=#]\s*|\s+)(?=\S*\d)[^\s,;]+",
            r"\1\2(serial)",
        ),
    )
)

_SERIAL = re.compile(rf"{_START}[A-Z0-9]{{12,}}{_END}")
"""Candidates for a serial number, which `_looks_serial` judges. In capitals, as makers write them."""


def redact_text(text: str, owner: Owner | None = None) -> str:
    """`text` without names of host, user and folders, addresses, ids and serial numbers.

    Folders of the system stay readable (`/proc/meminfo`), and of a model's path its file name. Safe to apply
    to a whole report, and twice.
    """
    owner = this_owner() if owner is None else owner
    for home in _longest_first(owner.homes):
        if len(home) > 1:
            text = re.sub(re.escape(home.rstrip("/\\")) + _END, "~", text, flags=re.IGNORECASE)
    text = _PATH.sub(_shortened, text)
    for pattern, shown in _RULES:
        text = pattern.sub(shown, text)
    text = _SERIAL.sub(lambda match: "(serial)" if _looks_serial(match[0]) else match[0], text)
    for names, shown in ((owner.hosts, "(host)"), (owner.users, "(user)")):
        for name in _longest_first(names):
            if len(name) > 1 and name.lower() not in _TELLS_NOTHING and not name.isdigit():
                text = re.sub(_START + re.escape(name) + _END, shown, text, flags=re.IGNORECASE)
    return text


def _shortened(path: re.Match[str]) -> str:
    name = re.split(r"[\\/]", path[0])[-1]
    return f"(path)/{name}" if name.lower().endswith(".gguf") else "(path)"


def _longest_first(names: tuple[str, ...]) -> list[str]:
    return sorted(names, key=len, reverse=True)


def _looks_serial(word: str) -> bool:
    """Letters and digits that take turns at least three times; `76800000000` and `AVX512VBMI` do not."""
    return len(re.findall(r"[A-Z]+|[0-9]+", word)) > 3
