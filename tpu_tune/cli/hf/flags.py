"""The flags that `tpu-tune hf` takes, and what becomes of each, in one table.

They are the flags of Hugging Face's TrainingArguments and its `run_clm.py`, of `qlora.py`, of the PygmalionAI training
code, and TRL's names for the same settings. There are four actions:

- `key`: the value is assigned to a config key (if this version lacks the key, only the neutral value is accepted);
- `used`: a function of `translate` or `data_flags` reads the flag, because it depends on others;
- `ignored`: the flag is accepted, and one line explains why it has no effect;
- `refused`: an error that says what to do instead, unless the value is neutral.

A new flag is one line.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
      kind: type of its value: str | int | float | bool (true if alone) | list (words or commas) | dict (JSON).
      action: key | used | ignored | refused.
      key: the config key that takes the value.
      why: reason for `ignored` and `refused`, as the end of a sentence that begins with the flag.
      neutral: values that change nothing, the only ones that a refused flag may have.
    """

    kind: type
    action: str
    key: str = ""
    why: str = ""
    neutral: tuple[Any, ...] = ()


def key(kind: type, name: str) -> Flag:
    """Return a flag whose value is assigned to a config key."""
    return Flag(kind, "key", key=name, neutral=(None, 0, "", False))


def used(kind: type) -> Flag:
    """Return a flag that `translate` reads."""
    return Flag(kind, "used")


def refused(kind: type, why: str, *neutral: Any) -> Flag:
    """Return a flag that is an error unless its value is neutral."""
    return Flag(kind, "refused", why=why, neutral=(None, *neutral))


# Other names; the guide itself writes --source_max_length in its text and --source_max_len in its script.
ALIASES = {
    "evaluation_strategy": "eval_strategy", "source_max_length": "source_max_len",
    "target_max_length": "target_max_len",
    "lora_r": "lora_rank", "r": "lora_rank", "lora_modules": "lora_target_modules",
    "target_modules": "lora_target_modules", "lora_bias": "bias", "lora_modules_to_save": "modules_to_save",
    "use_peft": "use_lora", "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size", "activation_checkpointing": "gradient_checkpointing",
    "validation_file": "eval_file", "model_max_length": "max_length", "max_seq_length": "max_length",
    "max_seq_len": "max_length", "block_size": "max_length", "dataset_name": "dataset", "no_cuda": "use_cpu",
    "apply_xformers": "use_xformers", "use_bnb_nested_quant": "double_quant", "bnb_4bit_quant_type": "quant_type",
    "pref_loss": "loss_type", "pref_beta": "beta", "pref_ftx": "rpo_alpha", "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight", "dataset_num_proc": "preprocessing_num_workers",
    "dataset_config": "dataset_config_name", "dataset_streaming": "streaming",
    "use_flash_attention_2": "use_xformers", "use_flash_attn": "use_xformers",
}  # fmt: skip

# Flags that only qlora.py has: if one is given, the script is qlora.py.
QLORA = frozenset(
    "bits quant_type double_quant full_finetune adam8bit dataset_format source_max_len target_max_len train_on_source "
    "do_mmlu_eval mmlu_split mmlu_dataset max_memory_MB eval_dataset_size".split()
)
# Defaults of LoRA's flags: qlora.py's, and those of the PygmalionAI training code (with --use_lora).
QLORA_DEFAULTS = {"bits": 4, "lora_rank": 64, "lora_alpha": 16.0, "lora_dropout": 0.0}
LORA_DEFAULTS = {"bits": 16, "lora_rank": 4, "lora_alpha": 32.0, "lora_dropout": 0.05}
QLORA_LENGTHS = (1024, 256)  # source_max_len, target_max_len
QLORA_EVAL_ROWS = 1024  # eval_dataset_size
QLORA_TRAINER = {  # defaults of the Trainer that qlora.py changes, and we do not
    "max_steps": 10000, "learning_rate": 0.0002, "lr_scheduler_type": "constant", "warmup_ratio": 0.03,
    "max_grad_norm": 0.3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16,
}  # fmt: skip

_USED = {
    "model_name_or_path": str, "output_dir": str, "train_file": str, "eval_file": str, "dataset": str,
    "dataset_format": str, "eval_dataset_size": float, "validation_split_percentage": float, "train_on_source": bool,
    "assistant_only_loss": bool, "completion_only_loss": bool,
    "source_max_len": int, "target_max_len": int, "max_length": int, "packing": bool, "add_special_tokens": list,
    "preprocessing_num_workers": int, "dataloader_num_workers": int, "do_train": bool, "do_eval": bool,
    "eval_strategy": str, "eval_steps": float, "save_strategy": str, "save_steps": float, "save_total_limit": int,
    "logging_strategy": str, "logging_steps": float, "logging_first_step": bool, "warmup_steps": float,
    "optim": str, "adafactor": bool, "adam8bit": bool, "seed": int, "data_seed": int, "report_to": list,
    "run_name": str, "cache_dir": str, "use_cpu": bool, "bf16": bool, "fp16": bool, "bf16_full_eval": bool,
    "fp16_full_eval": bool, "gradient_checkpointing": bool, "use_lora": bool, "full_finetune": bool, "bits": int,
    "load_in_4bit": bool, "load_in_8bit": bool, "quant_type": str, "double_quant": bool, "lora_rank": int,
    "lora_alpha": float, "lora_dropout": float, "lora_target_modules": list, "max_memory_MB": float,
    "do_mmlu_eval": bool,
    "resume_from_checkpoint": str, "tokenizer_name": str,
    "stage": str, "loss_type": list, "loss_weights": list, "beta": float, "label_smoothing": float, "rpo_alpha": float,
    "simpo_gamma": float, "cpo_alpha": float, "desirable_weight": float, "undesirable_weight": float, "ref_model": str,
    "disable_dropout": bool, "max_prompt_length": int, "max_completion_length": int,
}  # fmt: skip

_KEYS = {
    "learning_rate": (float, "train.learning_rate"),
    "num_train_epochs": (float, "train.num_train_epochs"),
    "max_steps": (int, "train.max_steps"),
    "per_device_train_batch_size": (int, "train.per_device_train_batch_size"),
    "per_device_eval_batch_size": (int, "train.per_device_eval_batch_size"),
    "gradient_accumulation_steps": (int, "train.gradient_accumulation_steps"),
    "lr_scheduler_type": (str, "train.lr_scheduler_type"),
    "lr_scheduler_kwargs": (dict, "train.lr_scheduler_kwargs"),
    "warmup_ratio": (float, "train.warmup_ratio"),
    "weight_decay": (float, "train.weight_decay"),
    "adam_beta1": (float, "train.adam_beta1"),
    "adam_beta2": (float, "train.adam_beta2"),
    "adam_epsilon": (float, "train.adam_epsilon"),
    "max_grad_norm": (float, "train.max_grad_norm"),
    "load_best_model_at_end": (bool, "train.load_best_model_at_end"),
    "early_stopping_patience": (int, "train.early_stopping_patience"),
    "early_stopping_threshold": (float, "train.early_stopping_threshold"),
    "neftune_noise_alpha": (float, "train.neftune_noise_alpha"),
    "loraplus_lr_ratio": (float, "train.loraplus_lr_ratio"),
    "max_train_samples": (int, "data.max_train_samples"),
    "max_eval_samples": (int, "data.max_eval_samples"),
    "bias": (str, "lora.bias"),
    "modules_to_save": (list, "lora.modules_to_save"),
    "layers_to_transform": (list, "lora.layers_to_transform"),
    "layers_pattern": (str, "lora.layers_pattern"),
    "use_rslora": (bool, "lora.use_rslora"),
    "use_dora": (bool, "lora.use_dora"),
    "chat_template_path": (str, "data.chat_template"),
}

# Reason -> flags, each with its type after a colon unless it is str.
_IGNORED = {
    "the reference's log-probabilities are always computed once, and kept": (
        "precompute_ref_log_probs:bool precompute_ref_batch_size:int"
    ),
    "rows are packed and padded as data.packing says": (
        "padding_free:bool pad_to_multiple_of pad_token padding_value:int label_pad_token_id:int "
        "is_encoder_decoder:bool"
    ),
    "it only counts with a flag that is not supported": (
        "f_alpha_divergence_coef:float discopop_tau:float ref_model_mixup_alpha:float ref_model_sync_steps:int"
    ),
    "the compiled step averages gradients, without DistributedDataParallel (the guide is mistaken: in torch too the "
    "flag does not switch the averaging off)": "ddp_find_unused_parameters:bool",
    "jax finds the devices, and the compiled step averages gradients, without DistributedDataParallel": (
        "ddp_bucket_cap_mb:int ddp_broadcast_buffers:bool ddp_static_graph:bool ddp_backend ddp_timeout:int "
        "local_rank:int accelerator_config parallelism_config tpu_num_cores:int tpu_metrics_debug:bool xpu_backend "
        "nproc_per_node:int mp_parameters sharded_ddp"
    ),
    "weights are read tensor by tensor, directly to their devices, so no process has to wait for another": (
        "model_load_delay_per_rank:int low_cpu_mem_usage:bool"
    ),
    "weights, gradients and optimizer state are sharded over all devices without it (mesh.fsdp=-1); "
    "--config.train.optim_offload=True keeps the optimizer's state in host memory": (
        "deepspeed fsdp:list fsdp_config fsdp_transformer_layer_cls_to_wrap fsdp_min_num_params:int"
    ),
    "for long rows memory-efficient attention is the default (model.attention=auto)": (
        "use_xformers:bool attn_implementation"
    ),
    "every step is compiled by XLA": (
        "torch_compile:bool torch_compile_backend torch_compile_mode jit_mode_eval:bool use_ipex:bool torchdynamo"
    ),
    "the loss never holds all logits in memory": "use_liger_kernel:bool liger_kernel_config:dict",
    "model.dtype decides the precision of matrix products": (
        "tf32:bool half_precision_backend fp16_opt_level fp16_backend"
    ),
    "model.remat recomputes layers, and needs no further settings": (
        "gradient_checkpointing_kwargs:dict activation_checkpointing_kwargs:dict activation_offloading:bool"
    ),
    "all rows are padded to the same length, so sorting them would save nothing": (
        "group_by_length:bool length_column_name sortish_sampler:bool"
    ),
    "a background thread makes the batches, and the seed decides their order": (
        "dataloader_pin_memory:bool dataloader_persistent_workers:bool dataloader_prefetch_factor:int "
        "dataloader_multiprocessing_context dataloader_in_order:bool ignore_data_skip:bool"
    ),
    "the last batch of an epoch is used even if it is smaller": "dataloader_drop_last:bool",
    "only the columns of the data's format are read": "remove_unused_columns:bool label_names:list",
    "every process reads the whole dataset, and tokenized rows are cached": (
        "overwrite_cache:bool keep_linebreaks:bool streaming:bool split_batches:bool dispatch_batches:bool"
    ),
    "training uploads nothing; use tpu-tune push afterwards": (
        "push_to_hub:bool hub_token hub_private_repo:bool hub_model_id hub_strategy hub_always_push:bool hub_revision "
        "push_to_hub_model_id push_to_hub_organization push_to_hub_token"
    ),
    "the token is read from the environment (HF_TOKEN) and never stored": "use_auth_token:bool token",
    "code from a model's repository is never run": "trust_remote_code:bool",
    "TensorBoard's files are always in OUTPUT_DIR/tensorboard": "logging_dir",
    "nothing is overwritten: the same settings continue the run in output_dir, other settings need another directory": (
        "overwrite_output_dir:bool"
    ),
    "metrics.jsonl, config.json and the lines that training prints have this information": (
        "log_level log_level_replica log_on_each_node:bool disable_tqdm:bool logging_nan_inf_filter:bool "
        "include_num_input_tokens_seen include_tokens_per_second:bool skip_memory_metrics:bool debug:list project "
        "trackio_space_id trackio_bucket_id trackio_static_space_id enable_profiler:bool"
    ),
    "evaluation computes loss and accuracy on the devices, and keeps no predictions": (
        "prediction_loss_only:bool eval_accumulation_steps:int include_inputs_for_metrics:bool "
        "include_for_metrics:list eval_do_concat_batches:bool eval_use_gather_object:bool batch_eval_metrics:bool"
    ),
    "for the loss before training, run once with --do_eval but without --do_train, in an empty output_dir": (
        "eval_on_start:bool"
    ),
    "a checkpoint always holds the trained weights and the optimizer's state": (
        "save_only_model:bool save_on_each_node:bool save_safetensors:bool enable_jit_checkpoint:bool "
        "restore_callback_states_from_checkpoint:bool"
    ),
    "losses are always averaged over the target tokens of all devices": "average_tokens_across_devices:bool",
    "use tpu-tune plan --suggest to find the largest batch": "auto_find_batch_size:bool",
    "on the same machine, the same seed always gives the same results": "full_determinism:bool",
    "training generates no text; use tpu-tune generate afterwards": (
        "generate_during_eval:bool "
        "do_predict:bool predict_with_generate:bool generation_max_length:int generation_num_beams:int "
        "generation_config max_new_tokens:int min_new_tokens:int do_sample:bool num_beams:int num_beam_groups:int "
        "penalty_alpha:float use_cache:bool temperature:float top_k:int top_p:float typical_p:float "
        "diversity_penalty:float repetition_penalty:float length_penalty:float no_repeat_ngram_size:int"
    ),
    "training does not run MMLU; use tpu-tune eval --task mmlu afterwards": (
        "mmlu_split mmlu_dataset max_mmlu_samples:int mmlu_source_max_len:int"
    ),
    "the model's fast tokenizer is always used": "use_fast_tokenizer:bool use_fast:bool",
    "model.param_dtype decides the dtype of stored weights, --bf16 and --fp16 that of computation": "torch_dtype dtype",
    "the task is always causal language modelling": "lora_task_type task_type",
    "jax has no such cache of device memory": "torch_empty_cache_steps:int",
}

_REFUSED = {
    "label_smoothing_factor": refused(float, "is not supported: the loss is plain cross-entropy; leave it out", 0.0),
    "greater_is_better": refused(
        bool, "must be false: the metric is eval_loss, which is better the smaller it is", False
    ),
    "metric_for_best_model": refused(str, "can only be eval_loss", "loss", "eval_loss"),
    "eval_delay": refused(float, "is not supported; the first evaluation comes after eval_steps steps", 0.0),
    "optim_args": refused(str, "is not supported; use --adam_beta1, --adam_beta2 and --adam_epsilon", ""),
    "optim_target_modules": refused(list, "belongs to GaLore and APOLLO, which are not supported", []),
    "train_sampling_strategy": refused(str, "can only be random", "random", "group_by_length"),
    "model_revision": refused(str, "is not supported; download that revision and give its directory", "main"),
    "config_name": refused(str, "is not supported; the configuration is always the model's own", ""),
    "model_type": refused(str, "is not supported: models are not trained from scratch", ""),
    "config_overrides": refused(str, "is not supported; the configuration is always the model's own", ""),
    "dataset_config_name": refused(str, "is not supported; give the files", "", "default"),
    "truncation_mode": refused(str, "can only be keep_start", "keep_start"),
    "ld_alpha": refused(float, "(LD-DPO) is not supported; leave it out", 1.0),
    "f_divergence_type": refused(str, "can only be reverse_kl, which is DPO's own", "reverse_kl"),
    "use_weighting": refused(bool, "(WPO) is not supported; leave it out", False),
    "sync_ref_model": refused(bool, "is not supported: the reference stays as it is at the start", False),
    "alpha": refused(float, "(AlphaPO) is not supported; leave it out", 0.0),
    "ref_adapter_name": refused(str, "is not supported; the reference is the adapter as training starts"),
    "dataset_train_split": refused(str, "can only be train; give a split's files by --train_file", "train"),
    "dataset_test_split": refused(str, "can only be test; give a split's files by --eval_file", "test"),
    "uft": refused(bool, "is not needed: rows with `text` are always trained on in full", False),
}

FLAGS: dict[str, Flag] = {
    **{name: used(kind) for name, kind in _USED.items()},
    **{name: key(*about) for name, about in _KEYS.items()},
    **_REFUSED,
    **{
        name.replace("-", "_"): Flag(
            {"int": int, "float": float, "bool": bool, "list": list, "dict": dict}.get(kind, str), "ignored", why=why
        )
        for why, names in _IGNORED.items()
        for name, _, kind in (word.partition(":") for word in names.split())
    },
}
