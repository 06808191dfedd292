"""One file a family: a Hugging Face config in, an `Architecture` with its name table out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.models.architecture import Architecture
from tpu_tune.models.families.checked import check_architecture, check_config
from tpu_tune.models.families.gemma import gemma, gemma2, gemma3
from tpu_tune.models.families.gpt2 import gpt2
from tpu_tune.models.families.gpt_neox import gpt_neox
from tpu_tune.models.families.gptj import gptj
from tpu_tune.models.families.llama import llama, mistral, qwen2, qwen3
from tpu_tune.models.families.opt import opt
from tpu_tune.models.families.phi import phi, phi3
from tpu_tune.models.families.t5 import t5
from tpu_tune.models.values import one_line, shown

FAMILIES: dict[str, Callable[[Mapping[str, Any]], Architecture]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gpt_neox": gpt_neox,
    "gptj": gptj,
    "gpt2": gpt2,
    "opt": opt,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "phi": phi,
    "phi3": phi3,
    "t5": t5,
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the Architecture that a Hugging Face `config.json` describes.

    Raises:
      UserError: an unknown `model_type` (the known are listed), a key that the family needs and the config lacks, or a
        value of a wrong type or range; key and value are named.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"model_type is {shown(kind)}; it must be one of {', '.join(FAMILIES)}")
    if kind not in FAMILIES:
        near = difflib.get_close_matches(kind, FAMILIES, 1, 0.8)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise UserError(f"model_type '{kind}' is not known{hint}; the known architectures are {', '.join(FAMILIES)}")
    check_config(config)
    with one_line(f"the config of this {kind} model"):
        try:
            made = FAMILIES[kind](config)
        except KeyError as error:
            raise UserError(f"the config of this {kind} model lacks the key {error}") from None
        check_architecture(made)
    return made
