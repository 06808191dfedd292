"""One file a family: a Hugging Face config in, an `Architecture` with its name table out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.models.architecture import Architecture
from tpu_tune.models.families.gpt_neox import gpt_neox
from tpu_tune.models.families.llama import llama, mistral, qwen2, qwen3

FAMILIES: dict[str, Callable[[Mapping[str, Any]], Architecture]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gpt_neox": gpt_neox,
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the Architecture that a Hugging Face `config.json` describes.

    Raises:
      UserError: an unknown `model_type` (the known are listed), or a key that the family needs and the config lacks.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        near = difflib.get_close_matches(str(kind), FAMILIES, 1, 0.8)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise UserError(f"model_type '{kind}' is not known{hint}; the known architectures are {', '.join(FAMILIES)}")
    try:
        return FAMILIES[kind](config)
    except KeyError as error:
        raise UserError(f"the config of this {kind} model lacks the key {error}") from None
