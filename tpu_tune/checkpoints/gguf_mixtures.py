"""Which number format each tensor of a quantized GGUF file has: llama-quantize's mixtures (llama-quant.cpp).

`q4_k_m` is not one format: the values of attention and the MLP's last matrix of some layers, and the head, have more
bits. `MIXTURES` are the names that users know; f16, bf16 and q8_0 are what convert_hf_to_gguf.py writes by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import gguf

Format = gguf.GGMLQuantizationType

# name on the command line -> format of most matrices, and GGUF's general.file_type
PLAIN = {
    "f16": (Format.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Format.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Format.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
MIXTURES = {
    "q6_k": (Format.Q6_K, gguf.LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": (Format.Q5_K, gguf.LlamaFileType.MOSTLY_Q5_K_M),
    "q5_0": (Format.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_k_m": (Format.Q4_K, gguf.LlamaFileType.MOSTLY_Q4_K_M),
    "q4_0": (Format.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
FORMATS = PLAIN | MIXTURES
# What takes the place of a format whose blocks do not divide a row.
_SMALLER_BLOCKS = {Format.Q4_K: Format.Q5_0, Format.Q5_K: Format.Q5_1, Format.Q6_K: Format.Q8_0}
_WITH_MORE_BITS = ("q4_k_m", "q5_k_m")
_VALUES = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")
# Matrices that llama-quantize leaves as convert_hf_to_gguf.py wrote them.
_KEPT = ("ffn_gate_inp.weight", "per_layer_model_proj", "ssm_conv1d", "attn_rel_b.weight")


def formats_of(names: Iterable[str], metadata: Mapping[str, object], kind: str) -> dict[str, Format]:
    """Return the format of each matrix, for rows of any length.

    Args:
      names: GGUF names of all tensors of the model.
      metadata: GGUF's, `general.architecture` among it.
      kind: one of `FORMATS`.
    """
    names = sorted(names, key=_order)
    number = FORMATS[kind][0]
    if kind in PLAIN:
        return dict.fromkeys(names, number)
    architecture = metadata["general.architecture"]
    layers = int(metadata[f"{architecture}.block_count"])
    experts = int(metadata.get(f"{architecture}.expert_count", 0))
    shares_values = layers == 80 and metadata.get(f"{architecture}.attention.head_count_kv") != metadata.get(
        f"{architecture}.attention.head_count"
    )
    head = "output.weight" if "output.weight" in names else "token_embd.weight"
    values = [name for name in names if any(part in name for part in _VALUES)]
    downs = [name for name in names if "ffn_down" in name]
    formats = {}
    for name in names:
        formats[name] = number
        if any(part in name for part in _KEPT):
            formats[name] = Format.F16
        elif name == head or (head == "token_embd.weight" and name == "per_layer_token_embd.weight"):
            formats[name] = Format.Q6_K
        elif name in values:
            formats[name] = _values_format(number, kind, values.index(name), len(values), shares_values)
        elif name in downs and kind in _WITH_MORE_BITS:
            layer = _layer(name) if experts > 1 else downs.index(name)
            formats[name] = Format.Q6_K if _wants_more_bits(layer, layers) else number
        if experts == 8:
            formats[name] = _with_eight_experts(name, formats[name], kind)
    return formats


def fitting(number: Format, row: int) -> Format:
    """Return a format for rows of this length: itself, one of smaller blocks, or F16."""
    for candidate in (number, _SMALLER_BLOCKS.get(number, number)):
        if row % gguf.GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return Format.F16


def _values_format(number: Format, kind: str, index: int, count: int, shares_values: bool) -> Format:
    """Values are small beside the other matrices, in the 70B models eight times, and gain most from more bits."""
    if kind in _WITH_MORE_BITS and _wants_more_bits(index, count):
        return Format.Q6_K
    return Format.Q5_K if shares_values and number == Format.Q4_K else number


def _with_eight_experts(name: str, number: Format, kind: str) -> Format:
    """Beside eight experts attention is small."""
    if any(part in name for part in (*_VALUES, "attn_k.weight")):
        return Format.Q8_0
    return Format.Q5_K if "attn_output.weight" in name and kind == "q4_k_m" else number


def _wants_more_bits(index: int, count: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _order(name: str) -> tuple[int, str]:
    return _layer(name), name


def _layer(name: str) -> int:
    matched = re.match(r"blk\.(\d+)\.", name)
    return int(matched[1]) if matched else -1
