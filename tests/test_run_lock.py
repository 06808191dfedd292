"""One start at a time in a run directory, on a disk and in a bucket; a start that comes to nothing leaves nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import uuid

import helpers_training as helpers
import pytest

import tpu_tune
from tpu_tune import UserError, ctrl_c
from tpu_tune.checkpoints import storage
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.training import run_lock, run_start

ROOT = pathlib.Path(__file__).parents[1]
HOLD = """
import sys, time
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.training import run_lock
with run_lock.hold(RunDirectory(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["disk", "bucket"])
def run(request, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_SETTLE", 0.05)
    return RunDirectory(str(tmp_path / "run") if request.param == "disk" else f"memory://runs/{uuid.uuid4().hex}")


def lock_of(run: RunDirectory) -> dict:
    return json.loads(storage.read_bytes(run.file(run_lock.NAME)))


def leave_lock(run: RunDirectory, **changes) -> None:
    """A lock as a kill leaves it."""
    storage.make_dirs(run.path)
    holder = dataclasses.replace(run_lock._this_process(), **changes)
    storage.write_bytes(run.file(run_lock.NAME), run_lock._text(holder).encode())


def test_a_second_is_refused_and_names_the_first(run):
    with run_lock.hold(run, print):
        held = lock_of(run)
        assert held["process"] == os.getpid() and held["host"]
        for refused in (lambda: run_lock.hold(run, print).__enter__(), lambda: run_lock.refuse_second(run)):
            with pytest.raises(UserError, match=rf"in use: process {os.getpid()} on {held['host']} .* trains there"):
                refused()
        assert lock_of(run)["token"] == held["token"]
    assert not storage.exists(run.file(run_lock.NAME))
    with run_lock.hold(run, print):
        pass


def dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@pytest.mark.parametrize("how", ["dead", "number used again"])
def test_what_a_killed_process_left_is_taken_over_and_said(run, how):
    leave_lock(run, **({"process": dead_process()} if how == "dead" else {"began": "1"}))
    run_lock.refuse_second(run)
    said = []
    with run_lock.hold(run, said.append):
        assert lock_of(run)["process"] == os.getpid()
    assert len(said) == 1 and "was left by process" in said[0] and "taking over" in said[0]


def test_of_another_machine_it_is_waited_for(run):
    leave_lock(run, host="elsewhere", machine="another boot")
    said = []
    with run_lock.hold(run, said.append, seconds=0.1):
        assert lock_of(run)["host"] != "elsewhere"
    assert len(said) == 2 and "waiting up to 0 s" in said[0] and "taking over" in said[1]


def test_of_another_machine_that_renews_it_is_refused(run):
    leave_lock(run, host="elsewhere", machine="another boot")

    def renew():
        for count in range(1, 30):
            time.sleep(0.1)
            leave_lock(run, host="elsewhere", machine="another boot", renewals=count)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use: process .* on elsewhere"):
            run_lock.hold(run, print, seconds=0.4).__enter__()
    finally:
        thread.join()
    assert lock_of(run)["host"] == "elsewhere"


def test_it_is_renewed_and_a_process_that_was_stopped_learns_that_another_took_over(run):
    with run_lock.hold(run, print, seconds=0.05) as lock:
        deadline = time.monotonic() + 20
        while lock_of(run)["renewals"] < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert lock_of(run)["renewals"] >= 2
        lock.check()
        leave_lock(run, host="thief", token="another")
        while not lock.is_lost and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(UserError, match="taken over by process .* on thief"):
            lock.check()
    assert lock_of(run)["host"] == "thief"  # it is not ours to remove


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"host": 3}', "[" * 50_000, "null", '{"process": "1"}'])
def test_a_lock_that_is_none_is_taken(run, text):
    storage.make_dirs(run.path)
    storage.write_bytes(run.file(run_lock.NAME), text.encode())
    with run_lock.hold(run, print):
        assert lock_of(run)["process"] == os.getpid()


def test_of_many_at_once_one_gets_it(tmp_path):
    run, won = RunDirectory(str(tmp_path)), []
    barrier = threading.Barrier(8)

    def start():
        barrier.wait()
        try:
            with run_lock.hold(run, print):
                won.append(1)
                time.sleep(1)
        except UserError:
            pass

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_a_kill_leaves_it_and_the_next_process_takes_over(tmp_path):
    words, env = [sys.executable, "-c", HOLD, str(tmp_path)], {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    second = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert second.returncode == 1 and f"in use: process {first.pid}" in second.stderr
    first.send_signal(signal.SIGKILL)
    time.sleep(0.5)  # not waited for: a zombie has ended too
    said = []
    with run_lock.hold(RunDirectory(str(tmp_path)), said.append):
        pass
    assert f"left by process {first.pid}" in said[0]
    first.wait()


# --- what a start that comes to nothing leaves


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return helpers.write_tiny_llama(tmp_path_factory.mktemp("model"))


def settings(tiny, tmp_path, **keys):
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "model__path": str(tiny),
        "model__dtype": "float32",
        "data__train": str(helpers.write_rows(tmp_path / "rows.jsonl", 8)),
        "data__cache_dir": str(tmp_path / "cache"),
        "data__num_workers": 1,
        "data__max_length": 64,
        "data__eval_ratio": 0.0,
        "train__per_device_train_batch_size": 1,
        "train__max_steps": 2,
        "train__logging_steps": 1,
    }
    return helpers.make_config(**{**defaults, **keys})


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt(), RuntimeError("RESOURCE_EXHAUSTED")])
def test_a_start_that_fails_before_its_first_step_takes_back_what_it_wrote(tiny, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        assert (tmp_path / "out" / "config.json").exists() and (tmp_path / "out" / run_lock.NAME).exists()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("tpu_tune.training.loop.prepare_steps", fail)
        with pytest.raises(type(error)):
            tpu_tune.train(settings(tiny, tmp_path, lora__rank=4))
    assert not (tmp_path / "out").exists()
    assert tpu_tune.train(settings(tiny, tmp_path, lora__rank=2)).status == "finished"
    assert not (tmp_path / "out" / run_lock.NAME).exists()


def test_a_second_ctrl_c_before_the_first_step_takes_back_what_was_written(tmp_path):
    run = RunDirectory(str(tmp_path / "run"))
    config = helpers.make_config(output_dir=run.path)
    with run_start.begin(run, config, print, lambda what, act: act()):
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", run_lock.NAME]
        ctrl_c._say_farewell()  # as `ctrl_c.leave` does it in a thread
        assert not (tmp_path / "run").exists()
    assert ctrl_c._farewells == []


def test_what_was_in_the_directory_stays(tiny, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("tpu_tune.training.loop.prepare_steps", fail)
    with pytest.raises(MemoryError):
        tpu_tune.train(settings(tiny, tmp_path))
    assert os.listdir(tmp_path / "out") == ["notes.txt"]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"train__per_device_train_batch_size": 2**31 - 1}, "more tokens than a device counts"),
        ({"train__per_device_eval_batch_size": 2**31 - 1}, "more tokens than a device counts"),
        ({"data__max_length": 2**31 - 1, "train__per_device_train_batch_size": 8}, "more tokens than a device counts"),
        ({"train__gradient_accumulation_steps": 2**31 - 1}, "GiB of memory"),
        ({"train__max_steps": -1, "train__num_train_epochs": 1e30}, "lower num_train_epochs"),
    ],
)
def test_numbers_that_no_machine_holds_are_one_line_and_leave_nothing(tiny, tmp_path, keys, says):
    with pytest.raises(UserError, match=says):
        tpu_tune.train(settings(tiny, tmp_path, **keys))
    assert not (tmp_path / "out").exists()


# --- a run whose loss is not finite


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"train__learning_rate": 1e30}, "last loss is not finite"),
        ({"lora__alpha": 1e38}, "no update was made|last loss is not finite"),
        ({"train__learning_rate": 3e38, "train__weight_decay": 3e38, "train__max_steps": 1}, "not finite"),
    ],
)
def test_a_run_that_is_not_finite_has_no_result_also_when_it_is_started_again(tiny, tmp_path, keys, says):
    config = settings(tiny, tmp_path, **keys)
    for _ in range(2):
        with pytest.raises(UserError, match=says):
            tpu_tune.train(config)
        assert not [name for name in os.listdir(tmp_path / "out") if name in ("adapter", "model")]
        assert not (tmp_path / "out" / run_lock.NAME).exists()
