"""Clustering a file of rows: their vectors, k-means, which rows to keep, and a map."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from tpu_tune.data.cluster import cluster_map, subset
from tpu_tune.data.cluster.choose import choose_k
from tpu_tune.data.cluster.cluster_options import ClusterOptions, check, map_files
from tpu_tune.data.cluster.features import TFIDF_SAMPLE, WINDOW, model_features, tfidf_features, wordless
from tpu_tune.data.cluster.kmeans import MINI_BATCH_FROM, Clusters, KMeansOptions, kmeans
from tpu_tune.data.cluster.map_page import page
from tpu_tune.data.cluster.row_texts import Survey, check_unchanged, read_texts, survey, windows
from tpu_tune.data.streams import Skipped, aside, progress, writing
from tpu_tune.errors import UserError, counted

SMALL = 1000  # rows; the guide says to leave clustering out where the set is small
_EXAMPLES = 3
_WORDLESS = "none of its words is in the vocabulary"


@dataclass(frozen=True)
class _Clustered:
    """The rows of the input, clustered.

    Attributes:
      features: (n, d) the rows' vectors.
      clusters: what k-means found, numbered from the largest.
      outliers: row -> why it is one.
      kept: (n,) the rows to keep.
      points: the rows that the map shows, ascending.
      near: of each cluster, the rows nearest its centre.
    """

    features: Float[np.ndarray, "n d"]
    clusters: Clusters
    outliers: dict[int, str]
    kept: Bool[np.ndarray, "n"]
    points: Int[np.ndarray, "m"]
    near: list[Int[np.ndarray, "e"]]


def cluster(input: str, output: str, options: ClusterOptions | None = None) -> dict[str, Any]:
    """Cluster the rows of a JSON Lines file and write those to keep, in their order, with `cluster` and `distance`.

    Clusters are numbered from the largest; `distance` is the row's from its centre. All other keys stay as they are.
    On one machine the same input, options and seed give the same files, byte for byte.

    Args:
      input: .jsonl, gzipped or not.
      output: the same, to write.
      options: see `ClusterOptions`.

    Returns:
      `rows`, `bad_rows`, `bad_examples`, `k`, `tried` (k -> silhouette, of "auto"), `features`, `dimensions`,
      `inertia`, `mini_batch`, `iterations` (passes, or mini-batches), `converged`, `kept`, `outliers`, `clusters` (of
      each `cluster`, `rows`, `kept`, `outliers`, `words`, `examples`), `hints`, and `options`.

    Raises:
      UserError: options that do not go together, a file that cannot be read or written, no text, a bad row that is not
        allowed, fewer rows than clusters.
    """
    options = options or ClusterOptions()
    check(input, output, options)
    surveyed = survey(input, options.text_key, options.skip_bad, TFIDF_SAMPLE if not options.model else 0, options.seed)
    if options.k != "auto" and options.k > surveyed.rows:
        raise UserError(f"{input} has {counted(surveyed.rows, 'row')}, too few for {options.k} clusters; lower --k")
    with _scratch(output) as file:
        features = _features(input, surveyed, file, options)
        k, tried = (options.k, {}) if options.k != "auto" else choose_k(features, options.seed)
        mini_batch = surveyed.rows >= MINI_BATCH_FROM if options.mini_batch is None else options.mini_batch
        how = KMeansOptions(mini_batch, options.batch_size, options.max_iterations)
        clustered = _chosen(features, by_size(kmeans(features, k, options.seed, how)), options)
        texts = _write(input, output, options, clustered)
        clusters = clustered.clusters
        report = {
            "input": input,
            "output": output,
            "rows": surveyed.rows,
            "bad_rows": surveyed.skipped.count,
            "bad_examples": [str(bad) for bad in surveyed.skipped.examples],
            "k": k,
            "tried": {str(number): round(score, 4) for number, score in tried.items()},
            "features": options.model or "tf-idf",
            "dimensions": features.shape[1],
            "inertia": clusters.inertia,
            "mini_batch": mini_batch,
            "iterations": clusters.iterations,
            "converged": clusters.converged,
            "kept": int(clustered.kept.sum()),
            "outliers": len(clustered.outliers),
            "clusters": _described(clustered, texts),
            "hints": _hints(clusters, options),
            "options": asdict(options),
        }
        if options.map:
            _draw(input, options, report, clustered, texts)
    return report


def by_size(clusters: Clusters) -> Clusters:
    """Number clusters from the largest on."""
    order = np.argsort(-np.bincount(clusters.labels, minlength=clusters.k), kind="stable")
    rank = np.empty(clusters.k, np.int32)
    rank[order] = np.arange(clusters.k, dtype=np.int32)
    return Clusters(
        clusters.centers[order],
        rank[clusters.labels],
        clusters.distances,
        clusters.inertia,
        clusters.iterations,
        clusters.converged,
    )


@contextlib.contextmanager
def _scratch(output: str) -> Iterator[Path]:
    """Yield a path beside the output for the vectors, which may not fit into a /tmp."""
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".cluster.", dir=Path(output).parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from error
    with folder as path:
        yield Path(path) / "features.npy"


def _features(input: str, surveyed: Survey, file: Path, options: ClusterOptions) -> np.ndarray:
    texts = windows(input, options.text_key, surveyed.rows, WINDOW)
    if not options.model:
        return tfidf_features(surveyed.sample, texts, surveyed.rows, file, options.seed)
    import jax

    from tpu_tune.inference import load

    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    model = load(options.model, dtype)
    return model_features(
        model, texts, surveyed.rows, file, max_length=options.max_length, batch_tokens=options.batch_tokens
    )


def _chosen(features: np.ndarray, clusters: Clusters, options: ClusterOptions) -> _Clustered:
    """Find the outliers, and choose the rows to keep and those to show."""
    rows = len(features)
    outliers = subset.outliers(clusters.labels, clusters.distances, clusters.k)
    if not options.model:
        outliers = dict(sorted((outliers | dict.fromkeys(wordless(features).tolist(), _WORDLESS)).items()))
    left_out = np.zeros(rows, bool)
    if options.drop_outliers or options.keep is not None or options.keep_per_cluster is not None:
        left_out[list(outliers)] = True
    limits = subset.Limits(options.keep_per_cluster, options.keep)
    kept = subset.kept(options.select, features, clusters, left_out, limits, options.seed)
    random = np.random.default_rng(options.seed)
    points = np.sort(random.choice(rows, min(rows, cluster_map.POINTS), replace=False))
    near = [
        members[np.argsort(clusters.distances[members], kind="stable")[:_EXAMPLES]]
        for members in subset.members(clusters.labels, clusters.k)
    ]
    return _Clustered(features, clusters, outliers, kept, points, near)


def _write(input: str, output: str, options: ClusterOptions, clustered: _Clustered) -> dict[int, str]:
    """Write the rows to keep and the outliers; return the texts of the rows that are shown."""
    shown = set(clustered.points.tolist()).union(*(near.tolist() for near in clustered.near))
    rows = len(clustered.features)
    texts: dict[int, str] = {}
    with contextlib.ExitStack() as stack:
        listed = stack.enter_context(writing(options.outliers)) if options.outliers else None
        out = stack.enter_context(writing(output))
        number = -1
        numbered = enumerate(read_texts(input, options.text_key, Skipped(allowed=True)))
        for number, (row, text) in progress(numbered, "writing", total=rows):
            if number >= rows:
                break
            if number in shown:
                texts[number] = text[:2000]
            distance = round(float(clustered.clusters.distances[number]), 6)
            row = {**row, "cluster": int(clustered.clusters.labels[number]), "distance": distance}
            if clustered.kept[number]:
                out.write(row)
            if listed is not None and number in clustered.outliers:
                listed.write({**row, "reason": clustered.outliers[number]})
        check_unchanged(input, number + 1, rows)
    return texts


def _described(clustered: _Clustered, texts: dict[int, str]) -> list[dict[str, Any]]:
    """Return the report's entry of each cluster."""
    labels, k = clustered.clusters.labels, clustered.clusters.k
    shown = sorted(texts)
    words = cluster_map.top_words([texts[row] for row in shown], labels[shown], k)
    rows, kept, outliers = (
        np.bincount(labels[chosen], minlength=k).tolist()
        for chosen in (slice(None), clustered.kept, list(clustered.outliers))
    )
    return [
        {
            "cluster": number,
            "rows": rows[number],
            "kept": kept[number],
            "outliers": outliers[number],
            "words": words[number],
            "examples": [cluster_map.shorten(texts[row], 240) for row in clustered.near[number].tolist()],
        }
        for number in range(k)
    ]


def _hints(clusters: Clusters, options: ClusterOptions) -> list[str]:
    hints, rows = [], len(clusters.labels)
    if rows < SMALL:
        hints.append(
            f"{counted(rows, 'row is', 'rows are')} few: a small set needs no clustering, and can go on as it is"
        )
    empty = clusters.k - len(np.unique(clusters.labels))
    if empty:
        hints.append(
            f"{empty} of the {clusters.k} clusters {'has' if empty == 1 else 'have'} no rows: too few different rows; "
            "lower --k"
        )
    if not clusters.converged:
        hints.append(f"k-means stopped at --max-iterations {options.max_iterations}, before it converged")
    return hints


def _draw(
    input: str, options: ClusterOptions, report: dict[str, Any], clustered: _Clustered, texts: dict[int, str]
) -> None:
    shown, clusters = clustered.points, clustered.clusters
    points, centers, share = cluster_map.project(np.asarray(clustered.features[shown]), clusters.centers)
    by = f"the hidden states of {options.model}" if options.model else "their words"
    drawn = cluster_map.Map(
        title=f"{Path(input).name}: {counted(report['rows'], 'row')} in {counted(report['k'], 'cluster')}",
        points=points,
        labels=clusters.labels[shown],
        outliers=np.isin(shown, list(clustered.outliers)),
        texts=[cluster_map.shorten(texts[row], 200) for row in shown.tolist()],
        share=share,
        clusters=[
            {**described, "center": center.tolist()}
            for described, center in zip(report["clusters"], centers, strict=True)
        ],
        summary=f"Told apart by {by}; {counted(report['kept'], 'row')} kept, {counted(report['outliers'], 'outlier')}.",
    )
    html, png = map_files(options.map)
    cluster_map.draw_png(drawn, png)
    with aside(html) as temporary:
        temporary.write_text(page(drawn), encoding="utf-8", errors="replace")
