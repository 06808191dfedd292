"""Pure transforms of the parameter tree: select, quantize, lora, split and combine, merge, sharding."""

from tpu_tune.transforms import lora, sharding
from tpu_tune.transforms.lora import LoraSpec, Target, Targets, TokenRows, find_targets, token_rows
from tpu_tune.transforms.merge import merge, merged_tensors, unties_head
from tpu_tune.transforms.quantize import QuantizePolicy, quantize
from tpu_tune.transforms.split import combine, split

__all__ = [
    "LoraSpec",
    "QuantizePolicy",
    "Target",
    "Targets",
    "TokenRows",
    "combine",
    "find_targets",
    "lora",
    "merge",
    "merged_tensors",
    "quantize",
    "sharding",
    "split",
    "token_rows",
    "unties_head",
]
