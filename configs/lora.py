"""LoRA: an adapter over the model's weights as they are, in bfloat16. For models that fit the device unquantized.

    cp configs/lora.py my_run.py                            # change model.path and data.train in it
    tpu-tune train --config my_run.py

Expected: two bytes for each of the model's weights, sharded over all devices; quicker steps than configs/qlora.py,
since nothing is dequantized. Every key and its default stands in tpu_tune/config/sections.py.
"""

from ml_collections import ConfigDict

from tpu_tune.config import default


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = default()
    config.output_dir = "output/my-lora"

    config.model.path = "meta-llama/Llama-3.2-1B"  # a hub id, a local directory, or a .gguf file
    config.model.dtype = "bfloat16"

    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.dropout = 0.05
    config.lora.target_modules = "all-linear"
    # Some layers only, or another rank for some names:
    #   config.lora.layers_to_transform = [8, 9, 10, 11]
    #   config.lora.rank_pattern = {"q_proj": 32}

    config.data.train = "my_data.jsonl"
    config.data.max_length = 1024

    config.train.num_train_epochs = 3.0
    config.train.per_device_train_batch_size = 4
    config.train.gradient_accumulation_steps = 4
    config.train.learning_rate = 2e-4
    config.train.lr_scheduler_type = "cosine"
    config.train.warmup_ratio = 0.03
    config.train.eval_steps = 50
    config.train.save_steps = 50
    return config
