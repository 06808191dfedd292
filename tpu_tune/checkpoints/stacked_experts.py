"""Files that hold a layer's experts otherwise than the family's own: as transformers 5 has them in memory.

`save_pretrained` writes every expert's matrices under the family's names, but a state dict that was saved as it is has
`experts.gate_up_proj` (experts, 2 x width, hidden), each expert's gate before its up, and `experts.down_proj` (experts,
hidden, width). Such tensors are read part by part under the family's names, and written whole again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError
from tpu_tune.models import Architecture, architecture

_BLOCKS = ("mlp", "block_sparse_moe")  # what transformers calls a layer's sparse MLP


def with_experts_apart(source: WeightSource) -> WeightSource:
    """Return a source that names the parts of such tensors as the family does; the same where there are none."""
    try:
        arch = architecture(source.config)
    except UserError:  # whoever needs the architecture says what is wrong with it
        return source
    parts = {whole: names for whole, names in _parts(arch).items() if whole in source.shapes}
    parts = {whole: names for whole, names in parts.items() if not any(name in source.shapes for name in names)}
    if not parts:
        return source
    places, shapes = {}, {name: shape for name, shape in source.shapes.items() if name not in parts}
    for whole, names in parts.items():
        shape = source.shapes[whole]
        places |= {name: (whole, number, len(names)) for number, name in enumerate(names)}
        matrix = shape if len(names) == 1 else (int(np.prod(shape[:-1])) // len(names), shape[-1])
        shapes |= dict.fromkeys(names, matrix)
    last: dict[str, Any] = {}  # the tensor read last: its parts are asked for one after the other

    def read(name: str) -> Any:
        if name not in places:
            return source.read(name)
        whole, number, count = places[name]
        if whole not in last:
            last.clear()
            last[whole] = source.read(whole)
        value = last[whole]
        return value if count == 1 else value.reshape(count, -1, value.shape[-1])[number]

    return dataclasses.replace(
        source, shapes=shapes, read=read, parts={whole: (source.shapes[whole], names) for whole, names in parts.items()}
    )


def as_in_files(tensors: Iterable[tuple[str, np.ndarray]], source: WeightSource) -> Iterator[tuple[str, np.ndarray]]:
    """Yield tensors as the source's files have them: the parts of one tensor together, when the last has come."""
    whole_of = {name: whole for whole, (_, names) in source.parts.items() for name in names}
    waiting: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors:
        if name not in whole_of:
            yield name, value
            continue
        whole = whole_of[name]
        shape, names = source.parts[whole]
        waiting.setdefault(whole, {})[name] = value
        if len(waiting[whole]) == len(names):
            values = waiting.pop(whole)
            yield whole, np.concatenate([values[part] for part in names]).reshape(shape)


def _parts(arch: Architecture) -> Mapping[str, tuple[str, ...]]:
    """Return a tensor's name in memory -> the names of its parts in the family's files, in their order."""
    parts: dict[str, tuple[str, ...]] = {}
    for layer, kind in enumerate(arch.layer_kinds):
        experts, names = kind.experts, kind.names
        if experts is None or experts.alternating:  # whose files are what transformers has in memory
            continue
        both = [names.expert_gate_up] if names.expert_gate_up else [names.expert_gate, names.expert_up]
        for block in _BLOCKS:
            for prefix in (arch.names.layers, arch.names.layers.removeprefix("model.")):
                there, here = f"{prefix}.{layer}.{block}", f"{arch.names.layers}.{layer}"
                parts |= {
                    f"{there}.experts.gate_up_proj": _of_experts(here, experts, both),
                    f"{there}.experts.down_proj": _of_experts(here, experts, [names.expert_down]),
                    f"{there}.gate.weight": (f"{here}.{names.router}.weight",),
                    f"{there}.router.weight": (f"{here}.{names.router}.weight",),
                }
    return {whole: names for whole, names in parts.items() if names != (whole,)}


def _of_experts(layer: str, experts: Any, names: list[str]) -> tuple[str, ...]:
    if not experts.path:
        return tuple(f"{layer}.{name}.weight" for name in names)
    return tuple(
        f"{layer}.{experts.path}.{expert}{name.removeprefix(experts.path)}.weight"
        for expert in range(experts.count)
        for name in names
    )
