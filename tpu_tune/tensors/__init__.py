"""Weight leaves, what they do in a product, and the number formats: see docs/design.md, "Kinds of leaves"."""

from tpu_tune.tensors.formats import FORMATS, Format
from tpu_tune.tensors.layer_view import LayerView, outside_scan, stack_of_one
from tpu_tune.tensors.leaf import Leaf, dense, embed, grouped_matmul, map_base, matmul, unembed
from tpu_tune.tensors.lora import LoraTensor
from tpu_tune.tensors.modules import LeafSpec, Module
from tpu_tune.tensors.quantized import QuantizedTensor, double_quantize, pack_block, quantize_tensor
from tpu_tune.tensors.saved import SavedTensor
from tpu_tune.tensors.tokens import TokensTensor
from tpu_tune.tensors.transposed import Transposed

__all__ = [
    "FORMATS",
    "Format",
    "LayerView",
    "Leaf",
    "LeafSpec",
    "LoraTensor",
    "Module",
    "QuantizedTensor",
    "SavedTensor",
    "TokensTensor",
    "Transposed",
    "dense",
    "double_quantize",
    "embed",
    "grouped_matmul",
    "map_base",
    "matmul",
    "outside_scan",
    "pack_block",
    "quantize_tensor",
    "stack_of_one",
    "unembed",
]
