"""One file a family: a Hugging Face config in, an `Architecture` with its name table out."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.models.architecture import Architecture
from tpu_tune.models.families.checked import check_architecture, check_config
from tpu_tune.models.families.cohere import cohere, cohere2
from tpu_tune.models.families.exaone4 import exaone4
from tpu_tune.models.families.gemma import gemma, gemma2, gemma3
from tpu_tune.models.families.gemma4 import gemma4
from tpu_tune.models.families.glm import glm, glm4, glm4_moe
from tpu_tune.models.families.gpt2 import gpt2
from tpu_tune.models.families.gpt_neox import gpt_neox
from tpu_tune.models.families.gpt_oss import gpt_oss
from tpu_tune.models.families.gptj import gptj
from tpu_tune.models.families.granite import granite, granite_hybrid, granite_moe
from tpu_tune.models.families.llama import llama, mistral, qwen2, qwen3
from tpu_tune.models.families.ministral3 import ministral3
from tpu_tune.models.families.mixtral import mixtral
from tpu_tune.models.families.nanochat import nanochat
from tpu_tune.models.families.olmo import olmo2, olmo3, olmoe
from tpu_tune.models.families.opt import opt
from tpu_tune.models.families.phi import phi, phi3
from tpu_tune.models.families.qwen3_5 import qwen3_5, qwen3_5_moe, qwen3_next
from tpu_tune.models.families.qwen_moe import qwen2_moe, qwen3_moe
from tpu_tune.models.families.seed_oss import seed_oss
from tpu_tune.models.families.smollm3 import smollm3
from tpu_tune.models.families.t5 import t5
from tpu_tune.models.values import one_line, shown
from tpu_tune.models.wrappers import WRAPPERS, as_wrapped, text_config

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
    "gemma4_text": gemma4,
    "gemma4_unified_text": gemma4,
    "phi": phi,
    "phi3": phi3,
    "smollm3": smollm3,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "granite": granite,
    "granitemoehybrid": granite_hybrid,
    "glm": glm,
    "glm4": glm4,
    "ministral3": ministral3,
    "cohere": cohere,
    "cohere2": cohere2,
    "seed_oss": seed_oss,
    "exaone4": exaone4,
    "nanochat": nanochat,
    "qwen3_next": qwen3_next,
    "qwen3_5_text": qwen3_5,
    "qwen3_5_moe_text": qwen3_5_moe,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "granitemoe": granite_moe,
    "granitemoeshared": granite_moe,
    "glm4_moe": glm4_moe,
    "gpt_oss": gpt_oss,
    "t5": t5,
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the Architecture that a Hugging Face `config.json` describes; of a multimodal model, its text model's.

    Raises:
      UserError: an unknown `model_type` (the known are listed, the nearest is named), a key that the family needs and
        the config lacks, or a value of a wrong type or range; key and value are named.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"model_type is {shown(kind)}; it must be one of {', '.join(FAMILIES)}")
    if kind in WRAPPERS:
        text = text_config(config)
        if text["model_type"] not in FAMILIES:
            raise UserError(
                f"model_type '{kind}' wraps the text model {shown(text['model_type'])}, which is not known; "
                f"the known architectures are {', '.join(FAMILIES)}"
            )
        return as_wrapped(architecture(text), config)
    if kind not in FAMILIES:
        raise UserError(
            f"model_type '{kind}' is not known{_nearest(kind, config)}; the known architectures are "
            f"{', '.join(FAMILIES)}"
        )
    check_config(config)
    with one_line(f"the config of this {kind} model"):
        try:
            made = FAMILIES[kind](config)
        except KeyError as error:
            raise UserError(f"the config of this {kind} model lacks the key {error}") from None
        check_architecture(made)
    return made


def _nearest(kind: str, config: Mapping[str, Any]) -> str:
    """Say what an unknown model is nearest to: by the text model it wraps, by its name, else by its config's keys."""
    wrappers = [name for name, wrapper in WRAPPERS.items() if wrapper.family in FAMILIES]
    nested = config.get("text_config")
    inner = nested.get("model_type") if isinstance(nested, Mapping) else None
    if inner in FAMILIES:
        return f" (it wraps a '{inner}' model; the known wrappers are {', '.join(wrappers)})"
    near = difflib.get_close_matches(kind, [*FAMILIES, *wrappers], 1, 0.8)
    if near:
        return f" (did you mean '{near[0]}'?)"
    stem = re.match("[a-z]*", kind)[0]
    related = [
        name
        for name in (*FAMILIES, *(wrappers if nested else ()))
        if len(stem) >= 4 and re.match("[a-z]*", name)[0] == stem
    ]
    near = difflib.get_close_matches(kind, related, 1, 0.0)
    if near:
        return f" (the nearest is '{near[0]}')"
    for name, family in FAMILIES.items():
        with contextlib.suppress(UserError), one_line(name):
            family({**config, "model_type": name})
            return f" (by the keys of its config, the nearest is '{name}')"
    return ""
