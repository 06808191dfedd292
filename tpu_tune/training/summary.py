"""What `summary.json` and `samples.jsonl` hold: what a report shows besides the metrics.

The summary says what the run is made of (the data's counts, the model's size, the steps) as soon as it starts, and how
much memory it took when it ends. The samples are the model's greedy answers to `train.sample_prompts` before and after,
from the weights that are being trained, where they live.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tpu_tune.checkpoints.prompts import CHAT, in_words, taught_as
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.checkpoints.tokenizers import with_bos
from tpu_tune.data import Datasets
from tpu_tune.errors import UserError
from tpu_tune.inference.generation import Sampling, encode_prompt, end_tokens, generate
from tpu_tune.training.execution import compute_dtype
from tpu_tune.training.opening import Session
from tpu_tune.training.prepare_model import PreparedModel
from tpu_tune.training.step import TrainState

SAMPLE_TOKENS = 64  # of an answer


def describe(session: Session) -> dict[str, Any]:
    """Return what a summary says from the start about the model, the steps and the data."""
    model, batches = session.model, session.batches
    return {
        "model": session.config.model.path,
        "family": model.architecture.family,
        # What a loss of pure guessing is judged by; a head that judges texts guesses no token.
        **({} if model.architecture.num_labels else {"vocab_size": model.architecture.vocab_size}),
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
        taught = taught_as(data.summary["train"])
        return lambda state, step: write_samples(config, model, state.trainable, step, taught)
    return lambda state, step: None


def write_samples(
    config: ConfigDict, model: PreparedModel, trainable: Mapping[str, Any], step: int, taught: str
) -> None:
    """Answer `train.sample_prompts` with the weights as they are, and write that into `samples.jsonl`.

    Answers of step 0 stay in the file, so that a report can show both. A prompt is put as the
    rows have theirs: through the chat template, with Alpaca's words, or as it is.

    Args:
      config: the whole configuration.
      model: the model with its frozen weights.
      trainable: the trained weights.
      step: updates made so far.
      taught: how the training rows ask (`checkpoints.prompts`).

    Raises:
      UserError: prompts that are empty or too long for the model, or a file that cannot be written.
    """
    prompts = list(config.train.sample_prompts)
    tokenizer = model.source.load_tokenizer()
    params = model.method.combine(trainable, model.frozen)
    chat = taught == CHAT and bool(tokenizer.chat_template)
    chat = chat and model.architecture.encoder is None  # what an encoder reads is no turn of a chat
    begun = [in_words(taught, prompt) for prompt in prompts]
    if config.data.add_bos_token == "always" and not chat:
        begun = [with_bos(tokenizer, prompt) for prompt in begun]
    ends, sampling = end_tokens(tokenizer, model.source), Sampling(SAMPLE_TOKENS)
    variables = dict(config.data.chat_template_kwargs)
    try:
        encoded = [encode_prompt(tokenizer, prompt, chat, variables) for prompt in begun]
        answers = generate(model.architecture, params, tokenizer, compute_dtype(config), encoded, sampling, ends)
    except UserError as error:
        raise UserError(f"train.sample_prompts: {error}") from error
    run = RunDirectory(config.output_dir)
    rows = [{"step": step, "prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    run.write_samples([*(row for row in run.samples() if row.get("step") == 0 and step > 0), *rows])
