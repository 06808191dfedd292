"""`reduce_lr_on_plateau` against torch's ReduceLROnPlateau, and in a run that is stopped and goes on."""

import math

import numpy as np
import pytest
from helpers_training import make_config, write_rows, write_tiny_llama

from tpu_tune.training import loop
from tpu_tune.training.plateau import Plateau, PlateauCounts

SETTINGS = [
    {},
    {"patience": 2, "factor": 0.5},
    {"patience": 0, "cooldown": 3},
    {"patience": 1, "threshold": 0.05, "threshold_mode": "abs", "min_lr": 2e-4},
    {"patience": 1, "threshold": 0.1, "factor": 0.7, "cooldown": 1, "eps": 2e-4},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_rates_are_torchs(settings):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **settings)
    random = np.random.RandomState(0)
    losses = [*(3 * 0.9 ** np.arange(10)), *(1.1 + 0.1 * random.randn(30)), math.nan, *(0.8 - 0.02 * np.arange(20))]
    ours, counts, rate = Plateau.from_settings(settings), PlateauCounts(), 1e-3
    for loss in losses:
        theirs.step(loss)
        counts, rate = ours.step(counts, loss, rate)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
    assert rate < 1e-3


def test_a_run_follows_its_evaluations_also_after_a_restart(tmp_path):
    model, rows = write_tiny_llama(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 40)
    said = []
    for steps in (6, 8):
        config = make_config(
            output_dir=str(tmp_path / "run"), model__path=str(model), model__dtype="float32", model__remat="none",
            data__train=str(rows), data__cache_dir=str(tmp_path), data__num_workers=1, data__max_length=64,
            lora__rank=2, lora__target_modules=["q_proj"], mesh__data=-1, mesh__fsdp=1,
            train__per_device_train_batch_size=1, train__per_device_eval_batch_size=1, train__max_steps=steps,
            train__logging_steps=1, train__eval_steps=2, train__learning_rate=1e-3,
            train__lr_scheduler_type="reduce_lr_on_plateau",
            # Nothing after the first evaluation is an improvement.
            train__lr_scheduler_kwargs={"patience": 0, "factor": 0.5, "threshold": 10.0, "threshold_mode": "abs"},
        )  # fmt: skip
        run = loop.train(config, said.append)
    assert any("resuming from step 6" in line for line in said)
    rates = [row["learning_rate"] for row in run.metrics if "loss" in row]
    np.testing.assert_allclose(rates, [1e-3] * 4 + [5e-4] * 2 + [2.5e-4] * 2, rtol=1e-6)
