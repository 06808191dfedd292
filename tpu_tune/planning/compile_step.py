"""The program that a plan runs in a process of its own: build the real training step from shapes, and compile it.

    python -m tpu_tune.planning.compile_step < job.json

libtpu and jax read their environment once, when they are imported, and libtpu belongs to one process: whoever plans
may have a TPU, or jax on a CPU, and keeps it. The job comes as JSON on standard input (see `measure`), the answer
leaves as one line of JSON on standard output: what `measure` returns, or `{"user_error": message}`.

Without the compiler the same shapes are laid over as many CPU devices, which gives the bytes of all that is held
between steps; what is needed within a step is then an estimate (`scratch`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from tpu_tune import config as configuration
from tpu_tune.errors import UserError
from tpu_tune.planning import choice, step_time
from tpu_tune.planning.devices import Device
from tpu_tune.planning.scratch import scratch_bytes
from tpu_tune.training import offload
from tpu_tune.training.opening import check_settings, micro_batch_rows
from tpu_tune.training.preference_settings import KEYS, REFERENCED
from tpu_tune.training.prepare_model import PreparedModel, abstract_model
from tpu_tune.training.prepare_steps import prepare_evaluation, prepare_steps
from tpu_tune.transforms import sharding

_COMPILERS = {"tpu": ("libtpu",), "cuda": ("jax-cuda13-plugin", "jax-cuda12-plugin")}  # packages, by platform
_DECODER = ("input_ids", "targets", "positions", "segment_ids")
_ENCODER = ("encoder_ids", "encoder_segment_ids")
_DOCUMENT = 128  # tokens of an answer with its prompt, where packed rows are planned
_ROUND = 64  # data/pairs.py rounds the widths of an encoder-decoder's rows up to multiples of this


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bytes a device needs for a training step, and for an evaluation step.

    Args:
      job: `config` (nested dicts), `model_config` (as config.json), `topology` (keywords of `get_topology_desc`),
        `count` (devices), `compile` (False: count bytes only), `evaluate` (compile the evaluation step too), `device`
        (the fields of a `Device`; without it nothing is said of time), `dump` (directory of the kernels' bundles),
        `ways` (of which the first that fits is taken, see `choice`; without them `config` as it is).

    Returns:
      `compiler` (its name and version; "" where it was not used), `why` (no compiler), `held` (bytes a device: frozen,
      trainable, optimizer, batch; of the shapes), `gradients`, `train` and `evaluate` (arguments, peak, host, fits, and
      capacity where it does not; of the compiler or of the estimate; of `train` also `time`, see `step_time`, where it
      was compiled), `parameters`, `trainable`, `rows` (of a step), `width` and `encoder_width` (tokens a row), `mesh`,
      `way` (the overrides taken) and `tried` (the ways that do not fit, each with its `bytes`), `host_state`
      ("computed": the optimizer's state in host memory is not in the compiled program, but taken off its figures).

    Raises:
      UserError: settings that do not fit the model or the devices.
    """
    config = check_settings(configuration.from_dict(job["config"]), with_data=False)
    devices, compiler, why = find_devices(job)
    mesh = sharding.make_mesh(config.mesh, devices)
    rows, eval_rows = micro_batch_rows(config, mesh)
    model = abstract_model(config, job["model_config"], mesh)
    accumulation = config.train.gradient_accumulation_steps
    batch = abstract_batch(config, model, (accumulation, rows))
    state = prepare_steps(config, model, max(config.train.max_steps, 1)).initial_state
    waiting = _waiting(config, model, state)
    found = {
        "compiler": compiler,
        "why": why,
        "held": {
            "frozen": device_bytes(model.frozen),
            "trainable": device_bytes(model.trainable),
            "optimizer": device_bytes((state.opt_state, state.loss_scale)) - sum(waiting),
            "batch": device_bytes(batch),
        },
        "gradients": device_bytes(model.trainable),
        "parameters": model.num_parameters,
        "trainable": model.num_trainable,
        "idle": _idle(model),
        "rows": rows * accumulation,
        "width": batch["input_ids"].shape[-1],
        "encoder_width": batch["encoder_ids"].shape[-1] if "encoder_ids" in batch else 0,
        "mesh": dict(mesh.shape),
        "tried": [],
    }
    ways, capacity = job.get("ways") or [{}], job.get("device", {}).get("capacity", 0)
    for way in ways:
        found["way"], last = way, way is ways[-1]
        changed = choice.with_overrides(config, way)
        counted = _counted(changed, model, found, waiting)
        if not last:
            scratch = scratch_estimate(changed, model, found, training=True)
            least = counted["train"]["peak"] + (0 if compiler else (choice.MARGIN - 1) * scratch)
            if least > capacity:
                found["tried"].append({"way": way, "bytes": counted["train"]["peak"]})
                continue
        try:
            found |= _compiled(job, changed, model, found, waiting) if compiler else counted
        except jax.errors.JaxRuntimeError:
            if last:
                raise
            found["tried"].append({"way": way, "bytes": 0})  # the compiler refuses it
            continue
        train = found["train"]
        if last or train["fits"] and train["peak"] <= (train.get("capacity") or capacity):
            break
        found["tried"].append({"way": way, "bytes": train["peak"]})
    if job.get("evaluate") and compiler and found["train"]["fits"]:
        steps = prepare_evaluation(changed, model)
        arguments = (model.trainable, model.frozen, abstract_batch(config, model, (eval_rows,)))
        found["evaluate"] = compile_one(steps.evaluate, arguments, job["topology"]["platform"] == "tpu")
        del found["evaluate"]["program"]
        if found["evaluate"]["peak"]:  # the optimizer's state is held beside it, though the program does not see it
            found["evaluate"]["peak"] += found["held"]["optimizer"]
    return found


def scratch_estimate(config: Any, model: PreparedModel, found: Mapping[str, Any], training: bool) -> int:
    """Return the scratch of one device by an estimate, with gradients in training."""
    train = config.train
    rows = train.per_device_train_batch_size if training else train.per_device_eval_batch_size
    scratch = scratch_bytes(model.architecture, config, rows, found["width"], found["mesh"], training)
    return scratch + (found["gradients"] if training else 0) + _dequantized(model)


def _counted(config: Any, model: PreparedModel, found: Mapping[str, Any], waiting: list[int]) -> dict[str, Any]:
    """Return `train` and `evaluate` by counted bytes and estimated scratch."""
    held = sum(found["held"].values())
    train, evaluate = (_estimate(held, scratch_estimate(config, model, found, side)) for side in (True, False))
    return {"train": {**train, "host": sum(waiting)}, "evaluate": evaluate}


def _compiled(
    job: Mapping[str, Any], config: Any, model: PreparedModel, found: Mapping[str, Any], waiting: list[int]
) -> dict[str, Any]:
    """Return `train` by the compiler, and `host_state`."""
    on_tpu = job["topology"]["platform"] == "tpu"
    steps = prepare_steps(config, model, max(config.train.max_steps, 1))
    accumulation = config.train.gradient_accumulation_steps
    batch = abstract_batch(config, model, (accumulation, found["rows"] // accumulation))
    train = compile_one(steps.train, (steps.initial_state, model.frozen, batch), on_tpu)
    program = train.pop("program")
    if program and job.get("device"):
        train["time"] = step_time.of_program(program, Device(**job["device"]), job.get("dump", ""))
    if not waiting or on_tpu:
        return {"train": train}
    # CUDA's devices that are not there name no host memory: the program compiled holds the state on the card.
    train["peak"] -= sum(waiting) - max(waiting)
    train["arguments"] -= sum(waiting)
    train["host"] += sum(waiting)
    return {"train": train, "host_state": "computed"}


def find_devices(job: Mapping[str, Any]) -> tuple[list[Any], str, str]:
    """Return (devices to lay shapes over, the compiler's name or "", why there is none)."""
    platform = job["topology"]["platform"]
    why = missing_compiler(platform) if job["compile"] else "asked for bytes only"
    if not why:
        try:
            devices = topologies.get_topology_desc(**job["topology"]).devices
            if len(devices) != job["count"]:
                raise ValueError(f"the compiler counts {len(devices)} devices, not {job['count']}")
            return list(devices), _compiler_name(platform), ""
        except Exception as error:  # absent libraries, plugins and unknown cards all raise their own
            why = " ".join(str(error).split())[:200] or type(error).__name__
    return jax.devices("cpu")[: job["count"]], "", why


def missing_compiler(platform: str) -> str:
    """Return why there is no compiler for a platform, "" where it is installed."""
    if any(importlib.util.find_spec(name.replace("-", "_")) for name in _COMPILERS[platform]):
        return ""
    extra = {"tpu": "tpu", "cuda": "cuda13"}[platform]
    return f"{_COMPILERS[platform][0]}, the compiler, is not installed; pip install 'tpu_tune[{extra}]' brings it"


def _compiler_name(platform: str) -> str:
    for name in _COMPILERS[platform]:
        try:
            return f"{name} {importlib.metadata.version(name)}, jax {jax.__version__}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{platform}, jax {jax.__version__}"


def abstract_batch(config: Any, model: PreparedModel, leading: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch, (leading..., tokens) int32 each, as `data.load_data` would make them.

    Packed rows have `data.max_length` tokens. Rows of one example each, and those of an encoder-decoder, are as wide as
    the longest; what bounds it is taken.
    """
    home = NamedSharding(model.mesh, sharding.batch_spec(len(leading) - 1))
    width = config.data.max_length
    widths = dict.fromkeys(_DECODER, width)
    if model.architecture.encoder:
        source = min(width, config.data.source_max_len or width)
        target = min(width, config.data.target_max_len or width)
        source, target = (-(-length // _ROUND) * _ROUND for length in (source + 1, target + 1))
        widths = dict.fromkeys(_DECODER, target) | dict.fromkeys(_ENCODER, source)
    batch = {name: jax.ShapeDtypeStruct((*leading, size), jnp.int32, sharding=home) for name, size in widths.items()}
    if config.head.name == "reward" or config.head.problem_type in ("multi_label_classification", "regression"):
        shape = (*leading, width, model.architecture.num_labels)
        batch["labels"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=home)
    if (
        config.objective.name in KEYS or config.head.name == "reward"
    ):  # of preference objectives: documents, whose number hardly matters
        home = NamedSharding(model.mesh, sharding.document_spec(len(leading) - 1))
        slots = (*leading, max(2, width // _DOCUMENT // 2 * 2) if config.data.packing else 2)
        batch["document_roles"] = jax.ShapeDtypeStruct(slots, jnp.int32, sharding=home)
        if config.objective.name in REFERENCED:
            batch["document_reference"] = jax.ShapeDtypeStruct(slots, jnp.float32, sharding=home)
    return batch


def device_bytes(tree: Any) -> int:
    """Return the bytes that one device holds of a tree of sharded shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "sharding")
    )


def compile_one(function: Any, arguments: tuple[Any, ...], on_tpu: bool) -> dict[str, Any]:
    """Compile a jitted function and return what the compiler says of its memory, in bytes a device, and its `program`.

    The peak is on a TPU what its compiler holds against the chip's memory (its `temp_size_in_bytes` may be larger than
    the chip in a program that it accepts). It counts what is in the host's memory too; of a program that puts something
    there the sum is taken if it is less. On a GPU scratch is one allocation, and the peak the sum of all, with what
    cuDNN will ask for.

    A program that is too large for a TPU is a result: `fits` is False, and `peak` what it would need, as far as the
    compiler says it (else 0).

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses the program for another reason.
    """
    lowered = function.lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text or not re.search("hbm", text, re.IGNORECASE):
            raise  # a kernel's own small memory does not get larger with the device
        needed = too_large(text, device_bytes(arguments))
        return {"fits": False, "arguments": device_bytes(arguments), "program": "", **needed}
    found = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    total = held + found.temp_size_in_bytes
    program = compiled.as_text() or ""
    total += 0 if on_tpu else cudnn_workspace(program)
    host = found.host_temp_size_in_bytes + found.host_argument_size_in_bytes
    peak = found.peak_memory_in_bytes if on_tpu and found.peak_memory_in_bytes else total
    return {
        "fits": True,
        "arguments": found.argument_size_in_bytes,
        "peak": min(peak, total) if host else peak,
        "host": host,
        "program": program,
    }


def cudnn_workspace(program: str) -> int:
    """Return the bytes that cuDNN's attention allocates in its backward pass, which only a compiler with a card counts.

    It sums the queries' gradient in float32 (cudnn-frontend, `dQ_accum` of its scaled dot product attention).
    """
    found = re.findall(r"= \(\w+\[([\d,]+)\].*?__cudnn\$fmhaSoftmaxBackward", program)
    return max((4 * math.prod(map(int, shape.split(","))) for shape in found), default=0)


def too_large(message: str, arguments: int) -> dict[str, int]:
    """Read from libtpu's RESOURCE_EXHAUSTED message what a program needs, and what there is, in bytes a device.

    Args:
      message: either "... (16.04G) exceeds available HBM (15.75G)" of the temporaries, or "Used 20.1G of 15.75G hbm".
      arguments: bytes of what is passed in, which the first form leaves out.
    """
    sizes = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}

    def find(pattern: str) -> int:
        number = re.search(pattern, message)
        return int(float(number[1]) * sizes[number[2]]) if number else 0

    used = find(r"Used ([\d.]+)([KMGT]?) of")
    temporaries = find(r"temporaries \(([\d.]+)([KMGT]?)B?\)")
    capacity = find(r"of ([\d.]+)([KMGT]?) hbm") or find(r"available HBM \(([\d.]+)([KMGT]?)B?\)")
    return {"peak": used or (temporaries + arguments if temporaries else 0), "capacity": capacity}


def _idle(model: PreparedModel) -> int:
    """Return the parameters of the adapters on experts that a token does not go to."""
    of_experts = [target for target in getattr(model.method, "adapted", ()) if target.module.experts]
    return round(
        sum(one.num_parameters * (1 - one.module.experts_per_token / one.module.experts) for one in of_experts)
    )


def _waiting(config: Any, model: PreparedModel, state: Any) -> list[int]:
    """Return the bytes a device of each of the optimizer's arrays that wait in host memory."""
    if not config.train.optim_offload:
        return []
    waiting = jax.tree.leaves(offload.waits(state.opt_state, model.specs))
    leaves = jax.tree.leaves(state.opt_state)
    return [device_bytes(leaf) for leaf, waits in zip(leaves, waiting, strict=True) if waits]


def _estimate(held: int, scratch: int) -> dict[str, Any]:
    return {"fits": True, "arguments": held, "peak": held + scratch, "host": 0}


def _dequantized(model: PreparedModel) -> int:
    """Return the bytes of the largest frozen matrix in the compute dtype: what is unpacked for one product."""
    quantized = [leaf for leaf in model.frozen.values() if hasattr(leaf, "codes")]
    return max((2 * math.prod(leaf.shape) for leaf in quantized), default=0) // model.mesh.shape["tensor"]


def main() -> int:
    """Run one job."""
    job = json.load(sys.stdin)
    jax.config.update("jax_num_cpu_devices", job["count"])
    try:
        found = measure(job)
    except UserError as error:
        found = {"user_error": str(error)}
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
