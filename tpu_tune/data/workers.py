"""Tokenizing in several processes.

Each worker is a fresh `python -c` that reads one pickled task from its standard input: unlike `multiprocessing`, that
never runs the user's own script or notebook again, and never forks a process in which JAX has threads. A worker costs a
few seconds to start, so small sets are tokenized here.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tpu_tune.data.tokenizing import Options, TokenizedSet, merge, tokenize_rows
from tpu_tune.errors import UserError

logger = logging.getLogger(__name__)

MIN_ROWS = 20_000  # a worker's start costs about as much as this many chats


def tokenize_parallel(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    options: Options,
    where: str = "row",
    first: int = 0,
    num_workers: int = 0,
) -> TokenizedSet:
    """Do what `tokenize_rows` does, over processes where the rows are many.

    Args:
      num_workers: processes; 0 means one a core, and never more than one for every `MIN_ROWS` rows. A number given
        outright is taken, unless it is more than there are rows.

    Raises:
      UserError: as `tokenize_rows`; with several workers, the first in the order of rows.
    """
    workers = min(num_workers, len(rows)) if num_workers else min(os.cpu_count() or 1, len(rows) // MIN_ROWS)
    if workers <= 1:
        return tokenize_rows(rows, tokenizer, options, where, first)
    bounds = [len(rows) * i // workers for i in range(workers + 1)]
    tasks = [
        (rows[start:stop], tokenizer, options, where, first + start)
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    logger.info("tokenizing %d rows in %d processes", len(rows), workers)
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(_run, tasks))
    for result in results:
        if isinstance(result, UserError):
            raise result
    return merge(results)


def _run(task: tuple) -> TokenizedSet | UserError:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
        "JAX_PLATFORMS": "cpu",  # an accelerator belongs to the parent
    }
    with tempfile.TemporaryFile() as out:
        done = subprocess.run(
            [sys.executable, "-c", "from tpu_tune.data.workers import main; main()"],
            input=pickle.dumps(task),
            stdout=out,
            stderr=subprocess.PIPE,
            env=environment,
        )
        out.seek(0)
        if done.returncode:
            last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
            raise RuntimeError(f"a tokenizing process ended with status {done.returncode}: {last[0]}")
        return pickle.load(out)


def main() -> None:
    """Run one task from standard input and write its result to standard output, both pickled."""
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up in the result
    try:
        result: TokenizedSet | UserError = tokenize_rows(*pickle.load(sys.stdin.buffer))
    except UserError as error:
        result = UserError(str(error))
    with stream:
        pickle.dump(result, stream, protocol=pickle.HIGHEST_PROTOCOL)
