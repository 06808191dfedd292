"""From a script's flags to a configuration, with a note on every translation that is not obvious.

Flags that are not given have the defaults of Hugging Face's TrainingArguments, flags of qlora.py and of the PygmalionAI
training code the defaults of that script. Settings that change no result (remat, kernels) keep tpu_tune's defaults.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.cli.hf.command_line import ScriptFlags
from tpu_tune.cli.hf.data_flags import set_data, set_lengths
from tpu_tune.cli.hf.flags import (
    FLAGS,
    LORA_DEFAULTS,
    QLORA,
    QLORA_DEFAULTS,
    QLORA_TRAINER,
)
from tpu_tune.cli.hf.preference_flags import set_objective
from tpu_tune.errors import UserError
from tpu_tune.training.arithmetic import AT_THE_END
from tpu_tune.training.too_little import of_warmup

OPTIMIZERS = {  # Hugging Face's name -> (our optimizer with the same algorithm, how it differs)
    "adamw_apex_fused": ("adamw", ""),
    "adamw_torch_npu_fused": ("adamw", ""),
    "adamw_anyprecision": ("adamw", "its state is float32"),
    "adamw_torch_4bit": ("adamw_8bit", "its state has eight bits, not four"),
    "lion_8bit": ("lion", "its state is float32"),
    "paged_lion_8bit": ("lion", "its state is float32"),
}
_UNSUPPORTED_REPORTERS = (
    "azure_ml clearml codecarbon comet_ml dagshub dvclive flyte mlflow neptune swanlab trackio".split()
)


@dataclasses.dataclass
class Translation:
    """A command line's flags as a job.

    Attributes:
      config: the configuration, checked as far as possible without the data and the model.
      notes: remarks for the user, one line each.
      ignored: for each ignored flag, as the user wrote it, why it has no effect.
      environ: environment variables to set before jax, wandb and huggingface_hub are imported.
      train: whether to train; otherwise only to evaluate.
      max_memory: bytes that a device may take, or None.
      derived_length: whether data.max_length was derived, not given.
    """

    config: ConfigDict
    notes: list[str]
    ignored: dict[str, str]
    environ: dict[str, str]
    train: bool
    max_memory: float | None
    derived_length: bool


def translate(flags: ScriptFlags, platform: Callable[[], str], environ: Mapping[str, str] = os.environ) -> Translation:
    """Turn flags into a configuration.

    Args:
      flags: from `command_line.parse`; remarks are added to its notes.
      platform: returns cpu | gpu | tpu; called only if a flag depends on it.
      environ: the environment, of which WANDB_PROJECT, HF_DATASETS_CACHE and TPU_TUNE_CACHE are read.

    Raises:
      UserError: a flag that is not supported, or a value that makes no sense; the message names the flag.
    """
    config = configuration.default()
    ignored = _assign_keys(flags, config)
    trains, evaluates = _mode(flags)
    _method(flags, config)
    _precision(flags, config, platform)
    set_data(flags, config, evaluates)
    derived_length = set_lengths(flags, config)
    if set_objective(flags, config):
        derived_length = False
    _intervals(flags, config, evaluates, trains)
    _optimizer(flags, config)
    _run(flags, config)
    for line in of_warmup(config, config.train.max_steps if config.train.max_steps > 0 else AT_THE_END):
        flags.note(line)
    variables = _environment(flags, config, {**environ, **flags.environ})
    if flags.get("do_mmlu_eval"):
        flags.note("--do_mmlu_eval: training does not run MMLU; use tpu-tune eval --task mmlu afterwards")
    cap = flags.get("max_memory_MB")
    if cap is not None and cap <= 0:
        raise UserError(f"{flags.spelled('max_memory_MB')} is {cap:g}; it must be positive")
    return Translation(
        configuration.check(config),
        flags.notes,
        ignored,
        {**flags.environ, **variables},
        trains,
        None if cap is None else cap * 1e6,
        derived_length,
    )


def _assign_keys(flags: ScriptFlags, config: ConfigDict) -> dict[str, str]:
    """Assign the flags that are config keys, and raise for refused ones; return the ignored flags and why."""
    known, ignored = dict(configuration.flatten(configuration.default())), {}
    for name, value in flags.values.items():
        flag, spelling = FLAGS[name], flags.spelled(name)
        if flag.action == "ignored":
            ignored[spelling] = flag.why
        elif flag.action == "refused" and value not in flag.neutral:
            raise UserError(f"{spelling} {flag.why}")
        elif flag.action == "key" and flag.key in known:
            try:
                configuration.assign(config, flag.key, value)
            except UserError as error:
                raise UserError(f"{spelling}: {error}") from None
        elif flag.action == "key" and value not in flag.neutral:
            raise UserError(f"{spelling}: this version of tpu_tune has no {flag.key}")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if flags.get(name, 1) < 1:
            raise UserError(f"{flags.spelled(name)} is {flags.get(name)}; there must be at least one")
    if flags.get("num_train_epochs", 1) <= 0 and flags.get("max_steps", -1) <= 0:
        raise UserError(
            f"{flags.spelled('num_train_epochs')} is {flags.get('num_train_epochs'):g}; it must be positive"
        )
    return ignored


def _mode(flags: ScriptFlags) -> tuple[bool, bool]:
    """Return (whether to train, whether to evaluate)."""
    strategy, do_eval = _strategy(flags, "eval_strategy", "no"), flags.get("do_eval", False)
    trains = flags.get("do_train", not flags.get("do_eval", False))
    if not trains and not do_eval:
        instead = "; for --do_predict, tpu-tune generate answers prompts" if flags.get("do_predict") else ""
        raise UserError(f"neither --do_train nor --do_eval: there is nothing to do{instead}")
    return trains, strategy != "no" or do_eval


def _strategy(flags: ScriptFlags, name: str, default: str) -> str:
    value = str(flags.get(name, default)).lower()
    if value == "best":
        raise UserError(
            f"{flags.spelled(name)} best is not supported; --load_best_model_at_end true keeps the best checkpoint"
        )
    if value not in ("no", "steps", "epoch"):
        raise UserError(f"{flags.spelled(name)} is '{value}'; it must be no, steps or epoch")
    return value


def _method(flags: ScriptFlags, config: ConfigDict) -> None:
    """Set full fine-tuning or LoRA, the bits of the frozen weights, and the adapters."""
    is_qlora = bool(set(flags.values) & QLORA)
    full, use_lora = flags.get("full_finetune", False), flags.get("use_lora", False)
    loaded_bits = 4 if flags.get("load_in_4bit") else 8 if flags.get("load_in_8bit") else None
    lora = not full and bool(use_lora or is_qlora or loaded_bits or "lora_rank" in flags.values)
    if full and use_lora:
        raise UserError("--full_finetune and --use_lora exclude each other")
    config.method = "lora" if lora else "full"
    defaults = LORA_DEFAULTS if use_lora or not is_qlora else QLORA_DEFAULTS
    config.data.add_bos_token = "always" if is_qlora else "auto"  # qlora.py writes it before every prompt
    bits = flags.get("bits", loaded_bits or (16 if full else defaults["bits"]))
    if bits not in (16, 8, 4):
        raise UserError(f"{flags.spelled('bits')} is {bits}; it must be 16, 8 or 4")
    if full and bits != 16:
        raise UserError(f"--full_finetune trains every weight, and weights of {bits} bits cannot be trained; --bits 16")
    if lora and is_qlora and bits == 4 and "bits" not in flags.values and loaded_bits is None:
        flags.note("--bits is not given: 4, qlora.py's default")
    kind = str(flags.get("quant_type", "nf4")).lower()
    if kind not in ("nf4", "fp4"):
        raise UserError(f"{flags.spelled('quant_type')} is '{kind}'; it must be nf4 or fp4")
    if kind == "fp4" and bits == 4:
        flags.note(f"{flags.spelled('quant_type')} fp4: nf4 instead, which takes the same memory and is more exact")
    config.quantize.format = {16: "none", 8: "int8", 4: "nf4"}[bits] if lora else "none"
    config.quantize.double_quant = flags.get("double_quant", True)
    if bits == 16 and "bits" in flags.values and lora:
        flags.note("--bits 16: the base weights are not quantized, so this is plain LoRA")
    if is_qlora and lora and not use_lora:
        unset = [
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in QLORA_TRAINER.items()
            if name not in flags.values
        ]
        if unset:
            flags.note(
                "flags of the Trainer that are not given have Hugging Face's defaults; qlora.py's own defaults would "
                "be " + ", ".join(unset)
            )
    if lora:
        _adapters(flags, config, defaults, all_linear=is_qlora or not use_lora)


def _adapters(flags: ScriptFlags, config: ConfigDict, defaults: Mapping[str, Any], all_linear: bool) -> None:
    """Set LoRA's own keys; without --lora_target_modules all linear layers are targets, or the model's usual ones."""
    config.lora.rank = flags.get("lora_rank", defaults["lora_rank"])
    if config.lora.rank < 1:
        raise UserError(f"{flags.spelled('lora_rank')} is {config.lora.rank}; there must be at least one")
    config.lora.alpha = float(flags.get("lora_alpha", defaults["lora_alpha"]))
    config.lora.dropout = flags.get("lora_dropout", defaults["lora_dropout"])
    if "lora_dropout" not in flags.values and config.lora.dropout:
        flags.note(
            f"--lora_dropout is not given: {config.lora.dropout:g}, the default of the PygmalionAI training code"
        )
    targets = flags.get("lora_target_modules")
    if targets is None or targets == ["all"]:  # forks of qlora.py have --lora_modules all
        targets = ["all-linear" if all_linear or targets else ""]
    configuration.assign(config, "lora.target_modules", targets[0] if len(targets) == 1 else targets)


def _precision(flags: ScriptFlags, config: ConfigDict, platform: Callable[[], str]) -> None:
    """Set the dtype of computation from --bf16 and --fp16, as far as the device supports it."""
    fp16, bf16 = flags.get("fp16", False), flags.get("bf16", False)
    if fp16 and bf16:
        raise UserError("--fp16 and --bf16 exclude each other")
    config.model.dtype = "bfloat16" if bf16 else "float32"
    if fp16:
        device = platform()
        config.model.dtype = {"tpu": "bfloat16", "cpu": "float32"}.get(device, "float16")
        flags.note(
            {
                "tpu": "--fp16: this is a TPU, which computes in bfloat16; using bfloat16",
                "cpu": "--fp16: a CPU has no fast float16; using float32 (--bf16 for bfloat16)",
            }.get(device, "--fp16: float16 with dynamic loss scaling; trained weights stay float32")
        )
    for name in ("fp16_full_eval", "bf16_full_eval"):
        if flags.get(name):
            flags.note(f"{flags.spelled(name)}: evaluation has the same dtype as training, {config.model.dtype}")
    if "gradient_checkpointing" in flags.values:
        config.model.remat = "full" if flags.get("gradient_checkpointing") else "none"
    config.data.packing = flags.get("packing", False)
    if not config.data.packing:
        flags.note(
            "one example per row (data.packing=False), as in the Trainer; --packing true packs several into a row"
        )


def _intervals(flags: ScriptFlags, config: ConfigDict, evaluates: bool, trains: bool) -> None:
    """Set when to log, evaluate and save."""
    train = config.train
    train.logging_first_step = flags.get("logging_first_step", False)
    train.logging_steps = _steps(flags, "logging_steps", 500)
    logging = flags.get("logging_strategy", "steps").lower()
    if logging != "steps":
        flags.note(
            f"{flags.spelled('logging_strategy')} {logging}: metrics.jsonl has a row every {train.logging_steps} steps"
        )
    train.eval_strategy = _strategy(flags, "eval_strategy", "no")
    train.eval_steps = _steps(flags, "eval_steps", train.logging_steps)
    if evaluates and train.eval_strategy == "no":
        train.eval_strategy, train.eval_steps = "steps", AT_THE_END
        if trains:
            flags.note("--do_eval without --eval_strategy: one evaluation, at the end")
    train.save_strategy = _strategy(flags, "save_strategy", "steps")
    train.save_steps = _steps(flags, "save_steps", 500)
    train.save_total_limit = max(0, flags.get("save_total_limit") or 0)
    if train.save_strategy != "no" and trains:
        flags.note("checkpoints are in OUTPUT_DIR/checkpoints/STEP; the Trainer's are in checkpoint-STEP")
    warmup = flags.get("warmup_steps", 0)
    if 0 < warmup < 1:
        train.warmup_ratio = warmup
    else:
        configuration.assign(config, "train.warmup_steps", warmup)


def _steps(flags: ScriptFlags, name: str, default: float) -> float:
    """Return a number of steps, or a share of the run, as the Trainer takes them."""
    value = flags.get(name, default)
    if value <= 0 or (value > 1 and value != int(value)):
        raise UserError(
            f"{flags.spelled(name)} is {value:g}; it must be a whole number of steps, or a share of the run below 1"
        )
    return value if value < 1 else int(value)


def _optimizer(flags: ScriptFlags, config: ConfigDict) -> None:
    """Set the optimizer from --optim and its older spellings."""
    name = flags.get("optim", "adamw_torch_fused")
    if flags.get("adafactor"):
        name = "adafactor"
    if flags.get("adam8bit"):
        name = "adamw_bnb_8bit"
    optimizer, difference = OPTIMIZERS.get(name, (name, ""))
    if difference:
        flags.note(f"{flags.spelled('optim')} {name}: {optimizer}; {difference}")
    elif name.startswith("paged_"):
        flags.note(
            f"{flags.spelled('optim')} {name}: the optimizer's state stays in device memory, where the plan counts it; "
            "--config.train.optim_offload=True keeps it in host memory"
        )
    config.train.optim = optimizer


def _run(flags: ScriptFlags, config: ConfigDict) -> None:
    """Set the model, the run directory, seeds, and where metrics are reported."""
    config.model.path = flags.get("model_name_or_path", "")
    if not config.model.path:
        raise UserError("--model_name_or_path is missing; give a hub id, a local directory or a .gguf file")
    tokenizer = flags.get("tokenizer_name")
    if tokenizer and tokenizer != config.model.path:
        raise UserError(
            f"{flags.spelled('tokenizer_name')} {tokenizer}: the model's own tokenizer is always used; leave it out"
        )
    config.output_dir = flags.get("output_dir", config.output_dir)
    config.seed = flags.get("seed", 42)
    config.data.data_seed = flags.get("data_seed", config.seed)
    for name, value in (("seed", config.seed), ("data_seed", config.data.data_seed)):
        if value < -1:
            raise UserError(f"{flags.spelled(name)} is {value}; it must not be negative (-1 draws one)")
    if -1 in (config.seed, config.data.data_seed):
        flags.note("a seed of -1 is drawn when the run begins, printed, and kept in OUTPUT_DIR/config.json")
    reporters = flags.get("report_to", [])
    for name in reporters:
        if name in _UNSUPPORTED_REPORTERS:
            flags.note(
                f"{flags.spelled('report_to')} {name} is not supported; wandb and tensorboard are, and metrics.jsonl "
                "is always written"
            )
    config.train.report_to = [name for name in reporters if name not in (*_UNSUPPORTED_REPORTERS, "none")]
    checkpoint = flags.get("resume_from_checkpoint")
    if checkpoint is None:
        return
    spelling, output_dir = flags.spelled("resume_from_checkpoint"), os.path.abspath(config.output_dir)
    is_path = checkpoint.lower() not in ("true", "false", "1", "0", "auto", "latest")
    if is_path and os.path.commonpath([os.path.abspath(checkpoint), output_dir]) != output_dir:
        raise UserError(
            f"{spelling} {checkpoint}: a run continues only in its own output_dir; set --output_dir to the run's"
        )
    flags.note(f"{spelling}: a run always continues from the last checkpoint in output_dir")


def _environment(flags: ScriptFlags, config: ConfigDict, environ: Mapping[str, str]) -> dict[str, str]:
    """Apply environment variables that scripts export; return the variables that flags set."""
    variables = {"WANDB_NAME": flags.get("run_name"), "HF_HUB_CACHE": flags.get("cache_dir")}
    variables["JAX_PLATFORMS"] = "cpu" if flags.get("use_cpu") else None
    cache = environ.get("HF_DATASETS_CACHE")
    if cache and not environ.get("TPU_TUNE_CACHE"):
        if _is_writable(cache):
            config.data.cache_dir = cache
            flags.note(f"HF_DATASETS_CACHE: tokenized data is cached in {cache}")
        else:
            flags.note(
                f"HF_DATASETS_CACHE: {cache} cannot be written; tokenized data is cached in the default directory"
            )
    if environ.get("WANDB_PROJECT") and "wandb" in config.train.report_to:
        flags.note(f"WANDB_PROJECT: the run appears in the project {environ['WANDB_PROJECT']}")
    return {name: value for name, value in variables.items() if value}


def _is_writable(directory: str) -> bool:
    """Return whether a directory exists or can be made, and can be written to."""
    existing = os.path.abspath(os.path.expanduser(directory))
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)
