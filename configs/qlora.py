"""QLoRA: an adapter over weights stored in four bits. The method for one small TPU or GPU, or for a large model.

    cp configs/qlora.py my_run.py                           # change model.path and data.train in it
    tpu-tune train --config my_run.py
    tpu-tune train --config my_run.py --config.train.learning_rate=1e-4 --config.output_dir=output/slower

Expected: about half a byte for each of the model's weights in device memory, beside the activations of one micro-batch;
losses like configs/lora.py's. Every key and its default stands in tpu_tune/config/sections.py.
"""

from ml_collections import ConfigDict

from tpu_tune.config import default


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = default()
    config.output_dir = "output/my-qlora"  # starting again with the same directory goes on where the run stopped

    config.model.path = "meta-llama/Llama-3.2-1B"  # a hub id, a local directory, or a .gguf file
    config.model.dtype = "bfloat16"  # float16 on GPUs older than Ampere, such as the T4
    config.model.remat = "auto"  # of what is kept for the backward pass, the fastest that fits; full keeps least

    config.quantize.format = "nf4"  # int8 loses less and takes twice the room
    config.quantize.group_size = 64
    config.quantize.double_quant = True

    config.lora.rank = 16
    config.lora.alpha = 32.0  # the update is scaled by alpha / rank
    config.lora.dropout = 0.05
    config.lora.target_modules = "all-linear"  # or names: ["q_proj", "v_proj"]; `tpu-tune inspect MODEL` lists them

    config.data.train = "my_data.jsonl"  # rows with text, input/output, instruction, conversations or messages
    config.data.eval = ""  # empty: eval_ratio of the rows, never trained on
    config.data.max_length = 1024
    config.data.packing = True  # several short documents a row, which do not see each other

    config.train.num_train_epochs = 3.0
    config.train.per_device_train_batch_size = 2  # what fits
    config.train.gradient_accumulation_steps = 8  # times this: what one update averages over
    config.train.learning_rate = 2e-4
    config.train.lr_scheduler_type = "cosine"
    config.train.warmup_ratio = 0.03
    config.train.eval_steps = 50
    config.train.save_steps = 50
    config.train.report_to = []  # ["tensorboard"], ["wandb"], or both
    return config
