"""mxfp4, the format of gpt-oss' experts: every code under every scale against transformers, and as a stored leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_tune.config import QuantizeConfig
from tpu_tune.tensors import FORMATS, LeafSpec, QuantizedTensor, matmul, quantize_tensor
from tpu_tune.transforms import quantize_weight, sharding

GROUPS = 3


def hand_made_blocks() -> tuple[np.ndarray, np.ndarray]:
    """Return blocks (256 outputs, 3 groups, 16 bytes) and scales: every code under each of the 256 scales, and more."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (256, GROUPS, 16), np.uint8)
    blocks[:, 0] = np.arange(16) * 16 + np.arange(15, -1, -1)
    scales = np.stack([np.arange(256), random.permutation(256), 255 - np.arange(256)], axis=1).astype(np.uint8)
    return blocks, scales


def as_leaf(blocks: np.ndarray, scales: np.ndarray) -> QuantizedTensor:
    """The low nibble of a byte is the even element."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(len(blocks), -1)
    return QuantizedTensor.from_codes(jnp.asarray(codes.T), jnp.asarray(scales.T), "mxfp4", 32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_code_and_scale_equals_transformers_to_the_bit(dtype):
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = hand_made_blocks()
    wanted = mxfp4.convert_moe_packed_tensors(
        torch.from_numpy(blocks)[None], torch.from_numpy(scales)[None], dtype=getattr(torch, dtype)
    )[0]
    found = np.asarray(as_leaf(blocks, scales).dequantize(jnp.dtype(dtype)))
    bits = np.uint16 if dtype == "bfloat16" else np.uint32
    np.testing.assert_array_equal(found.view(bits), wanted.view(getattr(torch, f"u{bits.__name__[1:]}")).numpy())


def test_every_code_and_scale_equals_the_standards_formula():
    """OCP Microscaling 1.0, tables 3 and 7, but that a scale of 255 is 2^128 as transformers has it, not a NaN."""
    blocks, scales = hand_made_blocks()
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(256, GROUPS, 32)
    with np.errstate(over="ignore"):
        wanted = (values[codes] * 2.0 ** (scales[..., None] - 127.0)).astype(np.float32).reshape(256, -1).T
    np.testing.assert_array_equal(
        np.asarray(as_leaf(blocks, scales).dequantize()).view(np.uint32), wanted.view(np.uint32)
    )


def test_half_a_byte_a_weight_and_a_byte_for_32():
    leaf = quantize_weight(jnp.ones((4096, 8)), QuantizeConfig("mxfp4"))
    assert (leaf.group_size, leaf.scale_max, leaf.scales.dtype) == (32, None, jnp.uint8)
    assert leaf.nbytes == 4096 * 8 // 2 + 4096 * 8 // 32


def test_quantizing_what_was_dequantized_changes_nothing():
    blocks, scales = hand_made_blocks()
    weight = as_leaf(blocks, np.clip(scales, 4, 252)).dequantize()
    np.testing.assert_array_equal(quantize_tensor(weight, "mxfp4", 32).dequantize(), weight)


def test_ties_go_to_the_even_code():
    middles = jnp.asarray([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]) * 2  # of the standard's numbers
    even = [0, 2, 2, 4, 4, 6, 6]
    np.testing.assert_array_equal(FORMATS["mxfp4"].encode(middles), even)
    np.testing.assert_array_equal(FORMATS["mxfp4"].encode(-middles), np.array(even) + 8)


def test_it_is_cut_over_a_mesh_in_whole_groups_and_pack_blocks():
    """A device's part is a valid leaf; the product over parts of `in` needs nothing but the sum."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 1, "sequence": 1}, jax.devices()[:2])
    weight = jax.random.normal(jax.random.key(0), (512, 8))
    x = jax.random.normal(jax.random.key(1), (3, 512))
    leaf = quantize_tensor(weight, "mxfp4", 32)
    placed = sharding.leaf_sharding("w", leaf, LeafSpec(("embed", "heads")), mesh)
    assert placed.codes.spec == placed.scales.spec == jax.sharding.PartitionSpec("fsdp", None)
    found = jax.jit(lambda x, leaf: jax.vjp(lambda x: matmul(x, leaf), x)[1](matmul(x, leaf))[0])
    np.testing.assert_allclose(found(x, jax.device_put(leaf, placed)), found(x, leaf), rtol=1e-5, atol=1e-3)
