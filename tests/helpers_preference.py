"""Pairs of answers for the tiny byte-level Llama: as texts, as TRL reads them, and as tokenized examples."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from typing import Any

import helpers_training as helpers
import numpy as np
from safetensors.numpy import load_file, save_file

from tpu_tune.data import Datasets
from tpu_tune.data.preference_rows import preference_rows
from tpu_tune.data.tokenized_set import TokenizedSet

EOS = 256
STEPS, RATES = 30, {"lora": 1e-2, "full": 2e-3}
WIDTH = 160
# name -> (settings of ours, rows of a micro-batch, micro-batches of a step) as TRL's trainers are run
RUNS: dict[str, tuple[dict[str, Any], int, int]] = {
    "dpo": ({"name": "dpo"}, 2, 2),
    "orpo": ({"name": "orpo"}, 4, 1),
    "simpo": ({"name": "simpo", "beta": 2.0}, 2, 2),
    "cpo": ({"name": "cpo"}, 4, 1),
    "kto": ({"name": "kto", "undesirable_weight": 1.3}, 2, 2),
}
# name -> settings of ours: loss types of dpo, measured and not trained, against a reference that is another model
TYPES: dict[str, dict[str, Any]] = {
    **{kind: {"loss_type": kind} for kind in ("sigmoid", "hinge", "ipo", "sigmoid_norm", "nca_pair", "bco_pair")},
    **{kind: {"loss_type": kind} for kind in ("sppo_hard", "apo_zero", "apo_down")},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def texts(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return prompt, chosen and rejected of ragged lengths; what is chosen can be learned."""
    random = np.random.RandomState(seed)
    words = "a tiny model reads some words and learns to say what comes next in them".split()

    def text(least: int, most: int) -> str:
        return " ".join(random.choice(words) for _ in range(random.randint(least, most)))

    return [
        {"prompt": text(1, 4) + "? ", "chosen": "yes " + text(1, 5), "rejected": text(1, 6) + " no"}
        for _ in range(count)
    ]


def examples(rows: list[list[tuple[str, str, int]]]) -> TokenizedSet:
    """Return source rows of (prompt, answer, role) as examples; a byte is a token."""
    documents, masks, roles, numbers = [], [], [], []
    for number, answers in enumerate(rows):
        for prompt, answer, role in answers:
            documents.append([*prompt.encode(), *answer.encode(), EOS])
            masks.append(np.arange(len(documents[-1])) >= len(prompt.encode()))
            roles.append(role)
            numbers.append(number)
    tokens, mask = np.concatenate(documents).astype(np.int32), np.concatenate(masks)
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in documents])]).astype(np.int64)
    summary = {"examples": len(documents), "tokens": len(tokens), "dropped": {}, "unused": {}, "bad_rows": 0}
    summary |= {"truncated": 0, "open_ended": 0, "pairs": 0, "formats": {}, "format": "pairs", "max_token_id": EOS}
    return TokenizedSet(tokens, mask, offsets, np.asarray(numbers), summary, roles=np.asarray(roles, np.int8))


def pairs(count: int, seed: int = 0) -> TokenizedSet:
    """Return `texts` as pairs."""
    return examples(
        [[(row["prompt"], row["chosen"], 1), (row["prompt"], row["rejected"], 2)] for row in texts(count, seed)]
    )


def single(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return `texts` as rows of prompt, completion and label."""
    random = np.random.RandomState(seed + 1)
    labels = random.rand(count) < 0.6
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if label else "rejected"], "label": bool(label)}
        for row, label in zip(texts(count, seed), labels, strict=True)
    ]


def answers(count: int, seed: int = 0) -> TokenizedSet:
    """Return `single` as examples."""
    return examples([[(row["prompt"], row["completion"], 1 if row["label"] else 2)] for row in single(count, seed)])


def datasets(name: str, count: int, packing: bool = False, group: int = 2, seed: int = 0) -> Datasets:
    """Return rows for an objective, in order."""
    data = answers(count, seed) if name == "kto" else pairs(count, seed)
    rows = preference_rows(data, np.arange(len(data)), WIDTH, packing, group if name == "kto" else None)
    return Datasets(rows, None, {"train": data.summary})


def settings(model: pathlib.Path, folder: pathlib.Path, method: str = "lora", **keys: Any) -> Any:
    """Return a configuration; `objective` is a dictionary of its keys."""
    objective = {f"objective__{key}": value for key, value in keys.pop("objective", {}).items()}
    defaults = {
        "model__path": str(model),
        "model__dtype": "float32",
        "method": method,
        "output_dir": str(folder / "out"),
        "data__cache_dir": str(folder / "cache"),
        "data__max_length": WIDTH,
        "data__packing": False,
        "lora__rank": 4,
        "lora__alpha": 8.0,
        "mesh__data": 1,
        "mesh__fsdp": 1,
        "train__learning_rate": RATES[method],
        "train__lr_scheduler_type": "constant",
        "train__per_device_train_batch_size": 2,
        "train__per_device_eval_batch_size": 4,
        "train__loss_chunk_size": 100,
    }
    return helpers.make_config(**{**defaults, **objective, **keys})


def write_other(model: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Write a tiny Llama a little off another one; return its directory."""
    shutil.copytree(model, folder)
    random, tensors = np.random.RandomState(5), load_file(folder / "model.safetensors")
    moved = {name: (one + 0.03 * random.randn(*one.shape)).astype(np.float32) for name, one in sorted(tensors.items())}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def initial_adapter(shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return LoRA's values to start from, by path."""
    random = np.random.RandomState(3)
    return {
        name: (
            random.uniform(-1, 1, leaf.shape) / np.sqrt(leaf.shape[-2])
            if name.endswith("lora_A")
            else np.zeros(leaf.shape)
        ).astype(np.float32)
        for name, leaf in sorted(shapes.items())
    }


def windows(rows: Any, per_step: int, accumulation: int) -> Any:
    """Yield the batches of consecutive steps."""
    for start in range(0, len(rows), per_step):
        yield helpers.window(rows.take(np.arange(start, start + per_step)), accumulation)


def run(name: str, method: str, model_path: pathlib.Path, folder: pathlib.Path, steps: int = STEPS) -> list[dict]:
    """Take the steps of one of `RUNS` here; return each step's metrics."""
    from tpu_tune.training.reference import add_reference

    objective, rows, accumulation = RUNS[name]
    config = settings(model_path, folder, method, objective=objective, train__gradient_accumulation_steps=accumulation)
    config.train.per_device_train_batch_size = rows
    initial = initial_adapter(helpers.prepare(config, STEPS)[0].trainable) if method == "lora" else None
    model, functions = helpers.prepare(config, STEPS, initial=initial)
    data = datasets(name, rows * accumulation * steps)
    data = add_reference(data, config, 4, dataclasses.replace(model), model.mesh)
    return helpers.run_steps(model, functions, windows(data.train, rows * accumulation, accumulation))[1]
