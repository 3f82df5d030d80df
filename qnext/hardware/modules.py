"""What the memory modules amount to: how many channels are in use, at which speed, and the rate they give.

SMBIOS lists slots, not channels. Boards say the channel in a slot's label, each maker in his own way:
`P0 CHANNEL A`, `Controller1-ChannelA-DIMM0`, `P0_Node0_Channel3_Dimm0`, `DIMM_A2`, `CPU1_DIMM_C1`. Labels
that only number the slots (`DIMM 3`, `PROC 1 DIMM 4`, `BANK 2`) tell nothing, and a letter is no channel
where it stands for the processor (Dell's `A1` to `A12`). Wherever it is not certain the channels stay
unknown: a wrong count would blame a sound machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qnext.hardware.dmi import Slot

CHANNEL_BITS = 64
"""Channels are counted in this width, whatever the parts they are built of (LPDDR5 has 16 or 32 bits)."""

_CHANNEL = re.compile(r"(?<![A-Z])CH(?:AN|ANNEL)?[ _#-]?(?:[0-9]{1,2}|[A-Z])(?![A-Z0-9])")
"""`CHANNEL A`, `ChannelA`, `Channel3`, `CHA`."""
_POSITION = re.compile(r"(?<![A-Z])C[0-9]{1,2}[ _]?(?=D[0-9]$)")
"""Intel servers: `CPU0_C1D0` is channel 1."""
_CONTROLLER = re.compile(r"(?<![A-Z])CONTROLLER[ _#-]?[0-9]{1,2}")
"""`Controller1-DIMM1`: since Alder Lake each controller of Intel's desktop CPUs drives 64 bits."""
_LETTER = re.compile(r"(?:DIMM|DDR[0-9]?)[ _#-]?(?:P[0-9]_)?[A-Z](?=([0-9]{0,2})(?:$|[ _(]))")
"""`DIMM_A2`, `DIMMA1`, `DDR5-B2`, `CPU1_DIMM_C1`, `DIMM_P0_A0`."""
_PLACE = re.compile(r"(?<![A-Z])(?:CPU|PROC|SOCKET|NODE|[PN])[ _#-]?[0-9]{1,2}(?![A-Z0-9])")
_SLOT = re.compile(r"(?:BANK|DIMM|SLOT)[ _#-]?[0-9]{1,2}(?![0-9])")
_MOST_PER_CHANNEL = 3
"""Slots one channel can drive. More under one letter: the letter is a processor, or a plain name."""

_SLOWEST = {"DDR4": 1600, "DDR5": 3200}
"""MT/s of JEDEC's slowest grade (JESD79-4, JESD79-5). Below it stands the clock: half the transfers."""

_SMALLEST_SHARE = 5
"""RAM is at least this part of the modules' sum: integrated GPUs may take three quarters of it away."""


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules together; speeds in MT/s, rate in bytes per second.

    `notes` says per field (by its name in `machine.Memory`) what is worth knowing of a value, or why it is
    missing. The other fields mean what they mean there.
    """

    modules: int | None = None
    channels: int | None = None
    channels_max: int | None = None
    speed_mtps: int | None = None
    speed_max_mtps: int | None = None
    rated_bandwidth_bps: int | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


FIELDS = ("modules", "channels", "channels_max", "speed_mtps", "speed_max_mtps", "rated_bandwidth_bps")


def judge_modules(slots: Sequence[Slot], total_bytes: int | None) -> Modules:
    """What `slots` amount to. `total_bytes` is the system's RAM, to check the modules' sizes against.

    Rated rate: sum over the channels in use of data width / 8 x the slowest module's configured MT/s.
    """
    filled = [slot for slot in slots if slot.size_bytes]
    installed = sum(slot.size_bytes or 0 for slot in filled)
    doubt = ""
    if not filled:
        doubt = "the firmware lists no module with a believable size"
    elif total_bytes and not installed / _SMALLEST_SHARE <= total_bytes <= installed * 1.01:
        doubt = "the firmware's module sizes do not agree with the system's RAM"
    if doubt:
        return Modules(notes=dict.fromkeys(FIELDS, doubt))
    notes: dict[str, str] = {}
    speed, rating = _speeds(filled, notes)
    used, present, width = _channels(slots, filled, notes)
    rate = None
    if used and speed and width:
        rate = used * (width // 8) * speed * 1_000_000
        notes["rated_bandwidth_bps"] = f"{used} x {width} bits x {speed} MT/s"
    else:
        notes["rated_bandwidth_bps"] = notes.get("speed_mtps" if used else "channels", "")
    return Modules(
        modules=len(filled),
        channels=_in_full_width(used, width),
        channels_max=_in_full_width(present, width),
        speed_mtps=speed,
        speed_max_mtps=rating,
        rated_bandwidth_bps=rate,
        notes=notes,
    )


def name_channels(slots: Sequence[Slot]) -> list[str] | None:
    """A name per slot, equal where two share a channel; None where the labels do not tell.

    One rule names all slots. A name is the label up to its channel (sockets and controllers stand before it)
    with the socket or node that the slot's other label states.
    """
    labels = [(slot.bank.upper().strip(), slot.locator.upper().strip()) for slot in slots]
    if len(set(labels)) < len(labels):
        return None  # two slots under one label: what is written there is no place
    for rule in (_CHANNEL, _POSITION, _CONTROLLER, _LETTER):
        names = [_name_by(rule, bank, locator) for bank, locator in labels]
        if names and all(names):
            break
    else:
        return None
    if any(
        slot.kind == "DDR5" and slot.width_bits == CHANNEL_BITS for slot in slots
    ):  # channels A and B of a controller are a module's halves
        names = [name[: found.end()] if (found := _CONTROLLER.search(name)) else name for name in names]
    return names if _is_likely(rule, names, [locator for _, locator in labels]) else None


def _name_by(rule: re.Pattern[str], bank: str, locator: str) -> str:
    """The channel's name by `rule`, from the bank's label or else the slot's; empty where neither fits."""
    for label, other in ((bank, locator), (locator, bank)):
        if found := rule.search(label):
            return " ".join([_SLOT.sub("", label[: found.end()]), *_PLACE.findall(other)])
    return ""


def _is_likely(rule: re.Pattern[str], names: Sequence[str], locators: Sequence[str]) -> bool:
    """Whether names so grouped can be channels, and not processors or mere numbering."""
    if any(names.count(name) > _MOST_PER_CHANNEL for name in set(names)):
        return False
    if rule is not _LETTER:
        return True
    numbers = [found[1] for locator in locators if (found := _LETTER.search(locator)) and found[1]]
    one_for_all = len(set(names)) == 1 and len(names) > 1
    return not one_for_all and all(int(number) <= _MOST_PER_CHANNEL for number in numbers)


def _channels(
    slots: Sequence[Slot], filled: Sequence[Slot], notes: dict[str, str]
) -> tuple[int | None, int | None, int | None]:
    """(channels with a module, channels of the board, their common data width in bits)."""
    widths = {slot.width_bits for slot in filled}
    width = widths.pop() if len(widths) == 1 else None
    names = name_channels(slots)
    reason = ""
    if len({slot.kind for slot in filled if slot.kind}) > 1:
        reason = "there are modules of different kinds"
    elif names is None:
        reason = "the board's slot labels do not name the channels"
    elif width is None:
        reason = "the firmware does not state one data width for all modules"
    if reason or names is None:
        notes["channels"] = notes["channels_max"] = reason
        return None, None, None
    used = {name for name, slot in zip(names, slots, strict=True) if slot.size_bytes}
    if width != CHANNEL_BITS:
        notes["channels"] = f"{len(used)} of {width} bits, counted as channels of {CHANNEL_BITS}"
    return len(used), len(set(names)), width


def _in_full_width(count: int | None, width: int | None) -> int | None:
    return max(1, count * width // CHANNEL_BITS) if count and width else None


def _speeds(filled: Sequence[Slot], notes: dict[str, str]) -> tuple[int | None, int | None]:
    """(what the slowest module is set to, what the slowest could do), MT/s."""
    ratings = [_transfers(slot.speed_mtps, slot) for slot in filled]
    speed, rating = _slowest([_setting(slot) for slot in filled]), _slowest(ratings)
    if speed is None:
        notes["speed_mtps"] = "the firmware does not state the configured speed of every module"
    elif speed not in {slot.configured_mtps for slot in filled}:
        notes["speed_mtps"] = f"the firmware states the clock, {speed // 2} MHz; transfers are twice that"
    if rating is None:
        notes["speed_max_mtps"] = "the firmware does not state what every module can do"
    elif speed is not None and speed > rating:
        rating = speed
        notes["speed_max_mtps"] = "set beyond the modules' stated rating: a memory profile is on"
    return speed, rating


def _setting(slot: Slot) -> int | None:
    """The configured MT/s. Exactly half of what the module can do is the clock: no board sets that."""
    setting, rating = slot.configured_mtps, slot.speed_mtps
    halved = setting is not None and rating is not None and abs(setting * 2 - rating) <= 2
    return rating if halved else _transfers(setting, slot)


def _transfers(speed: int | None, slot: Slot) -> int | None:
    return speed * 2 if speed is not None and speed < _SLOWEST.get(slot.kind, 0) else speed


def _slowest(speeds: Sequence[int | None]) -> int | None:
    known = [speed for speed in speeds if speed is not None]
    return min(known) if known and len(known) == len(speeds) else None
