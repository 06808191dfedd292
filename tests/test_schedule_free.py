"""A run with schedule-free AdamW evaluates, keeps and exports the average x, trains y, and goes on exactly.

The update itself is held against its package in `test_optimizers.py`.
"""

from __future__ import annotations

import pathlib
import signal
from typing import Any

import helpers_training as helpers
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tpu_tune.checkpoints.run_checkpoints import read_trainable
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.errors import UserError
from tpu_tune.inference import run_result
from tpu_tune.training import loop
from tpu_tune.training.evaluation import sum_batches
from tpu_tune.training.opening import check_settings, open_session
from tpu_tune.training.prepare_steps import prepare_steps


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = helpers.write_tiny_llama(tmp_path_factory.mktemp("model"))
    helpers.write_rows(folder / "rows.jsonl", 40)
    return folder


def settings(tiny: pathlib.Path, folder: pathlib.Path, **keys: Any) -> Any:
    return helpers.make_config(**{
        "output_dir": str(folder), "model__path": str(tiny), "model__dtype": "float32", "model__remat": "none",
        "data__train": str(tiny / "rows.jsonl"), "data__cache_dir": str(tiny), "data__num_workers": 1,
        "data__max_length": 64, "data__eval_ratio": 0.1, "lora__rank": 2, "lora__target_modules": ["q_proj", "v_proj"],
        "mesh__data": 1, "mesh__fsdp": -1, "seed": 3, "data__data_seed": 3,
        "train__per_device_train_batch_size": 1, "train__per_device_eval_batch_size": 1, "train__max_steps": 6,
        "train__learning_rate": 3e-2, "train__lr_scheduler_type": "constant", "train__warmup_steps": 3,
        "train__logging_steps": 1, "train__eval_steps": 2, "train__save_steps": 2, "train__save_total_limit": 0,
        "train__optim": "schedule_free_adamw", "train__load_best_model_at_end": True, **keys,
    })  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert loop.train(settings(tiny, folder), lambda line: None).status == "finished"
    return folder


def saved(folder: pathlib.Path, step: int) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(str(folder / "checkpoints" / str(step) / "state"))


def test_evaluation_is_of_the_average(tiny: pathlib.Path, whole: pathlib.Path) -> None:
    """The logged eval_loss is that of x, by the paper's formula from the checkpoint's y and z; y's and z's differ."""
    config = settings(tiny, whole)
    session = open_session(config, lambda new: (new, []))
    steps = prepare_steps(config, session.model, 6)
    logged = {row["step"]: row["eval_loss"] for row in helpers.metric_rows(whole) if "eval_loss" in row}
    assert sorted(logged) == [2, 4, 6]
    for step in (2, 6):
        held = saved(whole, step)
        y, z, b1 = held["trainable"], held["opt_state"]["z"], config.train.adam_beta1
        x = {path: (y[path] - (1 - b1) * z[path]) / b1 for path in y}

        def loss(weights: Any) -> float:
            homes = {path: leaf.sharding for path, leaf in session.model.trainable.items()}
            placed = jax.device_put({path: weights[path] for path in homes}, homes)
            total, weight = sum_batches(steps, placed, session.model.frozen, session.eval_batches())["loss"]
            return float(total / weight)

        assert logged[step] == pytest.approx(loss(x), rel=1e-6)
        assert abs(loss(y) - logged[step]) > 1e-5 * logged[step] < 1e3 * abs(loss(z) - logged[step])
        for path, leaf in read_trainable(str(whole / "checkpoints"), step)[0].items():
            np.testing.assert_allclose(leaf, x[path], rtol=0, atol=1e-6)


def test_the_adapter_is_the_average_of_the_best_step_and_so_is_a_checkpoints(
    tiny: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = RunDirectory(str(whole))
    run_result.write_result(run, run.config(), "best", str(tmp_path / "exported"))
    files = [folder / "adapter_model.safetensors" for folder in (whole / "adapter", tmp_path / "exported")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_stopped_run_goes_on_bit_for_bit(tiny: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The first start ends by the clock, after its first step: `train.max_hours` are over at once."""
    said: list[str] = []
    first = loop.train(settings(tiny, tmp_path / "run", train__max_hours=1e-9), said.append)
    assert (first.status, first.step, first.signal, first.result_dir) == ("interrupted", 1, signal.SIGTERM, "")
    assert loop.train(settings(tiny, tmp_path / "run"), said.append).status == "finished"
    assert any("resuming from step 1" in line for line in said)
    assert helpers.metric_rows(tmp_path / "run") == helpers.metric_rows(whole)
    jax.tree.map(np.testing.assert_array_equal, saved(tmp_path / "run", 6), saved(whole, 6))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"train__lr_scheduler_type": "cosine"}, "lr_scheduler_type=constant or constant_with_warmup, not cosine"),
        ({"train__lr_scheduler_type": "reduce_lr_on_plateau"}, "not reduce_lr_on_plateau"),
        ({"train__adam_beta1": 0.0}, "needs a train.adam_beta1 above 0"),
    ],
)
def test_what_it_cannot_be_combined_with_is_said(tiny: pathlib.Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        check_settings(settings(tiny, tiny / "run", **keys))
    assert "\n" not in str(error.value)
