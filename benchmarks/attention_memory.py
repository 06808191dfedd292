"""Scratch of attention, forward and backward, as the devices' own compilers say, as Markdown tables.

    python benchmarks/attention_memory.py            # all that is installed: pip install -e ".[test]" brings libtpu,
    python benchmarks/attention_memory.py v2-8       # pip install -e ".[cuda13]" the GPUs' compiler; needs no device

One row of bfloat16 with 32 heads of 128 (LLaMA-7B's), causal, with segments; cudnn without, as it takes none. On eight
devices the row is cut over them, and the heads are 64 (LLaMA-65B's). Compiled, not run. What cuDNN itself asks for when
it runs is not in the figures.
"""

from __future__ import annotations

import sys

from absent_devices import devices_of  # first: it sets what jax reads when it is imported

# isort: split
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from tpu_tune.kernels.attention import attention
from tpu_tune.kernels.blockwise import blockwise
from tpu_tune.kernels.layout import TokenLayout
from tpu_tune.planning.devices import find_device
from tpu_tune.transforms.sharding import batch_spec, make_mesh

SIZE = 128
LENGTHS = (2048, 8192, 32768)
TABLES = {  # device -> implementations
    "v5e-1": ("reference", "blockwise", "splash"),
    "h100": ("reference", "blockwise", "pallas", "cudnn"),
    "rtx3090": ("reference", "blockwise", "pallas", "cudnn"),
    "v2-8": ("partitioner", "ring"),
    "v5e-8": ("partitioner", "ring", "splash"),
}
LARGEST_REFERENCE = 2048  # tokens; all scores of more fit no device


def scratch(name: str, implementation: str, tokens: int, heads: int, groups: int) -> int:
    """Return bytes of scratch a device of one implementation, forward and backward.

    Args:
      name: of the device.
      implementation: as in `attention`; `ring` is blockwise attention there, `partitioner` the same left to XLA.
      tokens: of the row.
      heads, groups: of queries and of keys.

    Raises:
      RuntimeError: there is no compiler for the device.
    """
    devices = devices_of(name)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "sequence": len(devices)}, devices)

    def shape(*tail: int, dtype: object = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        home = NamedSharding(mesh, PartitionSpec(*batch_spec(), *[None] * len(tail)))
        return jax.ShapeDtypeStruct((1, tokens, *tail), dtype, sharding=home)

    def summed(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        index = jnp.arange(tokens)[None]
        layout = TokenLayout(index, index, segments, segments, packed=implementation != "cudnn")
        if implementation == "partitioner":
            return blockwise(q, k, v, layout, None, SIZE**-0.5).astype(jnp.float32).sum()
        used = "blockwise" if implementation == "ring" else implementation
        return attention(q, k, v, layout, implementation=used, mesh=mesh).astype(jnp.float32).sum()

    step = jax.jit(jax.grad(summed, argnums=(0, 1, 2)))
    arguments = shape(heads, SIZE), shape(groups, SIZE), shape(groups, SIZE), shape(dtype=jnp.int32)
    return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    """Print the tables."""
    for name in sys.argv[1:] or TABLES:
        heads = 32 if find_device(name).count == 1 else 64
        for groups in (heads, 8):
            rows = [f"{name}: {heads} heads, {groups} of keys", "| tokens | " + " | ".join(TABLES[name]) + " |"]
            rows.append("|---" * (1 + len(TABLES[name])) + "|")
            try:
                for tokens in LENGTHS:
                    tried = [one != "reference" or tokens <= LARGEST_REFERENCE for one in TABLES[name]]
                    cells = [
                        f"{scratch(name, one, tokens, heads, groups) / 1e6:,.0f} MB" if does else ""
                        for one, does in zip(TABLES[name], tried, strict=True)
                    ]
                    rows.append(f"| {tokens:,} | " + " | ".join(cells) + " |")
            except RuntimeError as error:
                rows = [f"{name}: {error}"]
            print("\n".join(rows), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
