"""Whether the machine is a virtual one, and whether this process lives in a container.

Both change what the other facts mean: a virtual machine's core and cache counts, frequencies and memory
modules are whatever its host made up; a container sees the host's /proc and /sys. x86 guests know by a CPU
flag that every hypervisor sets; arm64 has none, so there the firmware's names and the device tree tell. The
names in the DMI tables (SMBIOS) say which hypervisor it is; serial numbers beside them are never read.
"""

from __future__ import annotations

import re
from pathlib import Path

from qnext.hardware.files import read_text

CPUINFO_BYTES = 1 << 14
"""The first processor's lines of `/proc/cpuinfo` fit in this; each further CPU costs the kernel time."""

_DMI = "sys/class/dmi/id"
_VENDORS = (
    (r"vmware", "vmware"),
    (r"virtualbox|innotek", "virtualbox"),
    (r"microsoft corporation virtual machine", "hyperv"),
    (r"parallels", "parallels"),
    (r"bhyve", "bhyve"),
    (r"cloud[ -]hypervisor", "cloud-hypervisor"),
    (r"apple virtualization|apple inc\. vmm", "apple"),
    (r"amazon ec2", "amazon-ec2"),
    (r"google compute engine", "google"),
    (r"\bxen\b|hvm domu", "xen"),
    (r"openstack", "openstack"),
    (r"qemu|\bkvm\b|standard pc \(|alibaba cloud|digitalocean|ovirt|nutanix", "kvm"),
)
"""Words in vendor and product names -> our name; the first match counts, as QEMU is named beside others."""

_GROUP_HINTS = (
    (r"/kubepods|/kubelet", "kubernetes"),
    (r"/docker[/-][0-9a-f]{12,}", "docker"),
    (r"/libpod-[0-9a-f]{12,}", "podman"),
    (r"/(lxc|lxc\.payload[./][^/\n]+|lxc/[^/\n]+)(/|$)", "lxc"),
    (r"/(cri-)?containerd-[0-9a-f]{12,}", "containerd"),
)
_MOUNT_HINTS = (
    (r"/kubelet/pods/", "kubernetes"),
    (r"/docker/containers/", "docker"),
    (r"/containers/storage/|/overlay-containers/", "podman"),
    (r"/io\.containerd\.", "containerd"),
)
_CARRIED_MOUNTS = {"/etc/hostname", "/etc/hosts", "/etc/resolv.conf"}
"""Files that container engines mount over the image's own."""


def read_hypervisor(root: Path = Path("/")) -> tuple[str | None, str]:
    """(hypervisor, source); `none` on bare metal, `unknown` where a guest's host has no known name.

    None, with the reason, where nothing tells.
    """
    words = read_text(root / "proc/version", 4096).lower().split()
    release = words[2] if len(words) > 2 else ""  # `Linux version 5.15.90.1-microsoft-standard-WSL2 (…`
    if "microsoft" in release:
        return ("wsl2" if "wsl2" in release or "standard" in release else "wsl1"), "kernel release"
    cpuinfo = read_text(root / "proc/cpuinfo", CPUINFO_BYTES)
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    named, seen = _read_firmware(root)
    tree = read_text(root / "proc/device-tree/hypervisor/compatible", 256).lower()
    if flags is not None:
        xen = "xen" in read_text(root / "sys/hypervisor/type", 64).lower()
        if not xen and "hypervisor" not in flags[1].split():
            return "none", "/proc/cpuinfo: no hypervisor flag"
        if named or xen:
            return (
                named or "xen",
                f"/proc/cpuinfo: hypervisor flag; {'/' + _DMI if named else '/sys/hypervisor'}",
            )
        return "unknown", f"/proc/cpuinfo: hypervisor flag; no known name in /{_DMI}"
    if tree:
        known = next((name for name in ("kvm", "xen", "vmware") if name in tree), None)
        return named or known or "unknown", "device tree"
    if named == "amazon-ec2" and "metal" in seen:
        return "none", f"/{_DMI}: a bare-metal instance"
    if named:
        return named, f"/{_DMI}"
    if seen or read_text(root / "proc/device-tree/compatible", 256):
        return "none", "firmware tables name no hypervisor"
    return None, "neither the CPU nor firmware tables tell"


def read_container(root: Path = Path("/")) -> tuple[str | None, str]:
    """(container engine, source); `none` outside. None, with the reason, without /proc."""
    stated = read_text(root / "run/systemd/container", 64).strip().lower()
    if re.fullmatch(r"[a-z][a-z0-9-]{1,30}", stated) and stated != "wsl":  # WSL is told as the hypervisor
        return stated, "/run/systemd/container"
    if _is_there(root / "run/.containerenv"):
        return "podman", "/run/.containerenv"
    mounts = [line.split() for line in read_text(root / "proc/self/mountinfo").splitlines()]
    groups = read_text(root / "proc/self/cgroup")
    for pattern, name in _GROUP_HINTS:
        if re.search(pattern, groups, re.MULTILINE):
            return name, "/proc/self/cgroup"
    for words in mounts:
        if len(words) < 7:
            continue
        top, point, rest = words[3], words[4], " ".join(words[6:])
        if point == "/proc/meminfo" and "lxcfs" in rest:
            return "lxc", "/proc/self/mountinfo"
        about = top if point in _CARRIED_MOUNTS else rest if point == "/" else ""
        for pattern, name in _MOUNT_HINTS:
            if re.search(pattern, about):
                return name, "/proc/self/mountinfo"
    if _is_there(root / ".dockerenv"):
        if any(_is_own_disk(words) for words in mounts):  # a virtual machine started from a container's image
            return "none", "/.dockerenv is left over: / is a disk of its own"
        return "docker", "/.dockerenv"
    if not groups and not mounts:
        return None, "no /proc/self to tell by"
    return "none", "no container's marks in /run, /proc/self/cgroup or /proc/self/mountinfo"


def _read_firmware(root: Path) -> tuple[str | None, str]:
    """(hypervisor named by the firmware, all its names in lower case)."""
    names = ("sys_vendor", "product_name", "board_vendor", "bios_vendor")
    seen = " ".join(read_text(root / _DMI / name, 256).strip() for name in names).strip().lower()
    return next((name for pattern, name in _VENDORS if re.search(pattern, seen)), None), seen


def _is_own_disk(words: list[str]) -> bool:
    """A line of mountinfo that mounts a whole block device at `/`; engines mount overlays or folders."""
    if "-" not in words[6:] or words[3:5] != ["/", "/"]:
        return False
    kind, device = (*words[words.index("-", 6) + 1 :], "", "")[:2]
    return kind != "overlay" and device.startswith("/dev/") and "docker" not in device


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False
