"""Packed rows and the order in which they are trained on.

The batch of a step is a pure function of (data_seed, epoch, step): nothing is remembered between steps, so a resumed
run sees exactly what the uninterrupted one would have. Every batch has the same shape; what is missing from the last
one of an epoch is filled with empty rows, which hold no target and thus no weight.
"""

from __future__ import annotations

import functools
import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpu_tune.data.mixture import MixedRows
from tpu_tune.data.packing import Packing
from tpu_tune.data.tokenized_set import MISMATCHED, TokenizedSet

IGNORE = -100  # a target that counts for nothing, as in torch and Hugging Face


@dataclass(frozen=True)
class PackedRows:
    """Rows of documents, made from the flat form as they are asked for.

    Attributes:
      data: tokens, loss mask and offsets of all documents.
      packing: which documents share a row, and the rows' width T.
      slots: of answers to judge, the room S for documents in a row; 0 for plain examples.
      reference: (examples,) float32, the reference model's log-probability of each answer, where it is known.
    """

    data: TokenizedSet
    packing: Packing
    slots: int = 0
    reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.packing)

    @property
    def width(self) -> int:
        """Tokens a row, T."""
        return self.packing.width

    @property
    def documents(self) -> np.ndarray:
        """Examples in all rows, in order; not those that were made of others' parts (`MISMATCHED`)."""
        documents, roles = self.packing.documents, self.data.roles
        return documents if roles is None else documents[roles[documents] != MISMATCHED]

    @property
    def capacity(self) -> int:
        """Tokens that all rows have room for."""
        return len(self) * self.width

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Make rows.

        Args:
          indices: (n,) row numbers; -1 gives an empty row.

        Returns:
          (n, T) int32 each: `input_ids` (0 where padding), `targets` (the next token's id where it is to be predicted,
          else -100; never that of the next document), `positions` (from 0 in each document), `segment_ids` (from 1 in
          each row, 0 where padding). Where there are slots also (n, S) arrays: `document_roles` int32 (of
          `TokenizedSet` and `preference_rows`, 0 where there is none) and `document_reference` float32, where it is
          known.
        """
        shape = (len(indices), self.width)
        batch = {name: np.zeros(shape, np.int32) for name in ("input_ids", "positions", "segment_ids")}
        batch["targets"] = np.full(shape, IGNORE, np.int32)
        data, packing = self.data, self.packing
        if self.slots:
            batch["document_roles"] = np.zeros((len(indices), self.slots), np.int32)
            if self.reference is not None:
                batch["document_reference"] = np.zeros((len(indices), self.slots), np.float32)
        for i, row in enumerate(indices):
            if row < 0:
                continue
            at = 0
            documents = packing.documents[packing.offsets[row] : packing.offsets[row + 1]]
            if self.slots:
                batch["document_roles"][i, : len(documents)] = data.roles[documents]
                if self.reference is not None:
                    batch["document_reference"][i, : len(documents)] = self.reference[documents]
            for segment, document in enumerate(documents, start=1):
                first = data.offsets[document]
                length = min(int(data.offsets[document + 1] - first), self.width)
                tokens, mask = data.tokens[first : first + length], data.loss_mask[first : first + length]
                end = at + length
                batch["input_ids"][i, at:end] = tokens
                batch["targets"][i, at : end - 1] = np.where(mask[1:], tokens[1:], IGNORE)
                batch["positions"][i, at:end] = np.arange(length)
                batch["segment_ids"][i, at:end] = segment
                at = end
        return batch


@dataclass(frozen=True)
class Batches:
    """The batches of training, by step.

    Attributes:
      rows: what to train on; anything with `len` and `take`, see also `pairs.PairRows`; or `MixedRows`.
      batch_rows: rows of a micro-batch, over all devices.
      accumulation: micro-batches of a step.
      data_seed: with the epoch it decides the order of the rows.
      local_rows: (batch_rows,) bool, the rows of a micro-batch that this process reads; the others stay empty. None:
        all.
      block: consecutive rows that stay together in every order; of a micro-batch there are whole ones.
    """

    rows: Any
    batch_rows: int
    accumulation: int
    data_seed: int
    local_rows: np.ndarray | None = None
    block: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every row once; of a mixture, those of the first epoch."""
        return self._steps(0)

    def steps(self, epochs: float) -> int:
        """Steps of so many epochs, rounded up."""
        whole = int(epochs)
        before = sum(map(self._steps, range(whole))) if isinstance(self.rows, MixedRows) else whole * self._steps(0)
        return before + math.ceil((epochs - whole) * self._steps(whole))

    def _steps(self, epoch: int) -> int:
        rows = self.rows.count(epoch) if isinstance(self.rows, MixedRows) else len(self.rows)
        return steps_per_epoch(rows, self.batch_rows, self.accumulation)

    def _place(self, step: int) -> tuple[int, int, Any]:
        """The epoch of a step, which of its steps it is, and the epoch's rows."""
        if not isinstance(self.rows, MixedRows):
            return (*divmod(step, self.steps_per_epoch), self.rows)
        epoch = 0
        while step >= self._steps(epoch):  # epochs of mixtures may differ by a few packed rows
            step -= self._steps(epoch)
            epoch += 1
        return epoch, step, self.rows.epoch(epoch)

    def row_numbers(self, step: int) -> np.ndarray:
        """The rows of a step (0-based), (accumulation, batch_rows) int64, -1 where the epoch has run out of rows."""
        epoch, within, rows = self._place(step)
        size = self.accumulation * self.batch_rows
        blocks = _permutation(self.data_seed, epoch, -(-len(rows) // self.block))
        chosen = blocks[within * size // self.block : (within + 1) * size // self.block]
        chosen = (chosen[:, None] * self.block + np.arange(self.block)).reshape(-1)
        chosen = np.where(chosen < len(rows), chosen, -1)
        filled = np.full(size, -1, np.int64)
        filled[: len(chosen)] = chosen
        return filled.reshape(self.accumulation, self.batch_rows)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step (0-based): the arrays of `PackedRows.take`, (accumulation, batch_rows, T) int32."""
        numbers = _local(self.row_numbers(step), self.local_rows)
        flat = self._place(step)[2].take(numbers.reshape(-1))
        return {name: array.reshape(*numbers.shape, -1) for name, array in flat.items()}


def steps_per_epoch(rows: int, batch_rows: int, accumulation: int) -> int:
    """Return the steps of an epoch: ceil(ceil(rows / batch_rows) / accumulation), as Hugging Face counts them."""
    micro_batches = -(-rows // batch_rows)
    return -(-micro_batches // accumulation)


@functools.lru_cache(maxsize=2)  # a cache only: the value depends on the arguments alone
def _permutation(data_seed: int, epoch: int, count: int) -> np.ndarray:
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([data_seed, epoch]))).permutation(count)
    order.flags.writeable = False
    return order


def _local(numbers: np.ndarray, local_rows: np.ndarray | None) -> np.ndarray:
    """Row numbers (..., batch_rows) with -1 in place of those that another process reads."""
    return numbers if local_rows is None else np.where(local_rows, numbers, -1)


def eval_batches(rows: Any, batch_rows: int, local_rows: np.ndarray | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Yield all rows in order, (batch_rows, T) int32 each; the last batch is filled with empty rows.

    Args:
      local_rows: as in `Batches`.
    """
    for start in range(0, len(rows), batch_rows):
        numbers = np.arange(start, start + batch_rows)
        yield rows.take(_local(np.where(numbers < len(rows), numbers, -1), local_rows))


def num_target_tokens(batch: dict[str, np.ndarray]) -> int:
    """Tokens that a batch is trained (or evaluated) on."""
    return int(np.count_nonzero(batch["targets"] != IGNORE))


def prefetch(make: Callable[[int], Any], start: int, stop: int, depth: int = 2) -> Iterator[Any]:
    """Yield make(start), ..., make(stop - 1), computing up to `depth` of them ahead in a thread.

    An exception in `make` is raised here, in its place. Closing the generator ends the thread.
    """
    ready: queue.Queue = queue.Queue(maxsize=max(1, depth))
    closed = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for number in range(start, stop):
                if closed.is_set():
                    return
                put((True, make(number)))
        except BaseException as error:  # noqa: BLE001 - handed to the consumer
            put((False, error))

    thread = threading.Thread(target=work, name="tpu_tune-prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            good, value = ready.get()
            if not good:
                raise value
            yield value
    finally:
        closed.set()
        thread.join()
