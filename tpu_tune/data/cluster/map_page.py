"""The map as one HTML page that needs nothing else: an inline SVG, a table, and a few lines of script for the pointer.

Without scripts it shows all but the text under the pointer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tpu_tune.data.cluster.cluster_map import Map, color
from tpu_tune.data.html_report import render

_SIDE, _MARGIN = 1000.0, 24.0  # of the picture, in its own units


def page(drawn: Map) -> str:
    """Return the page."""
    centers = np.array([cluster["center"] for cluster in drawn.clusters]).reshape(-1, 2)
    positions = _positions(np.concatenate([drawn.points, centers]))
    points = positions[: len(drawn.points)]
    most = max((cluster["rows"] for cluster in drawn.clusters), default=1)
    return render(
        "tpu_tune.data",
        "cluster_map.html",
        title=drawn.title,
        summary=drawn.summary,
        share=f"{drawn.share:.0%}",
        count=f"{len(points):,}",
        side=int(_SIDE),
        radius=f"{np.clip(260 / max(1, len(points)) ** 0.5, 2.6, 7):.1f}",
        points=[
            {"x": f"{x:.1f}", "y": f"{y:.1f}", "cluster": label, "outlier": outlier}
            for (x, y), label, outlier in zip(points, drawn.labels.tolist(), drawn.outliers.tolist(), strict=True)
        ],
        clusters=[
            _cluster(cluster, *position, most)
            for cluster, position in zip(drawn.clusters, positions[len(points) :], strict=True)
        ],
        data={"texts": list(drawn.texts), "labels": drawn.labels.tolist()},
    )


def _positions(points: np.ndarray) -> np.ndarray:
    """Fit points into the picture, the same scale both ways, y upwards."""
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (_SIDE - 2 * _MARGIN) / max(float((high - low).max()), 1e-12)
    fitted = _SIDE / 2 + (points - (low + high) / 2) * scale
    return np.stack([fitted[:, 0], _SIDE - fitted[:, 1]], axis=1)


def _cluster(cluster: dict[str, Any], x: float, y: float, most: int) -> dict[str, Any]:
    """What the page shows of a cluster; `most` is the number of rows of the largest."""
    return {
        "cluster": cluster["cluster"],
        "color": color(cluster["cluster"]),
        "x": f"{x:.1f}",
        "y": f"{y:.1f}",
        "rows": f"{cluster['rows']:,}",
        "width": f"{100 * cluster['rows'] / most:.1f}",
        "kept": f"{cluster['kept']:,}",
        "outliers": f"{cluster['outliers']:,}",
        "words": ", ".join(cluster["words"]),
        "examples": cluster["examples"],
    }
