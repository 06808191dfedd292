"""`summary.json` and `samples.jsonl` in the run directory: what a report shows besides the metrics.

The summary says what the run is made of (the data's counts, the model's size, the steps) as soon as it starts, and how
much memory it took when it ends. The samples are the model's greedy answers to `train.sample_prompts` before and after,
from the weights that are being trained, where they live.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tpu_tune.checkpoints import storage
from tpu_tune.data import Datasets
from tpu_tune.errors import UserError
from tpu_tune.inference.generation import Sampling, generate
from tpu_tune.training import run_directory
from tpu_tune.training.execution import compute_dtype
from tpu_tune.training.opening import Session
from tpu_tune.training.prepare_model import PreparedModel
from tpu_tune.training.step import TrainState
from tpu_tune.transforms import combine

SAMPLE_TOKENS = 64  # of an answer


def describe(session: Session) -> dict[str, Any]:
    """Return what a summary says from the start about the model, the steps and the data."""
    model, batches = session.model, session.batches
    return {
        "model": session.config.model.path,
        "family": model.architecture.family,
        "vocab_size": model.architecture.vocab_size,
        "trainable_parameters": model.num_trainable,
        "rows_per_step": batches.batch_rows * batches.accumulation,
        "steps_per_epoch": batches.steps_per_epoch,
        "data": session.data.summary,
        "parameters": model.num_parameters,
        "devices": devices(model.mesh),
        "total_steps": session.length.total_steps,
    }


def devices(mesh: Mesh) -> str:
    """Return a mesh in words: 4 x TPU v4 (fsdp=4)."""
    kind = mesh.devices.flat[0].device_kind
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} x {kind}" + (f" ({axes})" if axes else "")


def write(output_dir: str, values: Mapping[str, Any]) -> None:
    """Write `summary.json`, laid over the one that is there.

    Raises:
      UserError: it cannot be written.
    """
    text = json.dumps({**read(output_dir), **values}, indent=2, default=run_directory.plain_number)
    run_directory.write_aside(run_directory.path(output_dir, "summary.json"), text + "\n")


def read(output_dir: str) -> dict[str, Any]:
    """Return `summary.json`; {} where there is none that can be read."""
    try:
        values = json.loads(storage.read_bytes(run_directory.path(output_dir, "summary.json")).decode())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def peak_memory() -> dict[str, int | None]:
    """Return the peaks in bytes of this process: the fullest local device's (None on a CPU) and the host's."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"device_peak_bytes": max((peak for peak in peaks if peak), default=None), "host_peak_bytes": host}


def sampler(
    config: ConfigDict, model: PreparedModel, data: Datasets, say: Callable[[str], None]
) -> Callable[[TrainState, int], None]:
    """Return the function of (state, step) that answers `train.sample_prompts`; without prompts it does nothing."""
    if config.train.sample_prompts and jax.process_count() > 1:
        say("train.sample_prompts: left out, because the model is spread over several processes")
    elif config.train.sample_prompts:
        data_format = data.summary["train"]["format"]
        return lambda state, step: write_samples(config, model, state.trainable, step, data_format)
    return lambda state, step: None


def write_samples(
    config: ConfigDict, model: PreparedModel, trainable: Mapping[str, Any], step: int, data_format: str
) -> None:
    """Answer `train.sample_prompts` with the weights as they are, and write that into `samples.jsonl`.

    Answers of step 0 stay in the file, so that a report can show both. A prompt goes through the chat template where
    the data are chats, and else stands as it is.

    Args:
      config: the whole configuration.
      model: the model with its frozen weights.
      trainable: the trained weights.
      step: updates made so far.
      data_format: the format of the training rows, as `data.format` names it.

    Raises:
      UserError: prompts that are empty or too long for the model, or a file that cannot be written.
    """
    prompts = list(config.train.sample_prompts)
    tokenizer = model.source.load_tokenizer()
    params = combine(trainable, model.frozen, model.targets)
    chat = data_format in ("messages", "sharegpt") and bool(tokenizer.chat_template)
    try:
        answers = generate(
            model.architecture, params, tokenizer, compute_dtype(config), prompts, Sampling(SAMPLE_TOKENS), chat
        )
    except UserError as error:
        raise UserError(f"train.sample_prompts: {error}") from error
    file = run_directory.path(config.output_dir, "samples.jsonl")
    rows = [{"step": step, "prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    kept = [row for row in _read_samples(file) if row.get("step") == 0 and step > 0]
    lines = [json.dumps(row, ensure_ascii=False).encode("utf-8", "replace").decode() for row in [*kept, *rows]]
    run_directory.write_aside(file, "\n".join(lines) + "\n")


def _read_samples(file: str) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in storage.read_bytes(file).decode().splitlines()]
    except (OSError, ValueError):
        return []
