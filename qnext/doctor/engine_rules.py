"""What is wrong with the engine: missing, built for another machine, changed by the environment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qnext.doctor.case import Case
from qnext.doctor.values import EngineFacts, Finding, Price
from qnext.hardware.machine import Gpu, has_integrated_gpu
from qnext.plan.problem import backend_of

_SPEED_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm", "sve")
"""Sets whose kernels are much faster than those without, the most telling ones."""


def engine_findings(case: Case) -> Iterator[Finding]:
    """Findings about the installed engine, which a recorded machine has none of, and about its settings."""
    yield from _mapped(case)
    engine = case.engine
    if engine is None:
        return
    if engine.build is None:
        yield Finding(
            id="engine-missing",
            level="error",
            about="engine.build",
            what="llama-cpp-python is not installed",
            because="without it nothing can be run, only planned",
            fix=engine.rebuild,
            unpriced="nothing runs without it",
        )
    else:
        yield from _distribution(engine)
        yield from _gpus(case, engine)
        yield from _integrated(case, engine)
        yield from _compiled(case, engine)
        yield from _layout(case, engine)
    yield from _variables(case)


def _distribution(engine: EngineFacts) -> Iterator[Finding]:
    if len(engine.claimants) > 1:
        yield Finding(
            id="engine-conflict",
            level="warning",
            about="engine.build",
            what=f"{' and '.join(engine.claimants)} are both installed under the name llama_cpp",
            because="each overwrites the other's files, so which engine runs is a matter of chance",
            fix=f"pip uninstall {' '.join(engine.claimants)}, then: {engine.rebuild}",
            unpriced="it may run at full speed or not at all",
        )
    elif not engine.expected:
        yield Finding(
            id="engine-other",
            level="warning",
            about="engine.build",
            what=f"the engine is {engine.build}, qnext is tested with {engine.pinned_version}",
            because="plans, probes and crash advice rest on the memory and the logs of that version",
            fix=engine.rebuild,
            unpriced="not measured",
        )


def _gpus(case: Case, engine: EngineFacts) -> Iterator[Finding]:
    """GPUs that the engine has no backend for, by kind, and those it should drive but does not list."""
    idle = [gpu for gpu in case.machine.gpus if backend_of(gpu) not in engine.backends]
    for kind in dict.fromkeys(gpu.kind for gpu in idle):
        if _is_no_gain(case, [gpu for gpu in idle if gpu.kind == kind]):
            continue
        only = f"for {', '.join(_gpu_backends(engine))}" if _gpu_backends(engine) else "CPU-only"
        yield _priced_gpus(
            case,
            [gpu for gpu in idle if gpu.kind == kind],
            Finding(
                id="engine-without-gpu",
                level="warning",
                about="engine.backends",
                what=f"{_names(idle, kind)} is here, but this engine is built {only}",
                because=f"it has no {kind or 'matching'} backend, so the GPU stays idle",
                fix=engine.rebuild,
            ),
        )
    unseen = [gpu for gpu in case.machine.gpus if gpu not in idle and gpu.index is None]
    for kind in dict.fromkeys(gpu.kind for gpu in unseen):
        yield _priced_gpus(
            case,
            [gpu for gpu in unseen if gpu.kind == kind],
            Finding(
                id="engine-does-not-see-gpu",
                level="warning",
                about="engine.backends",
                what=f"{_names(unseen, kind)} is here, but the engine does not list it",
                because=f"it has the {kind} backend; the driver, rights on /dev/dri or a variable that hides "
                "devices is in the way",
                fix="Install or update the GPU's driver, and look at HIP_VISIBLE_DEVICES and its like.",
            ),
        )


def _is_no_gain(case: Case, gpus: list[Gpu]) -> bool:
    """Whether the model runs no faster with these GPUs: some old cards are slower than the CPU."""
    price = _price_of(case, gpus)
    return price is not None and price.decode.now is not None and price.worst >= 0


def _priced_gpus(case: Case, gpus: list[Gpu], finding: Finding) -> Finding:
    """The finding with the price of leaving these GPUs idle, where their memory is known."""
    price = _price_of(case, gpus)
    return replace(finding, price=price, unpriced="" if price else "the GPU's memory is not known")


def _price_of(case: Case, gpus: list[Gpu]) -> Price | None:
    if not all(gpu.vram_total_bytes or case.machine.unified_memory for gpu in gpus):
        return None
    backends = (*(case.here.backends or ()), *map(backend_of, gpus))
    numbered = tuple(
        replace(gpu, index=position) if gpu in gpus and gpu.index is None else gpu
        for position, gpu in enumerate(case.machine.gpus)
    )
    return case.price(replace(case.here, machine=replace(case.machine, gpus=numbered), backends=backends))


def _names(gpus: list[Gpu], kind: str | None) -> str:
    return " and ".join(dict.fromkeys(gpu.name or "a GPU" for gpu in gpus if gpu.kind == kind))


def _integrated(case: Case, engine: EngineFacts) -> Iterator[Finding]:
    if case.machine.gpus or not has_integrated_gpu(case.machine) or _gpu_backends(engine):
        return
    yield Finding(
        id="integrated-gpu-idle",
        level="info",
        about="engine.backends",
        what="the GPU in the processor is not used: this engine is built CPU-only",
        because="it shares the RAM; large ones (Strix Halo) prefill several times faster than their CPU",
        fix=engine.rebuild,
        unpriced="how much memory it may take is known only to an engine built with Vulkan",
    )


def _gpu_backends(engine: EngineFacts) -> list[str]:
    return [name for name in engine.backends if name not in ("cpu", "rpc", "blas")]


def _compiled(case: Case, engine: EngineFacts) -> Iterator[Finding]:
    sets, compiled = case.machine.cpu.instruction_sets, engine.compiled_sets
    # Only Linux on x86 states every set that the engine may have been built with.
    complete = case.machine.arch == "x86_64" and case.machine.os in (None, "linux") and sets is not None
    needed = sorted(set(compiled or ()) - set(sets or ())) if complete else []
    if needed or engine.dies_of_instruction:
        yield Finding(
            id="engine-crashes-here",
            level="error",
            about="engine.instructions",
            what=f"the engine needs {', '.join(needed) or 'instructions'} that this CPU lacks",
            because="it was built on or for another machine, and stops at the first such instruction",
            fix=engine.rebuild,
            unpriced="it does not run at all",
        )
    if sets is None or compiled is None:
        return
    lacking = [name for name in _SPEED_SETS if name in sets and name not in compiled]
    if lacking:
        yield Finding(
            id="engine-for-another-cpu",
            level="warning",
            about="engine.instructions",
            what=f"the engine does not use this CPU's {', '.join(lacking)}",
            because="it was built for an older or a generic CPU",
            fix=engine.rebuild,
            price=case.price(replace(case.here, compiled_sets=None)),
        )


def _layout(case: Case, engine: EngineFacts) -> Iterator[Finding]:
    has_amx = "amx_int8" in (case.machine.cpu.instruction_sets or ())
    if engine.safe_layout in (None, "full") and not (has_amx and engine.safe_layout is None):
        return
    tried = engine.safe_layout is not None
    yield Finding(
        id="amx-crash",
        level="info",
        about="engine.layout",
        what="llama.cpp crashes here with its usual weight layout" if tried else "AMX layouts may crash here",
        because="its AMX buffers crash on such CPUs while a prompt is read"
        if has_amx
        else "the probe with every matrix repacked crashed",
        fix="Nothing to do: qnext runs the fastest layout that passed. Started by hand, use --no-repack.",
        unpriced="the crashing layout cannot be measured",
    )


def _mapped(case: Case) -> Iterator[Finding]:
    wishes = case.here.wishes
    placement = case.now.placed.placement
    if not wishes.load_mode.startswith("mmap") or not (placement.overrides or placement.cpu_expert_layers):
        return
    yield Finding(
        id="mmap-with-overrides",
        level="warning",
        about="engine.layout",
        what="the file is mapped while experts are placed by hand",
        because="mapped experts are not in pinned memory, so copies to the GPU are slower"
        if placement.devices
        else "repacked experts are then in RAM twice: in the mapped file and in their own buffer",
        fix="Use --load-mode none, qnext's default (llama-server: --no-mmap).",
        price=case.price(replace(case.here, wishes=replace(wishes, load_mode="none"))),
    )


def _variables(case: Case) -> Iterator[Finding]:
    for variable in case.variables:
        yield Finding(
            id="environment-variable",
            level="warning" if variable.reaches_engine else "info",
            about="engine.variables",
            what=f"{variable.name} is set",
            because=variable.effect,
            fix=f"unset {variable.name}, unless it is meant.",
            unpriced="it depends on its value",
        )
