"""Perplexity of a model on data as the trainer reads it: the same formats, the same mask, row by row.

The loss is the mean over the tokens that training would train on (an answer's, an assistant's words; every token of a
text), in nats; perplexity is its exponential. Of plain text there are also bits per byte, which models with different
tokenizers can be compared by.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tpu_tune.data import load_data
from tpu_tune.data.loading import PackedRows
from tpu_tune.data.mixture import resolve_all
from tpu_tune.data.pairs import PairRows
from tpu_tune.data.sources import read_rows
from tpu_tune.errors import UserError
from tpu_tune.inference.model import Model
from tpu_tune.inference.scoring import IGNORED, Row, score
from tpu_tune.training.tasks.intervals import Measure, Outcome


def score_perplexity(model: Model, config: ConfigDict, limit: int = 0) -> Outcome:
    """Score the evaluation rows of a configuration.

    Args:
      model: any model; an encoder-decoder is scored on its answers.
      config: a configuration whose `data` says what to read and how; `data.eval`, or the split of `data.train` that
        training holds out.
      limit: only the first so many rows; 0 for all.

    Returns:
      `eval_loss`, `eval_perplexity`, `eval_token_accuracy`, `eval_num_tokens`, as training logs them; of text rows
      `bits_per_byte` too. The predictions hold a row's number and its loss.

    Raises:
      UserError: data that cannot be read, or nothing to score.
    """
    arch = model.architecture
    data = load_data(config, model.tokenizer, arch.vocab_size, arch.start_token if arch.encoder else None)
    if data.eval is None:
        raise UserError("there are no rows to evaluate on; set data.eval, or data.eval_ratio above 0")
    documents = np.sort(data.eval.documents)
    source_rows = data.eval.data.source_rows[documents]
    if limit:
        documents = documents[np.isin(source_rows, np.unique(source_rows)[:limit])]
        source_rows = data.eval.data.source_rows[documents]
    rows = [_row(data.eval, int(number), arch.start_token) for number in documents]
    scores = score(model, rows)
    losses, counts = -scores.log_likelihood, scores.num_targets
    loss = Measure.ratio("eval_loss", losses, counts)
    measures = [loss]
    figures: dict[str, Any] = {
        "eval_loss": loss.value,
        "eval_perplexity": math.exp(loss.value) if loss.value < 700 else math.inf,
        "eval_token_accuracy": float(scores.num_right.sum() / counts.sum()),
        "eval_num_tokens": int(counts.sum()),
    }
    sizes = _text_bytes(config, data.summary["eval"]["format"])
    if sizes is not None:
        kept, groups = np.unique(source_rows, return_inverse=True)  # a long text's pieces are one text
        nats = np.bincount(groups, losses)
        measures.append(Measure.ratio("bits_per_byte", nats / math.log(2), sizes[kept]))
        figures["bits_per_byte"] = measures[-1].value
    predictions = [
        {"row": int(row) + 1, "loss": float(total / count), "tokens": int(count)}
        for row, total, count in zip(source_rows, losses, counts, strict=True)
    ]
    return Outcome(figures, tuple(measures), predictions)


def _row(rows: PackedRows | PairRows, number: int, start_token: int) -> Row:
    data = rows.data
    at = slice(int(data.offsets[number]), int(data.offsets[number + 1]))
    tokens, mask = data.tokens[at], data.loss_mask[at]
    if isinstance(rows, PairRows):
        answer = tokens[mask]
        return Row([start_token, *answer[:-1]], answer, tokens[~mask])
    return Row(tokens[:-1], np.where(mask[1:], tokens[1:], IGNORED))


def _text_bytes(config: ConfigDict, format: str) -> np.ndarray | None:
    """Bytes of each row's text, or None where not all of the text is scored."""
    data = config.data
    if format != "text" or data.response_markers:
        return None
    train, held_out = resolve_all(data.train)
    if data.eval:
        named, named_eval = resolve_all(data.eval, "data.eval")
        held_out = named_eval or named
    column = next((old for old, new in data.columns.items() if new == "text"), "text")
    rows = [row for source in held_out or train for row in read_rows(source, skip_bad_rows=data.skip_bad_rows)[0]]
    texts = [str(row.get(column, row.get("text", ""))) for row in rows]
    return np.array([len(text.encode("utf-8", "replace")) for text in texts], float)
