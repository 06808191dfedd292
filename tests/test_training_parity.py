"""30 steps of LoRA and of full fine-tuning, loss by loss, against torch + PEFT, and against stored losses.

The rows here are packed and padded; torch sees each document alone. Both normalise by the target tokens of the whole
accumulation window, clip at 1.0 and follow Hugging Face's cosine schedule with warm-up.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import helpers_training as helpers
import numpy as np
import pytest

from tpu_tune.checkpoints import peft as peft_files
from tpu_tune.checkpoints.source import open_source

STEPS, ACCUMULATION, ROWS, WARMUP = 30, 2, 2, 3
METHODS = {"lora": 2e-4, "full": 1e-5}
SCALE_UP = {"lora": 50.0, "full": 200.0}  # the tiny model has to move further for 30 steps to say anything
TOKENS = 24  # the documents of the tiny model use so few, to be learnable

# What torch 2.13 and peft 0.21 give for the tiny model (`python tests/test_training_parity.py` prints them).
GOLDEN = {
    "lora": [
        6.269201, 6.079394, 6.141779, 5.88684, 6.038807, 5.797424, 5.951704, 5.365688, 5.504968, 5.362263,
        5.53492, 5.373425, 5.192101, 5.134549, 5.298984, 5.305229, 4.545463, 5.123253, 5.010013, 4.837683,
        5.330457, 4.695344, 4.919769, 4.847899, 4.758216, 4.670171, 4.49706, 4.813882, 4.558436, 4.57064,
    ],
    "full": [
        6.269201, 6.079394, 6.11435, 5.82902, 5.954202, 5.688107, 5.825146, 5.298798, 5.46581, 5.259999,
        5.596476, 5.259976, 5.096744, 5.143885, 5.16279, 5.288434, 4.59616, 5.243879, 5.089557, 5.045506,
        5.040039, 4.750358, 4.82773, 4.96238, 4.759272, 4.420599, 4.462497, 4.571512, 4.254672, 4.452742,
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return helpers.write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("method", METHODS)
def test_losses_follow_torch_on_a_tiny_model(tiny: pathlib.Path, tmp_path: pathlib.Path, method: str) -> None:
    rate = METHODS[method] * SCALE_UP[method]
    ours, initial, model = our_losses(tiny, method, rate, vocabulary=TOKENS)
    np.testing.assert_allclose(ours, GOLDEN[method], rtol=1e-4)
    assert ours[-1] < ours[0] - 0.05  # otherwise the comparison would prove little
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs = torch_losses(tiny, method, rate, TOKENS, initial, model, tmp_path)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_losses_follow_torch_on_smollm2(smollm2_gguf: pathlib.Path, tmp_path: pathlib.Path, method: str) -> None:
    pytest.importorskip("torch")
    ours, initial, model = our_losses(smollm2_gguf, method, METHODS[method], vocabulary=49152)
    theirs = torch_losses(smollm2_gguf, method, METHODS[method], 49152, initial, model, tmp_path)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert abs(ours[-1] - ours[0]) > 1e-3


def windows(vocabulary: int) -> Iterator[list[list[list[np.ndarray]]]]:
    """Yield each step's micro-batches of rows of documents; the last row of some windows is empty."""
    random = np.random.RandomState(7)
    for step in range(STEPS):
        found = helpers.documents(min(vocabulary, 5000), 3, 11, 2 * ACCUMULATION * ROWS, seed=100 + step)
        rows = [found[2 * row : 2 * row + 2] for row in range(ACCUMULATION * ROWS)]
        if random.rand() < 0.2:
            rows[-1] = []
        yield [rows[part * ROWS : part * ROWS + ROWS] for part in range(ACCUMULATION)]


def settings(path: pathlib.Path, method: str, rate: float) -> Any:
    return helpers.make_config(
        model__path=str(path),
        method=method,
        model__dtype="float32",
        lora__rank=4,
        lora__alpha=8.0,
        train__learning_rate=rate,
        train__lr_scheduler_type="cosine",
        train__warmup_steps=WARMUP,
        train__weight_decay=0.1,
        train__max_grad_norm=1.0,
        train__gradient_accumulation_steps=ACCUMULATION,
        train__per_device_train_batch_size=ROWS,
        train__loss_chunk_size=22,
    )


def our_losses(path: pathlib.Path, method: str, rate: float, vocabulary: int) -> tuple[list[float], Any, Any]:
    """Train here; return the losses, LoRA's initial values, and the prepared model."""
    config, initial = settings(path, method, rate), None
    if method == "lora":
        model, _ = helpers.prepare(config, STEPS)
        random = np.random.RandomState(3)
        initial = {
            name: (
                random.uniform(-1, 1, leaf.shape) / np.sqrt(leaf.shape[-2])
                if name.endswith("lora_A")
                else np.zeros(leaf.shape)
            ).astype(np.float32)
            for name, leaf in sorted(model.trainable.items())
        }
    model, steps = helpers.prepare(config, STEPS, initial=initial)
    batches = (
        helpers.window(helpers.rows_of([row for part in parts for row in part], width=22), ACCUMULATION)
        for parts in windows(vocabulary)
    )
    _, metrics = helpers.run_steps(model, steps, batches)
    return [row["loss"] for row in metrics], initial, model


def torch_losses(
    path: pathlib.Path, method: str, rate: float, vocabulary: int, initial: Any, model: Any, tmp_path: pathlib.Path
) -> list[float]:
    """Train the same with torch, transformers and peft."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

    source = open_source(str(path))
    network = LlamaForCausalLM(LlamaConfig(**{**source.config, "attn_implementation": "eager"})).float()
    weights = {name: torch.tensor(np.array(source.read(name), np.float32)) for name in source.shapes}
    missing, extra = network.load_state_dict(weights, strict=False)
    assert not extra and all("lm_head" in name or "rotary" in name for name in missing)
    if method == "lora":
        peft = pytest.importorskip("peft")
        peft_files.write_adapter(str(tmp_path / "initial"), initial, model.method, model.architecture, str(path))
        network = peft.PeftModel.from_pretrained(network, str(tmp_path / "initial"), is_trainable=True)
    network.train()
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    plain = [weight for name, weight in trained.items() if "norm" in name]
    decayed = [weight for name, weight in trained.items() if "norm" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=rate
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses = []
    for parts in windows(vocabulary):
        found = [[document for row in part for document in row] for part in parts]
        count = sum(len(document) - 1 for part in found for document in part)
        total = 0.0
        for part in found:
            width = max(len(document) for document in part)
            ids = torch.zeros(len(part), width, dtype=torch.long)
            labels = torch.full((len(part), width), -100)
            for place, document in enumerate(part):
                ids[place, : len(document)] = labels[place, : len(document)] = torch.tensor(document)
            mask = (labels != -100).long()
            logits = network(input_ids=ids, attention_mask=mask).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
            )
            (loss / count).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total / count)
    return losses


if __name__ == "__main__":
    import tempfile

    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        helpers.write_tiny_llama(folder / "model")
        for kind, rate in METHODS.items():
            _, start, prepared = our_losses(folder / "model", kind, rate * SCALE_UP[kind], TOKENS)
            found = torch_losses(folder / "model", kind, rate * SCALE_UP[kind], TOKENS, start, prepared, folder)
            print(kind, [round(loss, 6) for loss in found])
