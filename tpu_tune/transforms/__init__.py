"""Pure transforms of the parameter tree: select, quantize, lora, split and combine, merge, sharding."""

from tpu_tune.config import LoraConfig, QuantizeConfig
from tpu_tune.transforms import lora, sharding
from tpu_tune.transforms.lora import Target, Targets, TokenRows, find_targets, token_rows
from tpu_tune.transforms.merge import merge, merged_tensors, unties_head
from tpu_tune.transforms.quantize import quantize, quantize_weight, quantized_paths
from tpu_tune.transforms.split import combine, split

__all__ = [
    "LoraConfig",
    "QuantizeConfig",
    "Target",
    "Targets",
    "TokenRows",
    "combine",
    "find_targets",
    "lora",
    "merge",
    "merged_tensors",
    "quantize",
    "quantize_weight",
    "quantized_paths",
    "sharding",
    "split",
    "token_rows",
    "unties_head",
]
