"""What `tpu-tune data cluster` is asked to do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tpu_tune.config.engine import key
from tpu_tune.data.cluster.kmeans import BATCH_SIZE
from tpu_tune.data.cluster.subset import SELECTIONS
from tpu_tune.errors import UserError


@dataclass(frozen=True)
class ClusterOptions:
    """What `tpu-tune data cluster` is asked to do.

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
    seed: int = key(0, "", at_least=0, at_most=2**32 - 1)
    mini_batch: bool | None = None
    batch_size: int = BATCH_SIZE
    max_iterations: int = 100
    skip_bad: bool = False


def check(input: str, output: str, options: ClusterOptions) -> None:
    """Refuse options that cannot be met, before anything is read.

    Raises:
      UserError: naming the option, its value and what is allowed.
    """
    if options.k != "auto" and (not isinstance(options.k, int) or options.k < 1):
        raise UserError(f"--k is {options.k}; it must be a number from 1, or auto")
    if options.select not in SELECTIONS:
        raise UserError(f"--select is '{options.select}'; it must be one of {', '.join(SELECTIONS)}")
    if options.keep is not None and options.keep_per_cluster is not None:
        raise UserError("--keep and --keep-per-cluster exclude each other; give one of them")
    for name in ("keep", "keep_per_cluster", "max_length", "batch_tokens", "batch_size", "max_iterations"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if options.map and Path(options.map).suffix.lower() not in (".html", ".png"):
        raise UserError(f"--map is {options.map}; its name must end in .html or .png")
    files = [input, output, *filter(None, [options.outliers, *map_files(options.map)])]
    resolved = [os.path.realpath(file) for file in files]
    for number, file in enumerate(resolved):
        if file in resolved[:number]:
            raise UserError(f"{files[number]} is named twice, as input or as two outputs; name another file")


def map_files(name: str) -> list[str]:
    """Return the two files of a map, HTML and PNG, of which `name` is one; none where it is empty."""
    return [str(Path(name).with_suffix(suffix)) for suffix in (".html", ".png")] if name else []
