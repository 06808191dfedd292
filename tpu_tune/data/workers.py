"""Tokenizing in several threads or processes.

Threads are enough where the tokenizer's own code, which runs without Python's lock, does nearly all the work: texts and
pairs through a fast tokenizer. Chats are rendered in Python, and slow tokenizers are Python: those need processes
(`processes`). A process takes a few seconds to start, so small sets are tokenized in this one.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tpu_tune.data.processes import in_order
from tpu_tune.data.tokenize_options import TokenizeOptions
from tpu_tune.data.tokenized_set import TokenizedSet, merge
from tpu_tune.data.tokenizing import tokenize_rows

logger = logging.getLogger(__name__)

MIN_ROWS = 20_000  # a worker's start costs about as much as this many chats
MAX_THREADS = 8  # more would wait for Python's lock, which lists of ids and NumPy's arrays are made under

Batch = tuple[Sequence[Mapping[str, Any]], str | Sequence[str], int]  # `rows`, `where` and `first` of tokenize_rows


def tokenize_parallel(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    options: TokenizeOptions,
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
    workers = num_processes(len(rows), num_workers)
    if workers <= 1:
        return tokenize_rows(rows, tokenizer, options, where, first)
    bounds = [len(rows) * i // workers for i in range(workers + 1)]
    batches = [(rows[start:stop], where, first + start) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    return merge(list(tokenize_batches(batches, tokenizer, options, workers)))


def num_processes(rows: int, num_workers: int = 0) -> int:
    """How many processes to tokenize this many rows in; see `tokenize_parallel`. 1 means this process."""
    return min(num_workers, rows) if num_workers else min(os.cpu_count() or 1, rows // MIN_ROWS)


def tokenize_batches(
    batches: Iterable[Batch], tokenizer: Any, options: TokenizeOptions, processes: int = 1
) -> Iterator[TokenizedSet]:
    """Tokenize batches as they come, a few ahead, and yield their sets in order.

    Args:
      batches: read only as far as there is room for; each is what `tokenize_rows` takes.
      processes: 1 tokenizes in this process, in threads.

    Raises:
      UserError: as `tokenize_rows`, of the first batch in order.
    """
    work = functools.partial(tokenize_batch, tokenizer=tokenizer, options=options)
    if processes > 1:
        logger.info("tokenizing in %d processes", processes)
        yield from in_order(work, batches, processes)
        return
    width = min(os.cpu_count() or 1, MAX_THREADS)
    with contextlib.ExitStack() as stack:
        if width > 1:
            stack.enter_context(_without_inner_threads())
        pool = stack.enter_context(ThreadPoolExecutor(width))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        waiting: collections.deque = collections.deque()
        for batch in batches:
            waiting.append(pool.submit(work, batch))
            if len(waiting) > 2 * width:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def tokenize_batch(batch: Batch, tokenizer: Any, options: TokenizeOptions) -> TokenizedSet:
    """Do what `tokenize_rows` does, as a function of one batch."""
    rows, where, first = batch
    return tokenize_rows(rows, tokenizer, options, where, first)


@contextlib.contextmanager
def _without_inner_threads() -> Iterator[None]:
    """Turn the tokenizer's own threads off: batches are shared out over ours, which leaves none waiting."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
