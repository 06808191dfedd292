"""Write `goldens/reward.json`: the losses of TRL's RewardTrainer on a tiny model. Needs `pip install trl==1.16.0`.

PYTHONPATH=.:tests python tests/make_reward_golden.py
"""

from __future__ import annotations

import json
import pathlib
import tempfile

import helpers_training as helpers
import tiny_models

from tpu_tune.checkpoints import heads
from tpu_tune.checkpoints.huggingface_write import write_model
from tpu_tune.checkpoints.params import load_params, open_architecture
from tpu_tune.checkpoints.source import open_source

GOLDEN = tiny_models.GOLDENS / "reward.json"
STEPS, RATE, CENTERING = 5, 2e-3, 0.01


def write_reward_model(folder: pathlib.Path) -> str:
    """Write a tiny Llama with a reward head; return its directory."""
    source = heads.with_head(open_source(str(helpers.write_tiny_llama(folder / "base"))), ["reward"])
    arch = open_architecture(source)
    write_model(str(folder / "reward"), load_params(source, arch), source, arch)
    return str(folder / "reward")


def reward_rows() -> list[dict]:
    """Return pairs of ragged lengths; some have a margin."""
    return [
        {"prompt": "What is it? ", "chosen": "A fine day.", "rejected": "No.", "margin": 0.0},
        {
            "prompt": "And then? ",
            "chosen": "It went on and on.",
            "rejected": "It went on, and on, badly.",
            "margin": 0.5,
        },
        {"prompt": "Why? ", "chosen": "So.", "rejected": "Because of all the things that were said.", "margin": 1.0},
        {"prompt": "Where do we go from here? ", "chosen": "Home!", "rejected": "Away", "margin": 0.0},
    ]


def main() -> None:
    """Train with TRL and write the losses."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            model=write_reward_model(pathlib.Path(folder)),
            args=RewardConfig(
                folder, per_device_train_batch_size=4, max_steps=STEPS, learning_rate=RATE, logging_steps=1,
                lr_scheduler_type="constant", center_rewards_coefficient=CENTERING, bf16=False, report_to=[],
                save_strategy="no", use_cpu=True, optim="adamw_torch", gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list(reward_rows()),
        )  # fmt: skip
        trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row and "margin" in row]
    golden = {name: [row[name] for row in rows] for name in ("loss", "accuracy", "margin", "grad_norm")}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
