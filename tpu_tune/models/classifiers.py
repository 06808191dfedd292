"""Models that judge a text: Hugging Face's `*ForSequenceClassification`, one output a label, read at the last token.

Such a model is its language model with a matrix `score` in place of the output head (transformers,
`modeling_layers.GenericForSequenceClassification`). A reward model is one of a single label. `architectures` in the
config.json says that a model is one, `id2label` how many labels it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.models.architecture import Architecture
from tpu_tune.models.values import shown

SCORE = "score"  # the head's name in every such class
_ENDING = "ForSequenceClassification"
# What transformers calls a family's class without the ending; a family that is not here has none.
_STEMS = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gpt_neox": "GPTNeoX", "gptj": "GPTJ",
    "gpt2": "GPT2", "opt": "OPT", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3Text", "phi": "Phi",
    "phi3": "Phi3", "smollm3": "SmolLM3", "olmo2": "Olmo2", "olmo3": "Olmo3", "glm": "Glm", "glm4": "Glm4",
    "ministral3": "Ministral3", "seed_oss": "SeedOss", "exaone4": "Exaone4", "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe", "gpt_oss": "GptOss", "qwen3_next": "Qwen3Next",
    "qwen3_5_text": "Qwen3_5Text",
}  # fmt: skip


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model with a classification or reward head."""
    classes = config.get("architectures")
    return isinstance(classes, list) and bool(classes) and str(classes[0]).endswith(_ENDING)


def label_names(config: Mapping[str, Any]) -> list[str]:
    """Return the labels' names of a classifier's config.json in order; transformers' LABEL_0, ... where it has none.

    Raises:
      UserError: `id2label` or `num_labels` is not what it should be.
    """
    names, count = config.get("id2label"), config.get("num_labels")
    if isinstance(names, Mapping) and names:
        texts = {str(key): name for key, name in names.items()}
        if sorted(texts) != sorted(map(str, range(len(texts)))) or not all(isinstance(n, str) for n in texts.values()):
            raise UserError(f"id2label is {shown(dict(names))}; it must give a name to each of 0, 1, ...")
        return [texts[str(number)] for number in range(len(texts))]
    count = 2 if count is None else count  # as in transformers
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count < 2**20:
        raise UserError(f"num_labels is {shown(count)}; it must be a positive number")
    return [f"LABEL_{number}" for number in range(count)]


def as_classifier(arch: Architecture, config: Mapping[str, Any]) -> Architecture:
    """Return a language model's architecture with the head that a classifier's config.json describes.

    Raises:
      UserError: an encoder-decoder, or labels that are not what they should be.
    """
    if arch.encoder:
        raise UserError(f"a classification or reward head on an encoder-decoder ({arch.family}) is not implemented")
    return dataclasses.replace(
        arch,
        names=dataclasses.replace(arch.names, head=SCORE),
        num_labels=len(label_names(config)),
        tied=False,
        head_bias=False,
        head_scale=1.0,
        logit_soft_cap=None,
    )


def classifier_config(
    config: Mapping[str, Any], labels: Sequence[str], problem_type: str = "", pad_token: int | None = None
) -> dict[str, Any]:
    """Return a model's config.json as that of its classifier in transformers.

    Args:
      config: the language model's, or a classifier's.
      labels: the labels' names, in order.
      problem_type: single_label_classification, ...; "" leaves it open.
      pad_token: `pad_token_id` where the config has none: a text is read at its last token that is another one.

    Raises:
      UserError: transformers has no such class for the family.
    """
    kind = config.get("model_type")
    if kind not in _STEMS:
        raise UserError(
            f"a classification or reward head on a '{kind}' model is not implemented; the families that have one, in "
            f"transformers too, are {', '.join(_STEMS)}"
        )
    changed = {
        "architectures": [f"{_STEMS[kind]}{_ENDING}"],
        "id2label": {str(number): name for number, name in enumerate(labels)},
        "label2id": {name: number for number, name in enumerate(labels)},
        "pad_token_id": pad_token if config.get("pad_token_id") is None else config["pad_token_id"],
    }
    if problem_type:
        changed["problem_type"] = problem_type
    dropped = ("num_labels", "problem_type", *([] if changed["pad_token_id"] is not None else ["pad_token_id"]))
    kept = {key: value for key, value in config.items() if key not in dropped}
    return kept | {key: value for key, value in changed.items() if value is not None}
