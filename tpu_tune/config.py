"""The whole configuration, documented, as one `ml_collections.ConfigDict`.

`default()` is the single list of keys, their meaning and their defaults. A config file defines `get_config()` that
starts from it, and the command line overrides single keys (`--config.train.learning_rate=1e-4`). Keys keep Hugging
Face's names where Hugging Face has one. Unknown keys and wrong types are errors that name the nearest key.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import numbers
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tpu_tune.errors import UserError


def default() -> ConfigDict:
    """Return a fresh configuration with every key at its default."""
    return _tree(
        {
            "output_dir": "output",  # the run directory, may be gs://: config.json, metrics.jsonl, checkpoints/, adapter/ or model/
            "method": "lora",  # lora | full
            "seed": 42,  # adapters' initial values and dropout; -1 draws one and records it
            "model": _model(),
            "quantize": _quantize(),
            "lora": _lora(),
            "data": _data(),
            "train": _train(),
            "objective": _objective(),
            "mesh": _mesh(),
        }
    )


def _tree(values: dict[str, Any]) -> ConfigDict:
    # Free dicts stay plain ones, because a ConfigDict refuses keys with dots and module names have them. Types are
    # held by `_convert`, which knows keys that may be of two and names the key that is wrong.
    options = {"type_safe": False, "convert_dict": False}
    return ConfigDict({k: ConfigDict(v, **options) if isinstance(v, dict) else v for k, v in values.items()}, **options)


def _model() -> dict[str, Any]:
    return {
        "path": "",  # Hugging Face id, a local directory, or a .gguf file
        "dtype": "bfloat16",  # compute: bfloat16 | float16 (with dynamic loss scaling) | float32
        "param_dtype": "auto",  # storage of base weights: auto = float32 under method=full, model.dtype under lora
        "attention": "auto",  # auto | reference | blockwise | splash (TPU v4 and later) | cudnn, pallas (GPUs from 8.0)
        "quantized_matmul": "auto",  # auto | xla (dequantizes whole matrices) | pieces (parts of them) | pallas (TPUs)
        "remat": "full",  # none | full (keep each layer's input) | dots (results of linear layers) | offload (inputs, on the host)
        "token_chunk_size": 0,  # tokens of a device in a layer's projections and MLP at one time; 0: all to 8,192, then 4,096
        "adapter": "",  # start from this PEFT adapter directory instead of a fresh one
        "add_special_tokens": [],  # e.g. ["<|im_start|>"]; new ones get rows in embedding and head: the old rows' mean
        "train_added_tokens": False,  # train these tokens' rows under method=lora too; full trains every row anyway
    }


def _quantize() -> dict[str, Any]:
    return {
        "format": "none",  # none | int8 | int4 | nf4: storage of the frozen base weights
        "group_size": 64,  # rows of the input dimension that share one scale
        "double_quant": True,  # store the scales themselves in 8 bits (nf4 and int4)
        "include": ["all-linear"],  # names to quantize, matched like lora.target_modules
        "exclude": [],  # names to leave alone; head and embeddings are only taken when included by name
    }


def _lora() -> dict[str, Any]:
    return {
        "rank": 8,  # PEFT's r
        "alpha": 16.0,  # PEFT's lora_alpha; the update is scaled by alpha / rank
        "dropout": 0.0,  # on the adapter's input only
        "target_modules": "all-linear",  # list of names or suffixes | regex | "all-linear" | "" (the family's PEFT default)
        "exclude_modules": [],  # list or regex, taken out of target_modules
        "bias": "none",  # none | all | lora_only
        "modules_to_save": [],  # modules trained in full and saved with the adapter
        "trainable_token_indices": [],  # token ids, or {module: ids}: rows of embedding (and tied head) trained beside it
        "layers_to_transform": [],  # layer indices; empty means every layer
        "layers_pattern": "",  # name of the layer list when the index cannot be found by PEFT's general pattern
        "rank_pattern": {},  # name or regex -> rank, overrides rank
        "alpha_pattern": {},  # name or regex -> alpha, overrides alpha
        "use_rslora": False,  # scale by alpha / sqrt(rank)
        "use_dora": False,  # weight-decomposed LoRA
        "init_lora_weights": "true",  # true (Kaiming uniform A, zero B) | gaussian
    }


def _data() -> dict[str, Any]:
    return {
        "train": "",  # .jsonl, .json, .csv, .parquet, .arrow (also tokenized), a directory of them (local or gs://), or a hub id
        "eval": "",  # the same; empty: a seeded split of data.train that is never trained on
        "eval_ratio": 0.05,  # share of the rows taken for that split; 0 turns evaluation off
        "format": "auto",  # auto | text | input-output | prompt-generation | prompt-completion | alpaca | sharegpt | messages
        "columns": {},  # the file's key -> the format's key, e.g. {"question": "input", "answer": "output"}
        "chat_template": "",  # Jinja text or file; empty: the tokenizer's own
        "response_markers": [],  # text rows: loss only after one of these strings, up to the next instruction marker
        "instruction_markers": [],  # strings that end a response
        "max_length": 2048,  # tokens a row; of an encoder-decoder, of the input and of the output each
        "packing": True,  # several documents a row, without attention across them; an encoder-decoder has one pair a row
        "train_on_source": False,  # loss on the prompt too
        "source_max_len": 0,  # truncate prompts (on the right) to this; 0: only max_length
        "target_max_len": 0,  # truncate answers to this; 0: only max_length
        "skip_bad_rows": False,  # go on at rows that cannot be read, and count them
        "data_seed": 42,  # order of the rows; -1 draws one and records it
        "num_workers": 0,  # processes that tokenize; 0: one a core
        "cache_dir": "",  # tokenized data; empty: $TPU_TUNE_CACHE or ~/.cache/tpu_tune
    }


def _train() -> dict[str, Any]:
    return {
        "num_train_epochs": 3.0,
        "max_steps": -1,  # overrides num_train_epochs when positive
        "per_device_train_batch_size": 8,  # rows a device and micro-batch
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",  # Hugging Face's names: constant, linear, cosine, ...
        "lr_scheduler_kwargs": {},  # e.g. {"min_lr_rate": 0.1} for cosine_with_min_lr
        "warmup_steps": 0,
        "warmup_ratio": 0.0,
        "optim": "adamw",  # adamw | adamw_8bit | adafactor | sgd | lion (and Hugging Face's spellings of them)
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,  # not on biases and norm weights
        "loraplus_lr_ratio": 0.0,  # LoRA+: lora_B learns this many times faster than lora_A (16 is usual); 0: as fast
        "loraplus_lr_embedding": 1e-6,  # with loraplus_lr_ratio: the rate of adapters of embeddings, as in PEFT
        "neftune_noise_alpha": 0.0,  # noise on the embeddings while training (5 to 15 are usual); 0: none
        "max_grad_norm": 1.0,  # global norm, after accumulation; 0 turns clipping off
        "optim_offload": False,  # optimizer state waits in host memory and comes to the device layer by layer; slower
        "loss_chunk_size": 0,  # tokens of a device whose logits exist at one time; 0: what 256 MiB hold, at most 1,024
        "max_nonfinite_steps": 10,  # end the run after so many updates in a row with a non-finite loss or gradient
        "logging_steps": 10,
        "logging_first_step": True,
        "eval_strategy": "steps",  # no | steps | epoch
        "eval_steps": 100,
        "save_strategy": "steps",  # no | steps | epoch
        "save_steps": 100,
        "save_total_limit": 2,
        "load_best_model_at_end": False,  # end with the weights of the smallest eval_loss; each new best is saved at once
        "early_stopping_patience": 0,  # evaluations without improvement; 0: never stop early
        "early_stopping_threshold": 0.0,  # improvements up to this do not count for the patience
        "sample_prompts": [],  # the report shows the model's answers to these before and after training
        "report_to": [],  # tensorboard, wandb; metrics.jsonl is always written
    }


def _objective() -> dict[str, Any]:
    return {
        "name": "sft",  # what is minimized; sft: the cross-entropy of the target tokens
    }


def _mesh() -> dict[str, Any]:
    return {"data": 1, "fsdp": -1, "tensor": 1, "sequence": 1}  # one may be -1: the rest of the devices


# Keys whose value may be of more than one type.
_EITHER = {
    "lora.target_modules": (str, list),
    "lora.exclude_modules": (str, list),
    "quantize.include": (str, list),
    "quantize.exclude": (str, list),
    "lora.trainable_token_indices": (list, dict),
}
_FREE = {
    "data.columns",
    "lora.rank_pattern",
    "lora.alpha_pattern",
    "lora.trainable_token_indices",
    "train.lr_scheduler_kwargs",
}  # dicts with the user's own keys
_CHOICES = {
    "method": ("full", "lora"),
    "model.dtype": ("bfloat16", "float16", "float32"),
    "model.param_dtype": ("auto", "bfloat16", "float16", "float32"),
    "model.attention": ("auto", "reference", "blockwise", "splash", "cudnn", "pallas"),
    "model.quantized_matmul": ("auto", "xla", "pieces", "pallas"),
    "model.remat": ("none", "full", "dots", "offload"),
    "quantize.format": ("none", "int8", "int4", "nf4"),
    "lora.bias": ("none", "all", "lora_only"),
    "lora.init_lora_weights": ("true", "gaussian"),
    "data.format": (
        "auto", "text", "input-output", "prompt-generation", "prompt-completion", "alpaca", "sharegpt", "messages",
    ),
    "train.eval_strategy": ("no", "steps", "epoch"),
    "train.save_strategy": ("no", "steps", "epoch"),
}  # fmt: skip
_POSITIVE = (
    "quantize.group_size", "lora.rank", "data.max_length", "train.per_device_train_batch_size",
    "train.per_device_eval_batch_size", "train.gradient_accumulation_steps",
    "train.logging_steps", "train.eval_steps", "train.save_steps", "train.max_nonfinite_steps",
)  # fmt: skip

_NOT_NEGATIVE = (
    "model.token_chunk_size", "train.loss_chunk_size",
    "data.source_max_len", "data.target_max_len", "data.num_workers", "train.learning_rate", "train.warmup_steps",
    "train.warmup_ratio", "train.weight_decay", "train.max_grad_norm", "train.save_total_limit",
    "train.early_stopping_patience", "train.early_stopping_threshold", "train.loraplus_lr_ratio",
    "train.loraplus_lr_embedding", "train.neftune_noise_alpha",
)  # fmt: skip


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every leaf of a configuration."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, (ConfigDict, dict)) and name not in _FREE:
            yield from flatten(value, name + ".")
        else:
            yield name, _plain(value)


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Return the configuration as plain nested dicts and lists, ready for `json.dump`."""
    return _plain(config)


def from_file(path: str | os.PathLike, lay: Callable[[Mapping[str, Any]], ConfigDict] | None = None) -> ConfigDict:
    """Run a config file's `get_config()` and check the result.

    Args:
      path: the file.
      lay: lays its values over the defaults and checks them; None: `from_dict`.

    Raises:
      UserError: the file is missing, does not run, or holds an unknown key or a wrong value.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such config file; configs/ has examples")
    spec = importlib.util.spec_from_file_location("tpu_tune_config_file", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
        if not isinstance(config, Mapping | ConfigDict):
            raise UserError(f"get_config() returns a {type(config).__name__}; it must return the configuration")
        return (lay or from_dict)(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever a user's own Python can raise
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
    """Lay `values` (nested, possibly partial) over the defaults and check the result."""
    config = default()
    for key, value in flatten(values):
        assign(config, key, value)
    return check(config)


def assign(config: ConfigDict, key: str, value: Any) -> None:
    """Set one dotted key in place, converting text as the command line gives it to the key's type.

    Raises:
      UserError: no such key (the nearest is named), or a value that its type does not admit.
    """
    known = dict(flatten(default()))
    free = next((name for name in _FREE if key == name or key.startswith(name + ".")), None)
    if key not in known and free is None:
        near = difflib.get_close_matches(key, known, 1, 0.5) or difflib.get_close_matches(
            key.rsplit(".")[-1], [k.rsplit(".")[-1] for k in known], 1, 0.5
        )
        full = next((k for k in known if near and (k == near[0] or k.endswith("." + near[0]))), None)
        raise UserError(f"unknown config key '{key}'" + (f"; did you mean '{full}'?" if full else ""))
    if free and key != free:  # one entry of a free dict
        target = free
        before = _plain(config_get(config, free))
        value = {**(before if isinstance(before, dict) else {}), key[len(free) + 1 :]: value}
        key = target
    node: Any = config
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = _convert(key, known[key], value)


def config_get(config: ConfigDict, key: str) -> Any:
    """Read one dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def check(config: ConfigDict) -> ConfigDict:
    """Hold every key against its choices and bounds, and return the configuration.

    Raises:
      UserError: naming the key, its value and what is allowed.
    """
    for key, choices in _CHOICES.items():
        value = config_get(config, key)
        if value not in choices:
            raise UserError(f"config key '{key}' is '{value}'; it must be one of {', '.join(choices)}")
    for key in _POSITIVE:
        value = config_get(config, key)
        if value <= 0:
            raise UserError(f"config key '{key}' is {value}; it must be positive")
    if config.train.max_steps <= 0 and config.train.num_train_epochs <= 0:
        raise UserError("config key 'train.num_train_epochs' must be positive (or set 'train.max_steps')")
    if not 0 <= config.lora.dropout < 1:
        raise UserError(f"config key 'lora.dropout' is {config.lora.dropout}; it must be at least 0 and below 1")
    if not 0 <= config.data.eval_ratio < 1:
        raise UserError(f"config key 'data.eval_ratio' is {config.data.eval_ratio}; it must be at least 0 and below 1")
    for key in _NOT_NEGATIVE:
        value = config_get(config, key)
        if not value >= 0:  # not a number is not either
            raise UserError(f"config key '{key}' is {value}; it must not be negative")
    train = config.train
    for wish in ("load_best_model_at_end", "early_stopping_patience"):
        if train[wish] and (train.eval_strategy == "no" or (config.data.eval_ratio == 0 and not config.data.eval)):
            raise UserError(
                f"config key 'train.{wish}' needs evaluations to go by; set 'train.eval_strategy' to steps or epoch, and "
                "give 'data.eval' or a 'data.eval_ratio' above 0"
            )
    if train.load_best_model_at_end and train.save_strategy == "no":
        raise UserError(
            "config key 'train.load_best_model_at_end' needs checkpoints; set 'train.save_strategy' to steps or epoch"
        )
    if train.loraplus_lr_ratio and config.method != "lora":
        raise UserError("config key 'train.loraplus_lr_ratio' needs adapters; set method=lora, or leave it at 0")
    if sum(size == -1 for size in config.mesh.values()) > 1:
        raise UserError("only one of mesh.data, mesh.fsdp, mesh.tensor, mesh.sequence may be -1")
    _check_tokens(config)
    if config.method == "full" and config.quantize.format != "none":
        raise UserError(
            "method 'full' trains every weight and a quantized weight cannot be trained; set quantize.format=none, or method=lora"
        )
    return config


def _check_tokens(config: ConfigDict) -> None:
    tokens = config.model.add_special_tokens
    for place, token in enumerate(tokens):
        if not token.strip():
            raise UserError(f"config key 'model.add_special_tokens' holds {token!r}; a token must not be empty")
        if token in tokens[:place]:
            raise UserError(f"config key 'model.add_special_tokens' names '{token}' twice")
    if config.model.train_added_tokens and not tokens:
        raise UserError(
            "config key 'model.train_added_tokens' is set and there are no tokens to train; name them in "
            "'model.add_special_tokens'"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, (ConfigDict, dict)):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _convert(key: str, example: Any, value: Any) -> Any:
    """Give `value` the type of `example`, reading text as the command line writes it."""
    wanted = _EITHER.get(key, type(example))
    if isinstance(value, str) and wanted is not str:
        text = value.strip()
        if isinstance(example, (list, dict)) or isinstance(wanted, tuple):
            if text.startswith(("[", "{")):
                try:
                    value = json.loads(text)
                except json.JSONDecodeError as error:
                    raise UserError(f"config key '{key}': {text!r} is not JSON ({error.msg})") from None
            elif not isinstance(wanted, tuple):
                value = (
                    [part.strip() for part in text.split(",") if part.strip()] if isinstance(example, list) else value
                )
            elif re.fullmatch(r"[\w.]+", text):
                value = [text]  # one name; a regular expression of nothing but letters would be a full path
            elif "," in text and not set(text) & set("*+?()|^$\\"):
                value = [part.strip() for part in text.split(",")]
        elif isinstance(example, bool):
            value = {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), value)
        elif isinstance(example, (int, float)):
            try:
                value = int(text) if isinstance(example, int) else float(text)
            except ValueError:
                pass
    value = _plain(value)
    if isinstance(example, float) and isinstance(value, numbers.Real) and not isinstance(value, bool):
        value = float(value)
    if isinstance(example, int) and not isinstance(example, bool) and isinstance(value, float) and value.is_integer():
        value = int(value)
    if key == "lora.init_lora_weights" and value is True:
        value = "true"
    allowed = wanted if isinstance(wanted, tuple) else (type(example),)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join(kind.__name__ for kind in allowed)
        raise UserError(f"config key '{key}' is {value!r}; it must be of type {names}")
    if isinstance(value, list):
        return [_item(key, item) for item in value]
    return {name: _item(key, item) for name, item in value.items()} if isinstance(value, dict) else value


def _item(key: str, item: Any) -> Any:
    """Give one entry of a list or free dict the type that the key asks for."""
    if key == "train.lr_scheduler_kwargs":  # numbers and words
        try:
            return json.loads(item) if isinstance(item, str) else item
        except json.JSONDecodeError:
            return item
    if key == "lora.trainable_token_indices" and isinstance(item, (str, list)):  # one module's ids, in the dict form
        try:
            item = json.loads(item) if isinstance(item, str) and item.strip().startswith("[") else item
        except json.JSONDecodeError as error:
            raise UserError(f"config key '{key}': {item!r} is not JSON ({error.msg})") from None
        if isinstance(item, list):
            return [_item(key, number) for number in item]
    wanted, words = {
        "lora.trainable_token_indices": (int, "token ids"),
        "lora.layers_to_transform": (int, "whole numbers"),
        "lora.rank_pattern": (int, "whole numbers"),
        "lora.alpha_pattern": (float, "numbers"),
    }.get(key, (str, "text"))
    try:
        converted = wanted(item)
    except (TypeError, ValueError):
        converted = None
    if converted is None or isinstance(item, bool) or not (isinstance(item, str) or converted == item):
        raise UserError(f"config key '{key}' holds {item!r}; its entries must be {words}")
    return converted


def names(value: str | Sequence[str]) -> str | list[str]:
    """A name list or regex from the configuration as a plain str or list."""
    return value if isinstance(value, str) else list(value)
