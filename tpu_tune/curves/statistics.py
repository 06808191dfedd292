"""Robust statistics for the diagnosis: a few outliers hardly change them, and none assumes a distribution.

The trend test counts pairs that rise or fall, and the noise level is estimated from differences between neighbours,
which the smooth curve below the noise hardly affects. Slopes are `scipy.stats.theilslopes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def running(
    function: Callable[[np.ndarray], float], values: np.ndarray, half: int, at_start: float = 1.0
) -> np.ndarray:
    """Apply `function` to centred windows of 2 `half` + 1 points; at both ends the window shrinks symmetrically.

    Point i reaches back by at most `at_start` times i, its distance from the first point.
    """
    reach = [min(half, int(at_start * i), len(values) - 1 - i) for i in range(len(values))]
    return np.array([function(values[i - r : i + r + 1]) for i, r in enumerate(reach)], float)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred running mean, over `window` points, of the running median of five.

    Centred, it does not lag behind a falling loss, as an average of the past does; the median keeps a single spike out.
    At the start, where a loss falls fast, a window reaches back by half the distance to the first point, so that the
    first losses lift no later ones; at the end, where the noise is larger than what is still to fall, the values of the
    last half window are those of a straight line fitted to the last whole one.

    Args:
      values: (n,)
      window: an odd number of points; 1 leaves the values as they are.
    """
    half = min(window // 2, (len(values) - 1) // 2)
    if half < 1:
        return np.asarray(values, float)
    medians = running(np.median, values, 2, at_start=0.5)
    smoothed = running(np.mean, medians, half, at_start=0.5)
    last = np.arange(2 * half + 1)
    smoothed[-half:] = np.polyval(np.polyfit(last, medians[-len(last) :], 1), last[-half:])
    return smoothed


def noise_level(values: np.ndarray) -> float:
    """Return the standard deviation of the noise on a falling or U-shaped curve; nan for fewer than five points.

    Second differences of independent noise have sqrt(6) times its standard deviation. The second differences of a
    convex curve are positive, so the estimate uses the negative side: the 20% quantile lies 0.8416 deviations below 0.
    A spike makes only one second difference very negative.
    """
    if len(values) < 5:
        return math.nan
    return float(max(0.0, -np.quantile(np.diff(values, 2), 0.2)) / 0.8416 / math.sqrt(6))


def mann_kendall(y: np.ndarray) -> float:
    """Return Z of the Mann-Kendall trend test (Mann 1945, Kendall 1975), corrected for ties and for continuity.

    Z is below 0 for a falling series, above 0 for a rising one, and standard normal without a trend; 0 for fewer than
    three points.
    """
    n = len(y)
    if n < 3:
        return 0.0
    i, j = np.triu_indices(n, 1)
    score = np.sign(y[j] - y[i]).sum()
    _, ties = np.unique(y, return_counts=True)
    variance = (n * (n - 1) * (2 * n + 5) - (ties * (ties - 1) * (2 * ties + 5)).sum()) / 18
    return float((score - np.sign(score)) / math.sqrt(variance)) if variance > 0 else 0.0


def block_medians(x: np.ndarray, y: np.ndarray, max_points: int) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a series to at most `max_points` medians of equal blocks, so that pairwise statistics stay cheap."""
    if len(x) <= max_points:
        return x, y
    blocks = np.array_split(np.arange(len(x)), max_points)
    return np.array([np.median(x[block]) for block in blocks]), np.array([np.median(y[block]) for block in blocks])
