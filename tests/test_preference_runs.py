"""Whole preference runs: killed and started again, and on a real model."""

from __future__ import annotations

import json
import pathlib
import random
import signal
import subprocess
import time
from typing import Any

import helpers_preference as preference
import helpers_training as helpers
import pytest

import tpu_tune


def settings(folder: pathlib.Path, model: pathlib.Path, **keys: Any) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference.texts(80)))
    defaults = {
        "data__train": str(folder / "pairs.jsonl"), "data__num_workers": 1, "data__eval_ratio": 0.1,
        "lora__dropout": 0.1, "train__max_steps": 12, "train__logging_steps": 2, "train__save_steps": 3,
        "train__eval_steps": 4, "train__per_device_eval_batch_size": 2,
    }  # fmt: skip
    return preference.settings(model, folder, objective={"name": "dpo"}, **{**defaults, **keys})


def kill_when(config: Any, folder: pathlib.Path, is_time: Any) -> None:
    words, env = helpers.command(config, folder)
    eager = "import runpy, tpu_tune.training.reference as r; r.PIECE_SECONDS = 0.0; "
    words[1:3] = ["-c", eager + "runpy.run_module('tpu_tune', run_name='__main__')"]
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    try:
        while process.poll() is None and time.monotonic() < deadline and not is_time():
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_kills_in_the_reference_pass_and_in_training_change_nothing(tmp_path: pathlib.Path) -> None:
    model = helpers.write_tiny_llama(tmp_path / "model")
    whole = settings(tmp_path / "whole", model)
    assert helpers.train_process(whole, tmp_path / "whole").returncode == 0
    config, folder = settings(tmp_path / "killed", model), tmp_path / "killed"
    pieces = folder / "cache" / "reference"
    kill_when(config, folder, lambda: len(list(pieces.rglob("*.npz"))) >= 3)
    assert not (folder / "out" / "metrics.jsonl").exists()
    metrics = folder / "out" / "metrics.jsonl"
    kill_when(config, folder, lambda: metrics.exists() and '"step": 6' in metrics.read_text())
    again = helpers.train_process(config, folder)
    assert again.returncode == 0, again.stderr
    assert helpers.metric_rows(folder / "out") == helpers.metric_rows(tmp_path / "whole" / "out")
    ours, theirs = (one / "out" / "adapter" / "adapter_model.safetensors" for one in (folder, tmp_path / "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def corpus_pairs(corpus: pathlib.Path, count: int) -> list[dict[str, str]]:
    """Return the corpus' own answers as chosen, and those to other questions as rejected."""
    import yaml

    talks = []
    for file in sorted(corpus.rglob("*.yml")):
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        talks += [talk for talk in found.get("conversations", []) if len(talk) >= 2]
    shuffled = random.Random(0)
    talks = [(str(talk[0]), str(talk[1])) for talk in talks if talk[0] and talk[1]]
    shuffled.shuffle(talks)
    rows = []
    for question, answer in talks[:count]:
        words = answer.split()
        other = list(words)
        shuffled.shuffle(other)
        if len(words) > 3 and other != words:
            rows.append({"prompt": question, "chosen": answer, "rejected": " ".join(other)})
    return rows


@pytest.mark.slow
def test_smollm2_learns_to_prefer(
    smollm2_gguf: pathlib.Path, chatterbot_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Answers of a real corpus against the same words in disorder: above 0.8 of held-out pairs in ten minutes."""
    rows = corpus_pairs(chatterbot_dir, 400)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = preference.settings(
        smollm2_gguf,
        tmp_path,
        objective={"name": "dpo"},
        data__train=str(tmp_path / "pairs.jsonl"),
        data__format="auto-as-chat",
        data__eval_dataset_size=60,
        data__max_length=256,
        data__packing=True,
        lora__rank=8,
        lora__alpha=16.0,
        train__learning_rate=1e-4,
        train__max_steps=30,
        train__eval_steps=10,
        train__loss_chunk_size=0,
        train__per_device_train_batch_size=1,
        mesh__fsdp=-1,
        train__save_strategy="no",
    )
    started = time.monotonic()
    run = tpu_tune.train(config)
    held_out = [row for row in run.metrics if "eval_loss" in row]
    print([row["eval_rewards/accuracies"] for row in held_out], time.monotonic() - started)
    assert held_out[-1]["eval_rewards/accuracies"] > 0.8
    assert held_out[-1]["eval_rewards/margins"] > held_out[0]["eval_rewards/margins"] > 0
