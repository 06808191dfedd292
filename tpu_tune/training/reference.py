"""The reference of dpo and kto: each answer's log-probability by the model as training starts, computed once.

It never changes, so it is data: computed before the first step with the initial tree (or with `objective.reference`)
and kept beside the tokenized data, under a hash of the answers' tokens and of the model. It is written in pieces, so
that a pass that was interrupted goes on where it was; a piece names its examples, so that other rows, another mesh or
another share held out use what is there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.checkpoints import storage
from tpu_tune.checkpoints.chat_template import read_text
from tpu_tune.checkpoints.run_checkpoints import base_fingerprint
from tpu_tune.checkpoints.vocabulary import open_configured
from tpu_tune.data import Datasets, PackedRows, cache
from tpu_tune.data.tokenized_set import TokenizedSet
from tpu_tune.errors import UserError
from tpu_tune.training.preference_settings import REFERENCED
from tpu_tune.training.prepare_model import PreparedModel, prepare_model, storage_dtype
from tpu_tune.training.prepare_steps import prepare_scoring
from tpu_tune.training.progress import Progress
from tpu_tune.transforms import sharding

logger = logging.getLogger(__name__)

PIECE_SECONDS = 20.0  # a piece is written when so much work would be lost; tests set it to 0


def add_reference(
    data: Datasets,
    config: ConfigDict,
    batch_rows: int,
    model: PreparedModel | None,
    mesh: Mesh,
    say: Callable[[str], None] = lambda line: None,
    only: Sequence[str] = ("train", "eval"),
) -> Datasets:
    """Return the data with the reference's log-probabilities, computing those that are not known.

    Args:
      data: the rows; other objectives' are returned as they are.
      config: the configuration that training starts with.
      batch_rows: rows of a batch, over all devices.
      model: that of `config`, where it is loaded already.
      mesh: the devices.
      say: receives a line for the user.
      only: the parts of the data that are used.

    Raises:
      UserError: `objective.reference` cannot be used.
    """
    if config.objective.name not in REFERENCED:
        return data
    start = _named(config) if config.objective.reference else config
    folder, kept = cache.directory(config.data.cache_dir) / "reference", _kept(start)
    named = {name: getattr(data, name) for name in only if getattr(data, name) is not None}
    parts = list(named.values())
    sets = {id(rows.data): rows.data for rows in parts}
    stores = {number: _Store(folder / _key(one, kept)) for number, one in sets.items()}
    known = {number: stores[number].read(len(one)) for number, one in sets.items()}
    unknown = [_unknown(rows, known[id(rows.data)]) for rows in parts]
    if count := sum(map(len, unknown)):
        say(f"reference: log-probabilities of {count} rows by {start.model.adapter or start.model.path}, computed once")
        if model is None or start is not config:
            model = prepare_model(start, mesh)
        total, done = sum(map(len, parts)), sum(map(len, parts)) - count
        with Progress(total, done, 50, jax.process_index() == 0, name="reference") as progress:

            def advance(rows: int) -> None:
                nonlocal done
                done += rows
                progress.update(done)

            for rows, numbers in zip(parts, unknown, strict=True):
                store, values = stores[id(rows.data)], known[id(rows.data)]
                write = functools.partial(store.write, values=values)
                _compute(rows, numbers, values, start, model, batch_rows, write, advance)
    found = {name: dataclasses.replace(rows, reference=known[id(rows.data)]) for name, rows in named.items()}
    return dataclasses.replace(data, **found)


def _named(config: ConfigDict) -> ConfigDict:
    """Return the configuration whose model is `objective.reference`."""
    named, path = configuration.from_dict(configuration.to_dict(config)), config.objective.reference
    if storage.exists(os.path.join(path, "adapter_config.json")):
        named.model.adapter, named.method = path, "lora"
    else:
        named.model.path, named.model.adapter = path, ""
        named.quantize.calibration = 0  # what the run has rounded is its own model
    return named


def _kept(config: ConfigDict) -> str:
    """Return what of a configuration decides a model's log-probabilities, besides the rows."""
    source = open_configured(config, read_text(config.data.chat_template))
    parts = [base_fingerprint(source, config), str(storage_dtype(config)), config.model.dtype]
    if config.model.adapter:
        for name in storage.list_names(config.model.adapter):
            if name.startswith("adapter_"):
                content = storage.read_bytes(os.path.join(config.model.adapter, name))
                parts += [name, hashlib.sha256(content).hexdigest()]
    return json.dumps(parts)


def _key(data: TokenizedSet, kept: str) -> str:
    digest = hashlib.sha256(kept.encode())
    for array in (data.tokens, data.loss_mask, data.offsets):
        digest.update(np.ascontiguousarray(array[:]).data)
    return digest.hexdigest()[:32]


def _unknown(rows: PackedRows, values: np.ndarray) -> np.ndarray:
    """Return the numbers of the rows that hold an answer whose value is not known."""
    missing = np.flatnonzero(np.isnan(values[rows.packing.documents]))
    return np.unique(np.searchsorted(rows.packing.offsets, missing, side="right") - 1)


def _compute(
    rows: PackedRows,
    numbers: np.ndarray,
    values: np.ndarray,
    config: ConfigDict,
    model: PreparedModel,
    batch_rows: int,
    write: Callable[[np.ndarray], None],
    progress: Callable[[int], None],
) -> None:
    """Fill in `values` for the given rows; `write` stores those of some examples, `progress` hears of rows done."""
    score = prepare_scoring(config, model)
    local, written, waiting = sharding.rows_here(model.mesh, batch_rows), time.monotonic(), []
    for start in range(0, len(numbers), batch_rows):
        chosen = numbers[start : start + batch_rows]
        filled = np.full(batch_rows, -1, np.int64)
        filled[: len(chosen)] = chosen
        found = np.asarray(score(rows.take(np.where(local, filled, -1))))
        for number, sums in zip(chosen, found, strict=False):
            documents = rows.packing.documents[rows.packing.offsets[number] : rows.packing.offsets[number + 1]]
            values[documents] = sums[: len(documents)]
            waiting.append(documents)
        if not np.isfinite(values[np.concatenate(waiting)]).all():
            raise UserError(
                "the reference model's log-probabilities are not finite; set model.dtype=float32 to see whether it is "
                "the precision"
            )
        progress(len(chosen))
        if time.monotonic() - written > PIECE_SECONDS or start + batch_rows >= len(numbers):
            write(np.concatenate(waiting))
            written, waiting = time.monotonic(), []


@dataclasses.dataclass(frozen=True)
class _Store:
    """Values on disk, in pieces; one process writes and reads them for all.

    Attributes:
      folder: of one set of examples and one model.
    """

    folder: Path

    def read(self, count: int) -> np.ndarray:
        """Return the values of all examples, (count,) float32, NaN where they are not known."""
        values = np.full(count, np.nan, np.float32)
        if jax.process_index() == 0 and self.folder.is_dir():
            for file in sorted(self.folder.glob("*.npz")):
                try:
                    with np.load(file) as piece:
                        values[piece["examples"]] = piece["values"]
                except Exception as error:  # whatever a damaged file raises
                    logger.warning("%s is damaged (%s); computing its values again", file, error)
                    file.unlink(missing_ok=True)
        if jax.process_count() > 1:
            values = np.asarray(multihost_utils.broadcast_one_to_all(values))
        return np.array(values)

    def write(self, examples: np.ndarray, values: np.ndarray) -> None:
        """Write a piece aside and rename it; a failure is logged and otherwise ignored."""
        if jax.process_index() != 0:
            return
        stream = io.BytesIO()
        np.savez(stream, examples=examples, values=values[examples])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            storage.write_bytes(self.folder / f"{examples.min():09d}-{secrets.token_hex(4)}.npz", stream.getvalue())
        except OSError as error:
            logger.warning("the reference could not be cached in %s (%s); going on without", self.folder, error)
