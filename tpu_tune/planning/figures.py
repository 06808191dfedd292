"""From a configuration and a device to the figures of a plan: memory, work, and the length of the run.

The dictionary that `plan` returns is what `tpu-tune plan --json` prints; `report` turns it into a table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.errors import UserError
from tpu_tune.models import Architecture, architecture
from tpu_tune.planning import choice, program_time
from tpu_tune.planning.compile_process import TIMEOUT, run_job, what_a_plan_does
from tpu_tune.planning.devices import Device, find_device
from tpu_tune.planning.flops import ROOFLINE_SHARE, roofline_seconds, step_work
from tpu_tune.planning.model_config import model_config
from tpu_tune.planning.row_estimate import estimate_rows
from tpu_tune.planning.step_time import by_work, rates
from tpu_tune.training import arithmetic, too_little
from tpu_tune.training.arithmetic import run_length
from tpu_tune.training.execution import remat
from tpu_tune.training.opening import check_settings
from tpu_tune.transforms import FULL, LoraConfig, find_targets
from tpu_tune.transforms.sharding import mesh_sizes

# The Novice's LLM Training Guide: "multiply the size of the model file by 1.2"; full training of a 6B or 7B model.
INFERENCE_FACTOR = 1.2
GUIDE_FULL_GB = (160, 192)
FULL_BYTES, FULL_16_BIT_BYTES = 16, 12  # float32 weight, gradient, two moments; the same with a 16-bit weight, gradient


def plan(
    config: Mapping[str, Any] | ConfigDict,
    device: str | Device,
    rows: int | None = None,
    compile: bool = True,
    evaluate: bool = True,
    timeout: float = TIMEOUT,
    say: Callable[[str], None] = lambda line: None,
    kernels: bool = False,
) -> dict[str, Any]:
    """Return what a job needs of a device, without the weights and without the device.

    Args:
      config: the whole configuration, or nested dicts of what differs from the defaults. `model.path` may be a preset.
      device: a name of the catalogue (see `devices`), `x4` behind it for several cards.
      rows: training rows, where they are known; packed rows where `data.packing` packs.
      compile: False counts bytes only, which takes seconds.
      evaluate: whether to plan the evaluation step too, where the configuration evaluates.
      timeout: seconds that the compiler may take.
      say: called before a compilation with a line about it, and about how long it takes.
      kernels: estimate the time of a TPU's kernels by their bundles, which takes several times as long.

    Returns:
      `device`, `num_devices`, `peak_bytes_per_device`, `capacity_bytes_per_device`, `fits`, `compiler` ("none (why)"
      where bytes were counted only), `breakdown` (bytes a device, which add up to the peak: frozen, trainable,
      gradients, optimizer, batch, padding, scratch), `host_bytes_per_device`, `evaluation_peak_bytes_per_device`
      (None without evaluation), `capacity_note`, `model`, `mesh`, `step` (with `time`, see `step_time`), `run`,
      `rules_of_thumb`, `notes`, `chosen` (what was taken for settings left open, and `why`; None where none was).

    Raises:
      UserError: an unknown device or model, or settings that do not fit it; one line.
    """
    config = check_settings(config, with_data=False)
    device = find_device(device) if isinstance(device, str) else device
    mesh = mesh_sizes(config.mesh, device.count)
    _check_rows(config, mesh["data"] * mesh["fsdp"], rows)
    shapes = model_config(config)
    arch = architecture(shapes)
    evaluates = evaluate and configuration.evaluates(config)
    usual = choice.usual(config)
    job = {
        "config": configuration.to_dict(choice.with_overrides(config, usual)),
        "ways": choice.ways(config),
        "model_config": shapes,
        "topology": device.topology,
        "count": device.count,
        "compile": compile,
        "evaluate": evaluates,
        "device": dataclasses.asdict(device),
        "kernels": kernels,
    }
    if compile:
        say(what_a_plan_does(device, kernels=kernels))
    measured = run_job(job, device.kind, timeout)
    way = measured.get("way") or usual
    by = "by an estimate of its bytes" if not measured["compiler"] else program_time.BY_COMPILER
    found = figures(choice.with_overrides(config, way), device, arch, measured, rows, evaluates)
    return {**found, "chosen": choice.chosen(config, way, measured.get("tried", []), by)}


def figures(
    config: ConfigDict,
    device: Device,
    arch: Architecture,
    measured: Mapping[str, Any],
    rows: int | None,
    evaluates: bool,
) -> dict[str, Any]:
    """Assemble `plan`'s figures from what `compile_step.measure` found."""
    train, notes = measured["train"], []
    capacity = train.get("capacity") or device.capacity
    breakdown = _breakdown(measured)
    peak = sum(breakdown.values()) if train["peak"] else None
    evaluation = measured.get("evaluate") if evaluates else None
    eval_peak = evaluation and (evaluation["peak"] or None)
    train_fits = train["fits"] and peak is not None and peak <= capacity
    eval_fits = evaluation is None or (evaluation["fits"] and (eval_peak or 0) <= capacity)
    if train_fits and not eval_fits:
        notes.append(
            "the training step fits, the evaluation does not: lower train.per_device_eval_batch_size "
            f"(now {config.train.per_device_eval_batch_size})"
        )
    if not measured["compiler"]:
        notes.append(
            f"no compiler: the activations are an estimate, and so is what follows from them ({measured['why']})"
        )
    if measured.get("host_state"):
        notes.append(
            "the compiler's figure includes the optimizer's state, which is in host memory; it was subtracted, except "
            "for the one array that is on the device at a time"
        )
    if not config.data.packing or arch.encoder:
        notes.append("rows are as wide as the longest example; here as wide as data.max_length allows")
    if config.model.dtype == "bfloat16" and not device.bfloat16:
        notes.append(f"a {device.name} has no bfloat16 and computes in float32 instead; set model.dtype=float16")
    if config.model.add_special_tokens:
        notes.append("every token of model.add_special_tokens is counted as new")
    step = _step(config, device, arch, measured, breakdown)
    run, warnings = _run(config, measured, step["seconds_estimate"], rows, evaluates, bool(arch.encoder))
    notes += warnings + _token_warning(config, arch)
    return {
        "device": device.name,
        "num_devices": device.count,
        "peak_bytes_per_device": peak,
        "capacity_bytes_per_device": capacity,
        "fits": bool(train_fits and eval_fits),
        "compiler": measured["compiler"] or f"none ({measured['why']})",
        "breakdown": breakdown,
        "host_bytes_per_device": train.get("host", 0),
        "evaluation_peak_bytes_per_device": eval_peak,
        "capacity_note": device.capacity_note,
        "model": {
            "path": config.model.path,
            "family": arch.family,
            "parameters": measured["parameters"],
            "trainable": measured["trainable"],
        },
        "mesh": measured["mesh"],
        "step": step,
        "run": run,
        "rules_of_thumb": rules_of_thumb(base_parameters(arch)),
        "notes": notes,
    }


def base_parameters(arch: Architecture) -> int:
    """Return the model's own parameters."""
    return sum(math.prod(shape) for shape in arch.leaf_shapes().values())


def rules_of_thumb(parameters: int) -> dict[str, Any]:
    """Return what the guide's rules say, in GB, of a model with so many parameters."""
    return {
        "inference_16_bit_gb": 2 * parameters * INFERENCE_FACTOR / 1e9,
        "full_fine_tuning_16_bytes_a_parameter_gb": FULL_BYTES * parameters / 1e9,
        "full_fine_tuning_16_bit_gb": FULL_16_BIT_BYTES * parameters / 1e9,
        "guide_full_fine_tuning_6b_7b_gb": list(GUIDE_FULL_GB),
    }


def _breakdown(measured: Mapping[str, Any]) -> dict[str, int]:
    """Share the peak out; where the program did not fit and the compiler said no number, scratch is 0."""
    held, train = measured["held"], measured["train"]
    known = sum(held.values())
    padding = max(0, train.get("arguments", known) - known)
    within = max(0, train["peak"] - known - padding)
    gradients = min(measured["gradients"], within) if train["peak"] else measured["gradients"]
    return {
        "frozen": held["frozen"],
        "trainable": held["trainable"],
        "gradients": gradients,
        "optimizer": held["optimizer"],
        "batch": held["batch"],
        "padding": padding,
        "scratch": within - gradients if train["peak"] else 0,
    }


def _step(
    config: ConfigDict, device: Device, arch: Architecture, measured: Mapping[str, Any], breakdown: Mapping[str, int]
) -> dict[str, Any]:
    rows, width, encoder_width = measured["rows"], measured["width"], measured["encoder_width"]
    adapters = measured["trainable"] - measured.get("idle", 0) if config.method == "lora" else 0
    work = step_work(arch, config, rows, width, encoder_width, adapters)
    seconds, bound = roofline_seconds(
        device,
        work,
        weights=breakdown["frozen"] + breakdown["trainable"],
        state=breakdown["trainable"] + breakdown["optimizer"],
        micro_batches=config.train.gradient_accumulation_steps,
        passes=2 + (remat(config) in ("full", "offload")),
    )
    tokens = rows * (width + encoder_width)
    time = rates(measured["train"].get("time") or by_work(seconds, bound), tokens, work.model, device)
    return {
        "rows": rows,
        "micro_batch_rows": rows // config.train.gradient_accumulation_steps,
        "tokens": tokens,
        "flops": work.model,
        "hardware_flops": work.hardware,
        "flops_formula": work.formula,
        "roofline_seconds": seconds,
        "bound_by": bound,
        "roofline_share": ROOFLINE_SHARE,
        "seconds_estimate": time["seconds"],
        "time": time,
    }


def _check_rows(config: ConfigDict, shards: int, rows: int | None) -> None:
    batch = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps * shards
    if rows is not None and rows < 1:
        raise UserError(f"--rows is {rows}; there must be at least one")
    if rows is not None and batch > rows:
        raise UserError(
            f"a step takes {batch} rows and there are only {rows}; lower train.per_device_train_batch_size "
            "or train.gradient_accumulation_steps"
        )


def _token_warning(config: ConfigDict, arch: Architecture) -> list[str]:
    if config.model.train_added_tokens or config.model.adapter or not config.model.add_special_tokens:
        return []
    lora = config.method == "lora"
    targets = find_targets(arch.modules(), LoraConfig(**config.lora), arch.default_targets) if lora else FULL
    return too_little.of_tokens(config, arch, targets)


def _run(
    config: ConfigDict, measured: Mapping[str, Any], seconds: float, rows: int | None, evaluates: bool, encoder: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return steps and hours, as far as the number of rows is known, and warnings about them."""
    given, batch, warnings = rows is not None, measured["rows"], []
    if rows is None:
        rows = estimate_rows(config, packed=config.data.packing and not encoder)
    train, length, total = config.train, None, None
    if train.max_steps > 0:
        total = train.max_steps
    if rows is not None:
        each, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
        devices = batch // (each * accumulation)
        length = run_length(rows, each, devices, accumulation, train.num_train_epochs, train.max_steps)
        total = length.total_steps
        warnings = too_little.of_length(config, length, evaluates)
        warnings = warnings if given else [f"{line} (by the guess of the rows)" for line in warnings]
    figures = {
        "rows": rows,
        "rows_are": "given" if given else ("a guess from the size of data.train" if rows is not None else "not known"),
        "gradient_descent": length and length.kind,
        "steps_per_epoch": length and length.steps_per_epoch,
        "total_steps": total,
        "arithmetic": length and arithmetic.words(length, config.data.packing and not encoder),
        "hours_estimate": None if total is None else total * seconds / 3600,
    }
    return figures, warnings
