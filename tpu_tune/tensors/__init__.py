"""Weight leaves, what they do in a product, and the number formats: see docs/design.md, "Kinds of leaves"."""

from tpu_tune.tensors.formats import FORMATS, Format
from tpu_tune.tensors.modules import Module
from tpu_tune.tensors.ops import dense, embed, matmul, unembed
from tpu_tune.tensors.quantized import QuantizedTensor, double_quantize, pack_block, quantize_tensor
from tpu_tune.tensors.wrapped import LayerView, LoraTensor, SavedTensor, TokensTensor, Transposed, outside_scan

__all__ = [
    "FORMATS",
    "Format",
    "LayerView",
    "LoraTensor",
    "Module",
    "QuantizedTensor",
    "SavedTensor",
    "TokensTensor",
    "Transposed",
    "dense",
    "double_quantize",
    "embed",
    "matmul",
    "outside_scan",
    "pack_block",
    "quantize_tensor",
    "unembed",
]
