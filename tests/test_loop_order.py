"""The loop reads a step's metrics once the device has the next step, and everything else keeps its step."""

from __future__ import annotations

import signal
import types
from typing import Any

import helpers_training as helpers
import numpy as np
import pytest

from tpu_tune import UserError
from tpu_tune.training import evaluation, loggers, loop
from tpu_tune.training.late import read_late
from tpu_tune.training.meter import LoopState


class OnDevice:
    """A number that notes when it is read."""

    def __init__(self, value: float, note: Any = lambda: None):
        self.value, self.note = value, note

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self.note()
        return np.asarray(self.value, dtype)


class Toy:
    """A loop of five steps that compute nothing: `events` has what it did, in order."""

    def __init__(self, nan_at: int = 0, signal_at: int = 0, no_data_at: int = 0, evaluates: bool = False, **train: Any):
        defaults = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 3, "max_nonfinite_steps": 1}
        keys = {f"train__{name}": value for name, value in {**defaults, **train}.items()}
        self.config = helpers.make_config(**keys)
        self.events: list[str] = []
        self.nan_at, self.signal_at, self.no_data_at = nan_at, signal_at, no_data_at
        session = types.SimpleNamespace(
            config=self.config,
            length=types.SimpleNamespace(total_steps=5),
            batches=types.SimpleNamespace(batch=self.batch, steps_per_epoch=5),
            data=types.SimpleNamespace(eval=True if evaluates else None),
            model=types.SimpleNamespace(frozen={}),
            began=0.0,
        )
        steps = types.SimpleNamespace(
            train=self.train, put_batch=lambda batch, leading: batch, averaged=lambda state: state
        )
        saves = types.SimpleNamespace(save=lambda step, state, counts: self.events.append(f"save {step}"))
        sink = loggers.Sink("test", lambda row: self.events.append(f"row {row['step']}"))
        self.loop = loop.TrainingLoop(session, steps, saves, LoopState(), 0, [sink], lambda line: None, None)

    def batch(self, number: int) -> int:
        if number + 1 == self.no_data_at:
            raise UserError("no data")
        return number + 1

    def train(self, state: Any, frozen: Any, step: int) -> Any:
        self.events.append(f"train {step}")
        if step == self.signal_at:
            signal.raise_signal(signal.SIGTERM)
        bad = step == self.nan_at
        metrics = {"learning_rate": 1e-3, "grad_norm": 1.0, "num_tokens": 7, "finite": not bad, "failures": bad}
        loss = OnDevice(np.nan if bad else 1 / step, lambda: self.events.append(f"read {step}"))
        return types.SimpleNamespace(step=step, trainable={}), {"loss": loss, **metrics}

    def run(self) -> str:
        return self.loop.run(types.SimpleNamespace(step=0, trainable={}))[1]


def test_a_step_is_read_while_the_next_one_runs_and_at_once_where_it_is_saved():
    toy = Toy()
    assert toy.run() == "finished"
    assert toy.events == [
        *("train 1", "train 2", "read 1", "row 1", "train 3", "read 2", "row 2", "read 3", "row 3", "save 3"),
        *("train 4", "train 5", "read 4", "row 4", "read 5", "row 5", "save 5"),
    ]  # fmt: skip


def test_without_saving_the_last_step_has_its_row():
    toy = Toy(save_strategy="no", logging_steps=5)
    toy.run()
    assert toy.events[-3:] == ["read 4", "read 5", "row 5"]


def test_a_signal_ends_the_run_after_the_step_it_came_in():
    toy = Toy(signal_at=2)
    assert toy.run() == "interrupted" and toy.loop.signal == signal.SIGTERM
    assert toy.events == ["train 1", "train 2", "read 1", "row 1", "read 2", "row 2", "save 2"]


@pytest.mark.parametrize("at", [2, 3, 5])
def test_a_loss_that_is_not_finite_is_told_of_its_own_step_and_nothing_is_kept_of_later_ones(at):
    toy = Toy(nan_at=at)
    with pytest.raises(UserError, match=f"up to step {at};"):
        toy.run()
    assert [event for event in toy.events if event.startswith(("row", "save"))] == [
        *("row 1", "row 2", "row 3", "save 3", "row 4")[: {2: 1, 3: 2, 5: 5}[at]]
    ]


def test_an_error_of_the_next_batch_leaves_the_last_step_its_row():
    toy = Toy(no_data_at=3)
    with pytest.raises(UserError, match="no data"):
        toy.run()
    assert toy.events[-2:] == ["read 2", "row 2"]


def test_an_evaluation_sees_the_state_of_its_step_and_ends_the_run_there(monkeypatch):
    toy = Toy(evaluates=True, eval_strategy="steps", eval_steps=2, early_stopping_patience=1, save_strategy="no")
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: {"eval_loss": next(losses)})
    monkeypatch.setattr(evaluation, "describe", str)
    assert toy.run() == "stopped early"
    assert toy.events == [
        *("train 1", "train 2", "read 1", "row 1", "read 2", "row 2", "row 2"),
        *("train 3", "train 4", "read 3", "row 3", "read 4", "row 4", "row 4", "save 4"),
    ]  # fmt: skip


def test_results_are_read_once_the_next_is_asked_for():
    events: list[str] = []

    def made() -> Any:
        for number in range(3):
            events.append(f"made {number}")
            yield {"n": OnDevice(number, lambda number=number: events.append(f"read {number}"))}

    assert [int(found["n"]) for found in read_late(made())] == [0, 1, 2]
    assert events == ["made 0", "made 1", "read 0", "made 2", "read 1", "read 2"]
    assert list(read_late([])) == []


def test_rows_hold_what_the_step_gave_before_the_next_one_took_its_buffers(tmp_path, monkeypatch):
    """The plateau's learning rate is part of the state that the next step overwrites."""
    model = helpers.write_tiny_llama(tmp_path / "model")
    helpers.write_rows(tmp_path / "rows.jsonl", 60)
    config = helpers.make_config(
        output_dir=str(tmp_path / "out"), model__path=str(model), model__dtype="float32", data__max_length=64,
        data__train=str(tmp_path / "rows.jsonl"), data__num_workers=1, data__packing=False, lora__rank=2,
        data__eval_ratio=0.2, train__max_steps=5, train__logging_steps=1, train__eval_steps=2,
        train__lr_scheduler_type="reduce_lr_on_plateau", train__warmup_steps=0, train__warmup_ratio=0.0,
        train__save_strategy="no", train__per_device_train_batch_size=1, train__per_device_eval_batch_size=1,
    )  # fmt: skip
    at_once: list[dict[str, float]] = []
    prepared = loop.prepare_steps

    def reading_at_once(*arguments: Any) -> Any:
        steps = prepared(*arguments)

        def train(*step: Any) -> Any:
            state, metrics = steps.train(*step)
            at_once.append({name: float(metrics[name]) for name in ("loss", "grad_norm", "learning_rate")})
            return state, metrics

        return loop.dataclasses.replace(steps, train=train)

    monkeypatch.setattr(loop, "prepare_steps", reading_at_once)
    rows = [row for row in loop.train(config, say=lambda line: None).metrics if "loss" in row]
    assert [{name: row[name] for name in at_once[0]} for row in rows] == at_once and len(rows) == 5
