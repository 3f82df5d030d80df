"""Whether the machine runs on its battery: laptops then hold their clocks down, whatever the governor is."""

from __future__ import annotations


def on_battery() -> bool | None:
    """True while the battery gives the power, False on mains; None without one or where it is not told."""
    import psutil

    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError, RuntimeError, ValueError):
        return None  # psutil has no such sensor on this system, or the firmware tells nonsense
    return None if battery is None or battery.power_plugged is None else not battery.power_plugged
