"""What the tests of evaluation share: a finished run directory that nobody had to train, and logits of one shape."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import numpy as np
from helpers_training import make_config, write_rows

from tpu_tune import config as configuration
from tpu_tune.checkpoints import peft
from tpu_tune.training.prepare_model import prepare_model
from tpu_tune.transforms import sharding

WIDTH = 192


def write_run(model: pathlib.Path, folder: pathlib.Path, scale: float = 0.3) -> pathlib.Path:
    """Write a QLoRA run directory: config.json, and an adapter whose random weights change what the model says."""
    rows = write_rows(folder / "rows.jsonl", count=20)
    config = make_config(
        model__path=str(model),
        data__train=str(rows),
        data__cache_dir=str(folder),
        data__num_workers=1,
        data__max_length=64,
        data__eval_ratio=0.3,
        model__dtype="float32",
        quantize__format="nf4",
        quantize__group_size=32,
        output_dir=str(folder / "run"),
        train__per_device_eval_batch_size=1,
    )
    run = folder / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(configuration.to_dict(config)))
    ready = prepare_model(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    random = np.random.RandomState(7)
    trained = {path: (scale * random.randn(*leaf.shape)).astype(np.float32) for path, leaf in ready.trainable.items()}
    peft.write_adapter(
        str(run / "adapter"), trained, ready.method, ready.architecture, str(model), ready.frozen, ready.source
    )
    return run


def padded_logits(model: Any, ids: list[int]) -> np.ndarray:
    """Return the model's logits of a text of at most WIDTH tokens, (tokens, vocabulary), compiled once."""
    return np.asarray(model([[*ids, *[0] * (WIDTH - len(ids))]]))[0, : len(ids)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities in float64."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
