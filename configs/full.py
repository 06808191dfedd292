"""Full fine-tuning: every weight is trained. For small models, or for many devices.

    cp configs/full.py my_run.py                            # change model.path and data.train in it
    tpu-tune train --config my_run.py

Expected: with AdamW sixteen bytes for each weight (float32 weight, gradient and two moments), sharded over all devices
by mesh.fsdp; adamw_8bit or adafactor take less. The result is a Hugging Face model in output_dir/model. Every key and
its default stands in tpu_tune/config/sections.py.
"""

from ml_collections import ConfigDict

from tpu_tune.config import default


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = default()
    config.output_dir = "output/my-full"
    config.method = "full"

    config.model.path = "meta-llama/Llama-3.2-1B"  # a hub id or a local directory
    config.model.dtype = "bfloat16"  # of the computation; trained weights are stored in float32,
    config.model.param_dtype = "float32"  # because bfloat16 would round small updates away

    config.data.train = "my_data.jsonl"
    config.data.max_length = 1024

    config.mesh.fsdp = -1  # every device holds its share of weights, gradients and moments

    config.train.num_train_epochs = 2.0
    config.train.per_device_train_batch_size = 4
    config.train.gradient_accumulation_steps = 4
    config.train.learning_rate = 1e-5  # far smaller than an adapter's
    config.train.lr_scheduler_type = "cosine"
    config.train.warmup_ratio = 0.03
    config.train.optim = "adamw"
    config.train.eval_steps = 100
    config.train.save_steps = 100
    return config
