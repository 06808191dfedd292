"""One function over many tasks in several processes, the results in the order of the tasks.

Each process is a fresh `python -c`: unlike `multiprocessing`, that never runs the user's own script or notebook again
and never forks a process in which JAX has threads. It serves one task after another, so that it is started once; the
function, which may hold a tokenizer, is sent to it once too.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tpu_tune.errors import UserError

# An engine runs one function over many tasks and yields the results in their order: `in_order` on a number of
# processes, or `recipe.beam.run_in_order`.
Engine = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]

AHEAD = 4  # tasks for each process that are running or whose result has not been taken yet


def in_order(function: Callable[[Any], Any], tasks: Iterable[Any], processes: int) -> Iterator[Any]:
    """Yield function(task) for each task, in the order of the tasks, computed in `processes` processes.

    Args:
      function: one that can be imported by its name; tasks and results can be pickled.

    Raises:
      UserError: the one that `function` raised for the earliest task that has one.
      RuntimeError: a process ended, or the function failed in another way.
    """
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_Worker()) for _ in range(processes)]
        # Leaving ends the workers first, so that no thread waits for an answer that nobody wants.
        pool = ThreadPoolExecutor(processes)
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        for worker in workers:
            stack.callback(worker.end)
        idle = deque(workers)
        waiting: deque[Future] = deque()

        def run(task: Any) -> Any:
            worker = idle.popleft()
            try:
                return worker.ask(function, task)
            finally:
                idle.append(worker)

        for task in tasks:
            waiting.append(pool.submit(run, task))
            if len(waiting) >= AHEAD * processes:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())


def _result(future: Future) -> Any:
    result = future.result()
    if isinstance(result, Exception):
        raise result
    return result


class _Worker:
    """A process that serves tasks."""

    def __enter__(self) -> _Worker:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
            "JAX_PLATFORMS": "cpu",  # an accelerator belongs to the parent
        }
        self._errors = tempfile.TemporaryFile()
        self._sent: Callable[[Any], Any] | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tpu_tune.data.processes import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                stream.close()

    def end(self) -> None:
        """Have the process end at once."""
        self._process.kill()

    def ask(self, function: Callable[[Any], Any], task: Any) -> Any:
        """Return the result of one task, or the exception to raise."""
        try:
            new = None if function is self._sent else function
            pickle.dump((new, task), self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._sent = function
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            status = self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
            return RuntimeError(f"a process ended with status {status}: {last[0]}")


def serve() -> None:
    """Serve tasks from standard input until it ends; results go to standard output, both pickled."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers
    function = None
    while True:
        try:
            new, task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        function = new or function
        try:
            result = function(task)
        except UserError as error:
            result = UserError(str(error))
        except Exception as error:
            result = RuntimeError(f"{type(error).__name__}: {error}")
        pickle.dump(result, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()
