"""The training step: accumulation, failures, precision, what is trained and what stays as it was."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import helpers_training as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_tune import UserError
from tpu_tune.tensors import LoraTensor
from tpu_tune.training import loop
from tpu_tune.training.loss_scale import LossScale

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
        "train__max_grad_norm": 1.0,
    }
    return helpers.make_config(**{**defaults, **keys})


def ragged_rows(count: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    return helpers.rows_of([[one] for one in helpers.documents(24, 3, WIDTH, count, seed)], WIDTH)


def batches_of(count: int, rows: int = 2) -> list[dict[str, np.ndarray]]:
    return [helpers.window(ragged_rows(rows, seed), 1) for seed in range(count)]


def assert_trees_equal(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


# --- accumulation -----------------------------------------------------------------------------------------------------


def test_accumulation_over_ragged_rows_changes_nothing(tiny: pathlib.Path) -> None:
    """1 x 8 rows, 4 x 2 rows, and 6 x 2 rows of which the last two micro-batches are empty."""
    rows = ragged_rows()
    empty = {name: np.full_like(array[:4], -100 if name == "targets" else 0) for name, array in rows.items()}
    longer = {name: np.concatenate([array, empty[name]]) for name, array in rows.items()}
    # Plain gradient descent: Adam would blow up rounding where a gradient is nearly zero.
    model, steps = helpers.prepare(settings(tiny, train__optim="sgd", train__learning_rate=0.1), 2)
    results = []
    for held, accumulation in ((rows, 1), (rows, 4), (longer, 6)):
        state = jax.tree.map(jnp.copy, steps.initial_state)
        state, metrics = helpers.run_steps(model, steps, [helpers.window(held, accumulation)] * 2, state)
        results.append((state, metrics))
    (state, metrics), *others = results
    assert metrics[0]["weight"] == (rows["targets"] != -100).sum()
    for other, other_metrics in others:
        for name in ("loss", "grad_norm", "weight", "num_tokens", "token_accuracy", "finite"):
            assert other_metrics[1][name] == pytest.approx(metrics[1][name], rel=1e-5), name
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.trainable, other.trainable
        )


def test_a_window_without_targets_changes_nothing(tiny: pathlib.Path) -> None:
    model, steps = helpers.prepare(settings(tiny, train__optim="sgd"), 2)
    before = jax.tree.map(np.asarray, steps.initial_state.trainable)
    batch = {name: np.full((1, 2, WIDTH), -100 if name == "targets" else 0, np.int32) for name in ragged_rows()}
    state, metrics = helpers.run_steps(model, steps, [batch])
    assert metrics[0]["finite"] == 1 and metrics[0]["loss"] == 0
    assert_trees_equal(before, state.trainable)


def test_the_first_step_of_a_warm_up_changes_nothing(tiny: pathlib.Path) -> None:
    model, steps = helpers.prepare(settings(tiny, train__lr_scheduler_type="linear", train__warmup_steps=2), 4)
    before = jax.tree.map(np.asarray, steps.initial_state.trainable)
    state, metrics = helpers.run_steps(model, steps, batches_of(1))
    assert metrics[0]["learning_rate"] == 0 and metrics[0]["grad_norm"] > 0
    assert_trees_equal(before, state.trainable)
    state, metrics = helpers.run_steps(model, steps, batches_of(1), state)
    assert metrics[0]["learning_rate"] == pytest.approx(5e-3)
    assert any(np.any(before[path] != np.asarray(leaf)) for path, leaf in state.trainable.items())


# --- what is not finite -----------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_counted_and_makes_no_update(tiny: pathlib.Path) -> None:
    model, steps = helpers.prepare(settings(tiny), 4)
    state, _ = helpers.run_steps(model, steps, batches_of(1))
    before = jax.tree.map(np.asarray, state)
    broken = dataclasses.replace(
        model, frozen={**model.frozen, "model.norm.weight": model.frozen["model.norm.weight"] * jnp.nan}
    )
    state, metrics = helpers.run_steps(broken, steps, batches_of(2), state)
    assert [row["failures"] for row in metrics] == [1, 2] and [row["finite"] for row in metrics] == [0, 0]
    assert (int(state.step), int(state.updates), int(state.failures)) == (3, 1, 2)
    assert_trees_equal((before.trainable, before.opt_state), (state.trainable, state.opt_state))
    state, metrics = helpers.run_steps(model, steps, batches_of(1), state)
    assert (int(state.updates), int(state.failures), metrics[0]["failures"]) == (2, 0, 0)


def test_too_many_failures_end_the_run_with_a_clear_message(tiny: pathlib.Path, tmp_path: pathlib.Path) -> None:
    huge = helpers.write_tiny_llama(tmp_path / "model")
    from safetensors.numpy import load_file, save_file

    tensors = load_file(huge / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(np.inf)
    save_file(tensors, str(huge / "model.safetensors"), metadata={"format": "pt"})
    config = loop_settings(huge, tmp_path, train__max_nonfinite_steps=3, train__max_steps=8)
    with pytest.raises(UserError, match="not finite in 3 steps in a row, up to step 3; no update was made"):
        loop.train(config, say=lambda line: None)


def loop_settings(model: pathlib.Path, folder: pathlib.Path, **keys: Any) -> Any:
    data = helpers.write_rows(folder / "rows.jsonl", 40)
    return settings(
        model,
        output_dir=str(folder / "out"),
        data__train=str(data),
        data__cache_dir=str(folder / "cache"),
        data__max_length=64,
        data__num_workers=1,
        data__eval_ratio=0.0,
        train__per_device_train_batch_size=1,
        train__logging_steps=1,
        train__save_strategy="no",
        **keys,
    )


# --- precision --------------------------------------------------------------------------------------------------------


def test_float16_searches_its_loss_scale_without_counting_failures(tiny: pathlib.Path) -> None:
    model, steps = helpers.prepare(settings(tiny, model__dtype="float16"), 40)
    wide = dataclasses.replace(steps.initial_state, loss_scale=LossScale(jnp.float32(2.0**40), jnp.int32(0)))
    state, metrics = helpers.run_steps(model, steps, batches_of(1) * 40, wide)
    overflows = [row["finite"] == 0 for row in metrics]
    assert overflows[0] and not any(overflows[30:])
    assert all(row["failures"] == 0 for row in metrics) and int(state.failures) == 0
    assert int(state.updates) == 40 - sum(overflows)
    assert float(state.loss_scale.scale) == 2.0 ** (40 - sum(overflows))
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert all(leaf.dtype == jnp.float32 for leaf in state.trainable.values())


def test_float16_failures_count_once_the_scale_can_shrink_no_further(tiny: pathlib.Path) -> None:
    model, steps = helpers.prepare(settings(tiny, model__dtype="float16"), 4)
    state = dataclasses.replace(steps.initial_state, loss_scale=LossScale(jnp.float32(2.0), jnp.int32(0)))
    broken = dataclasses.replace(
        model, frozen={**model.frozen, "model.norm.weight": model.frozen["model.norm.weight"] * jnp.nan}
    )
    state, metrics = helpers.run_steps(broken, steps, batches_of(3), state)
    assert [row["failures"] for row in metrics] == [0, 1, 2] and float(state.loss_scale.scale) == 1.0


def test_bfloat16_keeps_trained_leaves_and_moments_in_float32(tiny: pathlib.Path) -> None:
    for method in ("lora", "full"):
        model, steps = helpers.prepare(settings(tiny, model__dtype="bfloat16", method=method), 2)
        state, metrics = helpers.run_steps(model, steps, batches_of(1))
        kinds = {leaf.dtype for leaf in jax.tree.leaves((state.trainable, state.opt_state)) if leaf.ndim}
        assert kinds == {jnp.dtype("float32")}
        assert np.isfinite(metrics[0]["loss"]) and metrics[0]["finite"] == 1
        assert all(leaf.dtype == jnp.bfloat16 for leaf in model.frozen.values())


# --- what is trained --------------------------------------------------------------------------------------------------


def test_frozen_leaves_stay_bit_equal_and_the_optimizer_sees_none(tiny: pathlib.Path) -> None:
    model, steps = helpers.prepare(settings(tiny, quantize__format="nf4", quantize__group_size=16), 3)
    before = jax.tree.map(np.asarray, model.frozen)
    initial = jax.tree.map(np.asarray, steps.initial_state.trainable)
    state, _ = helpers.run_steps(model, steps, batches_of(3))
    assert_trees_equal(before, model.frozen)
    assert all(np.any(initial[path] != np.asarray(leaf)) for path, leaf in state.trainable.items())
    assert all(".lora_" in path for path in state.trainable)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * model.num_trainable


@pytest.mark.parametrize(
    "optim", ["adamw", "adamw_8bit", "adafactor", "sgd", "lion", "muon", "schedule_free_adamw", "adamw_bnb_8bit"]
)
def test_every_optimizer_lowers_the_loss(tiny: pathlib.Path, optim: str) -> None:
    rate = {"sgd": 1.0, "lion": 3e-3}.get(optim, 1e-2)
    config = settings(tiny, train__optim=optim, train__learning_rate=rate, train__weight_decay=0.01)
    model, steps = helpers.prepare(config, 6)
    state, metrics = helpers.run_steps(model, steps, batches_of(1) * 6)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) <= 2.2 * model.num_trainable + 4096


# --- dropout and remat ------------------------------------------------------------------------------------------------


def test_dropout_differs_between_layers_leaves_and_steps_and_comes_back(tiny: pathlib.Path) -> None:
    config = settings(tiny, lora__dropout=0.5, train__learning_rate=0.0, train__optim="sgd")
    model, steps = helpers.prepare(config, 4)
    params = model.method.combine(model.trainable, model.frozen, jax.random.key(1))
    keys = [jax.random.key_data(leaf.key) for leaf in params.values() if isinstance(leaf, LoraTensor)]
    flat = np.concatenate([np.asarray(key).reshape(-1, 2) for key in keys])
    assert len(flat) == 7 * 2 and len(np.unique(flat, axis=0)) == len(flat)

    # B is zero at first, so that only its gradient feels the dropout.
    batch = batches_of(1) * 3
    _, first = helpers.run_steps(model, steps, batch, jax.tree.map(jnp.copy, steps.initial_state))
    _, again = helpers.run_steps(model, steps, batch)
    assert first == again
    norms = [row["grad_norm"] for row in first]
    assert len(set(norms)) == 3, "each step draws its own"
    other, other_steps = helpers.prepare(
        settings(tiny, lora__dropout=0.5, train__learning_rate=0.0, train__optim="sgd", seed=43), 4
    )
    assert set(norms).isdisjoint(row["grad_norm"] for row in helpers.run_steps(other, other_steps, batch)[1])


def test_micro_batches_draw_different_dropout(tiny: pathlib.Path) -> None:
    config = settings(tiny, lora__dropout=0.5, train__learning_rate=0.0, train__optim="sgd", train__max_grad_norm=0.0)
    model, steps = helpers.prepare(config, 4)
    rows = ragged_rows(2)
    twice = {name: np.stack([array, array]) for name, array in rows.items()}
    _, one = helpers.run_steps(model, steps, [helpers.window(rows, 1)], jax.tree.map(jnp.copy, steps.initial_state))
    _, two = helpers.run_steps(model, steps, [twice])
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)  # B is zero: the loss does not feel the dropout
    assert abs(two[0]["grad_norm"] - one[0]["grad_norm"]) > 1e-4 * one[0]["grad_norm"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_remat_changes_neither_loss_nor_gradient(tiny: pathlib.Path, method: str) -> None:
    found = []
    for remat in ("none", "full", "dots"):
        config = settings(tiny, model__remat=remat, method=method, train__optim="sgd", lora__dropout=0.1)
        model, steps = helpers.prepare(config, 2)
        state, metrics = helpers.run_steps(model, steps, batches_of(2))
        found.append((state.trainable, [row["loss"] for row in metrics], [row["grad_norm"] for row in metrics]))
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found[0], other)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_the_backward_pass_keeps_no_second_stack_of_the_codes(tiny: pathlib.Path, remat: str) -> None:
    config = settings(tiny, model__remat=remat, quantize__format="nf4")
    model, steps = helpers.prepare(config, 2)
    batch = steps.put_batch(batches_of(1)[0], 1)
    jaxpr = jax.make_jaxpr(steps.train)(steps.initial_state, model.frozen, batch).jaxpr
    scans = list(scans_of(jaxpr))
    assert sum(any(var.aval.dtype == jnp.uint8 for var in scan.invars) for scan in scans) == 2, "forward and backward"
    assert not any(var.aval.dtype == jnp.uint8 for scan in scans for var in scan.outvars)


def scans_of(jaxpr: Any) -> Iterator[Any]:
    """Yield every scan of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from scans_of(inner)
