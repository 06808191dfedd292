"""`cluster`: rows grouped by what they say, a diverse part of them kept, outliers listed, all drawn as a map.

The file is read once to count and sample it, once to make a vector of each row (`features`), and once to write the rows
that are kept; between, k-means (`kmeans`) sees the vectors block by block. Vectors lie in a memory-mapped file, so that a
million rows need no more memory than their labels.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tpu_tune.data.cluster import map as maps
from tpu_tune.data.cluster import subset
from tpu_tune.data.cluster.choose import choose_k
from tpu_tune.data.cluster.features import TFIDF_SAMPLE, WINDOW, model_features, tfidf_features, wordless
from tpu_tune.data.cluster.html import page
from tpu_tune.data.cluster.kmeans import BATCH_SIZE, MINI_BATCH_FROM, Clusters, kmeans
from tpu_tune.data.cluster.rows import Survey, check_unchanged, read_texts, survey, windows
from tpu_tune.data.streams import Skipped, aside, progress, writing
from tpu_tune.errors import UserError

__all__ = ["ClusterOptions", "Clusters", "cluster", "kmeans"]

logger = logging.getLogger(__name__)

SMALL = 1000  # rows; the guide says to leave clustering out where the set is small
ADDED = ("cluster", "distance")  # keys of every row that is written
_EXAMPLES = 3
_WORDLESS = "none of its words is in the vocabulary"


@dataclass(frozen=True)
class ClusterOptions:
    """What `cluster` is asked for.

    Attributes:
      k: how many clusters; "auto" tries some on a sample.
      model: Hugging Face id, directory or .gguf whose hidden states tell rows apart; "" for their words (TF-IDF).
      dtype: of the model's activations and weights; "" for float32 on a CPU, bfloat16 elsewhere.
      max_length: tokens of a row that the model reads.
      batch_tokens: of a batch that it reads at one time.
      text_key: the key of the text; "" goes by the row's format.
      keep: rows to keep in all, shared over the clusters as evenly as they allow; None: all.
      keep_per_cluster: most rows to keep of each cluster.
      select: balanced | farthest | random, see `subset.select`.
      drop_outliers: keep none of them even where all rows are kept; a part never has any.
      outliers: file to list them in, with `reason`; "" for none.
      map: .html or .png file to draw; the other one is drawn beside it. "" for none.
      seed: of everything random.
      mini_batch: k-means by mini-batches; None goes by the number of rows.
      batch_size: rows of a mini-batch.
      max_iterations: most passes over the rows.
      skip_bad: leave out and count what is no row or has no text.
    """

    k: int | str = "auto"
    model: str = ""
    dtype: str = ""
    max_length: int = 512
    batch_tokens: int = 8192
    text_key: str = ""
    keep: int | None = None
    keep_per_cluster: int | None = None
    select: str = "balanced"
    drop_outliers: bool = False
    outliers: str = ""
    map: str = ""
    seed: int = 0
    mini_batch: bool | None = None
    batch_size: int = BATCH_SIZE
    max_iterations: int = 100
    skip_bad: bool = False


def cluster(input: str, output: str, options: ClusterOptions | None = None) -> dict[str, Any]:
    """Cluster the rows of a JSON Lines file and write those to keep, in their order, with `cluster` and `distance`.

    Clusters are numbered from the largest; `distance` is the row's from its centre. All other keys stay as they are.
    On one machine the same input, options and seed give the same files, byte for byte.

    Args:
      input: .jsonl, gzipped or not.
      output: the same, to write.
      options: see there.

    Returns:
      `rows`, `bad_rows`, `bad_examples`, `k`, `tried` (k -> silhouette, of "auto"), `features`, `dimensions`, `inertia`,
      `mini_batch`, `iterations` (passes, or mini-batches), `converged`, `kept`, `outliers`, `clusters` (of each `cluster`, `rows`, `kept`, `outliers`, `words`,
      `examples`), `hints`, and `options`.

    Raises:
      UserError: options that do not go together, a file that cannot be read or written, no text, a bad row that is not
        allowed, fewer rows than clusters.
    """
    options = options or ClusterOptions()
    _check(input, output, options)
    surveyed = survey(input, options.text_key, options.skip_bad, TFIDF_SAMPLE if not options.model else 0, options.seed)
    if options.k != "auto" and options.k > surveyed.rows:
        raise UserError(f"{input} has {surveyed.rows} rows, too few for {options.k} clusters; lower --k")
    with _scratch(output) as file:
        data = _features(input, surveyed, file, options)
        k, tried = (options.k, {}) if options.k != "auto" else choose_k(data, options.seed)
        mini_batch = surveyed.rows >= MINI_BATCH_FROM if options.mini_batch is None else options.mini_batch
        found = by_size(kmeans(data, k, options.seed, mini_batch, options.batch_size, options.max_iterations), k)
        far = subset.outliers(found.labels, found.distances, k)
        if not options.model:
            far = dict(sorted((far | dict.fromkeys(wordless(data).tolist(), _WORDLESS)).items()))
        left_out = np.zeros(surveyed.rows, bool)
        if options.drop_outliers or options.keep is not None or options.keep_per_cluster is not None:
            left_out[list(far)] = True
        kept = subset.kept(
            options.select,
            data,
            found.labels,
            found.distances,
            k,
            left_out,
            options.keep_per_cluster,
            options.keep,
            options.seed,
        )
        shown = _shown(surveyed.rows, found, k, options)
        texts = _write(input, output, options, found, kept, far, shown, surveyed.rows)
        clusters = _described(found, k, kept, far, shown, texts)
        report = {
            "input": input,
            "output": output,
            "rows": surveyed.rows,
            "bad_rows": surveyed.skipped.count,
            "bad_examples": [str(bad) for bad in surveyed.skipped.examples],
            "k": k,
            "tried": {str(number): round(score, 4) for number, score in tried.items()},
            "features": options.model or "tf-idf",
            "dimensions": data.shape[1],
            "inertia": found.inertia,
            "mini_batch": mini_batch,
            "iterations": found.iterations,
            "converged": found.converged,
            "kept": int(kept.sum()),
            "outliers": len(far),
            "clusters": clusters,
            "hints": _hints(surveyed.rows, found, k, options),
            "options": asdict(options),
        }
        if options.map:
            _draw(input, options, report, data, found, far, shown, texts)
    return report


def by_size(found: Clusters, k: int) -> Clusters:
    """Number clusters from the largest on."""
    order = np.argsort(-np.bincount(found.labels, minlength=k), kind="stable")
    place = np.empty(k, np.int32)
    place[order] = np.arange(k, dtype=np.int32)
    return Clusters(
        found.centers[order], place[found.labels], found.distances, found.inertia, found.iterations, found.converged
    )


def _check(input: str, output: str, options: ClusterOptions) -> None:
    if options.k != "auto" and (not isinstance(options.k, int) or options.k < 1):
        raise UserError(f"--k is {options.k}; it must be a number from 1, or auto")
    if options.select not in subset.SELECTIONS:
        raise UserError(f"--select is '{options.select}'; it must be one of {', '.join(subset.SELECTIONS)}")
    if options.keep is not None and options.keep_per_cluster is not None:
        raise UserError("--keep and --keep-per-cluster exclude each other; give one of them")
    for name in ("keep", "keep_per_cluster", "max_length", "batch_tokens", "batch_size", "max_iterations"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if options.map and Path(options.map).suffix.lower() not in (".html", ".png"):
        raise UserError(f"--map is {options.map}; its name must end in .html or .png")
    files = [input, output, *filter(None, [options.outliers, *_map_files(options.map)])]
    named = [os.path.realpath(file) for file in files]
    for place, file in enumerate(named):
        if file in named[:place]:
            raise UserError(f"{files[place]} is named twice, as input or as two outputs; name another file")


def _map_files(name: str) -> list[str]:
    return [str(Path(name).with_suffix(suffix)) for suffix in (".html", ".png")] if name else []


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


def _shown(rows: int, found: Clusters, k: int, options: ClusterOptions) -> dict[str, np.ndarray]:
    """Choose the rows that are looked at: `points` at random for the map and the words, `near` of each cluster."""
    points = np.sort(np.random.default_rng(options.seed).choice(rows, min(rows, maps.POINTS), replace=False))
    near = [
        mine[np.argsort(found.distances[mine], kind="stable")[:_EXAMPLES]] for mine in subset.members(found.labels, k)
    ]
    return {"points": points, "near": near}


def _write(
    input: str,
    output: str,
    options: ClusterOptions,
    found: Clusters,
    kept: np.ndarray,
    far: dict[int, str],
    shown: dict[str, Any],
    rows: int,
) -> dict[int, str]:
    """Write the rows to keep and the outliers; return the texts of the rows that are shown."""
    wanted = set(shown["points"].tolist()).union(*(near.tolist() for near in shown["near"]))
    texts: dict[int, str] = {}
    with contextlib.ExitStack() as stack:
        listed = stack.enter_context(writing(options.outliers)) if options.outliers else None
        out = stack.enter_context(writing(output))
        number = -1
        numbered = enumerate(read_texts(input, options.text_key, Skipped(allowed=True)))
        for number, (row, text) in progress(numbered, "writing", total=rows):
            if number >= rows:
                break
            if number in wanted:
                texts[number] = text[:2000]
            added = {"cluster": int(found.labels[number]), "distance": round(float(found.distances[number]), 6)}
            if kept[number]:
                out.write({**row, **added})
            if listed is not None and number in far:
                listed.write({**row, **added, "reason": far[number]})
        check_unchanged(input, number + 1, rows)
    return texts


def _described(
    found: Clusters, k: int, kept: np.ndarray, far: dict[int, str], shown: dict[str, Any], texts: dict[int, str]
) -> list[dict[str, Any]]:
    numbers = sorted(texts)
    words = maps.top_words([texts[number] for number in numbers], found.labels[numbers], k)
    rows, keeps, outlying = (
        np.bincount(found.labels[chosen], minlength=k).tolist() for chosen in (slice(None), kept, list(far))
    )
    return [
        {
            "cluster": number,
            "rows": rows[number],
            "kept": keeps[number],
            "outliers": outlying[number],
            "words": words[number],
            "examples": [maps.shorten(texts[row], 240) for row in shown["near"][number].tolist()],
        }
        for number in range(k)
    ]


def _hints(rows: int, found: Clusters, k: int, options: ClusterOptions) -> list[str]:
    hints = []
    if rows < SMALL:
        hints.append(f"{rows} rows are few: a small set needs no clustering, and can go on as it is")
    empty = k - len(np.unique(found.labels))
    if empty:
        hints.append(f"{empty} of the {k} clusters have no rows: there are not that many different rows; lower --k")
    if not found.converged:
        hints.append(f"k-means stopped at --max-iterations {options.max_iterations}, before nothing moved any more")
    return hints


def _draw(
    input: str,
    options: ClusterOptions,
    report: dict[str, Any],
    data: np.ndarray,
    found: Clusters,
    far: dict[int, str],
    shown: dict[str, Any],
    texts: dict[int, str],
) -> None:
    chosen = shown["points"]
    points, centers, share = maps.project(np.asarray(data[chosen]), found.centers)
    by = f"the hidden states of {options.model}" if options.model else "their words"
    drawn = maps.Map(
        title=f"{Path(input).name}: {report['rows']:,} rows in {report['k']} clusters",
        points=points,
        labels=found.labels[chosen],
        outliers=np.isin(chosen, list(far)),
        texts=[maps.shorten(texts[number], 200) for number in chosen.tolist()],
        share=share,
        clusters=[
            {**told, "center": center.tolist()} for told, center in zip(report["clusters"], centers, strict=True)
        ],
        summary=f"Told apart by {by}; {report['kept']:,} rows kept, {report['outliers']:,} outliers.",
    )
    html, png = _map_files(options.map)
    maps.draw_png(drawn, png)
    with aside(html) as temporary:
        temporary.write_text(page(drawn), encoding="utf-8", errors="replace")
