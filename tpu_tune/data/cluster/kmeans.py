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
    """What `kmeans` found.

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


def kmeans(
    data: Float[np.ndarray, "n d"],
    k: int,
    seed: int = 0,
    mini_batch: bool | None = None,
    batch_size: int = BATCH_SIZE,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    start: Float[np.ndarray, "k d"] | None = None,
    slots: int = 0,
    devices: Sequence[jax.Device] | None = None,
) -> Clusters:
    """Cluster rows.

    Args:
      data: in memory or memory-mapped.
      k: how many clusters.
      seed: of the first centres and of the order of mini-batches.
      mini_batch: follow seeded batches instead of passing over all rows each time; by default from `MINI_BATCH_FROM`.
      batch_size: rows of a mini-batch.
      max_iterations: most passes over the rows, of either way.
      tolerance: stop when the centres' squared moves add up to less than this share of the columns' mean variance (as
        scikit-learn's); mini-batches also stop when their smoothed inertia no longer falls.
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
    least = tolerance * float(sample.var(axis=0, dtype=np.float64).mean())
    centers = np.asarray(first_centers(sample, k, seed, slots) if start is None else start, np.float64)
    if mini_batch or (mini_batch is None and rows >= MINI_BATCH_FROM):
        found = _mini_batches(data, centers, passes, batch_size, max_iterations, least, seed)
    else:
        found = _lloyd(data, centers, passes, max_iterations, least)
    centers, iterations, converged = found
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
        for _, distances, part, number in self._over(data, centers, sums=True):
            squared.append(distances)
            sums += part[:k]
            counts += number[:k]
        return sums + counts[:, None] * self.offset.astype(np.float64), counts, np.concatenate(squared)

    def labels(
        self, data: Float[np.ndarray, "n d"], centers: Float[np.ndarray, "k d"]
    ) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        """Return each row's nearest centre and the squared distance to it."""
        found = list(self._over(data, centers, sums=False))
        return np.concatenate([part[0] for part in found]), np.concatenate([part[1] for part in found])

    def _over(self, data: np.ndarray, centers: np.ndarray, sums: bool) -> Iterator[list[np.ndarray]]:
        placed = np.zeros((self.slots, data.shape[1]), np.float32)
        placed[: len(centers)] = centers - self.offset
        # Infinitely long, a slot without a centre is no row's nearest.
        halves = np.full(self.slots, np.inf, np.float32)
        halves[: len(centers)] = np.square(placed[: len(centers)]).sum(axis=1) / 2
        waiting = None
        for block, count in self._blocks(data):
            found = _pass(block, np.int32(count), self.offset, placed, halves, mesh=self.mesh, sums=sums)
            if waiting is not None:  # the devices work on this block while the last one's results are fetched
                yield _fetched(*waiting)
            waiting = found, count
        yield _fetched(*waiting)

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


def _fetched(found: tuple[Array, ...], count: int) -> list[np.ndarray]:
    labels, squared, *rest = jax.device_get(found)
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
            mine = ((label[:, None] == index) & (number < count)[:, None]).astype(jnp.float32)
            # A sum over rows as a product: it runs at full speed, and in one order, on every kind of device.
            totals = (totals[0] + jnp.matmul(mine.T, x, precision=_HIGHEST), totals[1] + jnp.sum(mine, axis=0))
        return totals, (label, squared)

    def one_lane(lane: tuple[Array, Array]) -> tuple[Array, ...]:
        empty = (jnp.zeros_like(centers), jnp.zeros_like(halves)) if sums else ()
        totals, found = jax.lax.scan(one_chunk, empty, lane)
        return *found, *totals

    each = PartitionSpec("data")
    found = jax.shard_map(
        lambda *lanes: jax.lax.map(one_lane, lanes), mesh=mesh, in_specs=(each, each), out_specs=each, check_vma=False
    )(block, numbers)
    if not sums:
        return found
    labels, squared, totals, counts = jax.lax.with_sharding_constraint(found, NamedSharding(mesh, PartitionSpec()))
    return labels, squared, functools.reduce(jnp.add, list(totals)), counts.sum(axis=0).astype(jnp.int32)


def _lloyd(
    data: np.ndarray, centers: np.ndarray, passes: _Passes, max_iterations: int, least: float
) -> tuple[np.ndarray, int, bool]:
    for iteration in progress(range(1, max_iterations + 1), "k-means", unit="passes"):
        sums, counts, squared = passes.sums(data, centers)
        moved = _anew(sums / np.maximum(counts, 1)[:, None], counts, squared, data)
        shift = float(np.square(moved - centers).sum())
        centers = moved
        if shift <= least:
            return centers, iteration, True
    return centers, max_iterations, False


def _mini_batches(
    data: np.ndarray, centers: np.ndarray, passes: _Passes, batch_size: int, max_passes: int, least: float, seed: int
) -> tuple[np.ndarray, int, bool]:
    """Mini-batches (Sculley, WWW 2010): every centre is the mean of all rows that it ever was nearest to."""
    rows, batch_size = len(data), min(batch_size, len(data))
    random = np.random.default_rng(seed)
    seen = np.zeros(len(centers), np.int64)
    weight = min(1.0, 2 * batch_size / (rows + 1))  # of a batch in the smoothed inertia, as scikit-learn's
    smoothed = best = math.inf
    waited = taken = 0
    for number in progress(range(max_passes), "k-means", unit="passes"):
        order = random.permutation(rows)
        for begin in range(0, rows - batch_size + 1, batch_size):
            batch = data[np.sort(order[begin : begin + batch_size])]  # in the order in which they lie in a file
            sums, counts, squared = passes.sums(batch, centers)
            taken += 1
            seen += counts
            moved = centers + (sums - counts[:, None] * centers) / np.maximum(seen, 1)[:, None]
            shift = float(np.square(moved - centers).sum())
            centers = moved
            inertia = float(squared.mean(dtype=np.float64))
            smoothed = inertia if taken == 1 else smoothed * (1 - weight) + inertia * weight
            best, waited = (smoothed, 0) if smoothed < best * (1 - _GAIN) else (best, waited + 1)
            if shift <= least or waited >= _PATIENCE:
                return centers, taken, True
        if number == 0:
            centers = _anew(centers, seen, squared, batch)
    return centers, taken, False


def _anew(centers: np.ndarray, counts: np.ndarray, squared: np.ndarray, rows: np.ndarray) -> np.ndarray:
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
