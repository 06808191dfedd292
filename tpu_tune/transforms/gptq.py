"""`round_against(weight, moments, config)`: a matrix quantized so that its product loses little, not its weights.

GPTQ (Frantar et al. 2022, arXiv:2210.17323): inputs x of a matrix w (in, out) have second moments H = sum x x^T. Rows
of w are rounded one after the other, and what rounding a row changes in x @ w is taken out, as far as H allows, by the
rows that are not yet rounded. A group's scale is found when its first row's turn comes. Codes decode as all others do.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tpu_tune.config import QuantizeConfig
from tpu_tune.tensors import FORMATS, QuantizedTensor, double_quantize
from tpu_tune.tensors.quantized import group_scale, inverse_scale
from tpu_tune.transforms.moments import Moments, of_all_rows, steadied
from tpu_tune.transforms.quantize import group_size, has_small_scales

DAMPING = 0.01  # of the moments' mean diagonal, added to it; the paper's
EXPERTS_BYTES = 2**28  # of the moments of as many experts as are rounded at one time; it takes some seven times that


def round_against(
    weight: Float[Array, "in out"], moments: Float[Array, "in in"], config: QuantizeConfig
) -> QuantizedTensor:
    """Quantize one matrix against its inputs' second moments.

    Args:
      weight: the matrix, (in, out).
      moments: sum or mean of x x^T over its inputs x, (in, in) float32. An input that is always 0 gets plain rounding.
      config: format (int8, int4, nf4), group size and double quantization.
    """
    tensor = _rounded(weight, moments, config.format, group_size(config), config.symmetric)
    return double_quantize(tensor) if has_small_scales(config) else tensor


def round_experts(
    weight: Float[Array, "experts in out"], moments: Moments, same_inputs: bool, config: QuantizeConfig
) -> QuantizedTensor:
    """Quantize the matrices of experts, each against its own inputs; one that had none is rounded plainly.

    Args:
      weight: the matrices, (experts, in, out).
      moments: of each expert's inputs.
      same_inputs: whether all experts read the same hidden states, see `moments.steadied`.
      config: as for `round_against`.
    """
    tensor = _experts_rounded(weight, moments, same_inputs, config.format, group_size(config), config.symmetric)
    return double_quantize(tensor) if has_small_scales(config) else tensor


@functools.partial(jax.jit, static_argnames=("same_inputs", "format", "group", "symmetric"))
def _experts_rounded(
    weight: Array, moments: Moments, same_inputs: bool, format: str, group: int, symmetric: bool
) -> QuantizedTensor:
    all_rows = of_all_rows(moments) if same_inputs else None

    def one(expert: tuple[Array, Moments]) -> QuantizedTensor:
        matrix, own = expert
        return _rounded(matrix, steadied(own.sums, own.rows, all_rows), format, group, symmetric)

    count, width = weight.shape[:2]
    most = max(1, EXPERTS_BYTES // (4 * width * width))
    # A divisor, because the rest that `map` would cut off is a copy.
    at_once = next(number for number in range(min(most, count), 0, -1) if count % number == 0)
    # A batch of one would still copy all moments.
    return jax.lax.map(one, (weight, moments), batch_size=at_once if at_once > 1 else None)


@functools.partial(jax.jit, static_argnames=("format", "group", "symmetric"))
def _rounded(weight: Array, moments: Array, format: str, group: int, symmetric: bool) -> QuantizedTensor:
    form, rows = FORMATS[format], weight.shape[0]
    short = -rows % group  # zeros make the last group whole, and weigh nothing
    left = jnp.pad(weight.astype(jnp.float32), [(0, short), (0, 0)])
    factor = _inverse_factor(jnp.pad(moments.astype(jnp.float32), [(0, short), (0, short)]))
    places = jnp.arange(group)

    def one_row(block: Array, scales: Array, inner: Array, row: Array) -> tuple[Array, tuple[Array, Array]]:
        codes = form.encode(block[row] * inverse_scale(scales))
        error = (block[row] - form.decode(codes) * scales) / inner[row, row]
        after = jnp.where(places > row, inner[row], 0.0)
        return block - after[:, None] * error, (codes, error)

    def one_group(left: Array, start: Array) -> tuple[Array, tuple[Array, Array]]:
        block = jax.lax.dynamic_slice_in_dim(left, start, group)
        across = jax.lax.dynamic_slice_in_dim(factor, start, group)
        inner = jax.lax.dynamic_slice_in_dim(across, start, group, axis=1)
        scales = group_scale(block, format, symmetric)
        step = lambda block, row: one_row(block, scales, inner, row)  # noqa: E731
        _, (codes, errors) = jax.lax.scan(step, block, places)
        later = jnp.where(jnp.arange(left.shape[0]) >= start + group, across, 0.0)
        left = left - jnp.dot(later.T, errors, precision=jax.lax.Precision.HIGHEST)
        return left, (codes, scales)

    _, (codes, scales) = jax.lax.scan(one_group, left, jnp.arange(0, rows + short, group))
    return QuantizedTensor.from_codes(codes.reshape(-1, weight.shape[1])[:rows], scales, format, group)


def _inverse_factor(moments: Float[Array, "in in"]) -> Float[Array, "in in"]:
    """Return the upper triangular U with U^T U = (moments + damping)^-1.

    It is the inverse of the R, upper triangular, with R R^T = moments, which is a Cholesky factor read from its end:
    no inverse of the moments is formed.
    """
    diagonal = jnp.diagonal(moments)
    seen = diagonal > 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(seen), 1)
    damped = moments + jnp.diag(jnp.where(seen, DAMPING * mean, 1.0))
    lower = jnp.linalg.cholesky(damped[::-1, ::-1])
    inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(moments), dtype=moments.dtype), lower=True)
    return inverse[::-1, ::-1]
