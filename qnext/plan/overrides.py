"""Tensor overrides: which of the user's can be honoured, and those that lay experts out for wider kernels.

CPU_REPACK takes only tensors of certain types and shapes; anything else in there crashes the engine, so both
kinds are checked tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from qnext.errors import UsageError
from qnext.models.header import ModelHeader
from qnext.models.shape import is_expert, layer_of
from qnext.plan.traits import DeviceTraits, extra_buffer_accepts
from qnext.plan.values import CPU_REPACK, HOST, Override


def checked_overrides(
    header: ModelHeader, rules: tuple[Override, ...], traits: Mapping[str, DeviceTraits]
) -> tuple[Override, ...]:
    """The user's rules with device names (`RPC0`) replaced by those of buffer types.

    `traits` are the host and the devices in use. Raises UsageError for a buffer type that none of them has,
    for a pattern that is no regular expression, and for a tensor that CPU_REPACK cannot hold.
    """
    buffers = {HOST: HOST, CPU_REPACK: CPU_REPACK}
    for device in traits.values():
        buffers[device.name] = buffers[device.buffer_type] = device.buffer_type
        if device.host_buffer:
            buffers[device.host_buffer] = device.host_buffer
    checked: list[Override] = []
    for rule in rules:
        if rule.buffer not in buffers:
            raise UsageError(
                f"-ot {rule.pattern}={rule.buffer}: there is no buffer type '{rule.buffer}' here",
                hint=f"Choose one of: {', '.join(sorted(set(buffers.values())))}.",
            )
        checked.append(replace(rule, buffer=buffers[rule.buffer]))
    if any(rule.buffer == CPU_REPACK for rule in checked):
        _require_repackable(header, checked, traits[HOST])
    return tuple(checked)


def repack_overrides(header: ModelHeader, host: DeviceTraits) -> tuple[Override, ...]:
    """Overrides that put each routed-expert tensor into CPU_REPACK whose type and shape it supports.

    Layers are listed by kind of tensor, because quants give some layers another type.
    """
    layers_of: dict[str, list[int]] = {}
    for tensor in header.tensors:
        layer = layer_of(tensor.name)
        if layer is None or not is_expert(tensor.name) or not tensor.name.endswith(".weight"):
            continue
        if extra_buffer_accepts(CPU_REPACK, tensor, True, host.features):
            layers_of.setdefault(tensor.name.split(".")[2], []).append(layer)
    kinds_of: dict[tuple[int, ...], list[str]] = {}
    for kind, layers in layers_of.items():
        kinds_of.setdefault(tuple(sorted(layers)), []).append(kind)
    return tuple(
        Override(rf"blk\.({'|'.join(map(str, layers))})\.({'|'.join(kinds)})\.weight", CPU_REPACK)
        for layers, kinds in kinds_of.items()
    )


def _require_repackable(header: ModelHeader, rules: list[Override], host: DeviceTraits) -> None:
    try:
        compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    except re.error as error:
        raise UsageError(
            f"an override is not a regular expression: {error}",
            hint="Write -ot PATTERN=BUFFER, for example -ot 'exps=CPU'.",
        ) from error
    for tensor in header.tensors:
        rule = next((rule for pattern, rule in compiled if pattern.search(tensor.name)), None)
        if rule is None or rule.buffer != CPU_REPACK:
            continue
        if not extra_buffer_accepts(CPU_REPACK, tensor, is_expert(tensor.name), host.features):
            raise UsageError(
                f"-ot {rule.pattern}={CPU_REPACK}: {tensor.name} ({tensor.type_name}) cannot be repacked on "
                "this CPU, and the engine would crash",
                hint="Narrow the pattern, or use --repack experts, which picks those that can.",
            )
