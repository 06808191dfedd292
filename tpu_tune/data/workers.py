"""Tokenizing in several threads or processes.

Threads are enough where the tokenizer's own code, which runs without Python's lock, does nearly all the work: texts and
pairs through a fast tokenizer. Chats are rendered in Python, and slow tokenizers are Python: those need processes.
Each is a fresh `python -c` that reads pickled batches from its standard input and answers on its standard output:
unlike `multiprocessing`, that never runs the user's own script or notebook again, and never forks a process in which
JAX has threads. A process costs a few seconds to start, so small sets are tokenized here.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import pickle
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tpu_tune.data.tokenizing import Options, TokenizedSet, merge, tokenize_rows
from tpu_tune.errors import UserError

logger = logging.getLogger(__name__)

MIN_ROWS = 20_000  # a worker's start costs about as much as this many chats
MAX_THREADS = 8  # more would wait for Python's lock, which lists of ids and NumPy's arrays are made under

Batch = tuple[Sequence[Mapping[str, Any]], str | Sequence[str], int]  # `rows`, `where` and `first` of tokenize_rows


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
    workers = num_processes(len(rows), num_workers)
    if workers <= 1:
        return tokenize_rows(rows, tokenizer, options, where, first)
    bounds = [len(rows) * i // workers for i in range(workers + 1)]
    batches = [(rows[start:stop], where, first + start) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    return merge(list(tokenize_batches(batches, tokenizer, options, workers)))


def num_processes(rows: int, num_workers: int = 0) -> int:
    """How many processes to tokenize so many rows in; see `tokenize_parallel`. One means this one."""
    return min(num_workers, rows) if num_workers else min(os.cpu_count() or 1, rows // MIN_ROWS)


def tokenize_batches(
    batches: Iterable[Batch], tokenizer: Any, options: Options, processes: int = 1
) -> Iterator[TokenizedSet]:
    """Tokenize batches as they come, a few ahead, and yield their sets in order.

    Args:
      batches: read only as far as there is room for; each is what `tokenize_rows` takes.
      processes: one tokenizes here, in threads.

    Raises:
      UserError: as `tokenize_rows`, of the first batch in order.
    """
    with contextlib.ExitStack() as stack:
        if processes > 1:
            logger.info("tokenizing in %d processes", processes)
            width = processes
            idle: queue.Queue[_Process] = queue.Queue()
            for _ in range(processes):
                idle.put(stack.enter_context(_Process(tokenizer, options)))

            def work(batch: Batch) -> TokenizedSet:
                process = idle.get()
                try:
                    return process.tokenize(batch)
                finally:
                    idle.put(process)
        else:
            width = min(os.cpu_count() or 1, MAX_THREADS)
            if width > 1:
                stack.enter_context(_without_inner_threads())

            def work(batch: Batch) -> TokenizedSet:
                rows, where, first = batch
                return tokenize_rows(rows, tokenizer, options, where, first)

        pool = stack.enter_context(ThreadPoolExecutor(width))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        waiting: collections.deque = collections.deque()
        for batch in batches:
            waiting.append(pool.submit(work, batch))
            if len(waiting) > 2 * width:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def _without_inner_threads() -> Iterator[None]:
    """Keep the tokenizer from sharing out each batch: here, batches are shared out, which costs no waiting."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class _Process:
    """A process that tokenizes the batches it is given, one at a time, until it is closed."""

    def __init__(self, tokenizer: Any, options: Options):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
            "JAX_PLATFORMS": "cpu",  # an accelerator belongs to the parent
        }
        self._said = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tpu_tune.data.workers import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
        )
        self._setup: tuple | None = (tokenizer, options)

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()  # idle, or its work is no longer wanted
        self._process.communicate()
        self._said.close()

    def tokenize(self, batch: Batch) -> TokenizedSet:
        try:
            if self._setup is not None:
                pickle.dump(self._setup, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
                self._setup = None
            pickle.dump(batch, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
            result = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            status = self._process.wait()
            self._said.seek(0)
            last = self._said.read().decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
            raise RuntimeError(f"a tokenizing process ended with status {status}: {last[0]}") from error
        if isinstance(result, UserError):
            raise result
        return result


def main() -> None:
    """Answer batches from standard input with their sets on standard output, all pickled, until it ends."""
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up in the result
    tokenizer, options = pickle.load(sys.stdin.buffer)
    while True:
        try:
            rows, where, first = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result: TokenizedSet | UserError = tokenize_rows(rows, tokenizer, options, where, first)
        except UserError as error:
            result = UserError(str(error))
        pickle.dump(result, stream, protocol=pickle.HIGHEST_PROTOCOL)
        stream.flush()
