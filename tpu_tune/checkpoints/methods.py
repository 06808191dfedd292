"""What `config.method` names: which part of a model is trained, and from what it starts.

A method is an object (`transforms.Method`); an entry of `METHODS` builds it for one model. Whatever is registered here
can be trained: a run writes LoRA's result as a PEFT adapter, any other as a merged Hugging Face model.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any

from ml_collections import ConfigDict

from tpu_tune.checkpoints import peft
from tpu_tune.checkpoints.starting import as_trained
from tpu_tune.errors import UserError
from tpu_tune.models import SCORE, Architecture
from tpu_tune.transforms import FULL, LoraConfig, Method, find_targets, token_rows

log = logging.getLogger(__name__)

Adapters = dict[str, Any] | None  # leaves to start from; None: fresh ones
Builder = Callable[[ConfigDict, Architecture, Iterable[int]], tuple[Method, Adapters]]


def lora(config: ConfigDict, arch: Architecture, added_tokens: Iterable[int]) -> tuple[Method, Adapters]:
    """Return LoRA on the modules that the settings name, with the adapter of `model.adapter` where one is given.

    Under `model.train_added_tokens` the added tokens are among the trained ones.

    Raises:
      UserError: names that match no module, an adapter that does not fit, or one that trains other tokens.
    """
    settings, adapters = LoraConfig(**config.lora), None
    if config.model.adapter:
        log.info(
            "starting from %s: its rank, alpha and targets replace lora.*; only lora.dropout is taken from the config",
            config.model.adapter,
        )
        adapter = peft.read_adapter(config.model.adapter, arch)
        settings, adapters = as_trained(config.output_dir, config, adapter, arch)
        settings = dataclasses.replace(settings, dropout=config.lora.dropout)
    if config.model.train_added_tokens:
        settings = _with_added_tokens(config, settings, arch, added_tokens, has_adapter=adapters is not None)
    if arch.num_labels and SCORE not in settings.modules_to_save:  # as PEFT does where task_type is SEQ_CLS
        settings = dataclasses.replace(settings, modules_to_save=[*settings.modules_to_save, SCORE])
    return find_targets(arch.modules(), settings, arch.default_targets), adapters


def _with_added_tokens(
    config: ConfigDict, settings: LoraConfig, arch: Architecture, added_tokens: Iterable[int], has_adapter: bool
) -> LoraConfig:
    per_token = [arch.names.embed, *([] if arch.num_labels else [arch.names.head])]
    candidates = [module for module in arch.modules() if module.path in per_token]
    trained = {rows.module.path: list(rows.ids) for rows in token_rows(candidates, settings.trainable_token_indices)}
    before = {path: list(ids) for path, ids in trained.items()}
    for module in candidates:
        if module.tied_to or any(module.path.endswith(name) for name in settings.modules_to_save):
            continue  # its rows are trained already, or with the embedding's
        ids = trained.setdefault(module.path, [])
        ids += [number for number in added_tokens if number not in ids]
    if has_adapter and before and trained != before:
        raise UserError(
            f"model.train_added_tokens: {config.model.adapter} trains other tokens than model.add_special_tokens; "
            "leave it false to go on with the adapter's"
        )
    return dataclasses.replace(settings, trainable_token_indices=trained)


METHODS: dict[str, Builder] = {
    "full": lambda config, arch, added_tokens: (FULL, None),
    "lora": lora,
}


def check_method(name: str) -> None:
    """Check that a method is known.

    Raises:
      UserError: it is not; the known ones are listed.
    """
    if name not in METHODS:
        raise UserError(f"method is '{name}'; it must be one of {', '.join(METHODS)}")
