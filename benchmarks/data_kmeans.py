"""k-means against scikit-learn's MiniBatchKMeans: 200,000 x 384 float32 into 100 clusters, on this machine's CPU.

    python benchmarks/data_kmeans.py                  # three rounds
    python benchmarks/data_kmeans.py --rounds 5 --json

The rows are 150 Gaussian blobs of unequal sizes and widths. Each side has a process of its own with as many threads as
the machine has cores and clusters them in turn, with a new seed each round: from the array in memory to labels and
inertia. Ours is timed as it is called, what it compiles in its first round included. The inertia is computed in float64
from either side's centres, the same way for both.

Needs scikit-learn. Exit status 1 where ours is slower, or its inertia more than 2% higher, in the median.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
from sides import Side, serve

HERE = pathlib.Path(__file__).resolve()
ROWS, COLUMNS, BLOBS, CLUSTERS = 200_000, 384, 150, 100


def blobs(rows: int, columns: int, count: int, seed: int = 0) -> np.ndarray:
    """Return (rows, columns) float32 from `count` Gaussian blobs of unequal sizes and widths."""
    random = np.random.default_rng(seed)
    shares, widths = random.dirichlet(np.full(count, 2.0)), random.uniform(0.5, 1.5, count).astype(np.float32)
    centers = random.standard_normal((count, columns), dtype=np.float32)
    of = random.choice(count, rows, p=shares)
    data = np.empty((rows, columns), np.float32)
    for begin in range(0, rows, 20_000):
        here = of[begin : begin + 20_000]
        noise = random.standard_normal((len(here), columns), dtype=np.float32)
        data[begin : begin + 20_000] = centers[here] + widths[here, None] * noise
    return data


def inertia(data: np.ndarray, centers: np.ndarray) -> float:
    """Return the sum of squared distances of all rows from their nearest centres, in float64."""
    centers = centers.astype(np.float64)
    total = 0.0
    for begin in range(0, len(data), 4096):
        rows = data[begin : begin + 4096].astype(np.float64)
        nearest = (np.square(rows).sum(1)[:, None] - 2 * rows @ centers.T + np.square(centers).sum(1)).min(axis=1)
        total += float(nearest.sum())
    return total


def ours() -> Callable[[np.ndarray, int, int], np.ndarray]:
    """Return a function (rows, k, seed) -> centres."""
    sys.path.insert(0, str(HERE.parents[1]))
    from tpu_tune.data.cluster.kmeans import kmeans

    return lambda data, k, seed: kmeans(data, k, seed).centers


def theirs() -> Callable[[np.ndarray, int, int], np.ndarray]:
    """Return a function (rows, k, seed) -> centres."""
    from sklearn.cluster import MiniBatchKMeans

    return lambda data, k, seed: MiniBatchKMeans(k, random_state=seed).fit(data).cluster_centers_


def records(side: str, rows: int, columns: int, count: int, k: int) -> Generator[dict[str, Any], int, None]:
    """Yield a first record, then for each seed that is sent `seconds`, `cpu_seconds` and `inertia`."""
    cluster = {"ours": ours, "theirs": theirs}[side]()
    data = blobs(rows, columns, count)
    seed = yield {"side": side}
    while True:
        start, cpu = time.perf_counter(), time.process_time()
        centers = cluster(data, k, seed)
        record = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        seed = yield {**record, "inertia": inertia(data, centers)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--columns", type=int, default=COLUMNS)
    parser.add_argument("--blobs", type=int, default=BLOBS)
    parser.add_argument("--k", type=int, default=CLUSTERS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    shape = [options.rows, options.columns, options.blobs, options.k]
    if options.side:
        serve(records(options.side, *shape))
        return 0
    words = [f"--{name}={value}" for name, value in zip(("rows", "columns", "blobs", "k"), shape, strict=True)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    sides = {
        name: Side([sys.executable, str(HERE), f"--side={name}", *words], environment) for name in ("ours", "theirs")
    }
    rounds = []
    for seed in range(options.rounds):
        found = {name: side.ask(seed) for name, side in sides.items()}
        ratio = {key: found["theirs"][key] / found["ours"][key] for key in ("seconds", "cpu_seconds", "inertia")}
        rounds.append({**found, "ratio": ratio})
        if not options.json:
            print(
                f"round {seed}: ours {found['ours']['seconds']:.2f} s, inertia {found['ours']['inertia']:.6g}; "
                f"MiniBatchKMeans {found['theirs']['seconds']:.2f} s, inertia {found['theirs']['inertia']:.6g}; "
                f"{ratio['seconds']:.2f} times as fast ({ratio['cpu_seconds']:.2f} by CPU time), "
                f"inertia {100 / ratio['inertia'] - 100:+.1f}%",
                flush=True,
            )
    for side in sides.values():
        side.close()
    speed = statistics.median(found["ratio"]["seconds"] for found in rounds)
    worse = statistics.median(1 / found["ratio"]["inertia"] for found in rounds) - 1
    if options.json:
        print(json.dumps({"rounds": rounds, "speed": speed, "inertia": worse}))
    else:
        rows, columns, _, k = shape
        print(f"{rows:,} x {columns} into {k}: {speed:.2f} times as fast in the median, inertia {100 * worse:+.1f}%")
    return 0 if speed >= 1 and worse <= 0.02 else 1


if __name__ == "__main__":
    sys.exit(main())
