"""What is saved or pasted says nothing of a person or of one particular box, wherever a sensor put it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.hardware import Cpu, Disk, Gpu, Machine, Memory, NumaNode, machine_to_dict
from qnext.hardware.machine import facts
from qnext.hardware.recorded import machine_to_yaml
from qnext.hardware.redact import Owner, redact_machine, redact_text, this_owner

OWNER = Owner(
    hosts=("annas-box", "annas-box.example.org"), users=("anna", "Anna Schmidt"), homes=("/home/anna",)
)
HEX = "3f9c" * 16
SECRETS = (
    *("annas-box", "annas-box.example.org", "anna", "Anna Schmidt", "/home/anna", "ANNA", "Annas-Box"),
    *("5f3c1a2b-1234-5678-9abc-def012345678", "5f3c1a2b_1234_5678_9abc_def012345678"),
    *("52:54:00:ab:34:56", "52-54-00-AB-34-56", HEX, HEX[:32], "8d3f2a9c1b7e"),
    *(
        "192.168.17.23",
        "fe80::5054:ff:feab:3456",
        "anna@example.org",
        "S5GXNF0R123456",
        "in /mnt/our-clients",
    ),
)
FRAMES = ("{}", "read from {} at start", "/x/{}/y", "{}_1", "a={};b", "pod-{}.slice", "('{}')", "disk: {}")
PLAIN = "\N{MIDDLE DOT}"


def filled(value: Any, text: str) -> Any:
    """The value with `text` in every field that may hold a text."""
    changes: dict[str, Any] = {}
    for entry in dataclasses.fields(value):
        if entry.type == "str | None" or entry.name == "name":
            changes[entry.name] = text
        elif entry.type == "tuple[str, ...] | None":
            changes[entry.name] = (text, text)
    return dataclasses.replace(value, **changes)


def machine_full_of(text: str) -> Machine:
    machine = filled(
        Machine(
            cpu=filled(Cpu(physical_cores=8), text),
            memory=filled(Memory(total_bytes=1 << 36, numa_nodes=(NumaNode(),)), text),
            gpus=(filled(Gpu(), text),),
            disk=filled(Disk(), text),
        ),
        text,
    )
    sources = dict.fromkeys((path for path, _ in facts(machine)), f"read from {text}")
    return dataclasses.replace(machine, sources={**sources, text: text})


@pytest.mark.thorough
@settings(deadline=None, max_examples=150)
@given(st.sampled_from(SECRETS), st.sampled_from(FRAMES), st.sampled_from(FRAMES))
def test_no_secret_survives_in_any_text_of_a_machine(secret: str, outer: str, inner: str) -> None:
    machine = redact_machine(machine_full_of(outer.format(inner.format(secret))), OWNER)
    for written in (machine_to_yaml(machine), json.dumps(machine_to_dict(machine)), repr(machine)):
        assert secret.lower() not in written.lower()
        assert "anna" not in written.lower()


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(FRAMES), st.sampled_from(SECRETS)), min_size=1, max_size=6))
def test_no_secret_survives_in_a_report_and_redacting_twice_changes_nothing(
    parts: list[tuple[str, str]],
) -> None:
    report = "\n".join(f"- **fact** {frame.format(secret)} {PLAIN}" for frame, secret in parts)
    written = redact_text(report, OWNER)
    assert all(secret.lower() not in written.lower() for _, secret in parts)
    assert written.count(PLAIN) == len(parts) and written.count("- **fact** ") == len(parts)
    assert redact_text(written, OWNER) == written


@pytest.mark.parametrize(
    "text",
    [
        "AMD Ryzen 9 9950X 16-Core Processor, Intel(R) Xeon(R) Processor @ 2.50GHz",
        "0000:01:00.0 and 00000000:c3:00.0",
        "driver 595.58.03, 32.0.15.6094, compute capability 12.0",
        "/proc/meminfo, /sys/devices/system/cpu, /dev/nvidiactl, /.dockerenv, RLIMIT_MEMLOCK 8.0 MiB",
        "128.0 GB/s, 16 t/s, 412316860416 bytes, 76_800_000_000, 1/2, and/or, avx512_vnni AVX512VBMI2",
        "sudo cpupower frequency-set -g performance; needs root; ./scripts/qnext --version",
        "OLLAMA_HOST=127.0.0.1:11434, https://github.com/ggml-org/llama.cpp/issues/16725",
        "Annapurna, 2026-11-21T07:47:12, llama.cpp b8372ee, Qwen3-Next-80B-A3B Q4_K_M",
    ],
)
def test_what_says_nothing_of_a_person_stays_as_it_is(text: str) -> None:
    assert redact_text(text, OWNER) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("bound by /sys/fs/cgroup/user.slice/user-1000.slice", "bound by /sys/fs/cgroup/…"),
        (f"quota in /sys/fs/cgroup/system.slice/docker-{HEX}.scope", "quota in /sys/fs/cgroup/…"),
        ("LLAMA_ARG_MODEL=/home/anna/q/Qwen3.gguf", "LLAMA_ARG_MODEL=(path)/Qwen3.gguf"),
        ("nfs4 on annas-box:/export/x", "nfs4 on (host):(path)"),
        ("GPU-5f3c1a2b-1234-5678-9abc-def012345678", "GPU-(id)"),
        ("C:\\Users\\Anna\\x.gguf, D:/models", "(path)/x.gguf, (path)"),
        ("/dev/disk/by-id/nvme-X_S5GXNF0R123456", "/dev/disk/…"),
        ("Serial Number: 1234", "Serial Number: (serial)"),
    ],
)
def test_what_is_left_out_leaves_a_word_in_its_place(text: str, shown: str) -> None:
    assert redact_text(text, OWNER) == shown


def test_names_that_everything_is_full_of_are_no_secret() -> None:
    owner = Owner(hosts=("localhost", "7"), users=("root", "amd", "x"), homes=("/", "/root"))
    text = "AMD EPYC 9354, needs root, gen 7, x4"
    assert redact_text(text, owner) == text


def test_the_owner_is_found_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTNAME", "lab-7.example.org")
    monkeypatch.setenv("SUDO_USER", "greta")
    monkeypatch.setenv("HOME", "/srv/people/greta")
    owner = this_owner()
    assert {"lab-7", "lab-7.example.org"} <= set(owner.hosts)
    assert "greta" in owner.users and "/srv/people/greta" in owner.homes
    assert (
        redact_text("greta@lab-7 keeps lab-7 in /srv/people/greta/m")
        == "(user)@(host) keeps (host) in (path)"
    )


def test_a_saved_machine_is_idle_and_keeps_what_it_is() -> None:
    gpu = Gpu(
        name="X", pci_bus_id="0000:01:00.0", vram_total_bytes=8, vram_free_bytes=1, vram_others_bytes=7,
        processes=2, core_clock_mhz=300, throttle_reasons=("power",), power_limit_w=200, pcie_width_loaded=8,
    )  # fmt: skip
    memory = Memory(
        total_bytes=64, limit_bytes=32, available_bytes=9, usable_bytes=9, measured_bandwidth_bps=5
    )
    cpu = Cpu(quota_cores=4.0, usable_cores=4)
    machine = Machine(
        cpu=cpu,
        memory=memory,
        gpus=(gpu,),
        sources={"memory.available_bytes": "s", "memory.total_bytes": "t"},
    )
    kept = redact_machine(machine, OWNER)
    assert kept.cpu == cpu
    assert kept.memory == dataclasses.replace(memory, available_bytes=None, usable_bytes=None)
    assert kept.gpus[0] == Gpu(
        name="X", pci_bus_id="0000:01:00.0", vram_total_bytes=8, power_limit_w=200, pcie_width_loaded=8
    )
    assert kept.sources == {
        "memory.total_bytes": "t",
        "memory.available_bytes": "left out: it changes by itself",
    }
