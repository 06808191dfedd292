"""The map: rows as points in two dimensions, and what each cluster is about.

`project` is PCA on a sample; `top_words` names a cluster by the words that tell its rows from the others; `draw_png`
and `map_page.page` show both.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tpu_tune.data.cluster.features import WORD
from tpu_tune.data.streams import aside

POINTS = 5000
_INK, _MUTED, _GRID = "#1f2937", "#6b7280", "#e5e7eb"
_WORDS_OF = 400  # words of a text that are looked at


@dataclass(frozen=True)
class Map:
    """What is drawn.

    Attributes:
      title: what was clustered.
      points: (m, 2) coordinates of the sampled rows.
      labels: (m,) their clusters.
      outliers: (m,) bool.
      texts: (m,) their texts, shortened.
      share: of the rows' variance that the two dimensions show.
      clusters: of every cluster `cluster`, `rows`, `kept`, `outliers`, `words`, `examples`, `center` (2,).
      summary: one line of figures.
    """

    title: str
    points: np.ndarray
    labels: np.ndarray
    outliers: np.ndarray
    texts: Sequence[str]
    share: float
    clusters: Sequence[dict[str, Any]]
    summary: str


def project(
    sample: Float[np.ndarray, "m d"], centers: Float[np.ndarray, "k d"]
) -> tuple[Float[np.ndarray, "m 2"], Float[np.ndarray, "k 2"], float]:
    """Project rows and centres onto the sample's two principal components.

    Returns:
      The rows' coordinates, the centres', and the share of the sample's variance in them. A component's sign is such
      that its largest part is positive.
    """
    mean = sample.mean(axis=0, dtype=np.float64)
    centred = sample - mean
    values, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, ::-1][:, :2]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] < 0, -1, 1)
    if axes.shape[1] < 2:
        axes = np.pad(axes, ((0, 0), (0, 2 - axes.shape[1])))
    share = float(values[::-1][:2].sum() / values.sum()) if values.sum() > 0 else 1.0
    return centred @ axes, (centers - mean) @ axes, share


def top_words(texts: Sequence[str], labels: Int[np.ndarray, "m"], k: int, count: int = 8) -> list[list[str]]:
    """Return the words that tell each cluster's rows from all.

    A word's score is a log(a / b), with a the share of the cluster's rows that have it and b that of all: its part of
    the Kullback-Leibler divergence. A word that stands everywhere scores nothing.
    """
    pattern = re.compile(WORD)
    found = [Counter() for _ in range(k)]
    for text, label in zip(texts, labels.tolist(), strict=True):
        words = pattern.findall(text.lower())[:_WORDS_OF]
        found[label].update({word for word in words if not word.isdigit()})
    total = sum(found, Counter())
    rows = np.bincount(labels, minlength=k)

    def best(words: Counter, cluster_rows: int) -> list[str]:
        scores = {}
        for word, number in words.items():
            in_cluster, everywhere = number / cluster_rows, total[word] / len(texts)
            scores[word] = in_cluster * np.log(in_cluster / everywhere) if k > 1 else in_cluster
        return sorted(scores, key=lambda word: (-scores[word], word))[:count]

    return [best(words, number) for words, number in zip(found, rows.tolist(), strict=True)]


def shorten(text: str, length: int) -> str:
    """Return a text in one line, cut to `length` characters."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def color(cluster: int) -> str:
    """Return a cluster's colour, as HTML and matplotlib know it; neighbours in number are far apart in hue."""
    import colorsys

    hue = (0.6 + cluster * 0.61803398875) % 1.0
    light, strength = ((0.45, 0.72), (0.6, 0.6), (0.36, 0.55))[cluster // 8 % 3]
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, light, strength))


def draw_png(drawn: Map, path: str | os.PathLike) -> None:
    """Draw the map into a PNG file, written aside and renamed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), dpi=120, facecolor="white", layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(2.1, 1))
    axes, side = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    colors = np.array([color(label) for label in drawn.labels.tolist()])
    size = float(np.clip(20_000 / max(1, len(colors)), 5, 36))
    usual = ~drawn.outliers
    axes.scatter(*drawn.points[usual].T, s=size, c=colors[usual], alpha=0.65, linewidths=0)
    axes.scatter(*drawn.points[~usual].T, s=size * 1.6, c=colors[~usual], marker="x", linewidths=1)
    for cluster in drawn.clusters[:_LABELLED]:
        axes.text(
            *cluster["center"],
            str(cluster["cluster"]),
            color=_INK,
            fontsize=9,
            ha="center",
            va="center",
            bbox={"boxstyle": "circle,pad=0.25", "facecolor": "white", "edgecolor": color(cluster["cluster"])},
        )
    axes.set_title(_plain(drawn.title), loc="left", color=_INK, fontsize=13, fontweight="bold")
    axes.set_xlabel(
        _plain(f"{drawn.summary}\nPCA, {drawn.share:.0%} of the variance; x: outliers"), color=_MUTED, fontsize=9
    )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(_GRID)
    _draw_sizes(side, drawn.clusters[:_LISTED], len(drawn.clusters))
    with aside(path) as temporary:
        FigureCanvasAgg(figure).print_png(os.fspath(temporary))


_LABELLED = 60  # clusters whose number stands in the picture
_LISTED = 25  # clusters, the largest, beside it


def _draw_sizes(axes: Any, clusters: Sequence[dict[str, Any]], count: int) -> None:
    positions = np.arange(len(clusters))
    rows = np.array([cluster["rows"] for cluster in clusters])
    colors = [color(cluster["cluster"]) for cluster in clusters]
    axes.barh(positions, rows, color=colors, alpha=0.35, height=0.82)
    axes.barh(positions, [cluster["kept"] for cluster in clusters], color=colors, height=0.82)
    for position, cluster in zip(positions, clusters, strict=True):
        words = _plain(shorten(" ".join(cluster["words"][:5]), 42))
        axes.text(rows.max() * 0.01, position, f" {cluster['rows']:,}  {words}", va="center", fontsize=8, color=_INK)
    axes.set_yticks(positions, [str(cluster["cluster"]) for cluster in clusters], fontsize=8, color=_MUTED)
    axes.set_ylim(max(len(clusters), 8) - 0.5, -0.5)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    more = f", the largest {len(clusters)} of {count}" if count > len(clusters) else ""
    axes.set_title(f"rows in each cluster (full colour: kept){more}", loc="left", color=_INK, fontsize=10)


def _plain(text: str) -> str:
    """Keep matplotlib from reading a text's dollar signs as mathematics, and from what its font cannot draw."""
    return "".join(sign if sign.isprintable() or sign == "\n" else " " for sign in text).replace("$", r"\$")
