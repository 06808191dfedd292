"""DPO: an adapter that learns from pairs which of two answers is better, beginning with a model that already answers.

    cp configs/dpo.py my_run.py                             # change model.path and data.train in it
    tpu-tune train --config my_run.py

Expected: loss 0.693 at the first update (both answers are as likely as they were), `rewards/margins` rising from 0, and
`rewards/accuracies` towards 0.7 to 0.9 on held-out pairs. Rows are prompt, chosen and rejected; docs/preference.md
tells of the other losses.
"""

from ml_collections import ConfigDict

from tpu_tune.config import default


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = default()
    config.output_dir = "output/my-dpo"

    config.model.path = "meta-llama/Llama-3.2-1B-Instruct"  # one that has been tuned to answer
    config.model.dtype = "bfloat16"
    config.model.adapter = ""  # of an earlier tuning, which then goes on; the reference is the model with it

    config.objective.name = "dpo"
    config.objective.beta = 0.1  # higher: stays nearer the reference
    config.objective.loss_type = "sigmoid"  # ipo, hinge, robust, ...; or a list, with loss_weights
    config.objective.sft_weight = 0.0  # 1.0 holds the chosen answers up (RPO)

    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.target_modules = "all-linear"

    config.data.train = "my_pairs.jsonl"  # prompt, chosen, rejected: text or messages
    config.data.max_length = 2048  # both answers of a pair, each behind the prompt, stand in one row

    config.train.num_train_epochs = 1.0
    config.train.per_device_train_batch_size = 2  # rows; a packed row holds several pairs
    config.train.gradient_accumulation_steps = 4
    config.train.learning_rate = 2e-5  # a tenth of a first tuning's; method=full wants 5e-7 to 1e-6
    config.train.lr_scheduler_type = "cosine"
    config.train.warmup_ratio = 0.1
    config.train.eval_steps = 25
    config.train.logging_steps = 5
    return config
