"""Sinks of metrics and the progress line."""

import io
import json
import sys
import types

import pytest

from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.errors import UserError
from tpu_tune.training import loggers
from tpu_tune.training.progress import Progress, duration


def test_names():
    assert loggers.reporters([]) == loggers.reporters("none") == []
    assert loggers.reporters(["wandb", "wandb", "none"]) == ["wandb"]
    assert "tensorboard" in loggers.reporters("all")
    with pytest.raises(UserError, match="unknown train.report_to 'tensorbord'; did you mean 'tensorboard'"):
        loggers.reporters(["tensorbord"])


def test_metrics_and_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    sinks = loggers.open_sinks(["tensorboard"], RunDirectory(str(tmp_path)))
    loggers.log(sinks, {"step": 3, "loss": 1.5, "learning_rate": 1e-4})
    loggers.log(sinks, {"step": 3, "eval_loss": 2.5})
    loggers.close(sinks)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 3, "loss": 1.5, "learning_rate": 1e-4}, {"step": 3, "eval_loss": 2.5}]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert all(name in events.read_bytes() for name in (b"train/loss", b"train/learning_rate", b"eval/loss"))


def test_only_the_main_process_logs(tmp_path):
    assert loggers.open_sinks(["tensorboard"], RunDirectory(str(tmp_path)), is_main=False) == []


def fake_wandb(monkeypatch, login=True, fail=False):
    logged, started = [], []

    def init(**settings):
        started.append(settings)
        return types.SimpleNamespace(log=log, finish=lambda: None, define_metric=lambda *a, **k: None)

    def log(row):
        if fail:
            raise ConnectionError("the service\nis away")
        logged.append(row)

    util = types.SimpleNamespace(generate_id=lambda: "abc123")
    module = types.SimpleNamespace(init=init, login=lambda prompt: login, util=util)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: object())
    return logged, started


def test_wandb_run_and_resume(tmp_path, monkeypatch):
    logged, started = fake_wandb(monkeypatch)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for _ in range(2):
        sinks = loggers.open_sinks(["wandb"], RunDirectory(str(tmp_path)), {"seed": 1})
        loggers.log(sinks, {"step": 2, "loss": 1.0})
        loggers.close(sinks)
        sys.modules["wandb"].util.generate_id = lambda: "another"
    assert [run["id"] for run in started] == ["abc123", "abc123"]
    assert started[0]["project"] == "mine" and started[0]["config"] == {"seed": 1}
    assert logged[0] == {"train/loss": 1.0, "train/global_step": 2}


def test_wandb_logged_out_is_one_warning(tmp_path, monkeypatch):
    fake_wandb(monkeypatch, login=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    warnings = []
    sinks = loggers.open_sinks(["wandb"], RunDirectory(str(tmp_path)), warn=warnings.append)
    assert [sink.name for sink in sinks] == ["metrics.jsonl"]
    assert len(warnings) == 1 and "wandb login" in warnings[0]


def test_absent_package_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    warnings = []
    sinks = loggers.open_sinks(["wandb"], RunDirectory(str(tmp_path)), warn=warnings.append)
    assert len(sinks) == 1 and "pip install wandb" in warnings[0]


def test_a_sink_that_breaks_is_reported_once_and_the_rest_goes_on(tmp_path, monkeypatch):
    fake_wandb(monkeypatch, fail=True)
    warnings = []
    sinks = loggers.open_sinks(["wandb"], RunDirectory(str(tmp_path)), warn=warnings.append)
    for step in range(3):
        loggers.log(sinks, {"step": step})
    loggers.close(sinks)
    assert warnings == ["wandb stopped working (the service); training goes on without it"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_progress(stream):
    times = iter(range(0, 1000, 2))  # two seconds an update
    with Progress(30, initial=10, every=10, stream=stream, clock=lambda: next(times)) as progress:
        for step in range(11, 31):
            progress.update(step, loss=2.0, tokens_per_second=1234.5)
        progress.write("saved")
    return stream.getvalue()


def test_plain_lines_without_a_terminal():
    lines = run_progress(io.StringIO()).splitlines()
    assert lines == [
        "step 11/30  loss 2.0000  1,234 tokens/s",
        "step 20/30  loss 2.0000  1,234 tokens/s  20s left",
        "step 30/30  loss 2.0000  1,234 tokens/s  done",
        "saved",
    ]


def test_bar_in_a_terminal():
    text = run_progress(Terminal())
    assert "30/30" in text and "loss 2.0000" in text and "saved" in text


def test_durations():
    assert [duration(s) for s in (0, 42, 200, 7500)] == ["0s", "42s", "3m20s", "2h05m"]
