"""What is wrong with the engine: missing, built for another machine, changed by the environment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qnext.doctor.case import Case
from qnext.doctor.values import EngineFacts, Finding
from qnext.hardware.machine import Gpu
from qnext.plan.problem import backend_of

_SPEED_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm", "sve")
"""Sets whose kernels are much faster than those without, the most telling ones."""


def engine_findings(case: Case) -> Iterator[Finding]:
    """Findings about the installed engine; none for a recorded machine."""
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
            fix=engine.rebuild.get("cpu", "pip install 'qnext[engine]'"),
            unpriced="nothing runs without it",
        )
    else:
        yield from _distribution(engine)
        yield from _gpus(case, engine)
        yield from _compiled(case, engine)
        yield from _layout(case, engine)
        yield from _mapped(case)
    yield from _variables(case)


def _distribution(engine: EngineFacts) -> Iterator[Finding]:
    if len(engine.claimants) > 1:
        yield Finding(
            id="engine-conflict",
            level="warning",
            about="engine.build",
            what=f"{' and '.join(engine.claimants)} are both installed under the name llama_cpp",
            because="each overwrites the other's files, so which engine runs is a matter of chance",
            fix=f"pip uninstall {' '.join(engine.claimants)}, then: "
            f"{engine.rebuild.get('cpu', 'install one of them')}",
            unpriced="it may run at full speed or not at all",
        )
    elif not engine.expected:
        yield Finding(
            id="engine-other",
            level="warning",
            about="engine.build",
            what=f"the engine is {engine.build}, qnext is tested with {engine.pinned_version}",
            because="plans, probes and crash advice rest on the memory and the logs of that version",
            fix=engine.rebuild.get("cpu", f"pip install llama-cpp-python=={engine.pinned_version}"),
            unpriced="not measured",
        )


def _gpus(case: Case, engine: EngineFacts) -> Iterator[Finding]:
    """GPUs that the engine has no backend for, by kind, and those it should drive but does not list."""
    idle = [gpu for gpu in case.machine.gpus if backend_of(gpu) not in engine.backends]
    for kind in dict.fromkeys(gpu.kind for gpu in idle):
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
                fix=engine.rebuild.get(kind or "", "Build the engine with the GPU's backend."),
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


def _priced_gpus(case: Case, gpus: list[Gpu], finding: Finding) -> Finding:
    """The finding with the price of leaving these GPUs idle, where their memory is known."""
    if not all(gpu.vram_total_bytes or case.machine.unified_memory for gpu in gpus):
        return replace(finding, unpriced="the GPU's memory is not known")
    backends = (*(case.here.backends or ()), *map(backend_of, gpus))
    numbered = tuple(
        replace(gpu, index=position) if gpu in gpus and gpu.index is None else gpu
        for position, gpu in enumerate(case.machine.gpus)
    )
    mended = replace(case.here, machine=replace(case.machine, gpus=numbered), backends=backends)
    return replace(finding, price=case.price(mended))


def _names(gpus: list[Gpu], kind: str | None) -> str:
    return " and ".join(dict.fromkeys(gpu.name or "a GPU" for gpu in gpus if gpu.kind == kind))


def _gpu_backends(engine: EngineFacts) -> list[str]:
    return [name for name in engine.backends if name not in ("cpu", "rpc", "blas")]


def _compiled(case: Case, engine: EngineFacts) -> Iterator[Finding]:
    sets, compiled = case.machine.cpu.instruction_sets, engine.compiled_sets
    needed = sorted(set(compiled or ()) - set(sets or compiled or ()))
    if needed or engine.dies_of_instruction:
        yield Finding(
            id="engine-crashes-here",
            level="error",
            about="engine.instructions",
            what=f"the engine needs {', '.join(needed) or 'instructions'} that this CPU lacks",
            because="it was built on or for another machine, and stops at the first such instruction",
            fix=engine.rebuild.get("cpu", "build the engine on this machine"),
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
            fix=engine.rebuild.get("cpu", "build the engine on this machine"),
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
        because="mapped experts are not in pinned memory, so copies to the GPU are slower, and repacked ones "
        "are in RAM twice",
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
