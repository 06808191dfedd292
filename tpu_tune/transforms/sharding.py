"""`shard(params, rules, mesh)`: where each leaf's axes live on the mesh; the first matching rule wins.

One mesh `data, fsdp, tensor, sequence`. The batch is split over (data, fsdp), tokens over sequence, weights over
(fsdp, sequence) and tensor. A rule names the mesh axes of a matrix's (in, out); what does not divide is moved or left
whole, with a message, so that no model fails for its sizes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from tpu_tune.errors import UserError
from tpu_tune.tensors import QuantizedTensor

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor", "sequence")
STORED = ("fsdp", "sequence")  # the axes that share out storage; training gathers over them
Axes = tuple[str, ...]
Rule = tuple[str, tuple[Axes, ...]]  # regex on the path -> mesh axes of each of the leaf's own (unstacked) axes

# Modules whose input is what another one's output was cut into, by every family's names for them.
_ROW_PARALLEL = r"(o_proj|out_proj|c_proj|Attention\.o|dense|down_proj|dense_4h_to_h|fc_out|fc2|wo)"
_EMBEDDING = r"(embed\w*|wte|wpe|shared)"
RULES: tuple[Rule, ...] = (
    (r"(norm|layernorm|layer_norm|ln_\w+)\.(weight|bias)$|\.bias$|lora_magnitude_vector$|trainable_tokens_delta$", ()),
    (r"relative_attention_bias\.", ()),
    (rf"{_ROW_PARALLEL}\.weight$", (("tensor",), STORED)),
    (rf"{_ROW_PARALLEL}\.lora_A$", (("tensor",), ())),
    (rf"{_ROW_PARALLEL}\.lora_B$", ((), STORED)),
    (rf"{_EMBEDDING}\.weight$", (("tensor",), STORED)),
    (rf"{_EMBEDDING}\.lora_A$", (("tensor",), ())),
    (rf"{_EMBEDDING}\.lora_B$", ((), STORED)),
    (r"\.weight$", (STORED, ("tensor",))),  # column parallel
    (r"\.lora_A$", (STORED, ())),
    (r"\.lora_B$", ((), ("tensor",))),
)


def mesh_sizes(sizes: Mapping[str, int] | ConfigDict, count: int) -> dict[str, int]:
    """Return the size of every axis of the mesh that `config.mesh` describes over so many devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    shape = [int(sizes[axis]) for axis in AXES]
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and count % known == 0:
        shape[shape.index(-1)] = count // known
    if any(size < 1 for size in shape) or math.prod(shape) != count:
        told = ", ".join(f"mesh.{axis}={sizes[axis]}" for axis in AXES)
        raise UserError(f"{told} does not make {count} devices; set one of them to -1")
    return dict(zip(AXES, shape, strict=True))


def make_mesh(sizes: Mapping[str, int] | ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh that `config.mesh` describes over the given (default: all) devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    return Mesh(np.asarray(devices).reshape(list(mesh_sizes(sizes, len(devices)).values())), AXES)


def batch_spec(leading: int = 0) -> PartitionSpec:
    """Return the sharding of (leading..., rows, tokens) arrays."""
    return PartitionSpec(*[None] * leading, ("data", "fsdp"), "sequence")


def rows_here(mesh: Mesh, rows: int) -> np.ndarray:
    """Return which of a batch's rows live on this process's devices, (rows,) bool."""
    mine = np.zeros(rows, bool)
    home = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    for index in home.addressable_devices_indices_map((rows,)).values():
        mine[index] = True
    return mine


def leaf_sharding(
    path: str,
    leaf: Any,
    mesh: Mesh,
    stacked: bool,
    rules: Sequence[Rule] = RULES,
    units: Mapping[str, int] | None = None,
) -> Any:
    """Return the sharding of a leaf: a NamedSharding, or for a `QuantizedTensor` a tree of them in its shape.

    Args:
      path: in the tree.
      leaf: the leaf, or anything of its shape.
      mesh: from `make_mesh`.
      stacked: whether axis 0 is the layers; it is never sharded.
      rules: the first whose regex is found in the path wins.
      units: path -> smallest piece of `out` that may be cut (a fused projection's heads).
    """
    if not isinstance(leaf, QuantizedTensor):
        shape = leaf.shape[1:] if stacked else leaf.shape
        unit = (units or {}).get(path, 1)
        spec = _fit(path, shape, [1] * (len(shape) - 1) + [unit], _wanted(path, rules), mesh)
        return NamedSharding(mesh, PartitionSpec(*([None] if stacked else []), *spec))
    whole = math.lcm(leaf.group_size, leaf.pack_block)
    unit = (units or {}).get(path, 1)
    inner, outer = _fit(path, leaf.shape, [whole, unit], _wanted(path, rules), mesh)

    def sharding(*spec: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*([None] if stacked else []), *spec))

    return dataclasses.replace(
        leaf,
        codes=sharding(inner, outer),
        scales=sharding(inner, outer),
        scale_max=None if leaf.scale_max is None else sharding(None, outer),
    )


def shardings(
    tree: Mapping[str, Any],
    mesh: Mesh,
    stacked: frozenset[str],
    rules: Sequence[Rule] = RULES,
    units: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return path -> sharding for a whole tree; `stacked` holds the paths whose axis 0 is the layers."""
    return {path: leaf_sharding(path, leaf, mesh, path in stacked, rules, units) for path, leaf in tree.items()}


def explain(tree: Mapping[str, Any], found: Mapping[str, Any], rules: Sequence[Rule] = RULES) -> list[str]:
    """Return one line a leaf: its path, its shape, the rule that matched, and the sharding that it got."""
    lines = []
    for path, leaf in tree.items():
        rule = next((pattern for pattern, _ in rules if re.search(pattern, path)), "(none: replicated)")
        sharding = found[path].codes if isinstance(leaf, QuantizedTensor) else found[path]
        shape = leaf.codes.shape if isinstance(leaf, QuantizedTensor) else leaf.shape
        lines.append(f"{path}  {tuple(shape)}  {rule}  {tuple(sharding.spec)}")
    return lines


def gathered(sharding: Any) -> Any:
    """Return the sharding of one layer of a stacked leaf without the storage axes: how its products want it."""
    return jax.tree.map(
        lambda one: NamedSharding(one.mesh, PartitionSpec(*[_without(axes) for axes in one.spec[1:]])),
        sharding,
        is_leaf=lambda leaf: isinstance(leaf, NamedSharding),
    )


def _without(axes: Any) -> Any:
    kept = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis not in STORED)
    return kept[0] if len(kept) == 1 else (kept or None)


def _wanted(path: str, rules: Sequence[Rule]) -> tuple[Axes, ...]:
    return next((axes for pattern, axes in rules if re.search(pattern, path)), ())


def _fit(path: str, shape: Sequence[int], units: Sequence[int], wanted: Sequence[Axes], mesh: Mesh) -> list[Any]:
    """Give each axis of a leaf those mesh axes that cut it into whole units; the others move to the other axis."""
    given: list[list[str]] = [[] for _ in shape]

    def fits(axis: int, name: str) -> bool:
        pieces = math.prod(mesh.shape[other] for other in [*given[axis], name])
        return shape[axis] % (pieces * units[axis]) == 0

    for axis, names in enumerate(wanted[: len(shape)]):
        for name in names:
            if mesh.shape[name] == 1:
                continue
            choices = [axis] + [other for other in range(len(shape)) if other != axis and len(shape) == 2]
            place = next((choice for choice in choices if fits(choice, name)), None)
            if place is None:
                log.info(
                    "%s: %s does not divide over mesh axis '%s' (%d); replicated",
                    path,
                    tuple(shape),
                    name,
                    mesh.shape[name],
                )
            else:
                if place != axis:
                    log.info(
                        "%s: axis %d of %s moved to axis %d for mesh axis '%s'", path, axis, tuple(shape), place, name
                    )
                given[place].append(name)
    # The storage axes come last: gathering over them then leaves each device its own contiguous piece of `tensor`.
    given = [sorted(names, key=lambda name: name in STORED) for names in given]
    return [tuple(names) if len(names) > 1 else (names[0] if names else None) for names in given]
