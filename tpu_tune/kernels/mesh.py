"""Attention on a mesh: every device runs a kernel on its own rows, heads and tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

ROWS = ("data", "fsdp")
SEQUENCE = "sequence"


def on_each_device(
    local: Callable[..., Any], mesh: Mesh | None, heads: int, groups: int, first: tuple[Any, ...] = ()
) -> Callable[..., Any]:
    """Return the function (q, k, v, index or segments (B, T)...) -> out that runs `local` on each device's part.

    Args:
      local: function of one device's part of the same arguments; collectives may use the mesh's axes. It may return
        several arrays, all (B, T, H, ...).
      mesh: the devices over which rows, heads and tokens are cut; None on one device. Heads stay whole where they do
        not divide.
      heads, groups: number of query heads, and of key heads.
      first: specs of further arguments before all others.
    """
    if mesh is None or mesh.size == 1:
        return local
    cut = cut_heads(mesh, heads, groups)
    states, tokens = PartitionSpec(ROWS, SEQUENCE, cut, None), PartitionSpec(ROWS, SEQUENCE)

    def run(*arguments: Any) -> Any:
        specs = (*first, states, states, states, *[tokens] * (len(arguments) - 3 - len(first)))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=states, check_vma=False)(*arguments)

    return run


def cut_heads(mesh: Mesh, heads: int, groups: int) -> str | None:
    """Return the mesh axis over which so many query and key heads are cut; None where they do not divide."""
    tensor = mesh.shape["tensor"]
    return "tensor" if heads % tensor == 0 and groups % tensor == 0 else None
