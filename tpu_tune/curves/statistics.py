"""The statistics that the diagnosis stands on, in NumPy: all of them take a few wild points without changing much.

Nothing here assumes a distribution: slopes are medians of pairwise slopes, trends are counts of pairs that rise or
fall, and the noise is read off differences, which a smooth curve under it hardly touches.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def running(function: Callable[[np.ndarray], float], values: np.ndarray, half: int) -> np.ndarray:
    """Apply `function` to centred windows of 2 `half` + 1 points, which shrink evenly towards both ends."""
    reach = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
    return np.array([function(values[i - r : i + r + 1]) for i, r in enumerate(reach)], float)


def noise_level(values: np.ndarray) -> float:
    """Return the standard deviation of the noise on a falling or U-shaped curve; nan below five points.

    Second differences of independent noise have sqrt(6) times its deviation. Those of a convex curve are positive, so
    that it is read off the negative ones: their 20% quantile, 0.8416 deviations below 0. A spike makes one of them large.
    """
    if len(values) < 5:
        return math.nan
    return float(max(0.0, -np.quantile(np.diff(values, 2), 0.2)) / 0.8416 / math.sqrt(6))


def theil_sen(x: np.ndarray, y: np.ndarray) -> float:
    """Return the median of the slopes of all pairs of points (Theil 1950, Sen 1968); nan below two."""
    i, j = np.triu_indices(len(x), 1)
    apart = x[j] - x[i]
    kept = apart != 0
    return float(np.median((y[j] - y[i])[kept] / apart[kept])) if kept.any() else math.nan


def mann_kendall(y: np.ndarray) -> float:
    """Return the Z of the Mann-Kendall trend test: below 0 falling, above 0 rising, normal without a trend.

    With the correction for ties and for continuity (Mann 1945, Kendall 1975); 0 below three points.
    """
    n = len(y)
    if n < 3:
        return 0.0
    i, j = np.triu_indices(n, 1)
    score = np.sign(y[j] - y[i]).sum()
    _, ties = np.unique(y, return_counts=True)
    variance = (n * (n - 1) * (2 * n + 5) - (ties * (ties - 1) * (2 * ties + 5)).sum()) / 18
    return float((score - np.sign(score)) / math.sqrt(variance)) if variance > 0 else 0.0


def block_medians(x: np.ndarray, y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `most` points: medians of runs of neighbours of even length. Keeps pairwise statistics cheap."""
    if len(x) <= most:
        return x, y
    parts = np.array_split(np.arange(len(x)), most)
    return np.array([np.median(x[part]) for part in parts]), np.array([np.median(y[part]) for part in parts])
