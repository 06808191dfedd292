"""Sinks of metrics and the progress line."""

import errno
import io
import json
import math
import os
import subprocess
import sys
import threading

import numpy as np
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


def test_a_full_disk_ends_tensorboard_with_a_line(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    said, threads = [], threading.active_count()
    sinks = loggers.open_sinks(["tensorboard"], RunDirectory(str(tmp_path)), warn=said.append)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for step in range(1, 30):  # more than a queue would hold
        loggers.log(sinks, {"step": step, "loss": 1.0})
    loggers.close(sinks)
    assert said == ["tensorboard stopped working ([Errno 28] No space left on device); training goes on without it"]
    assert threading.active_count() == threads and len(RunDirectory(str(tmp_path)).metrics()) == 29


def test_tensorboard_itself_reads_what_is_written_and_forgets_what_a_resumed_run_writes_again(tmp_path):
    module = "tensorboard.backend.event_processing.event_accumulator"
    reader = pytest.importorskip(module, reason="tensorboard is not installed")
    for first, losses in ((0, {1: 4.0, 2: 3.0, 3: 9.0}), (2, {3: 2.0, 4: 1.0})):
        sinks = loggers.open_sinks(["tensorboard"], RunDirectory(str(tmp_path)), resume_step=first)
        for step, loss in losses.items():
            loggers.log(sinks, {"step": step, "loss": loss, "eval_accuracy": np.float32(0.5), "grad_norm": math.nan})
        loggers.close(sinks)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/accuracy", "train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 4), (2, 3), (3, 2), (4, 1)]


def test_only_the_main_process_logs(tmp_path):
    assert loggers.open_sinks(["tensorboard"], RunDirectory(str(tmp_path)), is_main=False) == []


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The real wandb, offline and without anybody's key."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it reads the environment once a process
    yield wandb
    wandb.teardown()


def wandb_runs(folder):
    return sorted((folder / "wandb").glob("offline-run-*"))


def test_wandb_writes_a_run_that_wandb_sync_takes_and_resumes_into_its_id(tmp_path, offline):
    warnings = []
    for step in (2, 4):
        sinks = loggers.open_sinks(["wandb"], RunDirectory(str(tmp_path)), {"train": {"x": 1}}, warn=warnings.append)
        assert [sink.name for sink in sinks] == ["metrics.jsonl", "wandb"]
        loggers.log(sinks, {"step": step, "loss": 1.0, "tokens_per_second": None})
        loggers.log(sinks, {"step": step, "eval_loss": 2.0})
        loggers.close(sinks)
    assert warnings == []
    identity = (tmp_path / "wandb_run_id").read_text().strip()
    runs = wandb_runs(tmp_path)
    assert (
        identity and 1 <= len(runs) <= 2 and all(f"-{identity}" in run.name for run in runs)
    )  # -1 behind it within a second
    content = b"".join((run / f"run-{identity}.wandb").read_bytes() for run in runs)
    for name in (b"train/loss", b"eval/loss", b"train/global_step"):
        assert name in content
    assert b"tokens_per_second" not in content  # it was None
    words = [sys.executable, "-m", "wandb", "sync", "--dry-run", *map(str, runs)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"Would sync {len(runs)} run(s)" in done.stdout + done.stderr


def test_wandb_takes_the_id_and_the_names_of_the_environment(tmp_path, offline, monkeypatch):
    started, init = [], offline.init
    monkeypatch.setattr(offline, "init", lambda **settings: started.append(init(**settings)) or started[-1])
    monkeypatch.setenv("WANDB_RUN_ID", "mine7")
    monkeypatch.setenv("WANDB_PROJECT", "project of mine")
    monkeypatch.setenv("WANDB_NAME", "a name")
    loggers.close(loggers.open_sinks(["wandb"], RunDirectory(str(tmp_path)), {"train": {"x": 1}}))
    (run,) = started
    assert (run.id, run.project, run.name) == ("mine7", "project of mine", "a name")
    assert run.config["train"] == {"x": 1} and (tmp_path / "wandb_run_id").read_text() == "mine7\n"


def test_wandb_switched_off_is_no_warning(tmp_path, offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    warnings = []
    sinks = loggers.open_sinks(["wandb"], RunDirectory(str(tmp_path)), warn=warnings.append)
    loggers.log(sinks, {"step": 1, "loss": 1.0})
    loggers.close(sinks)
    assert warnings == [] and not wandb_runs(tmp_path)


def test_wandb_logged_out_is_one_warning(tmp_path, offline, monkeypatch):
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


def test_a_sink_that_breaks_is_reported_once_and_the_rest_goes_on(tmp_path, offline, monkeypatch):
    def fail(*_):
        raise ConnectionError("the service\nis away")

    monkeypatch.setattr(offline.Run, "log", fail)
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
