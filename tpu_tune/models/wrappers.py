"""Multimodal models as their text models: which config.json wraps which, and where its parts lie.

The config of such a model has another one as `text_config`, and its class in transformers holds the text model at a
path of its own. Opened here, it is its text model under the names that its modules have in that class, so that
patterns, PEFT's files and messages say what peft and torch say. Its other parts (vision, audio, projector) never enter
the tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.models.architecture import Architecture
from tpu_tune.models.values import NOTHING, OBJECT, check


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """One multimodal `model_type`.

    Attributes:
      text: the text model's `model_type` where `text_config` names none.
      path: path of the text model in the wrapper's class (`*ForConditionalGeneration`), as of transformers 4.52.
      head: path of the output head there.
    """

    text: str
    path: str = "model.language_model"
    head: str = "lm_head"

    @property
    def family(self) -> str:
        """The family of `text`; one that is not known yet has the text model's own name."""
        return _SAME_AS.get(self.text, self.text)


# A text model that is not known yet is refused by its own name; a family that is added makes its rows work.
WRAPPERS = {
    "gemma3": Wrapper("gemma3_text"),
    "gemma4": Wrapper("gemma4_text"),
    "gemma4_unified": Wrapper("gemma4_unified_text"),
    "mistral3": Wrapper("mistral"),
    "qwen2_vl": Wrapper("qwen2_vl_text"),
    "qwen2_5_vl": Wrapper("qwen2_5_vl_text"),
    "qwen3_vl": Wrapper("qwen3_vl_text"),
    "qwen3_5": Wrapper("qwen3_5_text"),
    "qwen3_5_moe": Wrapper("qwen3_5_moe_text"),
    "llama4": Wrapper("llama4_text", "language_model.model", "language_model.lm_head"),
    **dict.fromkeys(("llava", "llava_next", "llava_next_video", "vipllava", "voxtral"), Wrapper("llama")),
    **dict.fromkeys(("llava_onevision", "internvl", "qwen2_audio"), Wrapper("qwen2")),
    "idefics2": Wrapper("mistral", "model.text_model"),
    **dict.fromkeys(("idefics3", "smolvlm"), Wrapper("llama", "model.text_model")),
}

# The text models that are a family under another name: rows of text have one position a token, whatever mrope is.
_SAME_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}

# What transformers takes where a text_config leaves a key out: it is saved as its difference from these.
_QWEN = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768,
}  # fmt: skip
_QWEN_VL = {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 32768, "max_window_layers": 80,
    "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
}  # fmt: skip
_GEMMA4 = {
    "vocab_size": 262144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072,
}  # fmt: skip
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": {**_GEMMA4, "max_position_embeddings": 262144},
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 2048,
    },
    "ministral3": {
        "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 34,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
    },
    "mistral": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "qwen2_vl_text": _QWEN_VL,
    "qwen2_5_vl_text": _QWEN_VL,
    "qwen3_5_text": {
        "vocab_size": 248320, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 32768,
    },
    "qwen3_5_moe_text": {
        "vocab_size": 248320, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 256, "max_position_embeddings": 32768,
    },
    "qwen3_vl_text": {**_QWEN, "head_dim": 128, "max_position_embeddings": 128000, "rope_theta": 500000.0},
}  # fmt: skip

# Keys that may stand outside of text_config only.
_OUTSIDE = ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")

# What stands in files and adapters before `layers.0...`: transformers has moved text models about.
_SPELLINGS = (
    "language_model.model.", "model.language_model.", "language_model.", "model.text_model.", "text_model.", "model.",
)  # fmt: skip


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a wrapper's config.json says of its text model, as a config.json of that model alone.

    Args:
      config: content of a config.json whose `model_type` is in `WRAPPERS`.

    Raises:
      UserError: its text_config is no object.
    """
    wrapper = WRAPPERS[config["model_type"]]
    check(config, {"text_config": OBJECT | NOTHING}, f"the config of this {config['model_type']} model")
    # Qwen2-VL's first files have no text_config: its keys stand among the wrapper's.
    flat = {key: value for key, value in config.items() if key != "model_type" and not key.endswith("_config")}
    nested = config.get("text_config") or flat
    kind = nested.get("model_type") or wrapper.text
    outside = {key: config[key] for key in _OUTSIDE if config.get(key) is not None}
    tying = {key: outside[key] for key in ("tie_word_embeddings",) if key in outside}  # the class goes by its own
    defaults = TEXT_DEFAULTS.get(kind, {}) if isinstance(kind, str) else {}
    text = {**defaults, **outside, **nested, **tying}
    text["model_type"] = _SAME_AS.get(kind, kind) if isinstance(kind, str) else kind
    for key in ("rope_parameters", "rope_scaling"):
        settings = text.get(key)
        if isinstance(settings, Mapping) and "mrope" in (settings.get("rope_type"), settings.get("type")):
            text[key] = {**{name: value for name, value in settings.items() if name != "type"}, "rope_type": "default"}
    return text


def as_wrapped(text: Architecture, config: Mapping[str, Any]) -> Architecture:
    """Return a text model's architecture with the names that its modules have in the class that `architectures` names.

    A class of the text model alone (`*ForCausalLM`) has them without the wrapper's path.

    Raises:
      UserError: the text model's names do not begin with `model.`, as those of every wrapped one known do.
    """
    wrapper = WRAPPERS[config["model_type"]]
    classes = config.get("architectures")
    if isinstance(classes, list) and classes and str(classes[0]).endswith("ForCausalLM"):
        path, head = "model", text.names.head
    else:
        path, head = wrapper.path, wrapper.head
    inside = dataclasses.asdict(text.names)
    if not text.names.layers.startswith("model.layers") or text.encoder:
        raise UserError(f"a {text.family} model inside a {config['model_type']} is not implemented")
    moved = {
        role: f"{path}.{name.removeprefix('model.')}" for role, name in inside.items() if name.startswith("model.")
    }
    return dataclasses.replace(text, names=dataclasses.replace(text.names, **moved, head=head, tower=path))


def with_keys(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json's content with keys of the language model changed: in text_config too, if there is one.

    There they stand in any case; outside of it, where they stood before, and `tie_word_embeddings`.
    """
    nested = config.get("text_config")
    if not isinstance(nested, Mapping):
        return {**config, **changes}
    outside = {key: value for key, value in changes.items() if key in config or key == "tie_word_embeddings"}
    return {**config, **outside, "text_config": {**nested, **changes}}


def spellings(name: str, tower: str) -> Iterator[str]:
    """Yield what a module's or tensor's name, as a file has it, may mean in a model whose text part is at `tower`."""
    yield name
    if name.startswith("language_model.lm_head"):
        yield name.removeprefix("language_model.")
    for prefix in _SPELLINGS:
        if name.startswith(prefix):
            yield f"{tower}.{name.removeprefix(prefix)}"
