"""Compile training steps for a device that is not there and say what its compiler says of them; run as a program.

Each line of standard input is a job, or a list of jobs to compile side by side; each line of standard output is what
was found, or the list. libtpu and jax read their environment when jax is imported, hence a process of its own; it takes
seconds to start, hence one process for many jobs. A job is a JSON object:

    model: a Hugging Face config
    config: overrides of tpu_tune's
    rows, tokens: of the batch; encoder_tokens of an encoder-decoder's
    device: of the catalogue of `tpu_tune.planning`: v3-8, h100; v5e-1 by default
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import math
import re
import sys
import threading
import traceback
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from tpu_tune import config as configuration
from tpu_tune.planning import find_device
from tpu_tune.tensors import QuantizedTensor
from tpu_tune.training.prepare_model import PreparedModel, abstract_model
from tpu_tune.training.prepare_steps import prepare_steps
from tpu_tune.transforms import sharding

LOADING = threading.Lock()  # two threads must not load a compiler at one time
GATHERS = re.compile(r"^.* = (.*?) all-gather(?:-start)?\(", re.MULTILINE)  # with the shapes of the results
SHAPES = re.compile(r"\b([a-z]+\d+)\[([0-9,]+)\]")
FLOATS = re.compile(r"\b(?:f32|bf16|f16)\[([0-9,]+)\]")


def main() -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # XLA compiles without the interpreter's lock
        for line in sys.stdin:
            jobs = json.loads(line)
            found = list(pool.map(compile_step, jobs)) if isinstance(jobs, list) else compile_step(jobs)
            print(json.dumps(found), flush=True)


@functools.cache
def devices_of(name: str) -> list[Any]:
    """Return the devices of a slice or a card."""
    return topologies.get_topology_desc(**find_device(name).topology).devices


def compile_step(job: dict[str, Any]) -> dict[str, Any]:
    """Return what `_compile_step` finds, or an `error`."""
    try:
        return _compile_step(job)
    except Exception:
        return {"error": traceback.format_exc()}


def _compile_step(job: dict[str, Any]) -> dict[str, Any]:
    """Return a step's figures.

    Returns:
      bytes on a device: `temp`, `peak`, `arguments` (of the compiler); over all devices: `frozen`, `trained`;
      `devices` and `hosts`, their number; shapes in the program: `dequantized` stacks, `gathered` arrays.
    """
    with LOADING:
        devices = devices_of(job.get("device", "v5e-1"))
    config = configuration.from_dict(job["config"])
    mesh = sharding.make_mesh(config.mesh, devices)
    model = abstract_model(config, job["model"], mesh)
    steps = prepare_steps(config, model, 10)
    home = jax.sharding.NamedSharding(mesh, sharding.batch_spec(1))

    def ids(tokens: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, job["rows"], tokens), jnp.int32, sharding=home)

    batch = {name: ids(job["tokens"]) for name in ("input_ids", "targets", "positions", "segment_ids")}
    if model.architecture.encoder:
        batch |= {name: ids(job["encoder_tokens"]) for name in ("encoder_ids", "encoder_segment_ids")}
    compiled = steps.train.lower(steps.initial_state, model.frozen, batch).compile()
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    return {
        "devices": len(devices),
        "hosts": len({device.process_index for device in devices}),
        "temp": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "host": memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes,
        "frozen": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.frozen)),
        "trained": sum(leaf.size * leaf.dtype.itemsize for leaf in model.trainable.values()),
        "dequantized": dequantized(text, model),
        "gathered": sorted({f"{hit[1]}[{hit[2]}]" for line in GATHERS.findall(text) for hit in SHAPES.finditer(line)}),
    }


def dequantized(text: str, model: PreparedModel) -> list[str]:
    """Return the shapes of floats in a program's text that are as large as a stacked quantized leaf, in any layout.

    Of experts, a stack is also that of one layer. A gate of one column is left out: to a kernel it is a vector.
    """
    stacks = {
        math.prod(leaf.shape) * count
        for module in model.architecture.modules()
        if module.layers
        and module.shape[-1] > 1
        and isinstance(leaf := model.frozen.get(module.weight), QuantizedTensor)
        for count in (math.prod(module.stack), module.experts)
        if count
    }
    assert stacks, "the model has no quantized layers"
    return sorted({hit[0] for hit in FLOATS.finditer(text) if math.prod(map(int, hit[1].split(","))) in stacks})


if __name__ == "__main__":
    main()
