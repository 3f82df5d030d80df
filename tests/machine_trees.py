"""Small trees of /proc, /sys and /run as real machines show them, and SMBIOS tables as firmware has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from qnext.units import GIB, KIB

CPUS = "sys/devices/system/cpu"
NODES = "sys/devices/system/node"
X86 = "model name\t: {model}\nflags\t\t: fpu sse4_2 avx2 fma{more}\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: {part}\n"


def plant(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write the files below `root` and return it."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def cores(
    siblings: Iterable[Sequence[int]],
    *,
    cores_per_package: int = 1 << 16,
    caches: Mapping[str, Sequence[int]] | None = None,
    cache_sizes: Sequence[str] = (),
    capacities: Sequence[int] = (),
) -> dict[str, str]:
    """Topology files; each entry of `siblings` is one physical core.

    `caches` maps a shared CPU list to (its CPUs); `cache_sizes` are their sizes in the same order, level 3.
    """
    files = {}
    for position, core in enumerate(siblings):
        for cpu in core:
            folder = f"{CPUS}/cpu{cpu}"
            files[f"{folder}/topology/core_cpus_list"] = ",".join(map(str, core)) + "\n"
            files[f"{folder}/topology/physical_package_id"] = f"{position // cores_per_package}\n"
            files[f"{folder}/cache/index0/level"] = "1\n"
            files[f"{folder}/cache/index0/size"] = "32K\n"
            files[f"{folder}/cache/index0/shared_cpu_list"] = ",".join(map(str, core)) + "\n"
            if capacities:
                files[f"{folder}/cpu_capacity"] = f"{capacities[position]}\n"
    for (shared, cpus), size in zip((caches or {}).items(), cache_sizes, strict=True):
        for cpu in cpus:
            folder = f"{CPUS}/cpu{cpu}/cache/index3"
            files |= {
                f"{folder}/level": "3\n",
                f"{folder}/size": size + "\n",
                f"{folder}/shared_cpu_list": shared + "\n",
            }
    return files


def policies(
    count: int, driver: str, governors: Sequence[str], preferences: Sequence[str] = ()
) -> dict[str, str]:
    """One cpufreq policy per CPU; short lists are repeated."""
    files = {}
    for cpu in range(count):
        folder = f"{CPUS}/cpufreq/policy{cpu}"
        files[f"{folder}/scaling_driver"] = driver + "\n"
        files[f"{folder}/scaling_governor"] = governors[cpu % len(governors)] + "\n"
        if preferences:
            files[f"{folder}/energy_performance_preference"] = preferences[cpu % len(preferences)] + "\n"
    return files


def meminfo(total: int, available: int | None = None, more: str = "") -> str:
    free = total // 2 if available is None else available
    return f"MemTotal: {total // KIB} kB\nMemAvailable: {free // KIB} kB\n{more}"


def nodes(cpulists: Sequence[str], size: int) -> dict[str, str]:
    files = {}
    for node, cpus in enumerate(cpulists):
        files[f"{NODES}/node{node}/meminfo"] = (
            f"Node {node} MemTotal:       {size // KIB} kB\nNode {node} MemFree: 1 kB\n"
        )
        files[f"{NODES}/node{node}/cpulist"] = cpus + "\n"
    return files


def intel_hybrid() -> dict[str, str | bytes]:
    """Core i9-12900K: 8 P cores with two threads each, 8 E cores, 30 MiB of L3, `powersave` as it ships."""
    pairs = [(2 * core, 2 * core + 1) for core in range(8)] + [(cpu,) for cpu in range(16, 24)]
    return {
        **cores(pairs, caches={"0-23": range(24)}, cache_sizes=["30720K"]),
        **policies(24, "intel_pstate", ["powersave"], ["balance_performance"]),
        "sys/devices/cpu_core/cpus": "0-15\n",
        "sys/devices/cpu_atom/cpus": "16-23\n",
        "proc/cpuinfo": X86.format(model="12th Gen Intel(R) Core(TM) i9-12900K", more=" avx_vnni"),
        "proc/meminfo": meminfo(62 * GIB),
        "sys/class/dmi/id/sys_vendor": "ASUS\n",
        "proc/self/cgroup": "0::/user.slice/user-1000.slice/session-3.scope\n",
        **nodes(["0-23"], 62 * GIB),
        "run/udev/data/+dmi:id": udev(
            [
                {"LOCATOR": f"Controller{side}-ChannelA-DIMM{place}", "BANK_LOCATOR": "BANK 0"}
                | (ddr5(32, 4800, 4800) if place else {"PRESENT": "0"})
                for side in (0, 1)
                for place in (0, 1)
            ]
        ),
    }


def amd_desktop() -> dict[str, str | bytes]:
    """Ryzen 9 7950X: 16 cores, 32 threads, two L3 of 32 MiB, two of four DIMM slots filled, EXPO on."""
    pairs = [(core, core + 16) for core in range(16)]
    halves = {"0-7,16-23": [*range(8), *range(16, 24)], "8-15,24-31": [*range(8, 16), *range(24, 32)]}
    return {
        **cores(pairs, caches=halves, cache_sizes=["32768K", "32768K"]),
        **policies(32, "amd-pstate-epp", ["powersave"], ["balance_performance", "power"]),
        "proc/cpuinfo": X86.format(model="AMD Ryzen 9 7950X 16-Core Processor", more=" avx512f"),
        "proc/meminfo": meminfo(61 * GIB),
        "sys/class/dmi/id/sys_vendor": "Gigabyte Technology Co., Ltd.\n",
        "proc/self/cgroup": "0::/user.slice\n",
        "run/udev/data/+dmi:id": udev(
            [
                {"LOCATOR": f"DIMM {place}", "BANK_LOCATOR": f"P0 CHANNEL {letter}"}
                | (ddr5(32, 5600, 6000) if place else {"PRESENT": "0"})
                for letter in "AB"
                for place in (0, 1)
            ]
        ),
    }


def two_socket_epyc() -> dict[str, str | bytes]:
    """Two EPYC 7543 with four nodes each: 64 cores, 128 threads, 16 L3 caches, 16 channels of DDR4-2933."""
    pairs = [(core, core + 64) for core in range(64)]
    groups = [[*range(4 * n, 4 * n + 4), *range(64 + 4 * n, 68 + 4 * n)] for n in range(16)]
    caches = {f"{4 * n}-{4 * n + 3},{64 + 4 * n}-{67 + 4 * n}": groups[n] for n in range(16)}
    locators = [(socket, letter) for socket in (0, 1) for letter in "ABCDEFGH"]
    return {
        **cores(pairs, cores_per_package=32, caches=caches, cache_sizes=["32768K"] * 16),
        **policies(128, "acpi-cpufreq", ["performance", "schedutil"]),
        "proc/cpuinfo": X86.format(model="AMD EPYC 7543 32-Core Processor", more=""),
        "proc/meminfo": meminfo(503 * GIB),
        "sys/class/dmi/id/sys_vendor": "Supermicro\n",
        "proc/self/cgroup": "0::/system.slice/ssh.service\n",
        "proc/self/status": "Name:\tx\nMems_allowed_list:\t0-7\n",
        **nodes([f"{8 * n}-{8 * n + 7},{64 + 8 * n}-{71 + 8 * n}" for n in range(8)], 62 * GIB),
        "sys/firmware/dmi/tables/DMI": array(16)
        + b"".join(
            device(32 * 1024, f"P{socket + 1}-DIMM{letter}1",
                   f"P{socket}_Node0_Channel{ord(letter) - 65}_Dimm0", kind=0x1A,
                   speed=3200, configured=2933, total_width=72)
            for socket, letter in locators
        )
        + end(),
    }  # fmt: skip


def arm_big_little() -> dict[str, str | bytes]:
    """RK3588: four A55, then four A76, one L3."""
    return {
        **cores([(cpu,) for cpu in range(8)], caches={"0-7": range(8)}, cache_sizes=["3072K"],
                capacities=[530] * 4 + [1024] * 4),
        **policies(8, "cpufreq-dt", ["ondemand"]),
        "proc/cpuinfo": ARM.format(part="0xd05"),
        "proc/device-tree/compatible": "radxa,rock-5b\0rockchip,rk3588\0",
        "proc/meminfo": meminfo(16 * GIB),
        "proc/self/cgroup": "0::/\n",
    }  # fmt: skip


def dgx_spark() -> dict[str, str | bytes]:
    """GB10: two clusters of five A725 and five X925 each; the second cluster's X925 are clocked higher."""
    clusters = {"0-9": range(10), "10-19": range(10, 20)}
    return {
        **cores([(cpu,) for cpu in range(20)], caches=clusters, cache_sizes=["8192K", "16384K"],
                capacities=[718] * 5 + [997] * 5 + [731] * 5 + [1024] * 5),
        "proc/cpuinfo": ARM.format(part="0xd87"),
        "proc/meminfo": meminfo(119 * GIB),
        "sys/class/dmi/id/sys_vendor": "NVIDIA\n",
        "sys/class/dmi/id/product_name": "NVIDIA_DGX_Spark\n",
        "proc/self/cgroup": "0::/user.slice\n",
        **nodes(["0-19"], 119 * GIB),
    }  # fmt: skip


def container() -> dict[str, str | bytes]:
    """A Docker container with version 2 groups: half of CPU 0's time, 16 GiB, on an eight-core host."""
    return {
        **cores([(cpu,) for cpu in range(8)]),
        "proc/cpuinfo": X86.format(model="Host CPU", more=""),
        "proc/meminfo": meminfo(64 * GIB, 60 * GIB),
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": "500 400 0:50 / / rw,relatime - overlay overlay rw,lowerdir=/var/lib/x\n"
        "510 500 0:26 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw\n"
        "520 500 8:1 /var/lib/docker/containers/0f/hosts /etc/hosts rw - ext4 /dev/sda1 rw\n",
        "sys/fs/cgroup/cpu.max": "50000 100000\n",
        "sys/fs/cgroup/memory.max": f"{16 * GIB}\n",
        "sys/fs/cgroup/memory.current": f"{GIB}\n",
        ".dockerenv": "",
    }


def wsl2() -> dict[str, str | bytes]:
    """Windows' Linux: no frequency, no firmware tables, a kernel that names itself."""
    return {
        **cores([(0, 1), (2, 3)], caches={"0-3": range(4)}, cache_sizes=["16384K"]),
        "proc/version": "Linux version 5.15.167.4-microsoft-standard-WSL2 (root@builder) (gcc 11.2.0)\n",
        "proc/cpuinfo": X86.format(model="Intel(R) Core(TM) i5", more=" hypervisor"),
        "proc/meminfo": meminfo(8 * GIB),
        "proc/self/cgroup": "0::/init.scope\n",
        "run/systemd/container": "wsl\n",
        **nodes(["0-3"], 8 * GIB),
    }


MACHINES = {
    "intel-hybrid": intel_hybrid,
    "amd-desktop": amd_desktop,
    "two-socket-epyc": two_socket_epyc,
    "arm-big-little": arm_big_little,
    "dgx-spark": dgx_spark,
    "container": container,
    "wsl2": wsl2,
    "empty": dict,
}
"""Every tree by name, as functions that give its files."""


def ddr5(gib: int, speed: int, configured: int) -> dict[str, str]:
    """A module as udev words it: systemd's list of types ends before DDR5."""
    return {
        "SIZE": str(gib * GIB),
        "DATA_WIDTH": "64",
        "TYPE": "<OUT OF SPEC>",
        "SPEED_MTS": str(speed),
        "CONFIGURED_SPEED_MTS": str(configured),
    }


def udev(devices: Sequence[Mapping[str, str]]) -> str:
    """udev's database entry of the DMI device, with one block of properties per slot."""
    lines = ["I:12345678", "E:ID_VENDOR=Somebody", "E:MEMORY_ARRAY_LOCATION=System Board Or Motherboard"]
    for number, device in enumerate(devices):
        lines += [f"E:MEMORY_DEVICE_{number}_{key}={value}" for key, value in device.items()]
        lines += [f"E:MEMORY_DEVICE_{number}_SERIAL_NUMBER=SECRET{number}"]
    return "\n".join([*lines, f"E:MEMORY_ARRAY_NUM_DEVICES={len(devices)}", "G:dmi", "V:1"]) + "\n"


def array(slots: int, *, use: int = 3, handle: int = 0x1000) -> bytes:
    """A memory array (SMBIOS type 16); use 3 is system memory, 4 video memory."""
    fixed = bytes([16, 0x17]) + handle.to_bytes(2, "little") + bytes([3, use, 6]) + bytes(6)
    return fixed + slots.to_bytes(2, "little") + bytes(0x17 - len(fixed) - 2) + b"\0\0"


def device(
    mib: int,
    locator: str,
    bank: str,
    *,
    kind: int = 0x22,
    speed: int = 4800,
    configured: int = 4800,
    width: int = 64,
    total_width: int | None = None,
    length: int = 0x5C,
    array_handle: int = 0x1000,
    technology: int = 3,
) -> bytes:
    """A memory device (SMBIOS type 17); 0 MiB is an empty slot. Speeds beyond 65534 go to the long fields."""
    fixed = bytearray(length)
    fixed[0:2] = bytes([17, length])

    def put(offset: int, value: int, size: int = 2) -> None:
        if offset + size <= length:
            fixed[offset : offset + size] = value.to_bytes(size, "little")

    put(0x02, 0x1100)
    put(0x04, array_handle)
    put(0x08, total_width or width)
    put(0x0A, width)
    put(0x0C, min(mib, 0x7FFF))
    put(0x1C, mib if mib >= 0x7FFF else 0, 4)
    for offset, text_index in ((0x10, 1), (0x11, 2), (0x17, 3), (0x18, 4)):
        put(offset, text_index, 1)
    put(0x12, kind, 1)
    put(0x15, 0xFFFF if speed > 0xFFFE else speed)
    put(0x20, 0xFFFF if configured > 0xFFFE else configured)
    put(0x28, technology, 1)
    put(0x54, speed, 4)
    put(0x58, configured, 4)
    return bytes(fixed) + "\0".join([locator, bank, "Maker", "SECRET"]).encode() + b"\0\0"


def end() -> bytes:
    return bytes([127, 4, 0xFF, 0xFE]) + b"\0\0"
