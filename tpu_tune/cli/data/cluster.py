"""`tpu-tune data cluster`: group rows by what they say, keep a diverse part, list outliers, draw a map."""

from __future__ import annotations

import argparse
import json
import sys

from tpu_tune.cli import numbers
from tpu_tune.cli.common import DTYPES, Commands
from tpu_tune.cli.data.arguments import same_names
from tpu_tune.errors import UserError, counted

_SHOWN = 20  # clusters in the printed table


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "cluster",
        run,
        "group rows by what they say, keep a diverse part of them, draw a map",
        "tpu-tune data cluster rows.jsonl --output diverse.jsonl --k 50 --keep 10000 "
        "--outliers outliers.jsonl --map map.html",
    )
    parser.add_argument("input", metavar="INPUT", help="a .jsonl file (may end in .gz)")
    parser.add_argument(
        "--output",
        required=True,
        help="the rows that are kept, in their order, with two keys more: cluster (0 is the largest) and distance "
        "(from its centre)",
    )
    parser.add_argument("--k", default="auto", help="how many clusters; auto (default) tries some on a sample")
    parser.add_argument(
        "--model",
        default="",
        help="read the rows with this model (Hugging Face id, local directory, or .gguf file); "
        "default: go by their words",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="", help="of the model (default float32 on a CPU, else bfloat16)"
    )
    parser.add_argument(
        "--max-length", type=numbers.whole(), default=512, help="tokens of a row that the model reads (default 512)"
    )
    parser.add_argument(
        "--batch-tokens", type=numbers.whole(), default=8192, help="that the model reads at one time (default 8192)"
    )
    parser.add_argument("--text-key", default="", help="the key of the text; default: by the row's format")
    parser.add_argument(
        "--keep", type=numbers.whole(), help="rows to keep in all, shared evenly over the clusters (default: all)"
    )
    parser.add_argument(
        "--keep-per-cluster", type=numbers.whole(), help="most rows to keep of each cluster; outliers never are"
    )
    parser.add_argument(
        "--select",
        choices=("balanced", "farthest", "random"),
        default="balanced",
        help="which: at even steps of distance from the centre (balanced, default), those most different from each "
        "other (farthest), or any",
    )
    parser.add_argument("--drop-outliers", action="store_true", help="leave outliers out of the output")
    parser.add_argument("--outliers", default="", metavar="FILE", help="list outliers here, each with its reason")
    parser.add_argument("--map", default="", metavar="FILE", help="draw a map, as FILE.html and FILE.png")
    parser.add_argument("--seed", type=numbers.seed, default=0, help="of everything random (default 0)")
    parser.add_argument(
        "--mini-batch",
        action=argparse.BooleanOptionalAction,
        help="k-means by mini-batches (default: from 100,000 rows)",
    )
    parser.add_argument("--batch-size", type=numbers.whole(), default=8192, help="rows of a mini-batch (default 8192)")
    parser.add_argument(
        "--max-iterations", type=numbers.whole(), default=100, help="most passes over the rows (default 100)"
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out and count what is no row or has no text")


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    from tpu_tune.data.cluster import ClusterOptions, cluster

    if options.k != "auto" and not options.k.isdecimal():
        raise UserError(f"--k is '{options.k}'; give a number, or auto")
    k = options.k if options.k == "auto" else int(options.k)
    cluster_options = ClusterOptions(**{**same_names(ClusterOptions, options), "k": k})
    report = cluster(options.input, options.output, cluster_options)
    if options.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return 0
    for hint in report["hints"]:
        print(f"note: {hint}", file=sys.stderr)
    if report["bad_rows"]:
        print(
            f"{counted(report['bad_rows'], 'bad row')} left out, the first {report['bad_examples'][0]}", file=sys.stderr
        )
    steps = counted(
        report["iterations"], *(("mini-batch", "mini-batches") if report["mini_batch"] else ("pass", "passes"))
    )
    print(
        f"{counted(report['rows'], 'row')} in {counted(report['k'], 'cluster')} (inertia {report['inertia']:.6g} after "
        f"{steps}, "
        f"{report['dimensions']} dimensions)"
    )
    if report["tried"]:
        print("silhouette by k: " + ", ".join(f"{k}: {score:.3f}" for k, score in report["tried"].items()))
    print("cluster    rows    kept  outliers  words")
    for row in report["clusters"][:_SHOWN]:
        words = " ".join(row["words"][:6])
        print(f"{row['cluster']:>7} {row['rows']:>7,} {row['kept']:>7,} {row['outliers']:>9,}  {words}")
    if report["k"] > _SHOWN:
        print(f"    and {report['k'] - _SHOWN} smaller ones")
    print(f"{counted(report['kept'], 'row')} kept in {options.output}; {counted(report['outliers'], 'outlier')}")
    return 0
