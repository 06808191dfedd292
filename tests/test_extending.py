"""What docs/extending.md promises: a family, a leaf with its method, a number format and an objective from outside.

Each is a few lines here, registered under a name, and trained with through `tpu_tune.train`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import helpers_training as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpu_tune
from tpu_tune.checkpoints.methods import METHODS
from tpu_tune.models import FAMILIES
from tpu_tune.models.families.llama import llama
from tpu_tune.tensors import FORMATS, Format, LeafSpec, dense, embed, matmul, unembed
from tpu_tune.training.objectives import OBJECTIVES

# --- a family: a function from config.json to an Architecture -------------------------------------------------------


def scaled_llama(config):
    """A Llama that scales its embedding and caps its logits."""
    return dataclasses.replace(llama(config), embed_scale=2.0, logit_soft_cap=30.0)


# --- a leaf: IA3 (arXiv:2205.05638), a learned factor on each output; and the method that puts it in the tree --------


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "factor"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ScaledTensor:
    """base, each output column times a learned factor, (..., out)."""

    base: Any
    factor: jax.Array

    def matmul(self, x):
        return matmul(x, self.base) * self.factor.astype(x.dtype)

    def embed(self, ids, dtype):
        return embed(ids, self.base, dtype) * self.factor.astype(dtype)

    def unembed(self, x):
        return unembed(x, self.base)

    def dense(self):
        return dense(self.base) * self.factor[..., None, :]


@dataclasses.dataclass(frozen=True)
class Ia3:
    """Train the factors of some modules."""

    modules: tuple
    saved = ()
    is_random = False

    def init(self, params, key):
        return {f"{module.path}.ia3": jnp.ones((*module.stack, module.shape[1])) for module in self.modules}

    def split(self, params, adapters=None):
        return dict(adapters), dict(params)

    def combine(self, trainable, frozen, dropout_key=None):
        scaled = {
            module.weight: ScaledTensor(frozen[module.weight], trainable[f"{module.path}.ia3"])
            for module in self.modules
        }
        return {**frozen, **scaled}

    def leaves(self, base):
        return {f"{module.path}.ia3": LeafSpec((module.axes[1],), bool(module.layers)) for module in self.modules}

    def num_parameters(self, trainable):
        return sum(leaf.size for leaf in trainable.values())


def ia3(config, arch, added_tokens):
    """Build the method for one model: keys, values and the MLP's output, as in the paper."""
    names = ("k_proj", "v_proj", "down_proj")
    return Ia3(tuple(module for module in arch.modules() if module.path.endswith(names))), None


# --- an objective: cross-entropy with a penalty on the size of the logits (PaLM's z-loss, arXiv:2204.02311) ----------


@dataclasses.dataclass(frozen=True)
class WithZLoss:
    """Cross-entropy + 1e-2 * log(Z)^2, mean over target tokens."""

    unit = "tokens"
    is_likelihood = False

    def weight(self, batch):
        return jnp.sum(batch["targets"] != -100)

    def __call__(self, head, hidden, batch):
        logits, targets = head(hidden).astype(jnp.float32), batch["targets"]
        log_z = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        is_target = targets != -100
        z_loss = jnp.sum(jnp.where(is_target, log_z**2, 0.0))
        return jnp.sum(jnp.where(is_target, log_z - chosen, 0.0)) + 1e-2 * z_loss, {
            "z_loss": (z_loss, self.weight(batch))
        }


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "scaled_llama", scaled_llama)
    monkeypatch.setitem(METHODS, "ia3", ia3)
    monkeypatch.setitem(OBJECTIVES, "z-loss", lambda config, chunk: WithZLoss())
    # --- a number format: one bit of sign in a byte -------------------------------------------------------------------
    sign = Format(8, lambda x: (x > 0).astype(jnp.uint8), lambda codes: codes.astype(jnp.float32) * 2 - 1)
    monkeypatch.setitem(FORMATS, "sign", sign)


def settings(folder: pathlib.Path, **keys: Any) -> Any:
    defaults = {
        "model__path": str(helpers.write_tiny_llama(folder / "model", model_type="scaled_llama")),
        "model__dtype": "float32",
        "output_dir": str(folder / "run"),
        "data__train": str(helpers.write_rows(folder / "rows.jsonl", 16)),
        "data__cache_dir": str(folder / "cache"),
        "data__max_length": 64,
        "data__num_workers": 1,
        "train__learning_rate": 1e-2,
        "train__max_steps": 4,
        "train__logging_steps": 1,
        "train__per_device_train_batch_size": 1,
    }
    return helpers.make_config(**{**defaults, **keys})


def test_a_family_a_leaf_and_an_objective_from_outside_train_together(tmp_path: pathlib.Path) -> None:
    run = tpu_tune.train(settings(tmp_path, method="ia3", objective__name="z-loss"))
    losses = [row["loss"] for row in run.metrics if "loss" in row]
    assert (
        len(losses) == 4 and losses[-1] < losses[0] and all(row["z_loss"] > 0 for row in run.metrics if "loss" in row)
    )
    # The result is a merged model in the family's own names, which loads and differs from the base.
    ids = np.arange(2 * 16).reshape(2, 16)
    before, after = (np.asarray(tpu_tune.load(path)(ids)) for path in (str(tmp_path / "model"), run.result_dir))
    assert pathlib.Path(run.result_dir).name == "model" and np.abs(before - after).max() > 1e-4
    assert np.abs(before).max() <= 30  # the family's cap


def test_a_run_with_a_leaf_from_outside_resumes_where_it_stopped(tmp_path: pathlib.Path) -> None:
    keys = {
        "method": "ia3",
        "train__save_strategy": "steps",
        "train__save_steps": 2,
        "train__lr_scheduler_type": "constant",
    }
    whole = tpu_tune.train(settings(tmp_path / "whole", **keys))
    first = settings(tmp_path / "cut", **keys)
    first.train.max_steps = 2
    tpu_tune.train(first)
    resumed = tpu_tune.train(settings(tmp_path / "cut", **keys))
    losses = [[row["loss"] for row in run.metrics if "loss" in row] for run in (resumed, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_leaf_from_outside_lies_over_quantized_weights(tmp_path: pathlib.Path) -> None:
    keys = {"quantize__format": "nf4", "quantize__group_size": 16, "mesh__fsdp": 4, "mesh__data": 2}
    config = settings(tmp_path, method="ia3", model__remat="full", **keys)
    model, steps = helpers.prepare(config, 2, 8)
    alone = settings(tmp_path, method="ia3", model__remat="full", **{**keys, "mesh__fsdp": 1, "mesh__data": 1})
    alone.train.per_device_train_batch_size = 8
    single, single_steps = helpers.prepare(alone, 2)
    batch = helpers.window(helpers.rows_of([[one] for one in helpers.documents(24, 6, 24, 8, 0)], 24), 1)
    losses = [
        [row["loss"] for row in helpers.run_steps(*both, [batch] * 2)[1]]
        for both in ((model, steps), (single, single_steps))
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_number_format_from_outside_quantizes(tmp_path: pathlib.Path) -> None:
    folder = str(helpers.write_tiny_llama(tmp_path / "model"))
    model, plain = tpu_tune.load(folder, quantize="sign"), tpu_tune.load(folder)
    path = "model.layers.self_attn.q_proj.weight"
    kernel, found = np.asarray(plain.params[path]), np.asarray(dense(model.params[path]))
    assert model.params[path].codes.dtype == jnp.uint8 and found.shape == kernel.shape
    np.testing.assert_array_equal(np.sign(found[kernel != 0]), np.sign(kernel[kernel != 0]))
    assert np.isfinite(np.asarray(model(np.arange(8)[None]))).all()
