"""A run that was killed, interrupted, or ran out of disk goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import time
from typing import Any

import helpers_training as helpers
import pytest

from tpu_tune import UserError
from tpu_tune.checkpoints.run_checkpoints import RunCheckpoints
from tpu_tune.training import loop

STEPS_AN_EPOCH, TOTAL = 10, 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return helpers.write_tiny_llama(tmp_path_factory.mktemp("model"))


def settings(tiny: pathlib.Path, folder: pathlib.Path, **keys: Any) -> Any:
    """Two epochs of ten steps of two rows each, evaluated and saved every three steps, with dropout."""
    folder.mkdir(parents=True, exist_ok=True)
    data = helpers.write_rows(tiny / "rows.jsonl", 42)
    defaults = {
        "output_dir": str(folder / "out"),
        "model__path": str(tiny),
        "model__dtype": "float32",
        "lora__rank": 4,
        "lora__dropout": 0.1,
        "data__train": str(data),
        "data__cache_dir": str(tiny / "cache"),
        "data__num_workers": 1,
        "data__packing": False,
        "data__max_length": 96,
        "data__eval_ratio": 0.05,
        "train__num_train_epochs": 2.0,
        "train__per_device_train_batch_size": 4,
        "train__per_device_eval_batch_size": 2,
        "train__learning_rate": 1e-2,
        "train__lr_scheduler_type": "cosine",
        "train__warmup_steps": 2,
        "train__logging_steps": 2,
        "train__eval_steps": 3,
        "train__save_steps": 3,
        "train__save_total_limit": 2,
        "mesh__fsdp": 1,
    }
    return helpers.make_config(**{**defaults, **keys})


@pytest.fixture(scope="module")
def whole(tiny: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    config = settings(tiny, folder)
    done = helpers.train_process(config, folder)
    assert done.returncode == 0, done.stderr
    assert f"{STEPS_AN_EPOCH} steps an epoch, {TOTAL} steps in 2 epochs; mini-batch" in done.stdout
    return folder


def adapter(folder: pathlib.Path) -> bytes:
    return (folder / "out" / "adapter" / "adapter_model.safetensors").read_bytes()


def assert_same_run(folder: pathlib.Path, whole: pathlib.Path) -> None:
    assert helpers.metric_rows(folder / "out") == helpers.metric_rows(whole / "out")
    assert adapter(folder) == adapter(whole)


def stop_after(config: Any, folder: pathlib.Path, step: int, how: int) -> tuple[int, str, str]:
    """Train in a process of its own and send it a signal once metrics.jsonl shows a step."""
    words, env = helpers.command(config, folder)
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = folder / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    try:
        while time.monotonic() < deadline and process.poll() is None:
            text = metrics.read_text() if metrics.exists() else ""
            steps = [int(found) for found in re.findall(r'"step": (\d+)', text)]
            if steps and steps[-1] >= step:
                process.send_signal(how)
                break
            time.sleep(0.002)
        out, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.kill()
    return process.returncode, out, err


@pytest.mark.parametrize("step", [4, 14], ids=["epoch 1", "epoch 2"])
def test_a_killed_run_goes_on_exactly(
    tiny: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path, step: int
) -> None:
    config = settings(tiny, tmp_path)
    code, _, _ = stop_after(config, tmp_path, step, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "out" / "adapter").exists()
    with open(tmp_path / "out" / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 9')  # a row that the kill cut short
    again = helpers.train_process(config, tmp_path)
    assert again.returncode == 0, again.stderr
    begun = re.search(rf"resuming from step (\d+) of {TOTAL}", again.stdout)
    assert begun is None and step < 6 or begun and 0 < int(begun[1]) < TOTAL
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(
    tiny: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path, how: signal.Signals
) -> None:
    config = settings(tiny, tmp_path)
    code, out, err = stop_after(config, tmp_path, 2, how)
    assert code == 128 + how, err  # as a shell calls what a signal has ended
    said = re.search(rf"interrupted: step (\d+) of {TOTAL} is saved; the same command goes on from there", out)
    assert said and f"{how.name}: saving after this step" in err and "Traceback" not in err
    assert not (tmp_path / "out" / "adapter").exists()
    again = helpers.train_process(config, tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"resuming from step {said[1]} of {TOTAL}" in again.stdout
    # An interrupted run saves at another step, which is all that may differ.
    assert_same_run(tmp_path, whole)


def test_a_finished_run_says_so_and_a_changed_one_is_refused(tiny: pathlib.Path, whole: pathlib.Path) -> None:
    config, before = settings(tiny, whole), adapter(whole)
    again = helpers.train_process(config, whole)
    assert again.returncode == 0 and f"this run is done: {TOTAL} of {TOTAL} steps" in again.stdout
    assert adapter(whole) == before
    config.train.learning_rate = 2e-2
    config.mesh.fsdp = -1  # on this process's devices; another mesh is no other run
    with pytest.raises(
        UserError, match="holds a run with another configuration: train.learning_rate was 0.01 and is now 0.02"
    ):
        loop.train(config, say=lambda line: None)


def test_checkpoints_hold_no_frozen_leaf_and_as_many_as_allowed(whole: pathlib.Path) -> None:
    folder = whole / "out" / "checkpoints"
    assert sorted(int(name) for name in os.listdir(folder) if name.isdigit()) == [18, 20]
    for step in ("18", "20"):
        text = (folder / step / "state" / "_METADATA").read_text()
        assert "lora_A" in text and "q_proj.weight" not in text and "embed_tokens" not in text
        held = [key for key in json.loads(text)["tree_metadata"] if "trainable" in key]
        assert len(held) == 14 and all("lora_" in key for key in held)


def test_more_steps_are_said_aloud_and_go_on(tiny: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(whole / "out", tmp_path / "out")
    config = settings(tiny, tmp_path, train__max_steps=TOTAL + 2)
    done = helpers.train_process(config, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"train.max_steps was -1 and is now {TOTAL + 2}" in done.stdout
    assert f"resuming from step {TOTAL} of {TOTAL + 2}" in done.stdout
    rows = helpers.metric_rows(tmp_path / "out")
    assert rows[: len(helpers.metric_rows(whole / "out"))] == helpers.metric_rows(whole / "out")
    assert rows[-1]["step"] == TOTAL + 2 and adapter(tmp_path) != adapter(whole)


def test_a_damaged_last_checkpoint_is_replaced(tiny: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The one before it is taken, and the damaged one is written anew on the way."""
    shutil.copytree(whole / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "adapter")
    damaged = tmp_path / "out" / "checkpoints" / "20" / "state"
    for file in [*damaged.glob("d/*"), *damaged.glob("ocdbt.process_0/d/*")]:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    config = settings(tiny, tmp_path)
    again = helpers.train_process(config, tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"resuming from step 18 of {TOTAL}" in again.stdout and "checkpoint 20 cannot be read" in again.stderr
    assert_same_run(tmp_path, whole)
    with RunCheckpoints(str(tmp_path / "out" / "checkpoints"), "") as checkpoints:
        assert checkpoints.steps == [18, 20]
    shutil.rmtree(tmp_path / "out" / "adapter")
    last = helpers.train_process(config, tmp_path)
    assert f"resuming from step {TOTAL} of {TOTAL}" in last.stdout, last.stderr
    assert_same_run(tmp_path, whole)


def test_a_full_disk_leaves_the_last_good_checkpoint(
    tiny: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(whole / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "20")
    config = settings(tiny, tmp_path)
    largest = 4096  # bytes a file: the metrics and the config fit, the leaves do not

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    full = helpers.train_process(config, tmp_path, preexec_fn=limit)
    lines = [line for line in full.stderr.splitlines() if line.startswith("tpu-tune:")]
    assert full.returncode == 1 and len(lines) == 1, full.stderr
    assert re.search(
        r"checkpoint 20 could not be written \(File too large\); the last good one is step 18", lines[0]
    ), lines
    assert "Traceback" not in full.stderr
    again = helpers.train_process(config, tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"resuming from step 18 of {TOTAL}" in again.stdout
    assert_same_run(tmp_path, whole)
