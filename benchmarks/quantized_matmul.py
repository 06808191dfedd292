"""Scratch of one product with an nf4 kernel, as the devices' own compilers say, as a Markdown table.

    python benchmarks/quantized_matmul.py                # TPUs and GPUs; see attention_memory.py for what to install
    python benchmarks/quantized_matmul.py v5e-1 rtx3090

2,048 tokens in bfloat16 with one layer of a stack of LLaMA-7B's `up_proj`, (4096, 11008), nf4 with double quantization;
`forward` is x @ w, `backward` the gradient of x. Dequantized, the matrix is 90 MB in bfloat16. Compiled, not run.
"""

from __future__ import annotations

import sys

from absent_devices import devices_of  # first: it sets what jax reads when it is imported

# isort: split
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from tpu_tune.kernels.quantized_matmul import for_device
from tpu_tune.tensors import LayerView, matmul, quantize_tensor
from tpu_tune.transforms.sharding import make_mesh

LAYERS, ROWS, COLUMNS, TOKENS = 2, 4096, 11008, 2048
DEVICES = ("v3-8", "v4-8", "v5e-1", "v6e-1", "rtx3090", "h100")


def scratch(name: str, implementation: str) -> tuple[int, int]:
    """Return bytes of scratch of the product and of its derivative on one device.

    Raises:
      RuntimeError: there is no compiler for the device.
    """
    devices = devices_of(name)
    home = SingleDeviceSharding(devices[0])
    one = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}, devices[:1])
    plan = for_device(implementation, one)

    def shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=home)

    weight = jax.ShapeDtypeStruct((LAYERS, ROWS, COLUMNS), jnp.float32)
    stack = jax.tree.map(shape, jax.eval_shape(lambda weight: quantize_tensor(weight, "nf4", 64, True), weight))
    x, g = (shape(jax.ShapeDtypeStruct((1, TOKENS, width), jnp.bfloat16)) for width in (ROWS, COLUMNS))
    layer = shape(jax.ShapeDtypeStruct((), jnp.int32))

    def forward(x: jax.Array, stack: object, layer: jax.Array) -> jax.Array:
        return matmul(x, LayerView(stack, layer, plan))

    def backward(g: jax.Array, x: jax.Array, stack: object, layer: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: forward(x, stack, layer), x)[1](g)[0]

    programs = (forward, (x, stack, layer)), (backward, (g, x, stack, layer))
    return tuple(
        jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        for function, arguments in programs
    )


def main() -> None:
    """Print the table."""
    print("| device | implementation | forward | backward |\n|---|---|---|---|")
    for name in sys.argv[1:] or DEVICES:
        for implementation in ("xla", "auto"):
            try:
                found = " | ".join(f"{size / 1e6:,.0f} MB" for size in scratch(name, implementation))
            except RuntimeError as error:
                found = f"{error} |"
            print(f"| {name} | {implementation} | {found} |", flush=True)


if __name__ == "__main__":
    main()
