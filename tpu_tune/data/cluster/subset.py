"""Which rows of each cluster to keep, and which are outliers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from tpu_tune.data.cluster.kmeans import Clusters
from tpu_tune.errors import counted

SELECTIONS = ("balanced", "farthest", "random")
_DEVIATIONS = 5.0
_JUDGED_FROM = 8  # rows; of fewer a median says too little
_LEAST_DEVIATION = 0.01  # of the median distance of all rows, lest a cluster of near copies calls every other row far
_TINY = 0.05  # of the average size
_BLOCK = 16_384  # rows whose distances are computed at one time


def outliers(labels: Int[np.ndarray, "n"], distances: Float[np.ndarray, "n"], k: int) -> dict[int, str]:
    """Find outliers; return row -> why, in the order of rows.

    A row is one where its distance from its centre is above its cluster's median distance + 5 median absolute
    deviations (each at least 1% of the median distance of all rows; clusters of fewer than 8 rows are not judged), or
    where its whole cluster has less than a twentieth of the average number of rows.

    Args:
      labels: cluster of each row.
      distances: of each row from its centre.
      k: number of clusters.
    """
    reasons: dict[int, str] = {}
    least = _LEAST_DEVIATION * float(np.median(distances))
    # The average is over clusters that have rows: k may be more than there are different rows.
    tiny = _TINY * len(labels) / max(1, len(np.unique(labels)))
    for cluster, rows in enumerate(members(labels, k)):
        if len(rows) < tiny:
            reasons |= dict.fromkeys(rows.tolist(), f"cluster {cluster} has only {counted(len(rows), 'row')}")
        elif len(rows) >= _JUDGED_FROM:
            own = distances[rows].astype(np.float64)
            median = float(np.median(own))
            bound = median + _DEVIATIONS * max(float(np.median(np.abs(own - median))), least)
            for row, distance in zip(rows[own > bound].tolist(), own[own > bound], strict=True):
                reasons[row] = (
                    f"distance {distance:.4g} from the centre of cluster {cluster}, whose bound is {bound:.4g}"
                )
    return dict(sorted(reasons.items()))


def members(labels: Int[np.ndarray, "n"], k: int) -> list[np.ndarray]:
    """Return the rows of each cluster, ascending."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.searchsorted(labels[order], np.arange(1, k)))


def shares(sizes: Sequence[int], total: int) -> list[int]:
    """Share `total` over clusters as evenly as their sizes allow (water filling).

    The shares add up to `total`, or to all there is. No cluster gets less than another one unless it has no more.
    """
    counts, left = [0] * len(sizes), min(total, sum(sizes))
    for done, cluster in enumerate(sorted(range(len(sizes)), key=lambda cluster: (sizes[cluster], cluster))):
        # From the smallest on: each gets an even share of what is left, or all that it has.
        counts[cluster] = min(sizes[cluster], left // (len(sizes) - done))
        left -= counts[cluster]
    return counts


def select(
    way: str,
    data: Float[np.ndarray, "n d"],
    distances: Float[np.ndarray, "n"],
    rows: Int[np.ndarray, "m"],
    count: int,
    random: np.random.Generator,
) -> Int[np.ndarray, "c"]:
    """Choose `count` (or all) of a cluster's rows; return them ascending.

    Args:
      way: balanced: the one nearest the centre, then at even steps of rank by distance out to the furthest. farthest:
        the one nearest the centre, then always the one furthest from all chosen (greedy k-center, Gonzalez 1985).
        random: any rows.
      data: the vectors of all rows.
      distances: of all rows from their centres.
      rows: of the cluster, ascending.
      count: how many.
      random: for `random`.
    """
    if count >= len(rows):
        return rows
    if count <= 0:
        return rows[:0]
    if way == "random":
        return np.sort(random.choice(rows, count, replace=False))
    ranked = rows[np.argsort(distances[rows], kind="stable")]
    if way == "balanced":
        return np.sort(ranked[np.linspace(0, len(ranked) - 1, count).round().astype(np.int64)])
    return np.sort(_farthest(data, ranked, count))


def _farthest(data: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    vectors = np.asarray(data[np.sort(rows)], np.float32)[np.argsort(np.argsort(rows))]
    chosen = np.zeros(count, np.int64)
    nearest = np.full(len(rows), np.inf, np.float32)
    for number in range(count):
        if number:
            chosen[number] = int(np.argmax(nearest))
        for begin in range(0, len(rows), _BLOCK):
            block = slice(begin, begin + _BLOCK)
            squared = np.square(vectors[block] - vectors[chosen[number]]).sum(axis=1)
            nearest[block] = np.minimum(nearest[block], squared)
        nearest[chosen[number]] = -1  # copies of it are as near, but it is taken
    return rows[chosen]


@dataclass(frozen=True)
class Limits:
    """How many rows to keep: at most `per_cluster` of each cluster, or `total` shared over them; neither: all."""

    per_cluster: int | None = None
    total: int | None = None


def kept(
    way: str,
    data: Float[np.ndarray, "n d"],
    clusters: Clusters,
    left_out: Bool[np.ndarray, "n"],
    limits: Limits,
    seed: int,
) -> Bool[np.ndarray, "n"]:
    """Return which rows to keep.

    Args:
      way: see `select`.
      data: the vectors of all rows.
      clusters: of all rows.
      left_out: rows that are not kept in any case.
      limits: how many to keep.
      seed: of `random`.
    """
    candidates = [rows[~left_out[rows]] for rows in members(clusters.labels, clusters.k)]
    sizes = [len(rows) for rows in candidates]
    if limits.per_cluster is not None:
        counts = [min(size, limits.per_cluster) for size in sizes]
    else:
        counts = sizes if limits.total is None else shares(sizes, limits.total)
    chosen = np.zeros(len(clusters.labels), bool)
    for cluster, (rows, count) in enumerate(zip(candidates, counts, strict=True)):
        random = np.random.default_rng([seed, cluster])
        chosen[select(way, data, clusters.distances, rows, count, random)] = True
    return chosen
