"""ORPO: a first tuning and the preference between two answers in one run, without a reference model.

    cp configs/orpo.py my_run.py                            # change model.path and data.train in it
    tpu-tune train --config my_run.py

Expected: `nll_loss` (the chosen answers' cross-entropy) falls as in a first tuning, `log_odds_chosen` rises above 0.
Rows are prompt, chosen and rejected; docs/preference.md tells of the other losses.
"""

from ml_collections import ConfigDict

from tpu_tune.config import default


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = default()
    config.output_dir = "output/my-orpo"

    config.model.path = "meta-llama/Llama-3.2-1B"  # a base model will do
    config.model.dtype = "bfloat16"

    config.objective.name = "orpo"
    config.objective.beta = 0.1  # weight of the odds ratio beside the cross-entropy

    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.target_modules = "all-linear"

    config.data.train = "my_pairs.jsonl"  # prompt, chosen, rejected: text or messages
    config.data.max_length = 2048  # both answers of a pair, each behind the prompt, stand in one row

    config.train.num_train_epochs = 3.0
    config.train.per_device_train_batch_size = 2  # rows; a packed row holds several pairs
    config.train.gradient_accumulation_steps = 4
    config.train.learning_rate = 1e-4
    config.train.lr_scheduler_type = "cosine"
    config.train.warmup_ratio = 0.1
    config.train.eval_steps = 25
    config.train.logging_steps = 5
    return config
