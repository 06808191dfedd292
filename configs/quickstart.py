"""QLoRA on SmolLM2-135M-Instruct with the ChatterBot conversations, small enough for two CPU cores.

    bash launch/quickstart.sh                               # fetches the inputs, trains, shows answers before and after
    tpu-tune train --config configs/quickstart.py           # the training alone, once the inputs are there

Expected, in six minutes on two cores: eval_loss 1.85 at step 18, 1.73 at 36, 1.71 at the end (53), and the answers turn
from a help desk's to ChatterBot's short ones. The same run with another seed:
--config.seed=1 --config.output_dir=output/quickstart-1
"""

import os
import pathlib

from ml_collections import ConfigDict

from tpu_tune.config import default


def get_config() -> ConfigDict:
    """Return the quickstart's configuration. The launch script fetches its inputs into $TPU_TUNE_CACHE."""
    cache = pathlib.Path(os.environ.get("TPU_TUNE_CACHE") or "~/.cache/tpu_tune").expanduser()
    config = default()
    config.output_dir = "output/quickstart"

    config.model.path = str(cache / "downloads" / "base-0.1.2" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    config.model.dtype = "float32"  # quick on every CPU; bfloat16 on a TPU, a GPU, or a CPU with AVX512_BF16 or AMX
    config.model.remat = "dots"  # keep the products, which cost time; recompute the rest, which costs memory

    config.quantize.format = "nf4"
    config.quantize.double_quant = True

    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.target_modules = "all-linear"

    config.data.train = str(cache / "quickstart" / "chats.jsonl")
    config.data.format = "messages"
    config.data.max_length = 256  # the chats are short: shorter rows, less attention
    config.data.packing = True

    config.train.num_train_epochs = 1.0
    config.train.per_device_train_batch_size = 4
    config.train.per_device_eval_batch_size = 4
    config.train.learning_rate = 5e-4
    config.train.lr_scheduler_type = "cosine"
    config.train.warmup_ratio = 0.1
    config.train.logging_steps = 1
    config.train.eval_steps = 18
    config.train.save_steps = 18
    return config
