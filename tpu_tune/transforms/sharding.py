"""Where each leaf's axes live on the mesh: logical axes, as a `Module` names them, go to mesh axes by `RULES`.

One mesh `data, fsdp, tensor, sequence`. The batch is split over (data, fsdp), tokens over sequence, weights over
(fsdp, sequence) and tensor. What does not divide is moved to the other axis of its matrix or left whole, with a
message, so that no model fails for its sizes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from tpu_tune.errors import UserError
from tpu_tune.tensors import LeafSpec

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor", "sequence")
STORED = ("fsdp", "sequence")  # the axes that share out storage; training gathers over them

# Megatron's layout (arXiv:1909.08053): what a column-parallel product's output is cut into, the row-parallel one reads.
RULES: dict[str, tuple[str, ...]] = {  # logical axis of a leaf (`LeafSpec.axes`) -> mesh axes
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "embed": STORED,
}


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
        settings = ", ".join(f"mesh.{axis}={sizes[axis]}" for axis in AXES)
        raise UserError(f"{settings} does not make {count} devices; set one of them to -1")
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


def document_spec(leading: int = 0) -> PartitionSpec:
    """Return the sharding of (leading..., rows, documents) arrays, which are split over rows alone."""
    return PartitionSpec(*[None] * leading, ("data", "fsdp"))


def rows_here(mesh: Mesh, rows: int) -> np.ndarray:
    """Return which of a batch's rows live on this process's devices, (rows,) bool."""
    local = np.zeros(rows, bool)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    for index in sharding.addressable_devices_indices_map((rows,)).values():
        local[index] = True
    return local


def leaf_sharding(path: str, leaf: Any, spec: LeafSpec, mesh: Mesh) -> Any:
    """Return the sharding of a leaf: a NamedSharding, or for a stored format a tree of them in its shape.

    Args:
      path: the leaf's path in the tree, for messages.
      leaf: the leaf, or anything of its shape.
      spec: the leaf's facts. The axes of layers and experts are never cut: a device that held some experts only would
        have to send tokens to the others, as many as come, where none may be dropped.
      mesh: the mesh that `make_mesh` returned.
    """
    mesh_axes = [RULES.get(axis, ()) for axis in spec.axes]
    stack = [None] * spec.leading
    if not hasattr(leaf, "map_parts"):
        shape = leaf.shape[len(stack) :]
        cut = _fit(path, shape, [1] * (len(shape) - 1) + [spec.unit], mesh_axes, mesh)
        return NamedSharding(mesh, PartitionSpec(*stack, *cut))
    inner, outer = _fit(path, leaf.shape, [leaf.row_unit, spec.unit], mesh_axes, mesh)
    return leaf.map_parts(
        lambda has_rows: NamedSharding(mesh, PartitionSpec(*stack, inner if has_rows else None, outer))
    )


def shardings(tree: Mapping[str, Any], specs: Mapping[str, LeafSpec], mesh: Mesh) -> dict[str, Any]:
    """Return path -> sharding for a whole tree, given the facts of its leaves."""
    return {path: leaf_sharding(path, leaf, specs[path], mesh) for path, leaf in tree.items()}


def gathered(sharding: Any) -> Any:
    """Return the sharding of one layer of a stacked leaf without the storage axes: how its products want it."""
    return jax.tree.map(
        lambda leaf: NamedSharding(leaf.mesh, PartitionSpec(*[_without(axes) for axes in leaf.spec[1:]])),
        sharding,
        is_leaf=lambda leaf: isinstance(leaf, NamedSharding),
    )


def _without(axes: Any) -> Any:
    remaining = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis not in STORED)
    return remaining[0] if len(remaining) == 1 else (remaining or None)


def _fit(
    path: str, shape: Sequence[int], units: Sequence[int], mesh_axes: Sequence[tuple[str, ...]], mesh: Mesh
) -> list[Any]:
    """Give each axis of a leaf those mesh axes that cut it into whole units; the others move to the other axis."""
    assigned: list[list[str]] = [[] for _ in shape]

    def fits(axis: int, name: str) -> bool:
        pieces = math.prod(mesh.shape[other] for other in [*assigned[axis], name])
        return shape[axis] % (pieces * units[axis]) == 0

    for axis, names in enumerate(mesh_axes[: len(shape)]):
        for name in names:
            if mesh.shape[name] == 1:
                continue
            choices = [axis] + [other for other in range(len(shape)) if other != axis and len(shape) == 2]
            chosen = next((choice for choice in choices if fits(choice, name)), None)
            if chosen is None:
                log.info(
                    "%s: %s does not divide over mesh axis '%s' (%d); replicated",
                    path,
                    tuple(shape),
                    name,
                    mesh.shape[name],
                )
            else:
                if chosen != axis:
                    log.info(
                        "%s: axis %d of %s moved to axis %d for mesh axis '%s'", path, axis, tuple(shape), chosen, name
                    )
                assigned[chosen].append(name)
    # The storage axes come last: gathering over them then leaves each device its own contiguous piece of `tensor`.
    assigned = [sorted(names, key=lambda name: name in STORED) for names in assigned]
    return [tuple(names) if len(names) > 1 else (names[0] if names else None) for names in assigned]
