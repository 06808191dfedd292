"""What a classifier or a reward model says of the rows that the trainer would evaluate it on, document by document.

The rows are read as in training: the same formats, labels and packing; a document's logits are read at its last token.
Of a reward model two answers to a prompt are one unit: right where the better one has the higher reward.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from tpu_tune.checkpoints.heads import pad_token
from tpu_tune.data import load_data
from tpu_tune.data.labels import MULTI, REGRESSION
from tpu_tune.data.loading import IGNORE
from tpu_tune.errors import UserError
from tpu_tune.inference.model import Model
from tpu_tune.models import Architecture, Decoder, Execution
from tpu_tune.training.tasks.intervals import Measure, Outcome

_BATCH_TOKENS = 4096  # of the rows that go through the model together


def score_judgements(model: Model, config: ConfigDict, limit: int = 0) -> Outcome:
    """Score the evaluation rows of a configuration.

    Args:
      model: a classifier or a reward model.
      config: a configuration whose `data` says what to read and how; where its `head` is a language model's, the
        model's own labels are taken.
      limit: only the first so many documents; 0 for all.

    Returns:
      `eval_loss`, `eval_accuracy` (of a reward model, of pairs) and `eval_f1` (macro), or `eval_mse`, as training logs
      them. The predictions hold a row's number, its label and what the model says.

    Raises:
      UserError: a language model, data that cannot be read, or nothing to score.
    """
    arch = model.architecture
    if not arch.num_labels:
        raise UserError("this is a language model, which has no labels; leave --task out, or load a classifier")
    config = _with_head_of(model, config)
    data = load_data(config, model.tokenizer, arch.vocab_size, None, pad_token(model.source))
    if data.eval is None:
        raise UserError("there are no rows to evaluate on; set data.eval, or data.eval_ratio above 0")
    documents, logits = _logits(model, data.eval)
    is_reward = config.head.name == "reward"
    order = np.argsort(documents, kind="stable")[: (limit * 2 if is_reward else limit) or None]
    documents, logits = documents[order], logits[order]
    rows, labels = data.eval.data.source_rows[documents], data.eval.data.labels[documents]
    if is_reward:
        return _preferred(rows[::2], labels[::2, 0], *logits.reshape(-1, 2).T.astype(np.float64))
    return _classified(model.labels, config.head.problem_type, rows, labels, logits)


def _with_head_of(model: Model, config: ConfigDict) -> ConfigDict:
    """Return the configuration with the model's labels, where it has none of its own."""
    config = config.copy_and_resolve_references()
    if config.head.name == "lm":
        problem = model.source.config.get("problem_type") or ""
        config.head.name = "classification" if problem or len(model.labels) > 1 else "reward"
        if config.head.name == "classification":
            config.head.labels, config.head.num_labels = model.labels, len(model.labels)
            config.head.problem_type = problem or "single_label_classification"
    return config


def _logits(model: Model, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents of all rows, row after row, and their logits (documents, labels)."""
    batch, found = max(1, _BATCH_TOKENS // rows.width), []
    for start in range(0, len(rows), batch):
        numbers = np.arange(start, start + batch)
        taken = rows.take(np.where(numbers < len(rows), numbers, -1))
        names = ("input_ids", "positions", "segment_ids")
        logits = _apply(model.architecture, model.dtype, model.params, *(taken[name] for name in names))
        found.append(np.asarray(logits)[taken["targets"] != IGNORE])
    return rows.documents, np.concatenate(found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(arch: Architecture, dtype: Any, params: dict[str, Any], *inputs: Array) -> Float[Array, "B T L"]:
    return Decoder(arch, params, Execution(dtype, packed=True))(*inputs)


def _preferred(rows: np.ndarray, margins: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> Outcome:
    """Return the figures of the rewards of pairs, (pairs,) each."""
    ones, losses = np.ones(len(rows)), np.logaddexp(0, rejected - chosen + margins)
    measures = (Measure.ratio("eval_loss", losses, ones), Measure.share("eval_accuracy", chosen > rejected))
    figures = {measure.name: measure.value for measure in measures}
    figures |= {"eval_margin": float(np.mean(chosen - rejected)), "eval_num_pairs": len(rows)}
    predictions = [
        {"row": int(row) + 1, "chosen_reward": float(better), "rejected_reward": float(worse)}
        for row, better, worse in zip(rows, chosen, rejected, strict=True)
    ]
    return Outcome(figures, measures, predictions)


def _classified(
    names: list[str], problem_type: str, rows: np.ndarray, labels: np.ndarray, logits: np.ndarray
) -> Outcome:
    """Return the figures of labels (documents, 1 or labels) against logits (documents, labels)."""
    logits = logits.astype(np.float64)
    if problem_type == REGRESSION:
        losses = np.mean((logits - labels) ** 2, 1)
        measures = [Measure.ratio("eval_mse", losses, np.ones(len(rows)))]
        said, true = logits.tolist(), labels.tolist()
        figures: dict[str, Any] = {}
    else:
        if problem_type == MULTI:
            losses = np.mean(np.logaddexp(0, logits) - logits * labels, 1)
            guessed, hot = logits > 0, labels > 0.5
        else:
            classes = labels[:, 0].astype(int)
            losses = np.logaddexp.reduce(logits, 1) - logits[np.arange(len(rows)), classes]
            guessed, hot = (np.eye(len(names), dtype=bool)[x] for x in (logits.argmax(1), classes))
        hits, parts = (guessed & hot).sum(0), guessed.sum(0) + hot.sum(0)
        figures = {"eval_f1": float(np.mean(2 * hits[parts > 0] / parts[parts > 0]))}
        measures = [Measure.share("eval_accuracy", (guessed == hot).all(1))]
        said, true = ([[names[i] for i in np.flatnonzero(row)] for row in x] for x in (guessed, hot))
        if problem_type != MULTI:
            said, true = ([one[0] for one in x] for x in (said, true))
    measures = [Measure.ratio("eval_loss", losses, np.ones(len(rows))), *measures]
    figures = {measure.name: measure.value for measure in measures} | figures | {"eval_num_documents": len(rows)}
    predictions = [
        {"row": int(row) + 1, "label": label, "predicted": guess, "loss": float(loss)}
        for row, label, guess, loss in zip(rows, true, said, losses, strict=True)
    ]
    return Outcome(figures, tuple(measures), predictions)
