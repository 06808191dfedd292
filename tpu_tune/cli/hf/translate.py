"""From a script's flags to a configuration, with a line for everything that is not plain.

Unset flags take Hugging Face's defaults (TrainingArguments), qlora.py's and the training code's own flags theirs. What
changes no number (remat, kernels) keeps tpu_tune's default.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.cli.hf.flags import (
    FLAGS,
    LORA_DEFAULTS,
    QLORA,
    QLORA_DEFAULTS,
    QLORA_TRAINER,
)
from tpu_tune.cli.hf.rows import limit_rows, place_rows
from tpu_tune.cli.hf.words import Given
from tpu_tune.errors import UserError

NEVER = 10**9  # steps: an evaluation that only the end of the run makes
OPTIMIZERS = {  # Hugging Face's names of the same algorithm in other arithmetic -> (ours, how it differs)
    "adamw_apex_fused": ("adamw", ""),
    "adamw_torch_npu_fused": ("adamw", ""),
    "adamw_anyprecision": ("adamw", "its state is float32"),
    "adamw_torch_4bit": ("adamw_8bit", "its state has eight bits, not four"),
    "lion_8bit": ("lion", "its state is float32"),
    "paged_lion_8bit": ("lion", "its state is float32"),
}
_REPORTERS = "azure_ml clearml codecarbon comet_ml dagshub dvclive flyte mlflow neptune swanlab trackio".split()


@dataclasses.dataclass
class Translation:
    """What a command line asks for.

    Attributes:
      config: checked as far as it goes without the data and the model.
      notes: what is to be said aloud, one line each.
      ignored: flag as written -> why it means nothing here.
      environ: variables to set before anything heavy is imported.
      train: False evaluates only.
      max_memory: bytes that a device may take, or None.
      derived_length: whether data.max_length was worked out rather than asked for.
    """

    config: ConfigDict
    notes: list[str]
    ignored: dict[str, str]
    environ: dict[str, str]
    train: bool
    max_memory: float | None
    derived_length: bool


def translate(given: Given, platform: Callable[[], str], environ: Mapping[str, str] = os.environ) -> Translation:
    """Turn flags into a configuration.

    Args:
      given: from `words.parse`.
      platform: says cpu | gpu | tpu; asked only where it matters.
      environ: WANDB_PROJECT, HF_DATASETS_CACHE and TPU_TUNE_CACHE are read.

    Raises:
      UserError: a flag that cannot be honoured, or a value that makes no sense, by the flag's name.
    """
    flags, config = given, configuration.default()
    ignored = _plain(flags, config)
    trains, evaluates = _mode(flags)
    _method(flags, config)
    _precision(flags, config, platform)
    place_rows(flags, config, evaluates)
    derived = limit_rows(flags, config)
    _intervals(flags, config, evaluates, trains)
    _optimizer(flags, config)
    _run(flags, config)
    variables = _environment(flags, config, {**environ, **given.environ})
    _outlook(flags)
    cap = flags.get("max_memory_MB")
    if cap is not None and cap <= 0:
        raise UserError(f"{flags.said('max_memory_MB')} is {cap:g}; it must be positive")
    return Translation(
        configuration.check(config),
        flags.notes,
        ignored,
        {**given.environ, **variables},
        trains,
        None if cap is None else cap * 1e6,
        derived,
    )


def _plain(flags: Given, config: ConfigDict) -> dict[str, str]:
    """Set what goes into a key as it is; raise at what is refused; return what is ignored and why."""
    known, ignored = dict(configuration.flatten(configuration.default())), {}
    for name, value in flags.values.items():
        flag, said = FLAGS[name], flags.said(name)
        if flag.action == "ignored":
            ignored[said] = flag.why
        elif flag.action == "refused" and value not in flag.neutral:
            raise UserError(f"{said} {flag.why}")
        elif flag.action == "key" and flag.key in known:
            try:
                configuration.assign(config, flag.key, value)
            except UserError as error:
                raise UserError(f"{said}: {error}") from None
        elif flag.action == "key" and value not in flag.neutral:
            raise UserError(f"{said}: this version of tpu_tune has no {flag.key}")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if flags.get(name, 1) < 1:
            raise UserError(f"{flags.said(name)} is {flags.get(name)}; there must be at least one")
    if flags.get("num_train_epochs", 1) <= 0 and flags.get("max_steps", -1) <= 0:
        raise UserError(f"{flags.said('num_train_epochs')} is {flags.get('num_train_epochs'):g}; it must be positive")
    return ignored


def _mode(flags: Given) -> tuple[bool, bool]:
    """Return (whether to train, whether to evaluate)."""
    strategy, do_eval = _strategy(flags, "eval_strategy", "no"), flags.get("do_eval", False)
    trains = flags.get("do_train", not flags.get("do_eval", False))
    if not trains and not do_eval:
        raise UserError("neither --do_train nor --do_eval: there is nothing to do")
    return trains, strategy != "no" or do_eval


def _strategy(flags: Given, name: str, default: str) -> str:
    value = str(flags.get(name, default)).lower()
    if value == "best":
        raise UserError(
            f"{flags.said(name)} best is not there; --load_best_model_at_end true keeps the best checkpoint"
        )
    if value not in ("no", "steps", "epoch"):
        raise UserError(f"{flags.said(name)} is '{value}'; it must be no, steps or epoch")
    return value


def _method(flags: Given, config: ConfigDict) -> None:
    """Full or LoRA, how many bits, which adapters."""
    style = sorted(set(flags.values) & QLORA)
    full, pygmalion = flags.get("full_finetune", False), flags.get("use_lora", False)
    fewer = 4 if flags.get("load_in_4bit") else 8 if flags.get("load_in_8bit") else None
    lora = not full and bool(pygmalion or style or fewer or "lora_rank" in flags.values)
    if full and pygmalion:
        raise UserError("--full_finetune and --use_lora exclude each other")
    config.method = "lora" if lora else "full"
    defaults = LORA_DEFAULTS if pygmalion or not style else QLORA_DEFAULTS
    bits = flags.get("bits", fewer or (16 if full else defaults["bits"]))
    if bits not in (16, 8, 4):
        raise UserError(f"{flags.said('bits')} is {bits}; it must be 16, 8 or 4")
    if full and bits != 16:
        raise UserError(f"--full_finetune trains every weight, and weights of {bits} bits cannot be trained; --bits 16")
    if lora and style and bits == 4 and "bits" not in flags.values and fewer is None:
        flags.note("--bits is not given: 4, as qlora.py has it")
    kind = str(flags.get("quant_type", "nf4")).lower()
    if kind not in ("nf4", "fp4"):
        raise UserError(f"{flags.said('quant_type')} is '{kind}'; it must be nf4 or fp4")
    if kind == "fp4" and bits == 4:
        flags.note(f"{flags.said('quant_type')} fp4: nf4 instead, which takes as much room and loses less")
    config.quantize.format = {16: "none", 8: "int8", 4: "nf4"}[bits] if lora else "none"
    config.quantize.double_quant = flags.get("double_quant", True)
    if bits == 16 and "bits" in flags.values and lora:
        flags.note("--bits 16: the base weights are not quantized, so that this is plain LoRA")
    if style and lora and not pygmalion:
        unset = [
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in QLORA_TRAINER.items()
            if name not in flags.values
        ]
        if unset:
            flags.note(
                "flags of the Trainer that are not given have Hugging Face's defaults; qlora.py itself would take "
                + ", ".join(unset)
            )
    if not lora:
        return
    config.lora.rank = flags.get("lora_rank", defaults["lora_rank"])
    if config.lora.rank < 1:
        raise UserError(f"{flags.said('lora_rank')} is {config.lora.rank}; there must be at least one")
    config.lora.alpha = float(flags.get("lora_alpha", defaults["lora_alpha"]))
    config.lora.dropout = flags.get("lora_dropout", defaults["lora_dropout"])
    if "lora_dropout" not in flags.values and config.lora.dropout:
        flags.note(f"--lora_dropout is not given: {config.lora.dropout:g}, as the training code has it")
    targets = flags.get("lora_target_modules")
    if targets is None:
        targets = ["" if pygmalion and not style else "all-linear"]
    configuration.assign(config, "lora.target_modules", targets[0] if len(targets) == 1 else targets)


def _precision(flags: Given, config: ConfigDict, platform: Callable[[], str]) -> None:
    """--bf16, --fp16 and their evaluation; which of them the device wants."""
    half, brain = flags.get("fp16", False), flags.get("bf16", False)
    if half and brain:
        raise UserError("--fp16 and --bf16 exclude each other")
    config.model.dtype = "bfloat16" if brain else "float32"
    if half:
        device = platform()
        config.model.dtype = {"tpu": "bfloat16", "cpu": "float32"}.get(device, "float16")
        flags.note(
            {
                "tpu": "--fp16: this is a TPU, which computes in bfloat16; bfloat16 it is",
                "cpu": "--fp16: a CPU has no fast float16; float32 it is (--bf16 for bfloat16)",
            }.get(device, "--fp16: float16 with dynamic loss scaling; trained weights stay float32")
        )
    for name in ("fp16_full_eval", "bf16_full_eval"):
        if flags.get(name):
            flags.note(f"{flags.said(name)}: evaluation computes as training does, in {config.model.dtype}")
    if "gradient_checkpointing" in flags.values:
        config.model.remat = "full" if flags.get("gradient_checkpointing") else "none"
    config.data.packing = flags.get("packing", False)
    if not config.data.packing:
        flags.note("one example a row (data.packing=False), as the Trainer has it; --packing true fills rows instead")


def _intervals(flags: Given, config: ConfigDict, evaluates: bool, trains: bool) -> None:
    """When to log, evaluate and save."""
    train = config.train
    train.logging_first_step = flags.get("logging_first_step", False)
    train.logging_steps = _steps(flags, "logging_steps", 500)
    logging = flags.get("logging_strategy", "steps").lower()
    if logging != "steps":
        flags.note(
            f"{flags.said('logging_strategy')} {logging}: metrics.jsonl has a row every {train.logging_steps} steps"
        )
    train.eval_strategy = _strategy(flags, "eval_strategy", "no")
    train.eval_steps = _steps(flags, "eval_steps", train.logging_steps)
    if evaluates and train.eval_strategy == "no":
        train.eval_strategy, train.eval_steps = "steps", NEVER
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


def _steps(flags: Given, name: str, default: int) -> int:
    value = flags.get(name, default)
    if value < 1 or value != int(value):
        what = "a share of the run is not there; it must be" if 0 < value < 1 else "it must be"
        raise UserError(f"{flags.said(name)} is {value:g}; {what} a whole number of steps, at least one")
    return int(value)


def _optimizer(flags: Given, config: ConfigDict) -> None:
    """--optim and its older spellings."""
    name = flags.get("optim", "adamw_torch_fused")
    if flags.get("adafactor"):
        name = "adafactor"
    if flags.get("adam8bit"):
        name = "adamw_bnb_8bit"
    ours, differs = OPTIMIZERS.get(name, (name, ""))
    if differs:
        flags.note(f"{flags.said('optim')} {name}: {ours}; {differs}")
    elif name.startswith("paged_"):
        flags.note(
            f"{flags.said('optim')} {name}: its state is in device memory, and the plan counts it there; "
            "--config.train.optim_offload=True keeps it in host memory"
        )
    config.train.optim = ours


def _run(flags: Given, config: ConfigDict) -> None:
    """The model, the run directory, seeds, and where metrics go."""
    config.model.path = flags.get("model_name_or_path", "")
    if not config.model.path:
        raise UserError("--model_name_or_path is missing; give a hub id, a local directory or a .gguf file")
    tokenizer = flags.get("tokenizer_name")
    if tokenizer and tokenizer != config.model.path:
        raise UserError(f"{flags.said('tokenizer_name')} {tokenizer}: the tokenizer is the model's own; leave it out")
    config.output_dir = flags.get("output_dir", config.output_dir)
    config.seed = flags.get("seed", 42)
    config.data.data_seed = flags.get("data_seed", config.seed)
    for name, value in (("seed", config.seed), ("data_seed", config.data.data_seed)):
        if value < -1:
            raise UserError(f"{flags.said(name)} is {value}; it must not be negative (-1 draws one)")
    if -1 in (config.seed, config.data.data_seed):
        flags.note("a seed of -1 is drawn when the run begins, printed, and kept in OUTPUT_DIR/config.json")
    reporters = [name for name in flags.get("report_to", []) if name not in _REPORTERS]
    for name in flags.get("report_to", []):
        if name in _REPORTERS:
            flags.note(
                f"{flags.said('report_to')} {name} is not there; metrics.jsonl is always written, and wandb and tensorboard are there"
            )
    config.train.report_to = [name for name in reporters if name != "none"]
    came = flags.get("resume_from_checkpoint")
    if came is None:
        return
    where, out = os.path.abspath(came), os.path.abspath(config.output_dir)
    if came.lower() not in ("true", "false", "1", "0", "auto", "latest") and os.path.commonpath([where, out]) != out:
        raise UserError(
            f"{flags.said('resume_from_checkpoint')} {came}: a run goes on from its own output_dir; set --output_dir to the run's"
        )
    flags.note(f"{flags.said('resume_from_checkpoint')}: a run goes on from the last checkpoint in output_dir, always")


def _environment(flags: Given, config: ConfigDict, environ: Mapping[str, str]) -> dict[str, str]:
    """Honour the variables that scripts export; return those that flags set."""
    found = {}
    if flags.get("run_name"):
        found["WANDB_NAME"] = flags.get("run_name")
    if flags.get("cache_dir"):
        found["HF_HUB_CACHE"] = flags.get("cache_dir")
    if flags.get("use_cpu"):
        found["JAX_PLATFORMS"] = "cpu"
    cache = environ.get("HF_DATASETS_CACHE")
    if cache and not environ.get("TPU_TUNE_CACHE"):
        if _can_be_made(cache):
            config.data.cache_dir = cache
            flags.note(f"HF_DATASETS_CACHE: tokenized data is kept in {cache}")
        else:
            flags.note(f"HF_DATASETS_CACHE: {cache} cannot be written; tokenized data is kept where it is by default")
    if environ.get("WANDB_PROJECT") and "wandb" in config.train.report_to:
        flags.note(f"WANDB_PROJECT: the run appears in the project {environ['WANDB_PROJECT']}")
    return found


def _can_be_made(directory: str) -> bool:
    place = os.path.abspath(os.path.expanduser(directory))
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    return os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)


def _outlook(flags: Given) -> None:
    if flags.get("do_mmlu_eval"):
        flags.note("--do_mmlu_eval: MMLU is not run while training; score the result afterwards")
