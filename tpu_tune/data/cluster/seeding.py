"""First centres for k-means: greedy k-means++, then swaps for better ones by local search, on a sample of the rows.

k-means++ is Arthur and Vassilvitskii, SODA 2007, greedy as in scikit-learn. The local search is Lattanzi and Sohler,
ICML 2019: rows drawn by their squared distance replace the centre that is missed least, where the sum of squared
distances falls by it. What it finds is mostly better than what Lloyd's algorithm finds from k-means++ alone.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

SWAPS = 200  # tries to put a centre elsewhere, at most two for each centre
_MOST_DISTANCES = 2**26  # rows x centres; above, there is no local search
_HIGHEST = jax.lax.Precision.HIGHEST


def first_centers(rows: Float[np.ndarray, "m d"], k: int, seed: int) -> Float[np.ndarray, "k d"]:
    """Choose k of the rows, m at least k; the same seed chooses the same ones."""
    trials = 2 + int(math.log(k))  # rows drawn at a time, of which the best is taken
    swaps = min(2 * k, SWAPS) if k > 1 and k * len(rows) <= _MOST_DISTANCES else 0
    # Sizes are rounded up so that few shapes are compiled; the rows added weigh nothing.
    padded = np.zeros((-(-len(rows) // 512) * 512, rows.shape[1]), np.float32)
    padded[: len(rows)] = rows - rows.mean(axis=0)
    with jax.default_device(jax.local_devices()[0]):  # the same on any number of them
        chosen = _choose(padded, len(rows), k, trials, swaps, jax.random.key(seed))
    return rows[np.asarray(chosen)]


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _choose(rows: Float[Array, "m d"], count: Array, k: int, trials: int, swaps: int, key: Array) -> Int[Array, "k"]:
    norms = jnp.sum(rows * rows, axis=1)
    real = jnp.arange(len(rows)) < count
    index = jnp.arange(k, dtype=jnp.int32)[:, None]

    def to_all(some: Int[Array, "c"]) -> Float[Array, "c m"]:
        """Squared distances from some rows to all."""
        products = jnp.matmul(rows[some], rows.T, precision=_HIGHEST)
        # What rounding leaves of the distance to itself must not be drawn.
        itself = some[:, None] == jnp.arange(len(rows))
        return jnp.where(real & ~itself, jnp.maximum(norms[some][:, None] - 2 * products + norms, 0), 0)

    def draw(nearest: Float[Array, "m"], key: Array) -> Int[Array, "c"]:
        reach = jnp.cumsum(nearest)
        drawn = jnp.searchsorted(reach, jax.random.uniform(key, (trials,)) * reach[-1], side="right")
        return jnp.minimum(drawn, count - 1).astype(jnp.int32)

    def add(nearest: Float[Array, "m"], key: Array) -> tuple[Float[Array, "m"], Int[Array, ""]]:
        drawn = draw(nearest, key)
        left = jnp.minimum(nearest, to_all(drawn))
        best = jnp.argmin(left.sum(axis=1))
        return left[best], drawn[best]

    def swap(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], None]:
        chosen, distances = carry
        first = jnp.min(distances, axis=0)
        mine = index == jnp.min(jnp.where(distances == first, index, k - 1), axis=0)
        second = jnp.min(jnp.where(mine, jnp.inf, distances), axis=0)
        drawn = draw(first, key)
        new = to_all(drawn)
        # A row goes to the drawn one where that is nearer; else it stays, or goes to its second if its own is given up.
        kept = jnp.minimum(new, first)
        missed = jnp.minimum(new, second) - kept
        cost = kept.sum(axis=1)[:, None] + jnp.matmul(missed, mine.T.astype(jnp.float32), precision=_HIGHEST)
        best = jnp.argmin(cost)
        into, out = best // k, best % k
        better = cost.reshape(-1)[best] < first.sum()
        chosen = jnp.where(better, chosen.at[out].set(drawn[into]), chosen)
        return (chosen, jnp.where(better, distances.at[out].set(new[into]), distances)), None

    start, *_ = keys = jax.random.split(key, k + swaps)
    first = jax.random.randint(start, (1,), 0, count, jnp.int32)
    _, others = jax.lax.scan(add, to_all(first)[0], keys[1:k])
    chosen = jnp.concatenate([first, others])
    if swaps:
        (chosen, _), _ = jax.lax.scan(swap, (chosen, to_all(chosen)), keys[k:])
    return chosen
