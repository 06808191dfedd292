"""T5 and FLAN-T5: an adapter on an encoder-decoder, which reads an input and writes an output.

    cp configs/t5.py my_run.py                              # change model.path and data.train in it
    tpu-tune train --config my_run.py
    tpu-tune generate --model google/flan-t5-base --adapter output/my-t5/adapter --greedy --prompt "summarize: ..."

Expected: with google/flan-t5-base, trainable params: 1,769,472 || all params: 249,347,328 || trainable%: 0.7096, and
two bytes for each of these in device memory, beside the activations of one micro-batch. `tpu-tune export output/my-t5
--merge --output DIR` gives a model that transformers loads. The model's own dropout (`dropout_rate`) is not applied,
only lora.dropout. Every key and its default stands in tpu_tune/config/sections.py.
"""

from ml_collections import ConfigDict

from tpu_tune.config import default


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = default()
    config.output_dir = "output/my-t5"

    config.model.path = "google/flan-t5-base"  # a hub id or a local directory
    config.model.dtype = (
        "bfloat16"  # not float16, in which T5's activations overflow; float32 where there is no bfloat16
    )

    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.dropout = 0.05
    config.lora.target_modules = ["q", "v"]  # of encoder, decoder and cross-attention; or "all-linear"
    # Four bits for the base, as in configs/qlora.py:
    #   config.quantize.format = "nf4"

    config.data.train = "my_data.jsonl"  # rows with input/output, prompt/completion or instruction; not text, not chats
    config.data.max_length = 512  # tokens of the input and, separately, of the output; EOS is kept where a text is cut
    config.data.target_max_len = 128  # less for the output. Rows are padded, one pair each: data.packing does nothing

    config.train.num_train_epochs = 3.0
    config.train.per_device_train_batch_size = 8
    config.train.gradient_accumulation_steps = 2
    config.train.learning_rate = 1e-3  # T5 takes more than decoder-only models do
    config.train.lr_scheduler_type = "linear"
    config.train.warmup_ratio = 0.03
    config.train.eval_steps = 50
    config.train.save_steps = 50
    return config
