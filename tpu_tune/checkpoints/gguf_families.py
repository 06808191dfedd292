"""How each family's tensors differ between GGUF and Hugging Face: names, row order, values, and back.

llama.cpp's converter (convert_hf_to_gguf.py) renames tensors and, for some families, changes them; each entry of
`FAMILIES` says how for one `general.architecture`, in both directions. Adding a family is one entry here and one
function in gguf_config.py.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tpu_tune.checkpoints import gguf_config, gguf_config_llama_like, gguf_gemma4
from tpu_tune.checkpoints.gguf_file import GgufFile

Change = Callable[[str, np.ndarray, dict[str, Any]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class GgufFamily:
    """How one architecture differs between GGUF and Hugging Face.

    Attributes:
      config: builds the content of config.json.
      names: GGUF module name -> Hugging Face's; `{}` stands for the layer's index.
      restore: (Hugging Face name, tensor as GGUF has it, config) -> tensor as Hugging Face has it.
      store: its inverse.
      plain_mlp: replacements in `names` for models whose MLP has no gate (T5).
      transposed: ends of the Hugging Face names whose matrices Hugging Face stores as (in, out).
      parameters: ends of the Hugging Face names that have no `.weight`.
      skip: GGUF modules that are not weights of the model (their content is in the configuration, or unused).
    """

    config: Callable[[GgufFile], dict[str, Any]]
    names: dict[str, str]
    restore: Change
    store: Change
    plain_mlp: dict[str, str] = dataclasses.field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    skip: tuple[str, ...] = ("rope_freqs",)

    def names_in(self, tensors: Iterable[str]) -> dict[str, str]:
        """Return `names` as they hold for a model with these tensors, by GGUF's or by Hugging Face's names."""
        gated = any("ffn_gate" in name or ".wi_0." in name for name in tensors)
        return self.names if gated or not self.plain_mlp else self.names | self.plain_mlp

    def gguf_name(self, name: str, tensors: Iterable[str]) -> str | None:
        """Return GGUF's name of a Hugging Face tensor of a model with these tensors, or None where it has none."""
        module, _, kind = (f"{name}.weight" if name.endswith(self.parameters) else name).rpartition(".")
        key, layer = split_layer(module, "layers|h|block")
        stored = {original: stored for stored, original in self.names_in(tensors).items()}.get(key)
        return f"{stored.format(layer)}.{kind}" if stored else None

    def tensor_name(self, module: str, kind: str) -> str:
        """Return the Hugging Face name of a tensor, given its module's and `weight` or `bias`."""
        return module if module.endswith(self.parameters) else f"{module}.{kind}"

    def to_gguf(self, name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
        """Return a tensor as GGUF has it; `to_huggingface` undoes it."""
        return self.store(name, np.ascontiguousarray(tensor.T) if name.endswith(self.transposed) else tensor, config)

    def to_huggingface(self, name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
        """Return a tensor of a GGUF file with this Hugging Face name as Hugging Face has it."""
        tensor = self.restore(name, tensor, config)
        return np.ascontiguousarray(tensor.T) if name.endswith(self.transposed) else tensor

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape on the other side of a tensor with this Hugging Face name."""
        return shape[::-1] if name.endswith(self.transposed) else shape


def split_layer(name: str, block: str) -> tuple[str, str]:
    """Take the layer's index out of a name: (name with `{}` in its place, index or "").

    Args:
      name: a tensor's or module's name.
      block: the name before the index, `blk` in GGUF; several are separated by `|`.
    """
    matched = re.match(rf"((?:.*\.)?(?:{block}))\.(\d+)\.", name)
    return (f"{matched[1]}.{{}}.{name[matched.end() :]}", matched[2]) if matched else (name, "")


def _same(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    return tensor


def _rotary_heads(name: str, config: dict[str, Any]) -> int:
    """Heads of a matrix whose rows llama.cpp reorders for its rotary embedding; 0 for any other."""
    heads = config["num_attention_heads"]
    return heads if ".q_proj." in name else config.get("num_key_value_heads") or heads if ".k_proj." in name else 0


def _unpermute_rotary(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Rows of q and k: from pairs (i, i + 1) rotated together back to halves (i, i + head_dim / 2)."""
    heads = _rotary_heads(name, config)
    return _swap(tensor, (heads, tensor.shape[0] // heads // 2, 2)) if heads else tensor


def _permute_rotary(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    heads = _rotary_heads(name, config)
    return _swap(tensor, (heads, 2, tensor.shape[0] // heads // 2)) if heads else tensor


def _interleave_qkv(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Rows of query_key_value: from all of q, all of k, all of v back to q, k, v of each head in turn."""
    if ".query_key_value." not in name:
        return tensor
    heads = config["num_attention_heads"]
    return _swap(tensor, (1, 3, heads, tensor.shape[0] // heads // 3))


def _separate_qkv(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    if ".query_key_value." not in name:
        return tensor
    heads = config["num_attention_heads"]
    return _swap(tensor, (1, heads, 3, tensor.shape[0] // heads // 3))


def _swap(tensor: np.ndarray, rows: tuple[int, ...]) -> np.ndarray:
    """Read the rows as an array of this shape and exchange its axes 1 and 2."""
    split = tensor.reshape(*rows, *tensor.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(tensor.shape)


def _minus_one(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Gemma's norms: GGUF holds what the input is multiplied with, Hugging Face that less one."""
    return tensor.astype(np.float32) - np.float32(1) if name.endswith("norm.weight") else tensor


def _plus_one(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    return tensor.astype(np.float32) + np.float32(1) if name.endswith("norm.weight") else tensor


def _layered(prefix: str, modules: dict[str, str], block: str = "blk.{}") -> dict[str, str]:
    return {f"{block}.{stored}": f"{prefix}.{{}}.{original}" for stored, original in modules.items()}


_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
} | _layered(
    "model.layers",
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
)
_HEAD_NORMS = _layered("model.layers", {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"})
# The norms round attention and MLP, and their outputs, of Gemma 2 and 3.
_FOUR_NORMS = _layered(
    "model.layers",
    {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
)
_GEMMA4_NAMES = (
    _LLAMA_NAMES
    | _HEAD_NORMS
    | _FOUR_NORMS
    | {
        "per_layer_token_embd": "model.embed_tokens_per_layer",
        "per_layer_model_proj": "model.per_layer_model_projection",
        "per_layer_proj_norm": "model.per_layer_projection_norm",
    }
    | _layered(
        "model.layers",
        {
            "inp_gate": "per_layer_input_gate",
            "proj": "per_layer_projection",
            "post_norm": "post_per_layer_input_norm",
            "layer_output_scale": "layer_scalar",
        },
    )
)
_NORMS_AFTER = {
    key: name for key, name in _LLAMA_NAMES.items() if not key.endswith(("attn_norm", "ffn_norm"))
} | _layered(
    "model.layers",
    {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
)
_GLM_NAMES = {key: name for key, name in _LLAMA_NAMES.items() if not key.endswith("ffn_gate")} | _layered(
    "model.layers", {"ffn_up": "mlp.gate_up_proj"}
)
_GLM4_NORMS = _layered(
    "model.layers", {"post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm"}
)
_ONE_NORM = {key: name for key, name in _LLAMA_NAMES.items() if key != "output" and not key.endswith("ffn_norm")}
_SEED_OSS_NAMES = {key: name for key, name in _LLAMA_NAMES.items() if not key.endswith("ffn_norm")} | _layered(
    "model.layers", {"post_attention_norm": "post_attention_layernorm"}
)
_NEOX_NAMES = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
} | _layered(
    "gpt_neox.layers",
    {
        "attn_norm": "input_layernorm",
        "attn_qkv": "attention.query_key_value",
        "attn_output": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    },
)
_GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
} | _layered(
    "transformer.h",
    {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
)
_PHI_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.final_layernorm",
    "output": "lm_head",
} | _layered(
    "model.layers",
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.dense",
        "ffn_up": "mlp.fc1",
        "ffn_down": "mlp.fc2",
    },
)
_FUSED = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
_PHI3_NAMES = {key: name for key, name in _LLAMA_NAMES.items() if not key.endswith(_FUSED)} | _layered(
    "model.layers", {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
)


def _t5_stack(side: str, stack: str) -> dict[str, str]:
    """Names of T5's encoder or decoder; the MLP is the last sublayer."""
    mlp = 1 if side == "enc" else 2
    names = {f"attn_{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"}
    names |= {"attn_norm": "layer.0.layer_norm", "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias"}
    if side == "dec":
        names |= {f"cross_attn_{part}": f"layer.1.EncDecAttention.{part}" for part in "qkvo"}
        names["cross_attn_norm"] = "layer.1.layer_norm"
    names |= {
        "ffn_norm": f"layer.{mlp}.layer_norm",
        "ffn_gate": f"layer.{mlp}.DenseReluDense.wi_0",
        "ffn_up": f"layer.{mlp}.DenseReluDense.wi_1",
        "ffn_down": f"layer.{mlp}.DenseReluDense.wo",
    }
    return _layered(f"{stack}.block", names, f"{side}.blk.{{}}") | {f"{side}.output_norm": f"{stack}.final_layer_norm"}


_T5_NAMES = (
    {
        "token_embd": "shared",
        "output": "lm_head",
    }
    | _t5_stack("enc", "encoder")
    | _t5_stack("dec", "decoder")
)
_T5_PLAIN = {key: name[: -len("_1")] for key, name in _T5_NAMES.items() if key.endswith("ffn_up")}


def _llama_like(model_type: str, class_name: str) -> Callable[[GgufFile], dict[str, Any]]:
    return functools.partial(gguf_config.llama_like_config, model_type=model_type, class_name=class_name)


FAMILIES = {
    "llama": GgufFamily(gguf_config.llama_config, _LLAMA_NAMES, _unpermute_rotary, _permute_rotary),
    "qwen2": GgufFamily(_llama_like("qwen2", "Qwen2ForCausalLM"), _LLAMA_NAMES, _same, _same),
    "qwen3": GgufFamily(_llama_like("qwen3", "Qwen3ForCausalLM"), _LLAMA_NAMES | _HEAD_NORMS, _same, _same),
    "gptneox": GgufFamily(gguf_config.gpt_neox_config, _NEOX_NAMES, _interleave_qkv, _separate_qkv),
    "gpt2": GgufFamily(
        gguf_config.gpt2_config,
        _GPT2_NAMES,
        _same,
        _same,
        transposed=(".c_attn.weight", ".c_proj.weight", ".c_fc.weight"),
    ),
    "gemma": GgufFamily(gguf_config.gemma_config, _LLAMA_NAMES, _minus_one, _plus_one),
    "gemma2": GgufFamily(gguf_config.gemma2_config, _LLAMA_NAMES | _FOUR_NORMS, _minus_one, _plus_one),
    "gemma3": GgufFamily(gguf_config.gemma3_config, _LLAMA_NAMES | _FOUR_NORMS | _HEAD_NORMS, _minus_one, _plus_one),
    "gemma4": GgufFamily(gguf_gemma4.gemma4_config, _GEMMA4_NAMES, _same, _same, parameters=(".layer_scalar",)),
    "phi2": GgufFamily(gguf_config.phi_config, _PHI_NAMES, _same, _same),
    "phi3": GgufFamily(
        gguf_config.phi3_config, _PHI3_NAMES, _same, _same, skip=("rope_factors_long", "rope_factors_short")
    ),
    "smollm3": GgufFamily(gguf_config_llama_like.smollm3_config, _LLAMA_NAMES, _unpermute_rotary, _permute_rotary),
    "olmo2": GgufFamily(gguf_config_llama_like.olmo2_config, _NORMS_AFTER | _HEAD_NORMS, _same, _same),
    "granite": GgufFamily(gguf_config_llama_like.granite_config, _LLAMA_NAMES, _unpermute_rotary, _permute_rotary),
    "chatglm": GgufFamily(gguf_config_llama_like.glm_config, _GLM_NAMES, _same, _same),
    "glm4": GgufFamily(gguf_config_llama_like.glm4_config, _GLM_NAMES | _GLM4_NORMS, _same, _same),
    "mistral3": GgufFamily(gguf_config_llama_like.ministral3_config, _LLAMA_NAMES, _unpermute_rotary, _permute_rotary),
    "command-r": GgufFamily(gguf_config_llama_like.cohere_config, _ONE_NORM, _same, _same),
    "cohere2": GgufFamily(gguf_config_llama_like.cohere2_config, _ONE_NORM, _same, _same),
    "seed_oss": GgufFamily(gguf_config_llama_like.seed_oss_config, _SEED_OSS_NAMES, _same, _same),
    "exaone4": GgufFamily(gguf_config_llama_like.exaone4_config, _NORMS_AFTER | _HEAD_NORMS, _same, _same),
    "t5": GgufFamily(
        gguf_config.t5_config, _T5_NAMES, _same, _same, plain_mlp=_T5_PLAIN, skip=("dec.blk.{}.cross_attn_rel_b",)
    ),
}
