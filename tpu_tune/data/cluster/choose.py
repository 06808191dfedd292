"""`--k auto`: the number of clusters with the best silhouette, on a sample."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from tpu_tune.data.cluster.kmeans import KMeansOptions, kmeans
from tpu_tune.data.extra import extra_library

_SAMPLE = 4000  # rows; the silhouette needs the distances of all pairs
_MOST = 64
_ROWS_EACH = 10  # least on average, in a cluster


def choose_k(data: Float[np.ndarray, "n d"], seed: int) -> tuple[int, dict[int, float]]:
    """Return the number of clusters with the highest mean silhouette (Rousseeuw 1987) and that of every number tried.

    Tried are 2, 3, 4, 6, 8, 12, ... up to 64, as long as there are ten rows for each cluster; the smallest of equals
    wins. Too few rows, or rows that are all the same, make one cluster.
    """
    silhouette_score = extra_library("sklearn.metrics", "scikit-learn", "data cluster --k auto").silhouette_score

    chosen = np.sort(np.random.default_rng(seed).choice(len(data), min(len(data), _SAMPLE), replace=False))
    sample = np.asarray(data[chosen], np.float32)
    tried = [k for k in sorted({2**i for i in range(1, 7)} | {3 * 2**i for i in range(5)}) if k <= _MOST]
    tried = [k for k in tried if k * _ROWS_EACH <= len(sample)]
    scores: dict[int, float] = {}
    for k in tried:
        labels = kmeans(sample, k, seed, KMeansOptions(mini_batch=False), slots=max(tried)).labels
        if 2 <= len(np.unique(labels)) < len(sample):
            scores[k] = float(silhouette_score(sample, labels))
    return max(scores, key=lambda k: (scores[k], -k), default=1), scores
