"""The thread that owns the device: a bounded queue of jobs, and for each model a batch of those that are being written.

Jobs are taken in the order in which they came, as soon as one of the slots is free. Each model with jobs writes a few
tokens in its turn, so that no adapter waits for another one's answers to end. A job's text is not made here: tokens go
to its `emit`, from this thread.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp

from tpu_tune.inference.generation import Sampling
from tpu_tune.inference.model import Model
from tpu_tune.inference.serving import batch as device

log = logging.getLogger(__name__)

_COLUMNS, _WIDTH, _ROWS_STEP = 256, 32, 4  # the smallest cache and prompt, and how a batch's rows grow
_FAILED = "the server failed while it wrote this answer; its log says why"


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much the server takes on.

    Attributes:
      slots: answers that are written at the same time.
      queue: answers that may wait for a slot, beyond those that are written.
      max_length: tokens of a prompt and its answer.
      max_new_tokens: tokens of an answer.
    """

    slots: int = 8
    queue: int = 64
    max_length: int = 2048
    max_new_tokens: int = 1024


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of an answer; with logprobs its own and the likeliest ones' as (id, log-probability)."""

    id: int
    logprob: float = 0.0
    tops: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class News:
    """What has become of a job: new tokens, and why it ended: "" not yet, stop, length, or error with a message."""

    tokens: tuple[Token, ...] = ()
    ended: str = ""
    message: str = ""


@dataclasses.dataclass(eq=False)
class Job:
    """One answer to write.

    Attributes:
      model: the model's name.
      prompt: token ids, at least one.
      sampling: how tokens are chosen, and how many at most.
      tops: how many of the likeliest tokens' log-probabilities come with each; None: no log-probabilities at all.
      emit: called with news, by the engine's thread.
      cancelled: set it to let go of the job; no more news comes then.
    """

    model: str
    prompt: Sequence[int]
    sampling: Sampling
    tops: int | None
    emit: Callable[[News], None]
    cancelled: bool = False


class Busy(Exception):
    """The queue is full."""


class Stopped(Exception):
    """The engine takes no more jobs."""


class Engine:
    """Writes the answers of some models; `start` it once.

    Args:
      models: by name; all on the default device.
      limits: how much it takes on.
    """

    def __init__(self, models: Mapping[str, Model], limits: Limits):
        self.models, self.limits = models, limits
        self._lanes = {name: Lane(model, limits) for name, model in models.items()}
        self._waiting: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put jobs into the queue, all of them or none.

        Raises:
          Busy: there is no room.
          Stopped: it has been stopped.
        """
        with self._changed:
            if self._stopping:
                raise Stopped
            self._waiting = collections.deque(job for job in self._waiting if not job.cancelled)
            if self._running() + len(self._waiting) + len(jobs) > self.limits.slots + self.limits.queue:
                raise Busy
            self._waiting.extend(jobs)
            self._changed.notify()

    def stop(self) -> None:
        """End every job with an error and take no more; returns at once."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self, timeout: float) -> None:
        """Wait until the thread has ended, at most so many seconds."""
        self._thread.join(timeout)

    def load(self) -> tuple[int, int]:
        """Return how many jobs are being written and how many wait."""
        return self._running(), len(self._waiting)

    def _running(self) -> int:
        return sum(len(lane.jobs) for lane in self._lanes.values())

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self._waiting or self._running()):
                    self._changed.wait()
                if self._stopping:
                    break
            try:
                self._turn()
            except Exception:  # whatever the device raises, the next requests find a server
                log.exception("the engine failed; the answers that were being written are lost")
                self._fail(_FAILED)
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        self._fail("the server is shutting down")
        for job in waiting:
            job.emit(News(ended="error", message="the server is shutting down"))

    def _turn(self) -> None:
        """Let jobs in where slots are free, and let every model that has jobs write a few tokens."""
        for lane in self._lanes.values():
            lane.let_go()
        while job := self._next():
            try:
                self._lanes[job.model].join(job)
            except Exception:
                job.emit(News(ended="error", message=_FAILED))  # it is in nobody's list now
                raise
        for lane in self._lanes.values():
            if lane.jobs:
                lane.write()

    def _next(self) -> Job | None:
        with self._changed:
            while self._waiting and self._waiting[0].cancelled:
                self._waiting.popleft()
            return self._waiting.popleft() if self._waiting and self._running() < self.limits.slots else None

    def _fail(self, message: str) -> None:
        for lane in self._lanes.values():
            jobs = list(lane.jobs.values())
            lane.clear()
            for job in jobs:
                job.emit(News(ended="error", message=message))


class Lane:
    """One model's running batch; its rows are the slots' jobs of that model.

    Attributes:
      jobs: row -> the job that it writes.
    """

    def __init__(self, model: Model, limits: Limits):
        self.model, self.limits = model, limits
        self.jobs: dict[int, Job] = {}
        self._ends = jnp.asarray(list(model.ends) or [-1], jnp.int32)
        self.clear()

    def clear(self) -> None:
        """Forget all jobs and free the cache."""
        self.jobs.clear()
        self._batch: device.Batch | None = None
        self._used = 0  # columns up to where the next token goes
        self._lengths: dict[int, int] = {}  # of each row: its tokens, which end there
        self._fresh = False  # whether somebody waits for a first token

    def join(self, job: Job) -> None:
        """Read a job's prompt and give it a row."""
        arch, dtype = self.model.architecture, self.model.dtype
        width = min(device.size(len(job.prompt), smallest=_WIDTH), self.limits.max_length)
        new = device.read_prompt(arch, dtype, self.model.params, job.prompt, width)
        row = next(row for row in range(self.limits.slots) if row not in self.jobs)
        self._make_room(row + 1, width, 0)
        self._batch = device.join(arch, self._batch, row, new, job.prompt, job.sampling)
        self.jobs[row], self._lengths[row], self._fresh = job, len(job.prompt), True

    def let_go(self) -> None:
        """Free the rows of cancelled jobs."""
        for row in [row for row, job in self.jobs.items() if job.cancelled]:
            self._batch = device.leave(self._batch, jnp.int32(row))
            self._free(row)

    def write(self) -> None:
        """Write a few tokens of every row and tell the jobs; the first token of a new one comes by itself."""
        steps = 1 if self._fresh else device.EVERY
        self._make_room(1, 0, device.EVERY)
        tops = device.TOPS if any(job.tops is not None for job in self.jobs.values()) else 0
        model = self.model
        self._batch, written = device.write(
            model.architecture, model.dtype, tops, model.params, self._batch, jnp.int32(steps), self._ends
        )
        written = device.on_host(written)
        self._fresh = False
        count = int((written.tokens >= 0).any(axis=0).sum())
        self._used += count
        for row, job in list(self.jobs.items()):
            self._lengths[row] += count
            self._tell(row, job, written)

    def _tell(self, row: int, job: Job, written: device.Written) -> None:
        ids = [int(token) for token in written.tokens[row] if token >= 0]
        tokens = [Token(token) for token in ids]
        if job.tops is not None:
            tokens = [
                Token(token, float(written.logprobs[row, place]), _pairs(written, row, place, job.tops))
                for place, token in enumerate(ids)
            ]
        ended = ""
        if ids and ids[-1] in self.model.ends:
            ended, tokens = "stop", tokens[:-1]
        elif self._lengths[row] - len(job.prompt) >= job.sampling.max_new_tokens:
            ended = "length"
        if ended:
            self._free(row)
        job.emit(News(tuple(tokens), ended))

    def _free(self, row: int) -> None:
        del self.jobs[row], self._lengths[row]
        if not self.jobs:
            self.clear()

    def _make_room(self, rows: int, used: int, more: int) -> None:
        """Have so many rows, at least `used` columns that are used, and `more` free ones behind them."""
        arch, most = self.model.architecture, self.limits.max_length + device.EVERY
        used = max(used, *self._lengths.values(), 0)
        rows = min(device.size(rows, _ROWS_STEP), self.limits.slots)
        columns = min(device.size(used + more, smallest=_COLUMNS), most)
        if self._batch is None:
            self._batch = device.empty_batch(arch, self.model.dtype, rows, columns)
        now = self._batch.cache.segments.shape
        if rows > now[0] or columns > now[1]:
            self._batch = device.grow(arch, self._batch, max(rows, now[0]), max(columns, now[1]))
        if self._used < used or self._used + more > self._batch.cache.segments.shape[1]:
            self._batch = device.move(arch, self._batch, jnp.int32(used - self._used))
            self._used = used


def _pairs(written: device.Written, row: int, place: int, count: int) -> tuple[tuple[int, float], ...]:
    ids, logprobs = written.top_tokens[row, place, :count], written.top_logprobs[row, place, :count]
    return tuple((int(token), float(logprob)) for token, logprob in zip(ids, logprobs, strict=True))
