"""How fast training steps and quantized products are on a TPU by the compiler's own output, as Markdown tables.

    python benchmarks/tpu_speed.py                               # whole steps: minutes each on two cores
    python benchmarks/tpu_speed.py --step 7b 7b-dots --keep DIR  # some; programs and bundles stay in DIR
    python benchmarks/tpu_speed.py --step tunix-int4-block --python TUNIX/bin/python  # a peer's: see tunix_step.py
    python benchmarks/tpu_speed.py --kernel                      # the table of LLaMA-7B's and Llama-3-8B's products
    python benchmarks/tpu_speed.py --kernel --shape 4096x11008 --format nf4 --tokens 2048

Nothing is run on a TPU: libtpu compiles for a device that is not there and writes down the kernels' instructions, which
`tpu_tune.planning.bundles` executes. Of a step `tpu_tune.planning.tpu_time` says what its other operations take, as
`tpu-tune plan --kernels` does. MFU counts what the mathematics asks for, nothing twice.

A product is one layer of a stack's, double quantized. `peak` is the share of the matrix units' peak (2 x in x out x
tokens operations at the device's rate), `backward` the gradient of x. Of two cores behind one device
(v4, v5p) the dump is one's, which does half of the work.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

from absent_devices import devices_of, find_device  # first: it sets what jax reads when it is imported

# isort: split
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from tpu_steps import JOBS, PEERS, figures, kinds

from tpu_tune.kernels.quantized_matmul import MatmulPlan, for_device
from tpu_tune.planning.bundles import Core, core_of, dump_flags, dumped, run_bundles
from tpu_tune.tensors import LayerView, matmul, quantize_tensor
from tpu_tune.transforms.sharding import AXES, make_mesh

SHAPES = ("4096x4096", "4096x11008", "11008x4096", "4096x1024", "4096x14336", "14336x4096")


def compiled_products(home: Any, plan: MatmulPlan, format: str, shape: tuple[int, int], tokens: int) -> dict[str, str]:
    """Return the HLO of x @ w and of its derivative, compiled for the device `home`."""

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(home))

    weight = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    stack = jax.tree.map(placed, jax.eval_shape(lambda weight: quantize_tensor(weight, format, 64, True), weight))
    x, g = (placed(jax.ShapeDtypeStruct((1, tokens, width), jnp.bfloat16)) for width in shape)
    layer = placed(jax.ShapeDtypeStruct((), jnp.int32))

    def forward(x: jax.Array, stack: object, layer: jax.Array) -> jax.Array:
        return matmul(x, LayerView(stack, layer, plan))

    def backward(g: jax.Array, x: jax.Array, stack: object, layer: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: forward(x, stack, layer), x)[1](g)[0]

    def text(function: Callable[..., jax.Array], *arguments: object) -> str:
        function.__name__ += f"_{format}_{shape[0]}_{shape[1]}_{tokens}"  # names the kernel, and so its dump
        return jax.jit(function).lower(*arguments).compile().as_text()

    return {"forward": text(forward, x, stack, layer), "backward": text(backward, g, x, stack, layer)}


def kernel_seconds(text: str, dump: str, core: Core) -> float:
    """Return the time of a program's Pallas kernels.

    Raises:
      RuntimeError: it has none.
    """
    names = re.findall(r'%([\w.-]+) = [^\n]*custom_call_target="tpu_custom_call"', text)
    if not names:
        raise RuntimeError("no Pallas kernel")
    return sum(run_bundles(dumped(dump)[name], core).seconds for name in names)


def kernels(device: str, cases: Iterable[tuple[str, str, int]], dump: str) -> None:
    """Print the table of products, given (format, INxOUT, tokens) of each.

    Raises:
      RuntimeError: there is no compiler for the device.
    """
    target, home = find_device(device), devices_of(device)[0]
    core, plan = core_of(target), for_device("auto", make_mesh(dict.fromkeys(AXES, 1), [home]))
    print("| device | format | in x out | tokens | direction | us | cycles | peak |\n|---|---|---|---|---|---|---|---|")
    for format, shape, tokens in cases:
        rows, columns = (int(size) for size in shape.split("x"))
        for direction, text in compiled_products(home, plan, format, (rows, columns), tokens).items():
            try:
                seconds = kernel_seconds(text, dump, core)
                share = 2 * rows * columns * tokens / target.flops / seconds
                found = f"{seconds * 1e6:,.0f} | {seconds * core.hertz:,.0f} | {share:.1%}"
            except RuntimeError as error:
                found = f"{error} | |"
            print(f"| {device} | {format} | {shape} | {tokens:,} | {direction} | {found} |", flush=True)


def steps(names: Iterable[str], keep: pathlib.Path | None, python: str) -> None:
    """Print the table of training steps."""
    print("| step | device | ms | without bundles | tokens/s a device | MFU | peak GB | where the time goes, ms |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        with tempfile.TemporaryDirectory(prefix="tpu_speed_") as directory:
            found = figures(name, keep or pathlib.Path(directory), python)
        full, plan, count = found["full"], found["plan"], find_device(found["device"]).count
        by_bundles = "" if full["how"] == plan["how"] else f"{1e3 * full['seconds']:,.0f}"  # none were dumped
        times = f"{by_bundles} | {1e3 * plan['seconds']:,.0f}"
        rates = f"{times} | {full['tokens_per_second'] / count:,.0f} | {full['mfu']:.1%}"
        print(f"| {name} | {found['device']} | {rates} | {found['peak'] / 1e9:.2f} | {kinds(full)} |", flush=True)


def main() -> None:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="store_true", help="single products (seconds each)")
    parser.add_argument(
        "--step", nargs="+", choices=[*JOBS, *PEERS], default=list(JOBS), metavar="STEP",
        help=f"which steps: {', '.join(JOBS)} (all of these by default); of a peer's {', '.join(PEERS)}",
    )  # fmt: skip
    parser.add_argument(
        "--python", default=sys.executable, help="the interpreter that has Tunix and qwix, for its steps"
    )
    parser.add_argument("--keep", type=pathlib.Path, help="a directory for the steps' programs and bundles")
    parser.add_argument("--device", default="v5e-1", help="a TPU of `tpu-tune plan --device list`")
    parser.add_argument("--format", default="nf4", help="formats, with commas")
    parser.add_argument("--shape", default=",".join(SHAPES), help="INxOUT, with commas")
    parser.add_argument("--tokens", default="2048,512", help="token counts, with commas")
    options = parser.parse_args()
    start = time.time()
    if options.kernel:
        formats, shapes, tokens = (given.split(",") for given in (options.format, options.shape, options.tokens))
        with tempfile.TemporaryDirectory(prefix="tpu_speed_") as dump:
            os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump_flags(dump)}"
            kernels(options.device, itertools.product(formats, shapes, map(int, tokens)), dump)
    else:
        steps(options.step, options.keep, options.python)
    print(f"\n{time.time() - start:.0f} s; by the compiler, nothing was run on a device.")


if __name__ == "__main__":
    main()
