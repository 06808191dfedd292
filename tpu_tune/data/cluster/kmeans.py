"""k-means in JAX over every device: seeded first centres, then Lloyd or mini-batches, then one pass for the labels.

Rows stay where they are, in memory or in a memory-mapped file, and go to the devices block by block, so that neither
the rows nor the n x k distances are ever held whole. A block is cut into the same lanes whatever the number of devices,
and sums over lanes and blocks are taken in the same order: on any number of devices that divides 8, the labels are the
same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from tpu_tune.data.cluster.seeding import first_centers
from tpu_tune.data.streams import progress
from tpu_tune.errors import UserError

LANES = 8  # a block's parts; devices share them out
CHUNK = 1024  # rows of one product: a CPU's cache holds them; eight times as many elsewhere
BLOCK_BYTES = 64 * 2**20  # of rows that are on the devices at one time
BATCH_SIZE = 8192  # rows of a mini-batch
MINI_BATCH_FROM = 100_000  # rows; below, Lloyd's passes over all of them are quick enough
_PATIENCE = 3  # mini-batches without a smoothed inertia that is better by
_GAIN = 2e-3  # this share
_SAMPLE = 8192  # least rows that the first centres are chosen from
_HIGHEST = jax.lax.Precision.HIGHEST  # TPUs would round to bfloat16 otherwise, GPUs to TF32


@dataclass(frozen=True)
class Clusters:
    """The clusters that `kmeans` finds.

    Attributes:
      centers: (k, d) float32.
      labels: (n,) int32, the nearest centre of each row.
      distances: (n,) float32, the Euclidean distance to it.
      inertia: sum of the squared distances.
      iterations: passes over the rows (Lloyd), or mini-batches.
      converged: it stopped by itself, not at the limit.
    """

    centers: np.ndarray
    labels: np.ndarray
    distances: np.ndarray
    inertia: float
    iterations: int
    converged: bool

    @property
    def k(self) -> int:
        """How many clusters."""
        return len(self.centers)


@dataclass(frozen=True)
class KMeansOptions:
    """How `kmeans` searches.

    Attributes:
      mini_batch: follow seeded batches instead of passing over all rows each time; by default from `MINI_BATCH_FROM`.
      batch_size: rows of a mini-batch.
      max_iterations: most passes over the rows, of either way.
      tolerance: stop when the centres' squared moves add up to less than this share of the columns' mean variance (as
        scikit-learn's); mini-batches also stop when their smoothed inertia no longer falls.
    """

    mini_batch: bool | None = None
    batch_size: int = BATCH_SIZE
    max_iterations: int = 100
    tolerance: float = 1e-4


def kmeans(
    data: Float[np.ndarray, "n d"],
    k: int,
    seed: int = 0,
    options: KMeansOptions = KMeansOptions(),  # noqa: B008
    *,
    start: Float[np.ndarray, "k d"] | None = None,
    slots: int = 0,
    devices: Sequence[jax.Device] | None = None,
) -> Clusters:
    """Cluster rows.

    Args:
      data: in memory or memory-mapped.
      k: how many clusters.
      seed: of the first centres and of the order of mini-batches.
      options: mini-batches or not, and when to stop.
      start: the first centres, instead of those of `first_centers`.
      slots: room for at least so many centres, so that runs with several k share what is compiled.
      devices: by default all.

    Raises:
      UserError: more clusters than rows, or a value that is not finite.
    """
    rows = len(data)
    if not 1 <= k <= rows:
        raise UserError(f"k is {k}; it must be at least 1 and at most the number of rows, {rows}")
    sample = _sample(data, max(_SAMPLE, 20 * k), seed)
    if not np.isfinite(sample).all():
        raise UserError("the vectors to cluster are not all finite numbers")
    slots = -(-max(slots, k) // 8) * 8
    passes = _Passes(devices or jax.devices(), slots, sample.mean(axis=0))
    least = options.tolerance * float(sample.var(axis=0, dtype=np.float64).mean())
    centers = np.asarray(first_centers(sample, k, seed, slots) if start is None else start, np.float64)
    if options.mini_batch or (options.mini_batch is None and rows >= MINI_BATCH_FROM):
        centers, iterations, converged = _mini_batches(data, centers, passes, options, least, seed)
    else:
        centers, iterations, converged = _lloyd(data, centers, passes, options.max_iterations, least)
    labels, squared = passes.labels(data, centers)
    if not np.isfinite(squared).all():
        raise UserError("the vectors to cluster are not all finite numbers")
    distances, inertia = np.sqrt(squared), float(squared.sum(dtype=np.float64))
    return Clusters(centers.astype(np.float32), labels, distances, inertia, iterations, converged)


class _Passes:
    """Passes over rows on some devices, with room for a number of centres."""

    def __init__(self, devices: Sequence[jax.Device], slots: int, offset: Float[np.ndarray, "d"]):
        self.mesh = Mesh(np.asarray(devices), ("data",))
        self.lanes = math.lcm(LANES, len(devices))
        self.slots = slots
        self.offset = np.asarray(offset, np.float32)  # far from the origin, x.c would lose what tells centres apart

    def sums(
        self, data: Float[np.ndarray, "n d"], centers: Float[np.ndarray, "k d"]
    ) -> tuple[Float[np.ndarray, "k d"], Int[np.ndarray, "k"], Float[np.ndarray, "n"]]:
        """Return each cluster's sum of rows (float64) and number of rows, and each row's squared distance."""
        k = len(centers)
        sums, counts, squared = np.zeros_like(centers, np.float64), np.zeros(k, np.int64), []
        for _, block_squared, block_sums, block_counts in self._over(data, centers, sums=True):
            squared.append(block_squared)
            sums += block_sums[:k]
            counts += block_counts[:k]
        return sums + counts[:, None] * self.offset.astype(np.float64), counts, np.concatenate(squared)

    def labels(
        self, data: Float[np.ndarray, "n d"], centers: Float[np.ndarray, "k d"]
    ) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        """Return each row's nearest centre and the squared distance to it."""
        blocks = list(self._over(data, centers, sums=False))
        return np.concatenate([labels for labels, _ in blocks]), np.concatenate([squared for _, squared in blocks])

    def _over(self, data: np.ndarray, centers: np.ndarray, sums: bool) -> Iterator[list[np.ndarray]]:
        padded = np.zeros((self.slots, data.shape[1]), np.float32)
        padded[: len(centers)] = centers - self.offset
        # An unused slot counts as infinitely far away.
        halves = np.full(self.slots, np.inf, np.float32)
        halves[: len(centers)] = np.square(padded[: len(centers)]).sum(axis=1) / 2
        previous = None
        for block, count in self._blocks(data):
            results = _pass(block, np.int32(count), self.offset, padded, halves, mesh=self.mesh, sums=sums)
            if previous is not None:  # the devices work on this block while the last one's results are fetched
                yield _fetched(*previous)
            previous = results, count
        yield _fetched(*previous)

    def _blocks(self, data: np.ndarray) -> Iterator[tuple[Array, int]]:
        """Yield (lanes, chunks, rows, d) arrays on the devices and how many of their rows are real."""
        most = CHUNK if self.mesh.devices.flat[0].platform == "cpu" else 8 * CHUNK
        chunk = min(most, 1 << max(len(data) // self.lanes, 8).bit_length())
        unit = self.lanes * chunk
        chunks = max(1, min(-(-len(data) // unit), BLOCK_BYTES // (4 * unit * data.shape[1])))
        shape, size = (self.lanes, chunks, chunk, data.shape[1]), unit * chunks
        sharding = NamedSharding(self.mesh, PartitionSpec("data"))
        for begin in range(0, len(data), size):
            part = np.asarray(data[begin : begin + size], np.float32)
            count = len(part)
            if count < size:
                part = np.concatenate([part, np.zeros((size - count, data.shape[1]), np.float32)])
            yield jax.device_put(part.reshape(shape), sharding), count


def _fetched(results: tuple[Array, ...], count: int) -> list[np.ndarray]:
    labels, squared, *rest = jax.device_get(results)
    return [labels.reshape(-1)[:count], squared.reshape(-1)[:count], *rest]


@functools.partial(jax.jit, static_argnames=("mesh", "sums"))
def _pass(
    block: Float[Array, "lanes chunks rows d"],
    count: Array,
    offset: Float[Array, "d"],
    centers: Float[Array, "k d"],
    halves: Float[Array, "k"],
    mesh: Mesh,
    sums: bool,
) -> tuple[Array, ...]:
    """Find the nearest centre of every row; with `sums` also each centre's sum of rows (less offset) and number."""
    lanes, chunks, rows, _ = block.shape
    numbers = jnp.arange(lanes * chunks * rows, dtype=jnp.int32).reshape(lanes, chunks, rows)
    index = jnp.arange(len(centers), dtype=jnp.int32)

    def one_chunk(totals: tuple[Array, ...], chunk: tuple[Array, Array]) -> tuple[tuple[Array, ...], tuple]:
        x, number = chunk[0] - offset, chunk[1]
        # The nearest centre has the largest x.c - |c|^2 / 2. Two reductions are quicker than one argmax on a CPU.
        scores = jnp.matmul(x, centers.T, precision=_HIGHEST) - halves
        best = jnp.max(scores, axis=1, keepdims=True)
        label = jnp.min(jnp.where(scores == best, index, len(centers) - 1), axis=1)
        squared = jnp.sum(jnp.square(x - centers[label]), axis=1)
        if sums:
            members = ((label[:, None] == index) & (number < count)[:, None]).astype(jnp.float32)
            # A sum over rows as a product: it runs at full speed, and in one order, on every kind of device.
            totals = (totals[0] + jnp.matmul(members.T, x, precision=_HIGHEST), totals[1] + jnp.sum(members, axis=0))
        return totals, (label, squared)

    def one_lane(lane: tuple[Array, Array]) -> tuple[Array, ...]:
        empty = (jnp.zeros_like(centers), jnp.zeros_like(halves)) if sums else ()
        totals, per_row = jax.lax.scan(one_chunk, empty, lane)
        return *per_row, *totals

    each = PartitionSpec("data")
    results = jax.shard_map(
        lambda *lanes: jax.lax.map(one_lane, lanes), mesh=mesh, in_specs=(each, each), out_specs=each, check_vma=False
    )(block, numbers)
    if not sums:
        return results
    labels, squared, totals, counts = jax.lax.with_sharding_constraint(results, NamedSharding(mesh, PartitionSpec()))
    return labels, squared, functools.reduce(jnp.add, list(totals)), counts.sum(axis=0).astype(jnp.int32)


def _lloyd(
    data: np.ndarray, centers: np.ndarray, passes: _Passes, max_iterations: int, least: float
) -> tuple[np.ndarray, int, bool]:
    for iteration in progress(range(1, max_iterations + 1), "k-means", unit="passes"):
        sums, counts, squared = passes.sums(data, centers)
        moved = _restarted(sums / np.maximum(counts, 1)[:, None], counts, squared, data)
        shift = float(np.square(moved - centers).sum())
        centers = moved
        if shift <= least:
            return centers, iteration, True
    return centers, max_iterations, False


def _mini_batches(
    data: np.ndarray, centers: np.ndarray, passes: _Passes, options: KMeansOptions, least: float, seed: int
) -> tuple[np.ndarray, int, bool]:
    """Mini-batches (Sculley, WWW 2010): every centre is the mean of all rows that it ever was nearest to."""
    rows, batch_size = len(data), min(options.batch_size, len(data))
    random = np.random.default_rng(seed)
    totals = np.zeros(len(centers), np.int64)
    weight = min(1.0, 2 * batch_size / (rows + 1))  # of a batch in the smoothed inertia, as scikit-learn's
    smoothed = best = math.inf
    without_gain = batches = 0
    for number in progress(range(options.max_iterations), "k-means", unit="passes"):
        order = random.permutation(rows)
        for begin in range(0, rows - batch_size + 1, batch_size):
            batch = data[np.sort(order[begin : begin + batch_size])]  # in the order in which they lie in a file
            sums, counts, squared = passes.sums(batch, centers)
            batches += 1
            totals += counts
            moved = centers + (sums - counts[:, None] * centers) / np.maximum(totals, 1)[:, None]
            shift = float(np.square(moved - centers).sum())
            centers = moved
            inertia = float(squared.mean(dtype=np.float64))
            smoothed = inertia if batches == 1 else smoothed * (1 - weight) + inertia * weight
            best, without_gain = (smoothed, 0) if smoothed < best * (1 - _GAIN) else (best, without_gain + 1)
            if shift <= least or without_gain >= _PATIENCE:
                return centers, batches, True
        if number == 0:
            centers = _restarted(centers, totals, squared, batch)
    return centers, batches, False


def _restarted(centers: np.ndarray, counts: np.ndarray, squared: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Put centres without any row at the rows furthest from theirs."""
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        centers = centers.copy()
        centers[empty] = rows[np.sort(np.argsort(-squared, kind="stable")[: len(empty)])]
    return centers


def _sample(data: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return a seeded sample of the rows, in their order; all where there are not more."""
    if len(data) <= count:
        return np.asarray(data, np.float32)
    chosen = np.random.default_rng(seed).choice(len(data), count, replace=False)
    return np.asarray(data[np.sort(chosen)], np.float32)
