"""llama.cpp's Q4_K, Q5_K and Q6_K, which the `gguf` package reads but does not write.

A block is 256 values of a row. Q4_K and Q5_K cut it into eight groups of 32 with a scale and a minimum each, Q6_K into
sixteen groups of 16 with a scale each; the groups' scales are integers times one float16 of the block. The searches
are those of ggml-quants.c (`make_qkx2_quants`, `make_qx_quants`, the versions without an importance matrix), in
float32 and with sums in the same order. A compiler may fuse a product and a sum there: of the codes a few in a
thousand then differ, by near ties.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
from jaxtyping import Float32, UInt8

BLOCK = 256  # values a block
_CHUNK = 512  # blocks worked on at one time: what a group's search holds then fits into a core's cache
_TINY = np.float32(1e-15)  # a group that is smaller counts as zero (GROUP_MAX_EPS)


def quantize(values: Float32[np.ndarray, "*rows in"], number: gguf.GGMLQuantizationType) -> UInt8[np.ndarray, "..."]:
    """Return values in one of `QUANTIZERS`' formats.

    Args:
      values: rows whose length is a multiple of 256.
      number: Q4_K, Q5_K or Q6_K.

    Returns:
      (*rows, bytes a row).
    """
    blocks = values.reshape(-1, BLOCK)
    chunks = [blocks[start : start + _CHUNK] for start in range(0, len(blocks), _CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy's loops run without Python's lock
        done = list(pool.map(QUANTIZERS[number], chunks))
    width = values.shape[-1] // BLOCK * gguf.GGML_QUANT_SIZES[number][1]
    return np.concatenate(done).reshape(*values.shape[:-1], width)


def quantize_q4_k(blocks: Float32[np.ndarray, "blocks 256"]) -> UInt8[np.ndarray, "blocks 144"]:
    """Q4_K: 4.5 bits a value."""
    header, codes = _with_minimums(blocks, largest=15, first=-1.0, steps=20)
    return np.concatenate([header, _low_nibbles(codes)], axis=1)


def quantize_q5_k(blocks: Float32[np.ndarray, "blocks 256"]) -> UInt8[np.ndarray, "blocks 176"]:
    """Q5_K: 5.5 bits a value."""
    header, codes = _with_minimums(blocks, largest=31, first=-0.5, steps=15)
    # Bit g of byte j is the fifth bit of value j of group g.
    high = np.bitwise_or.reduce((codes >> 4) << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    return np.concatenate([header, high, _low_nibbles(codes & 15)], axis=1)


def quantize_q6_k(blocks: Float32[np.ndarray, "blocks 256"]) -> UInt8[np.ndarray, "blocks 210"]:
    """Q6_K: 6.5625 bits a value."""
    groups = blocks.reshape(-1, 16, 16)
    scales = _symmetric_scales(np.ascontiguousarray(groups.reshape(-1, 16).T), 32).reshape(-1, 16)
    extreme = np.take_along_axis(scales, np.argmax(np.abs(scales), axis=1)[:, None], axis=1)
    empty = np.abs(extreme) < _TINY
    inverse = np.float32(-128) / np.where(empty, np.float32(1), extreme)
    whole = np.where(empty, np.float32(0), np.float32(1) / inverse).astype(np.float16)
    # The extreme itself is exactly -128; what its reciprocal rounds beyond is held at the other end.
    integers = np.minimum(np.where(empty, 0, np.rint(inverse * scales)), 127).astype(np.int8)
    step = (whole.astype(np.float32) * integers)[..., None]
    codes = np.rint(groups / np.where(step == 0, np.float32(1), step))
    codes = np.where(step == 0, 0, np.clip(codes, -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = (codes[:, :, :2] & 15) | ((codes[:, :, 2:] & 15) << 4)
    high = np.bitwise_or.reduce((codes >> 4) << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2)
    count = len(blocks)
    parts = (low.reshape(count, -1), high.reshape(count, -1), integers.view(np.uint8), whole.view(np.uint8))
    return np.concatenate(parts, axis=1)


QUANTIZERS: dict[gguf.GGMLQuantizationType, Callable[[np.ndarray], np.ndarray]] = {
    gguf.GGMLQuantizationType.Q4_K: quantize_q4_k,
    gguf.GGMLQuantizationType.Q5_K: quantize_q5_k,
    gguf.GGMLQuantizationType.Q6_K: quantize_q6_k,
}


def _with_minimums(
    blocks: np.ndarray, largest: int, first: float, steps: int
) -> tuple[UInt8[np.ndarray, "blocks 16"], UInt8[np.ndarray, "blocks 8 32"]]:
    """Return what stands before the codes of Q4_K and Q5_K blocks, and the codes.

    Args:
      blocks: (blocks, 256).
      largest: the largest code.
      first, steps: the search tries `largest + first + 0.1 * step` levels between a group's extremes.
    """
    groups = blocks.reshape(-1, 8, 32)
    found = _scales_and_minimums(np.ascontiguousarray(groups.reshape(-1, 32).T), largest, first, steps)
    scales, minimums = (part.reshape(-1, 8) for part in found)
    (scale, scale_codes), (minimum, minimum_codes) = _six_bits(scales), _six_bits(minimums)
    step = (scale.astype(np.float32) * scale_codes)[..., None]
    shift = (minimum.astype(np.float32) * minimum_codes)[..., None]
    codes = np.rint((groups + shift) / np.where(step == 0, np.float32(1), step))
    codes = np.where(step == 0, 0, np.clip(codes, 0, largest)).astype(np.uint8)
    packed = np.concatenate(
        [
            scale_codes[:, :4] | (scale_codes[:, 4:] >> 4 << 6),
            minimum_codes[:, :4] | (minimum_codes[:, 4:] >> 4 << 6),
            (scale_codes[:, 4:] & 15) | ((minimum_codes[:, 4:] & 15) << 4),
        ],
        axis=1,
    )
    return np.concatenate([scale.view(np.uint8), minimum.view(np.uint8), packed], axis=1), codes


def _six_bits(values: Float32[np.ndarray, "blocks 8"]) -> tuple[np.ndarray, UInt8[np.ndarray, "blocks 8"]]:
    """Return the float16 of each block, (blocks, 1), and the codes 0..63 that times it are the values (>= 0)."""
    top = np.maximum(values.max(axis=1, keepdims=True), np.float32(0))
    inverse = np.where(top > 0, np.float32(63) / np.where(top > 0, top, np.float32(1)), np.float32(0))
    codes = np.minimum(np.rint(inverse * values), 63).astype(np.uint8)
    return (top / np.float32(63)).astype(np.float16), codes


def _low_nibbles(codes: UInt8[np.ndarray, "blocks 8 32"]) -> UInt8[np.ndarray, "blocks 128"]:
    """Pack codes below 16: byte j of a pair of groups has value j of the first below and of the second above."""
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).reshape(len(codes), -1)


def _scales_and_minimums(
    x: Float32[np.ndarray, "32 groups"], largest: int, first: float, steps: int
) -> tuple[Float32[np.ndarray, "groups"], Float32[np.ndarray, "groups"]]:
    """Search each group's scale s and minimum m >= 0: the least weighted squared error of s * code - m."""
    top = np.float32(largest)
    weights = np.sqrt(_sum(x * x) / np.float32(32)) + np.abs(x)
    low, high = np.minimum(x.min(axis=0), np.float32(0)), x.max(axis=0)
    flat = high == low
    high = np.where(flat, low + 1, high)
    sum_w, sum_x = _sum(weights), _sum(weights * x)

    def codes_at(levels: np.float32) -> np.ndarray:
        return np.clip(np.rint(levels / (high - low) * (x - low)), np.float32(0), top)

    def error_of(codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
        difference = scale * codes + minimum - x
        return _sum(weights * (difference * difference))

    scale = np.float32(1) / (top / (high - low))
    best = error_of(codes_at(top), scale, low)
    with np.errstate(divide="ignore", invalid="ignore"):
        for step in range(steps + 1):
            codes = codes_at(np.float32(first) + np.float32(0.1) * np.float32(step) + top)
            weighted = weights * codes
            sum_l, sum_l2, sum_xl = _sum(weighted), _sum(weighted * codes), _sum(weighted * x)
            determinant = sum_w * sum_l2 - sum_l * sum_l
            new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
            new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
            positive = new_low > 0
            new_scale = np.where(positive, sum_xl / sum_l2, new_scale)
            new_low = np.where(positive, np.float32(0), new_low)
            error = error_of(codes, new_scale, new_low)
            better = (determinant > 0) & (error < best)
            # The next try starts from the minimum that was found, as in the original.
            best, scale, low = (
                np.where(better, new, old) for new, old in ((error, best), (new_scale, scale), (new_low, low))
            )
    return np.where(flat, np.float32(0), scale), -low


def _symmetric_scales(x: Float32[np.ndarray, "16 groups"], levels: int) -> Float32[np.ndarray, "groups"]:
    """Search each group's scale for codes -levels..levels - 1: the best of 19 fits, weighted by squares."""
    magnitude = np.abs(x)
    extreme = np.take_along_axis(x, magnitude.argmax(axis=0)[None], axis=0)[0]
    zero = magnitude.max(axis=0) < _TINY
    extreme = np.where(zero, np.float32(1), extreme)
    weights = x * x

    def fit(divisor: np.float32) -> tuple[np.ndarray, np.ndarray]:
        codes = np.clip(np.rint(-divisor / extreme * x), np.float32(-levels), np.float32(levels - 1))
        return _sum(weights * x * codes), _sum(weights * codes * codes)

    sum_lx, sum_l2 = fit(np.float32(levels))
    scale = np.where(sum_l2 > 0, sum_lx / np.where(sum_l2 > 0, sum_l2, np.float32(1)), np.float32(0))
    best = scale * sum_lx
    for step in (*range(-9, 0), *range(1, 10)):
        sum_lx, sum_l2 = fit(np.float32(levels) + np.float32(0.1) * np.float32(step))
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = np.where(better, sum_lx / np.where(better, sum_l2, np.float32(1)), scale)
        best = np.where(better, scale * sum_lx, best)
    return np.where(zero, np.float32(0), scale)


def _sum(values: Float32[np.ndarray, "n groups"]) -> Float32[np.ndarray, "groups"]:
    """Add up over the first axis, one after the other as a loop over a group does."""
    return np.add.reduce(values, axis=0)
