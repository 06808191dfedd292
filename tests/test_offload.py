"""Host memory: layer inputs and optimizer state that wait there change no number, and a run may change its mind."""

from __future__ import annotations

import pathlib
from typing import Any

import helpers_training as helpers
import jax
import numpy as np
import pytest

from tpu_tune.checkpoints.run_checkpoints import RunCheckpoints

WIDTH = 24


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
        "lora__target_modules": ["q_proj", "down_proj"],
    }
    return helpers.make_config(**{**defaults, **keys})


def batches(count: int) -> list[dict[str, np.ndarray]]:
    found = []
    for seed in range(count):
        rows = helpers.rows_of([[one] for one in helpers.documents(24, 3, WIDTH, 2, seed)], WIDTH)
        found.append(helpers.window(rows, 1))
    return found


def kinds(tree: Any) -> set[str]:
    """Return the memories of the matrices of a tree with stacked layers."""
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim > 2}


def counters(state: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(state) if np.issubdtype(leaf.dtype, np.integer) and leaf.ndim < 2]


def trained(tiny: pathlib.Path, devices: int = 1, **keys: Any) -> tuple[Any, list[dict[str, float]]]:
    model, steps = helpers.prepare(settings(tiny, **keys), 3, devices)
    return helpers.run_steps(model, steps, batches(3))


def assert_close(one: Any, other: Any) -> None:
    """Adam divides a gradient by its own size: one that is nothing but rounding moves a weight like any other."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, other)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_layer_inputs_on_the_host_change_no_number(tiny: pathlib.Path, method: str) -> None:
    model, steps = helpers.prepare(settings(tiny, method=method, model__remat="offload"), 3)
    batch = steps.put_batch(batches(1)[0], 1)
    program = str(jax.make_jaxpr(steps.train)(steps.initial_state, model.frozen, batch))
    layers = model.architecture.num_layers
    assert f"f32<host>[{layers},2,{WIDTH},{model.architecture.hidden_size}]" in program
    state, rows = helpers.run_steps(model, steps, batches(3))
    expected, expected_rows = trained(tiny, method=method, model__remat="full")
    assert_close(state.trainable, expected.trainable)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected_rows], rel=1e-6)


@pytest.mark.parametrize(
    ("method", "optim"),
    [
        ("full", "adamw"),
        ("lora", "adamw_8bit"),
        ("lora", "adafactor"),
        ("lora", "muon"),
        pytest.param("full", "schedule_free_adamw", marks=pytest.mark.slow),
    ],
)
def test_optimizer_state_on_the_host_changes_no_number(tiny: pathlib.Path, method: str, optim: str) -> None:
    keys = {"method": method, "train__optim": optim, "train__weight_decay": 0.1}
    expected, expected_rows = trained(tiny, **keys)
    state, rows = trained(tiny, train__optim_offload=True, **keys)
    if optim in ("adamw", "adamw_8bit"):
        assert kinds(state.opt_state) == {"pinned_host"} and kinds(expected.opt_state) == {"device"}
    assert kinds(state.trainable) == {"device"}
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected_rows], rel=1e-6)
    assert_close(state.trainable, expected.trainable)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(expected.opt_state)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), *(counters(one) for one in (state, expected)))


def test_state_on_the_host_is_cut_over_a_mesh_as_its_weights_are(tiny: pathlib.Path) -> None:
    keys = {"method": "full", "mesh__fsdp": 2, "mesh__tensor": 2}
    expected, _ = trained(tiny, 4, **keys)
    state, _ = trained(tiny, 4, train__optim_offload=True, **keys)
    specs = [[leaf.sharding.spec for leaf in jax.tree.leaves(one.opt_state)] for one in (state, expected)]
    assert specs[0] == specs[1] and kinds(state.opt_state) == {"pinned_host"}
    assert_close((state.trainable, state.opt_state), (expected.trainable, expected.opt_state))


@pytest.mark.parametrize("before", [False, True])
def test_a_checkpoint_restores_with_and_without(tiny: pathlib.Path, tmp_path: pathlib.Path, before: bool) -> None:
    keys = {"method": "lora", "train__optim": "adamw"}
    expected, expected_rows = trained(tiny, **keys)
    model, steps = helpers.prepare(settings(tiny, train__optim_offload=before, **keys), 3)
    state, _ = helpers.run_steps(model, steps, batches(3)[:2])
    with RunCheckpoints(str(tmp_path), "base") as checkpoints:
        checkpoints.save(2, state, {})
        checkpoints.wait()
        model, steps = helpers.prepare(settings(tiny, train__optim_offload=not before, **keys), 3)
        state, _ = checkpoints.restore(steps.initial_state)
    assert kinds(state.opt_state) == {"device" if before else "pinned_host"}
    state, rows = helpers.run_steps(model, steps, batches(3)[2:], state)
    assert rows[0]["loss"] == pytest.approx(expected_rows[2]["loss"], rel=1e-6)
    assert_close((state.trainable, state.opt_state), (expected.trainable, expected.opt_state))
