"""NEFTune, LoRA+, keeping the best and stopping early, each against its definition."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil
from typing import Any

import helpers_training as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_tune import UserError
from tpu_tune import config as configuration
from tpu_tune.tensors import LeafSpec
from tpu_tune.training import loop, neftune, stopping
from tpu_tune.training.optimizers import loraplus_factor, make_optimizer

WIDTH = 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return helpers.write_tiny_llama(tmp_path_factory.mktemp("model"))


def settings(tiny: pathlib.Path, **keys: Any) -> Any:
    defaults = {
        "model__path": str(tiny),
        "model__dtype": "float32",
        "lora__rank": 4,
        "train__lr_scheduler_type": "constant",
        "train__learning_rate": 1e-2,
    }
    return helpers.make_config(**{**defaults, **keys})


# --- NEFTune ----------------------------------------------------------------------------------------------------------


def test_neftune_is_uniform_noise_bounded_by_the_length_of_the_document() -> None:
    alpha, width = 5.0, 64
    segments = np.array([[1] * 10 + [2] * 40 + [0] * 14, [1] * 64])
    clean = np.zeros((2, 64, width), np.float32)
    noisy = np.asarray(neftune.noise(jax.random.key(0), alpha, jnp.asarray(segments))(jnp.asarray(clean)))
    assert not noisy[0, 50:].any()  # padding
    for row, part, length in ((0, slice(0, 10), 10), (0, slice(10, 50), 40), (1, slice(0, 64), 64)):
        bound, found = alpha / math.sqrt(length * width), noisy[row, part]
        assert np.abs(found).max() <= bound and np.abs(found).max() > 0.98 * bound
        assert abs(found.mean()) < 5 * bound / math.sqrt(3 * found.size)
        np.testing.assert_allclose(found.std(), bound / math.sqrt(3), rtol=0.05)


def test_neftune_has_the_spread_of_transformers_hook() -> None:
    torch = pytest.importorskip("torch")
    from transformers.integrations.neftune import neftune_post_forward_hook

    module = torch.nn.Embedding(8, 32)
    module.neftune_noise_alpha = 10.0
    module.train()
    output = neftune_post_forward_hook(module, None, torch.zeros(4, 50, 32)).numpy()
    ours = neftune.noise(jax.random.key(1), 10.0, jnp.ones((4, 50), jnp.int32))(jnp.zeros((4, 50, 32)))
    np.testing.assert_allclose(np.abs(ours).max(), np.abs(output).max(), rtol=0.01)
    np.testing.assert_allclose(np.std(ours), output.std(), rtol=0.05)


def test_neftune_is_in_training_only_and_new_in_every_step(tiny: pathlib.Path) -> None:
    rows = helpers.rows_of([[one] for one in helpers.documents(24, 6, WIDTH, 4, 0)], WIDTH)
    # A learning rate of zero, so that only the noise can change the loss from step to step.
    losses, evals = {}, {}
    for alpha in (0.0, 20.0):
        config = settings(tiny, train__learning_rate=0.0, train__neftune_noise_alpha=alpha)
        model, steps = helpers.prepare(config, 3)
        sums = steps.evaluate(model.trainable, model.frozen, steps.put_batch(rows, 0))
        evals[alpha] = float(sums["loss"][0])
        _, metrics = helpers.run_steps(model, steps, [helpers.window(rows, 1)] * 3)
        losses[alpha] = [row["loss"] for row in metrics]
    assert evals[0.0] == evals[20.0]
    assert len(set(losses[0.0])) == 1 and len({*losses[20.0], losses[0.0][0]}) == 4


# --- LoRA+ ------------------------------------------------------------------------------------------------------------


def test_loraplus_rates_are_pefts(tiny: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    names = ["q_proj", "down_proj", "embed_tokens"]
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny), peft.LoraConfig(r=4, target_modules=names, modules_to_save=["norm"])
    )
    from peft.optimizers import create_loraplus_optimizer

    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    rate_of = {id(leaf): group["lr"] for group in optimizer.param_groups for leaf in group["params"]}
    wanted = {}
    for name, leaf in theirs.named_parameters():
        if leaf.requires_grad:
            path = name.removeprefix("base_model.model.").replace(".default", "").replace("lora_embedding_", "lora_")
            path = path.replace(".modules_to_save", "").replace("layers.0.", "layers.").replace("layers.1.", "layers.")
            wanted[path.removesuffix(".weight") if ".lora_" in path else path] = rate_of[id(leaf)]

    config = settings(
        tiny,
        lora__target_modules=names,
        lora__modules_to_save=["norm"],
        train__learning_rate=1e-3,
        train__loraplus_lr_ratio=16.0,
        train__optim="sgd",
        train__max_grad_norm=0.0,
    )
    model, _ = helpers.prepare(config, 2)
    factor = loraplus_factor(config.train, model.specs)
    found = {path: 1e-3 * factor(path) for path in model.trainable}
    assert set(found) == set(wanted)
    for path, rate in wanted.items():
        np.testing.assert_allclose(found[path], rate, rtol=1e-6, err_msg=path)


def test_loraplus_multiplies_the_whole_update(tiny: pathlib.Path) -> None:
    train = configuration.default().train
    train.weight_decay = 0.1
    random = np.random.default_rng(0)
    names = ("model.layers.q_proj.lora_A", "model.layers.q_proj.lora_B", "model.embed_tokens.lora_B", "head.bias")
    params, grads = ({name: jnp.asarray(random.normal(size=(3, 4)), jnp.float32) for name in names} for _ in "ab")
    matrix = LeafSpec(("embed", "mlp"))
    specs = {
        names[0]: matrix,
        names[1]: dataclasses.replace(matrix, lora_plus="ratio"),
        names[2]: dataclasses.replace(matrix, lora_plus="embedding"),
        names[3]: LeafSpec((None,)),
    }

    def updates(ratio):
        train.loraplus_lr_ratio = ratio
        optimizer = make_optimizer(train, lambda count: jnp.float32(0.25), specs)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    plain, scaled = updates(0.0), updates(8.0)
    for name, times in zip(names, (1.0, 8.0, 1e-6 / train.learning_rate, 8.0), strict=True):
        np.testing.assert_allclose(scaled[name], plain[name] * times, rtol=1e-6)


def test_loraplus_learns_faster_and_needs_adapters(tiny: pathlib.Path) -> None:
    rows = helpers.window(helpers.rows_of([[one] for one in helpers.documents(24, 6, WIDTH, 4, 0)], WIDTH), 1)
    last = {}
    for ratio in (0.0, 8.0):
        config = settings(tiny, train__loraplus_lr_ratio=ratio, train__learning_rate=1e-3)
        _, metrics = helpers.run_steps(*helpers.prepare(config, 6), [rows] * 6)
        last[ratio] = metrics[-1]["loss"]
    assert last[8.0] < last[0.0]
    with pytest.raises(UserError, match="loraplus_lr_ratio.*method=lora"):
        settings(tiny, method="full", train__loraplus_lr_ratio=2.0)


# --- the best, and stopping early -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.5])
def test_patience_is_transformers(threshold: float) -> None:
    torch = pytest.importorskip("torch")  # transformers' Trainer wants it
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

    del torch
    random = np.random.default_rng(3)
    losses = [*(2.0 - 0.1 * np.arange(6) + random.normal(0, 0.06, 6)), math.nan, 1.2, 1.19, 1.5, 0.4, 0.4]
    callback = EarlyStoppingCallback(early_stopping_patience=99, early_stopping_threshold=threshold)
    args = TrainingArguments(output_dir="unused", metric_for_best_model="eval_loss", greater_is_better=False)
    state, best, count = TrainerState(), math.inf, 0
    for loss in losses:
        callback.check_metric_value(args, state, TrainerControl(), loss)
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric = loss
        better, anew = stopping.judge(loss, best, threshold)
        best, count = (loss if better else best), (0 if anew else count + 1)
        assert (best, count) == (state.best_metric, callback.early_stopping_patience_counter)


@pytest.fixture(scope="module")
def overfitting(tiny: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run on three rows at a rate that soon makes the held-out ones worse; stopped by patience, its best kept."""
    folder = tmp_path_factory.mktemp("run")
    train, held_out = (helpers.write_rows(folder / f"{name}.jsonl", 3, seed) for name, seed in (("a", 1), ("b", 2)))
    config = settings(
        tiny,
        output_dir=str(folder / "out"),
        data__train=str(train),
        data__eval=str(held_out),
        data__packing=False,
        data__cache_dir=str(folder),
        data__max_length=96,
        train__max_steps=60,
        train__learning_rate=3e-2,
        train__per_device_train_batch_size=1,
        train__per_device_eval_batch_size=1,
        train__eval_steps=2,
        train__save_steps=50,
        train__save_total_limit=1,
        train__early_stopping_patience=3,
        train__load_best_model_at_end=True,
    )
    said = []
    return config, loop.train(config, said.append), said


def test_stops_after_patience(overfitting: Any) -> None:
    config, run, said = overfitting
    rows = [row for row in run.metrics if "eval_loss" in row]
    losses = [row["eval_loss"] for row in rows]
    best = int(np.argmin(losses))
    assert run.status == "stopped early" and 0 < best and run.step < 60
    assert best == len(losses) - 1 - config.train.early_stopping_patience
    assert any(f"taking the weights of step {rows[best]['step']}" in line for line in said)


def test_the_best_is_kept_between_the_checkpoints_that_were_asked_for(overfitting: Any) -> None:
    config, run, _ = overfitting
    rows = [row for row in run.metrics if "eval_loss" in row]
    best = min(rows, key=lambda row: row["eval_loss"])
    assert best["step"] % config.train.save_steps  # it was saved for being the best
    again = configuration.from_dict(
        {
            **configuration.to_dict(config),
            "output_dir": config.output_dir + "-best",
            "model": {**configuration.to_dict(config.model), "adapter": run.result_dir},
        }
    )
    again.train.max_steps, again.train.learning_rate, again.train.load_best_model_at_end = 1, 0.0, False
    found = [row for row in loop.train(again, lambda line: None).metrics if "eval_loss" in row]
    np.testing.assert_allclose(found[0]["eval_loss"], best["eval_loss"], rtol=1e-6)
    kept = sorted(
        int(name.name) for name in pathlib.Path(config.output_dir, "checkpoints").iterdir() if name.name.isdigit()
    )
    assert kept == [best["step"], run.step]


def test_the_second_start_says_done(overfitting: Any) -> None:
    config, run, _ = overfitting
    before = pathlib.Path(config.output_dir, "metrics.jsonl").read_text()
    assert loop.train(config, lambda line: None).status == "already finished"
    assert pathlib.Path(config.output_dir, "metrics.jsonl").read_text() == before
    assert json.loads(before.splitlines()[-1])["step"] == run.step


def test_a_run_that_had_stopped_early_writes_its_lost_result_without_another_step(overfitting: Any) -> None:
    config, run, _ = overfitting
    before = pathlib.Path(config.output_dir, "metrics.jsonl").read_text()
    adapter = pathlib.Path(run.result_dir, "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run.result_dir)
    again = loop.train(config, lambda line: None)
    assert (again.status, again.step) == ("stopped early", run.step)
    assert pathlib.Path(run.result_dir, "adapter_model.safetensors").read_bytes() == adapter
    assert pathlib.Path(config.output_dir, "metrics.jsonl").read_text() == before
