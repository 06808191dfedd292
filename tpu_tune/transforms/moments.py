"""`Moments`: what GPTQ has to know of a matrix's inputs, summed up row by row; of experts, of each one's own inputs.

An expert sees few tokens, and the moments of fewer tokens than inputs leave directions in which no error seems to
count. So its moments are taken together with what is known without it (`steadied`), as covariances are that are
estimated from little (Friedman 1989, Ledoit and Wolf 2004). Where that is nothing, a matrix is rounded plainly, which
is also QMoE's way out (arXiv:2310.16795, section 3.2).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_tune.kernels.grouped_matmul import add_grouped_outer

FEW = 0.25  # of the inputs' number: as many rows count what is known without an expert's own


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sums", "rows"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Moments:
    """Second moments of a matrix's inputs, or of the inputs of each of several experts.

    Attributes:
      sums: sum of x x^T over the inputs x, (in, in) or (experts, in, in) float32.
      rows: number of inputs, () or (experts,) float32.
    """

    sums: Float[Array, "*experts in in"]
    rows: Float[Array, "*experts"]


def add_rows(moments: Moments | None, x: Float[Array, "rows in"], sizes: Int[Array, "*experts"]) -> Moments:
    """Return the moments with further inputs; the old ones are used up, so that there is one array of their size.

    Args:
      moments: those so far; None at first.
      x: inputs, those of experts sorted by expert.
      sizes: int32, number of inputs, of each expert (experts,) or of the one matrix (). Its other rows of x are 0.
    """
    if moments is None:
        width = x.shape[-1]
        moments = Moments(jnp.zeros((*sizes.shape, width, width), jnp.float32), jnp.zeros(sizes.shape, jnp.float32))
    return _with_rows(moments, x, sizes)


@functools.partial(jax.jit, donate_argnums=0)
def _with_rows(moments: Moments, x: Array, sizes: Array) -> Moments:
    wide = x.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        sums = add_grouped_outer(moments.sums, wide, wide, sizes) if sizes.ndim else moments.sums + wide.T @ wide
    return Moments(sums, moments.rows + sizes)


def of_all_rows(moments: Moments) -> Float[Array, "in in"]:
    """Return the mean of x x^T over all experts' inputs."""
    return jnp.sum(moments.sums, axis=0) / jnp.maximum(jnp.sum(moments.rows), 1.0)


def steadied(
    sums: Float[Array, "in in"], rows: Float[Array, ""], all_rows: Float[Array, "in in"] | None
) -> Float[Array, "in in"]:
    """Return one expert's moments with `FEW` * in rows more, of what is known without them; 0 where it has no rows.

    Args:
      sums, rows: its own moments.
      all_rows: mean of x x^T over the inputs of all experts, which stands for the rows if the experts read the same
        hidden states. None if each expert has inner channels of its own: then its own channels' sizes do, uncorrelated,
        with which rounding is plain.
    """
    known = jnp.diag(jnp.diagonal(sums) / jnp.maximum(rows, 1.0)) if all_rows is None else all_rows
    return jnp.where(rows > 0, sums + FEW * len(sums) * known, 0.0)
