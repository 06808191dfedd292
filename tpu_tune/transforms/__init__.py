"""Pure transforms of the parameter tree: select, quantize, lora, split and combine, merge, sharding."""

from tpu_tune.config import LoraConfig, QuantizeConfig
from tpu_tune.transforms import lora, sharding
from tpu_tune.transforms.lora import Target, Targets, TokenRows
from tpu_tune.transforms.merge import merge, merged_tensors, unties_head
from tpu_tune.transforms.methods import FULL, FullTuning, Method
from tpu_tune.transforms.quantize import group_size, quantize, quantize_weight, quantized_paths
from tpu_tune.transforms.targets import experts_words, find_targets, token_rows

__all__ = [
    "FULL",
    "FullTuning",
    "LoraConfig",
    "Method",
    "QuantizeConfig",
    "Target",
    "Targets",
    "TokenRows",
    "find_targets",
    "group_size",
    "lora",
    "merge",
    "merged_tensors",
    "quantize",
    "quantize_weight",
    "quantized_paths",
    "sharding",
    "token_rows",
    "unties_head",
    "experts_words",
]
