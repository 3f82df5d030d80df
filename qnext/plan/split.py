"""Deals layers to several devices: what each layer costs where it goes, and how many each device takes.

llama.cpp cuts the layers that `-ngl` moves, the output layer last, into one run per device, in the devices'
order and in proportion to the tensor split. A split of whole numbers that add up to the layers moved says
exactly how many each gets (`llama_model_base::load_tensors`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from qnext.models.header import ModelHeader
from qnext.models.shape import ModelShape, layer_of
from qnext.plan.cache import kv_bytes, recurrent_bytes
from qnext.plan.identity import Same
from qnext.plan.traits import DeviceTraits
from qnext.plan.values import HOST, Placement
from qnext.plan.weights import PlacedTensor, assign_buffers


def layer_costs(
    header: ModelHeader, shape: ModelShape, placement: Placement, traits: Mapping[str, DeviceTraits]
) -> list[int]:
    """Bytes on its device of each layer that moves off the host, in order, last the output layer.

    Weights after all overrides, cache and recurrent state, with the padding of the first device. Layers of
    multi-token prediction that are not loaded cost nothing but count as layers.
    """
    first_device = traits[placement.devices[0]]
    single = replace(placement, devices=(first_device.name,), tensor_split=None)
    n_all = shape.n_layer_all
    placed = assign_buffers(header, shape, single, traits[HOST], [first_device])
    costs = list(_weight_costs(Same(placed), first_device, n_all))
    if placement.kv_offload:
        names = [str(layer) for layer in range(n_all + 1)]
        by_layer = dict.fromkeys(names, first_device)
        for state in (kv_bytes, recurrent_bytes):
            for name, size in state(shape, placement, names, by_layer).items():
                costs[int(name)] += size
    return costs[max(n_all + 1 - placement.n_gpu_layers, 0) :]


@lru_cache(maxsize=16)
def _weight_costs(
    placed: Same[tuple[PlacedTensor, ...]], device: DeviceTraits, n_layers: int
) -> Sequence[int]:
    """Bytes of weights on `device` of each layer, last of the output layer."""
    costs = [0] * (n_layers + 1)
    for item in placed.value:
        if item.buffer == device.buffer_type:
            tensor = item.tensor
            layer = layer_of(tensor.name)
            cost = device.alloc_bytes(tensor.shape, tensor.type_name, tensor.nbytes)
            costs[n_layers if layer is None else layer] += cost
    return costs


def deal_layers(costs: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """Number of layers for each device: each takes what fits, in order, the last one all that is left.

    Filling early devices first is never worse: whatever a later device must hold only gets less.
    """
    counts, position = [], 0
    for index, room in enumerate(rooms):
        count, left = 0, room
        last = index == len(rooms) - 1
        while position < len(costs) and (last or left >= costs[position]):
            left -= costs[position]
            position += 1
            count += 1
        counts.append(count)
    return counts
