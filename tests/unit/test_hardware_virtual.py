"""Virtual machines and containers, each told by the marks it really leaves; bare metal is told as such."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qnext.hardware.virtual import read_container, read_hypervisor
from tests.machine_trees import ARM, MACHINES, X86, plant

DMI = "sys/class/dmi/id"
GUEST = X86.format(model="m", more=" hypervisor")
METAL = X86.format(model="m", more="")
OVERLAY = "500 400 0:50 / / rw,relatime - overlay overlay rw,lowerdir={folder}/1/fs\n"


@pytest.mark.parametrize(
    ("vendor", "product", "expected"),
    [
        ("QEMU", "Standard PC (Q35 + ICH9, 2009)", "kvm"),
        ("Red Hat", "KVM", "kvm"),
        ("VMware, Inc.", "VMware Virtual Platform", "vmware"),
        ("innotek GmbH", "VirtualBox", "virtualbox"),
        ("Microsoft Corporation", "Virtual Machine", "hyperv"),
        ("Xen", "HVM domU", "xen"),
        ("Amazon EC2", "c7i.4xlarge", "amazon-ec2"),
        ("Google", "Google Compute Engine", "google"),
        ("Parallels International GmbH.", "Parallels Virtual Platform", "parallels"),
        ("Somebody", "Else", "unknown"),
        (None, None, "unknown"),  # Firecracker has no tables
    ],
)
def test_a_guest_is_named_by_its_firmware(
    tmp_path: Path, vendor: str | None, product: str | None, expected: str
) -> None:
    plant(tmp_path, {"proc/cpuinfo": GUEST})
    if vendor and product:
        plant(tmp_path, {f"{DMI}/sys_vendor": vendor + "\n", f"{DMI}/product_name": product + "\n"})
    assert read_hypervisor(tmp_path)[0] == expected


@pytest.mark.parametrize(
    ("vendor", "product"),
    [
        ("ASUS", "System Product Name"),
        ("Microsoft Corporation", "Surface Laptop 5"),
        ("Amazon EC2", "c5.metal"),
    ],
)
def test_without_the_flag_an_x86_machine_is_bare_metal(tmp_path: Path, vendor: str, product: str) -> None:
    plant(tmp_path, {"proc/cpuinfo": METAL, f"{DMI}/sys_vendor": vendor, f"{DMI}/product_name": product})
    assert read_hypervisor(tmp_path)[0] == "none"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/device-tree/hypervisor/compatible": "linux,kvm\0"}, "kvm"),
        ({"proc/device-tree/hypervisor/compatible": "xen,xen-4.17\0xen,xen\0"}, "xen"),
        ({f"{DMI}/sys_vendor": "QEMU"}, "kvm"),
        ({f"{DMI}/sys_vendor": "Amazon EC2", f"{DMI}/product_name": "c7g.large"}, "amazon-ec2"),
        ({f"{DMI}/sys_vendor": "Amazon EC2", f"{DMI}/product_name": "c7g.metal"}, "none"),
        ({"proc/device-tree/compatible": "radxa,rock-5b"}, "none"),
        ({}, None),
    ],
)
def test_arm64_has_no_flag_and_is_told_by_tables(
    tmp_path: Path, files: dict[str, str], expected: str | None
) -> None:
    assert (
        read_hypervisor(plant(tmp_path, {"proc/cpuinfo": ARM.format(part="0xd0c"), **files}))[0] == expected
    )


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("5.15.167.4-microsoft-standard-WSL2", "wsl2"),
        ("4.19.43-microsoft-standard", "wsl2"),
        ("4.4.0-19041-Microsoft", "wsl1"),
        ("6.8.0-1015-azure", "hyperv"),
    ],
)
def test_wsl_is_told_by_the_kernels_own_name(tmp_path: Path, release: str, expected: str) -> None:
    files = {
        "proc/version": f"Linux version {release} (builder@microsoft.example) (gcc 11)\n",
        "proc/cpuinfo": GUEST,
        f"{DMI}/sys_vendor": "Microsoft Corporation",
        f"{DMI}/product_name": "Virtual Machine",
    }
    assert read_hypervisor(plant(tmp_path, files))[0] == expected


def test_a_xen_guest_without_the_flag_is_told_by_sys_hypervisor(tmp_path: Path) -> None:
    assert (
        read_hypervisor(plant(tmp_path, {"proc/cpuinfo": METAL, "sys/hypervisor/type": "xen\n"}))[0] == "xen"
    )


CGROUP = "proc/self/cgroup"
MOUNTS = "proc/self/mountinfo"
DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"run/systemd/container": "systemd-nspawn\n"}, "systemd-nspawn"),
        ({"run/systemd/container": "lxc"}, "lxc"),
        ({"run/systemd/container": "wsl", CGROUP: "0::/init.scope\n"}, "none"),
        ({"run/.containerenv": "", CGROUP: "0::/\n"}, "podman"),
        ({".dockerenv": "", CGROUP: "0::/\n", MOUNTS: OVERLAY.format(folder="/x")}, "docker"),
        ({".dockerenv": "", MOUNTS: "27 1 254:0 / / rw - ext4 /dev/vda rw\n"}, "none"),  # an image's leftover
        ({CGROUP: f"4:memory:/docker/{DIGEST}\n"}, "docker"),
        ({CGROUP: f"0::/system.slice/docker-{DIGEST}.scope\n"}, "docker"),
        ({CGROUP: "0::/system.slice/docker.service\n"}, "none"),  # the daemon itself is on the host
        ({CGROUP: f"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{DIGEST}.scope\n"}, "kubernetes"),
        ({CGROUP: f"0::/user.slice/libpod-{DIGEST}.scope/container\n"}, "podman"),
        ({CGROUP: "0::/lxc.payload.web/init.scope\n"}, "lxc"),
        ({CGROUP: "0::/\n", MOUNTS: "1 2 0:5 / /proc/meminfo rw - fuse.lxcfs lxcfs rw\n"}, "lxc"),
        ({CGROUP: "0::/\n", MOUNTS: "1 2 8:1 /var/lib/kubelet/pods/1/hosts /etc/hosts rw - ext4 /dev/a rw\n"},
         "kubernetes"),
        ({CGROUP: "0::/\n", MOUNTS: OVERLAY.format(folder="/io.containerd.snapshotter")}, "containerd"),
        ({CGROUP: "0::/user.slice\n", MOUNTS: "9 8 0:1 / /var/lib/docker/overlay2/1 rw - overlay o rw\n"},
         "none"),  # a host that runs containers
        ({}, None),
    ],
)  # fmt: skip
def test_a_container_is_told_by_its_marks(
    tmp_path: Path, files: dict[str, str], expected: str | None
) -> None:
    name, source = read_container(plant(tmp_path, files))
    assert name == expected
    assert source


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("intel-hybrid", ("none", "none")),
        ("two-socket-epyc", ("none", "none")),
        ("dgx-spark", ("none", "none")),
        ("container", ("none", "docker")),
        ("wsl2", ("wsl2", "none")),
        ("empty", (None, None)),
    ],
)
def test_whole_machines(tmp_path: Path, name: str, expected: tuple[str | None, str | None]) -> None:
    plant(tmp_path, MACHINES[name]())
    assert (read_hypervisor(tmp_path)[0], read_container(tmp_path)[0]) == expected


def test_sources_name_neither_the_builder_nor_the_product(tmp_path: Path) -> None:
    plant(tmp_path, MACHINES["wsl2"]() | {f"{DMI}/product_name": "Janes Laptop", "proc/cpuinfo": GUEST})
    said = repr(read_hypervisor(tmp_path)) + repr(read_container(tmp_path))
    assert "Jane" not in said
    assert "builder" not in said


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(rubbish=st.binary(max_size=200))
def test_rubbish_is_read_without_an_error(tmp_path: Path, rubbish: bytes) -> None:
    names = ("proc/version", "proc/cpuinfo", f"{DMI}/sys_vendor", "run/systemd/container", CGROUP, MOUNTS)
    plant(tmp_path, dict.fromkeys(names, rubbish))
    for value, source in (read_hypervisor(tmp_path), read_container(tmp_path)):
        assert value is None or value.isascii()
        assert source
