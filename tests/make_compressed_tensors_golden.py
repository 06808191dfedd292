"""Write `goldens/compressed_tensors.npz`: matrices compressed on a CPU by the compressed-tensors library itself.

    pip install compressed-tensors==0.20.0
    python tests/make_compressed_tensors_golden.py

An array CASE/PART is a stored tensor (bfloat16 and fp8 as raw bytes, their dtype in CASE/dtypes), CASE/config the
`quantization_config`, CASE/expected what the library's `decompress` gives with its scales in float32.
"""

import json
import pathlib

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

# name -> format, settings of the weights, shape, dtype of the scales
CASES = {
    "int4": ("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group"}, (6, 96), "bfloat16"),
    "int4_channel_odd": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, (5, 77), "float16"),
    "int4_channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, (5, 76), "float16"),
    "int4_zeros": (
        "pack-quantized",
        {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False},
        (10, 64),
        "bfloat16",
    ),
    "int8_words": ("pack-quantized", {"num_bits": 8, "group_size": 64, "strategy": "group"}, (6, 128), "float16"),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, (7, 40), "bfloat16"),
    "int8_zeros": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, (7, 40), "float16"),
    "int8_tensor": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}, (7, 40), "float32"),
    "fp8_channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, (7, 40), "bfloat16"),
    "fp8_tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, (7, 40), "bfloat16"),
    "fp8_block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]},
        (40, 56),
        "bfloat16",
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
        (6, 64),
        "",
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        (6, 64),
        "",
    ),
}  # fmt: skip


def blocks(weight: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """Return the weight as (rows of scales, columns of scales, numbers that share one), short blocks padded with 0."""
    rows, columns = weight.shape
    high, wide = {
        "group": (1, args.group_size),
        "tensor_group": (1, args.group_size),
        "channel": (1, columns),
        "tensor": (rows, columns),
        "block": tuple(args.block_structure or (1, 1)),
    }[str(getattr(args.strategy, "value", args.strategy))]
    padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % high))
    parts = padded.reshape(padded.shape[0] // high, high, padded.shape[1] // wide, wide)
    return parts.permute(0, 2, 1, 3).flatten(2)


def case(format: str, settings: dict, shape: tuple[int, int], scales: str, seed: int) -> dict[str, np.ndarray]:
    """Return one case's arrays."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    args = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
    parts = blocks(weight, args)
    overall = generate_gparam(weight.min(), weight.max()) if format.startswith("nvfp4") else None
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args, global_scale=overall)
    if str(getattr(args.strategy, "value", args.strategy)) == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    state = {"weight": weight, "weight_scale": scale.to(getattr(torch, scales)) if scales else scale}
    state |= {"weight_zero_point": zero} if not args.symmetric else {}
    state |= {"weight_global_scale": overall.reshape(1)} if overall is not None else {}
    compressor = BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(dict(state), scheme)
    whole = {name: value.float() if name == "weight_scale" and scales else value for name, value in stored.items()}
    expected = compressor.decompress(whole, scheme)["weight"]
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in stored.items()}
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": settings}},
        "ignore": ["lm_head"],
    }
    return {
        **{name: value.contiguous().reshape(-1).view(torch.uint8).numpy() for name, value in stored.items()},
        "shapes": np.array(json.dumps({name: list(value.shape) for name, value in stored.items()})),
        "dtypes": np.array(json.dumps(dtypes)),
        "config": np.array(json.dumps(config)),
        "expected": expected.float().numpy(),
    }


def main() -> None:
    """Write the file."""
    arrays = {}
    for seed, (name, how) in enumerate(CASES.items()):
        arrays |= {f"{name}/{part}": value for part, value in case(*how, seed).items()}
    np.savez_compressed(pathlib.Path(__file__).parent / "goldens" / "compressed_tensors.npz", **arrays)


if __name__ == "__main__":
    main()
