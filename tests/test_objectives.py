"""An objective that is not ours: registered from here, named by a config, trained and evaluated with.

It weighs documents where cross-entropy weighs tokens, as a preference loss weighs pairs, and needs each document's
summed log-probability. What training logs is held against the formula, one document at a time, without padding, batches
or accumulation.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import helpers_training as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import log_softmax, softplus

import tpu_tune
from tpu_tune.data import load_data
from tpu_tune.errors import UserError
from tpu_tune.models import Decoder, Execution
from tpu_tune.training.objectives import OBJECTIVES, CrossEntropy
from tpu_tune.training.opening import check_settings
from tpu_tune.training.prepare_model import prepare_model
from tpu_tune.transforms import sharding

ROWS, SLOTS, BETA, RATE = 5, 8, 0.05, 0.3  # SLOTS: at least the documents of a row


@dataclasses.dataclass(frozen=True)
class DocumentSigmoid:
    """softplus(-beta * log p(document)), mean over documents."""

    beta: float
    unit = "documents"
    is_likelihood = False

    def weight(self, batch):
        return jnp.sum((batch["segment_ids"] > 0) & (batch["positions"] == 0))

    def __call__(self, head, hidden, batch):
        counted = batch["targets"] != -100
        chosen = jnp.take_along_axis(log_softmax(head(hidden)), jnp.maximum(batch["targets"], 0)[..., None], -1)[..., 0]
        chosen = jnp.where(counted, chosen, 0.0)
        segments = batch["segment_ids"][..., None] == jnp.arange(1, SLOTS)  # (rows, tokens, documents)
        sums = jnp.einsum("bt,bts->bs", chosen, segments.astype(jnp.float32))
        is_there = segments.any(1)
        loss = jnp.sum(jnp.where(is_there, softplus(-self.beta * sums), 0.0))
        likely = jnp.sum(is_there & (sums > -40.0))
        metrics = {"documents/likely": (likely, jnp.sum(is_there)), "log_prob": (jnp.sum(chosen), jnp.sum(counted))}
        return loss, metrics


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "document-sigmoid", lambda config, chunk: DocumentSigmoid(BETA))


def settings(folder: pathlib.Path, model: pathlib.Path, **keys: Any) -> Any:
    defaults = {
        "model__path": str(model),
        "model__dtype": "float32",
        "output_dir": str(folder / "out"),
        "objective__name": "document-sigmoid",
        "data__train": str(helpers.write_rows(folder / "rows.jsonl", ROWS)),
        "data__eval": str(helpers.write_rows(folder / "held_out.jsonl", 3, seed=1)),
        "data__cache_dir": str(folder / "cache"),
        "data__max_length": 64,
        "data__packing": False,
        "data__num_workers": 1,
        "mesh__fsdp": 1,
        "mesh__data": 1,
        "train__optim": "sgd",
        "train__learning_rate": RATE,
        "train__lr_scheduler_type": "constant",
        "train__max_grad_norm": 0.0,
        "train__max_steps": 2,
        "train__logging_steps": 1,
        "train__save_strategy": "no",
    }
    return helpers.make_config(**{**defaults, **keys})


def by_the_formula(config: Any) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Return each step's loss and metrics, and those of the held-out rows after the last step."""
    model = prepare_model(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    data = load_data(config, model.source.load_tokenizer(), model.architecture.vocab_size)

    def log_probs(trainable: Any, tokens: np.ndarray, mask: np.ndarray) -> jax.Array:
        """Return the log-probability of each token that is trained on."""
        decoder = Decoder(model.architecture, model.method.combine(trainable, model.frozen), Execution(jnp.float32))
        ids = jnp.asarray(tokens[None, :-1])
        places = jnp.arange(ids.shape[1])[None]
        logits = decoder.logits(decoder.hidden(ids, places, jnp.ones_like(ids))[0])
        return log_softmax(logits)[0, np.flatnonzero(mask[1:]), tokens[1:][mask[1:]]]

    def measure(trainable: Any, rows: Any) -> tuple[jax.Array, dict[str, float]]:
        cuts = list(zip(rows.data.offsets[:-1], rows.data.offsets[1:], strict=True))
        documents = [cuts[number] for number in rows.documents]
        found = [log_probs(trainable, rows.data.tokens[a:b], rows.data.loss_mask[a:b]) for a, b in documents]
        sums = jnp.stack([jnp.sum(each) for each in found])
        metrics = {"documents/likely": jnp.mean(sums > -40.0), "log_prob": jnp.mean(jnp.concatenate(found))}
        return jnp.mean(softplus(-BETA * sums)), metrics

    trainable, steps = model.trainable, []
    for _ in range(config.train.max_steps):
        (loss, metrics), grads = jax.value_and_grad(measure, has_aux=True)(trainable, data.train)
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in grads.values()))
        steps.append({"loss": float(loss), "grad_norm": float(norm), **{k: float(v) for k, v in metrics.items()}})
        trainable = {path: leaf - RATE * grads[path] for path, leaf in trainable.items()}
    loss, metrics = measure(trainable, data.eval)
    return steps, {"eval_loss": float(loss), **{f"eval_{name}": float(value) for name, value in metrics.items()}}


@pytest.mark.parametrize(
    ("accumulation", "devices", "rows"),
    [(1, 1, 6), pytest.param(3, 1, 2, marks=pytest.mark.slow), (3, 2, 1)],
    ids=["whole", "accumulated", "two-devices"],
)
def test_an_objective_from_outside_is_exact(
    named: None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, accumulation: int, devices: int, rows: int
) -> None:
    """Five ragged rows in a step with room for six: micro-batches of different weight, and an empty row."""
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda mesh, some=None: make_mesh(mesh, some or jax.devices()[:devices]))
    config = settings(
        tmp_path,
        helpers.write_tiny_llama(tmp_path / "model"),
        mesh__data=devices,
        train__per_device_train_batch_size=rows,
        train__per_device_eval_batch_size=2,
        train__gradient_accumulation_steps=accumulation,
    )
    run = tpu_tune.train(config)
    config.mesh.data = 1
    expected, expected_eval = by_the_formula(config)
    logged = [row for row in run.metrics if "loss" in row]
    assert len({round(step["loss"], 4) for step in expected}) == len(expected) == len(logged)  # it learns
    for row, step in zip(logged, expected, strict=True):
        assert {name: row[name] for name in step} == pytest.approx(step, rel=1e-5)
        assert "token_accuracy" not in row
    held_out = next(row for row in run.metrics if "eval_loss" in row)
    assert {name: held_out[name] for name in expected_eval} == pytest.approx(expected_eval, rel=1e-5)
    assert held_out["eval_num_documents"] == 3
    assert not {"eval_perplexity", "eval_token_accuracy", "eval_num_tokens"} & held_out.keys()


def test_an_unknown_objective_is_named(tmp_path: pathlib.Path) -> None:
    config = helpers.make_config(objective__name="stf")
    with pytest.raises(UserError, match=r"unknown objective.name 'stf'; did you mean 'sft'\? choose among sft"):
        check_settings(config, with_data=False)


def test_a_metric_cannot_take_the_name_of_one_of_the_steps(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clashing(CrossEntropy):
        def __call__(self, head: Any, hidden: Any, batch: Any) -> Any:
            loss, metrics = super().__call__(head, hidden, batch)
            return loss, {**metrics, "grad_norm": (loss, self.weight(batch))}

    monkeypatch.setitem(OBJECTIVES, "clashing", lambda config, chunk: Clashing(chunk))
    config = helpers.make_config(
        model__path=str(helpers.write_tiny_llama(tmp_path / "model")), objective__name="clashing"
    )
    model, steps = helpers.prepare(config, 2)
    rows = helpers.rows_of([[one] for one in helpers.documents(24, 3, 16, 2, 0)], 16)
    with pytest.raises(ValueError, match="Clashing names a metric as the step does: grad_norm"):
        helpers.run_steps(model, steps, [helpers.window(rows, 1)])
