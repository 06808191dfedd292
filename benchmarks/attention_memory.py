"""Scratch of attention, forward and backward, as the TPU's own compiler says for one v5e chip, as a Markdown table.

    python benchmarks/attention_memory.py        # needs libtpu, not a TPU: pip install -e ".[test]"

One row of bfloat16 with 32 heads of 128 (LLaMA-7B's), causal, with segments. Compiled, not run.
"""

from __future__ import annotations

import os

os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)  # fmt: skip

import jax  # noqa: E402 - libtpu reads the environment when jax is imported
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from tpu_tune.kernels.attention import attention  # noqa: E402
from tpu_tune.kernels.places import Places  # noqa: E402

HEADS, SIZE = 32, 128


def scratch(implementation: str, tokens: int) -> int:
    """Return bytes of scratch of one implementation at so many tokens."""
    one = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=[1, 1, 1]).devices
    home = SingleDeviceSharding(one[0])
    states = jax.ShapeDtypeStruct((1, tokens, HEADS, SIZE), jnp.bfloat16, sharding=home)
    segments = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=home)

    def summed(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        index = jnp.arange(tokens)[None]
        out = attention(q, k, v, Places(index, index, segments, segments), implementation=implementation)
        return out.astype(jnp.float32).sum()

    step = jax.jit(jax.grad(summed, argnums=(0, 1, 2)))
    return step.lower(states, states, states, segments).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    """Print the table."""
    print("| tokens | reference | blockwise | splash |")
    print("|---|---|---|---|")
    for tokens in (2048, 8192):
        found = [scratch(name, tokens) if tokens < 8192 or name != "reference" else None for name in NAMES]
        cells = " | ".join("" if size is None else f"{size / 1e6:.0f} MB" for size in found)
        print(f"| {tokens:,} | {cells} |", flush=True)


NAMES = ("reference", "blockwise", "splash")

if __name__ == "__main__":
    main()
