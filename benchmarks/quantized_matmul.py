"""Scratch of one product with an nf4 kernel, as the devices' own compilers say, as a Markdown table.

    python benchmarks/quantized_matmul.py                # TPUs and GPUs; see attention_memory.py for what to install
    python benchmarks/quantized_matmul.py v5e-1 rtx3090

2,048 tokens in bfloat16 with one layer of a stack of LLaMA-7B's `up_proj`, (4096, 11008), nf4 with double quantization;
`forward` is x @ w, `backward` the gradient of x. Dequantized, the matrix is 90 MB in bfloat16. Compiled, not run.
"""

from __future__ import annotations

import os
import sys

os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", CUDA_VISIBLE_DEVICES="",
)  # fmt: skip


import jax  # noqa: E402 - the compilers read the environment when jax is imported
import jax.numpy as jnp  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from tpu_tune.kernels.quantized_matmul import for_device  # noqa: E402
from tpu_tune.planning.compile_step import find_devices  # noqa: E402
from tpu_tune.planning.devices import find_device  # noqa: E402
from tpu_tune.tensors import LayerView, matmul, quantize_tensor  # noqa: E402
from tpu_tune.transforms.sharding import make_mesh  # noqa: E402

LAYERS, ROWS, COLUMNS, TOKENS = 2, 4096, 11008, 2048
DEVICES = ("v3-8", "v4-8", "v5e-1", "v6e-1", "rtx3090", "h100")


def scratch(name: str, implementation: str) -> tuple[int, int]:
    """Return bytes of scratch of the product and of its derivative on one device.

    Raises:
      RuntimeError: there is no compiler for the device.
    """
    device = find_device(name)
    devices, compiler, why = find_devices({"topology": device.topology, "count": device.count, "compile": True})
    if not compiler:
        raise RuntimeError(why)
    home = SingleDeviceSharding(devices[0])
    one = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}, devices[:1])
    product = for_device(implementation, one)

    def shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=home)

    weight = jax.ShapeDtypeStruct((LAYERS, ROWS, COLUMNS), jnp.float32)
    stack = jax.tree.map(shape, jax.eval_shape(lambda weight: quantize_tensor(weight, "nf4", 64, True), weight))
    x, g = (shape(jax.ShapeDtypeStruct((1, TOKENS, width), jnp.bfloat16)) for width in (ROWS, COLUMNS))
    layer = shape(jax.ShapeDtypeStruct((), jnp.int32))

    def forward(x: jax.Array, stack: object, layer: jax.Array) -> jax.Array:
        return matmul(x, LayerView(stack, layer, product))

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
