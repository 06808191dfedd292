"""Attention on a mesh: every device runs a kernel on its own rows, heads and tokens."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

ROWS = ("data", "fsdp")
SEQUENCE = "sequence"


def on_each_device(
    local: Callable[..., Array], mesh: Mesh | None, heads: int, groups: int, first: PartitionSpec | None = None
) -> Callable[..., Array]:
    """Return the function (q, k, v, index or segments (B, T)...) -> out that runs `local` on each device's part.

    Args:
      local: function of one device's part of the same arguments; collectives may use the mesh's axes.
      mesh: the devices over which rows, heads and tokens are cut; None on one device. Heads stay whole where they do
        not divide.
      heads, groups: number of query heads, and of key heads.
      first: specs of another argument before all others; None without one.
    """
    if mesh is None or mesh.size == 1:
        return local
    tensor = mesh.shape["tensor"]
    cut = "tensor" if heads % tensor == 0 and groups % tensor == 0 else None
    states, tokens = PartitionSpec(ROWS, SEQUENCE, cut, None), PartitionSpec(ROWS, SEQUENCE)

    def run(*arguments: Array) -> Array:
        ahead = () if first is None else (first,)
        specs = (*ahead, states, states, states, *[tokens] * (len(arguments) - 3 - len(ahead)))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=states, check_vma=False)(*arguments)

    return run
