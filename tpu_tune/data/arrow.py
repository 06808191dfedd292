"""Tokenized rows as Arrow files: written for our trainer and others, read memory-mapped.

A file is an Arrow IPC *file* of record batches with the columns `input_ids` and `labels`, lists of int64, where -100
marks what is not predicted: what PygmalionAI's training code maps into memory and `datasets` loads. Read are also its
files for plain text (one batch of plain integers a block), columns of other integer types, and the IPC *stream* format
that `datasets` saves. Of further columns, `completion_mask` and `assistant_masks` say what is predicted and
`attention_mask` what is padding; others are named in a warning. Preference rows have a column `role` besides: 1 for a
chosen answer, 2 for a rejected one.

Reading converts nothing: `Values` cuts an example's tokens out of the mapped file when a batch is made of it. What is
held for a file is some 60 bytes an example. The file is gone through once, in pieces, to check it and to count.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tpu_tune.checkpoints import json_text
from tpu_tune.data import columnar
from tpu_tune.data.formats import in_words
from tpu_tune.data.loading import IGNORE
from tpu_tune.data.preferences import LONG_PAIR, PAIRED, ROWS, SINGLE, learns_from
from tpu_tune.data.tokenized_set import CHOSEN, PLAIN, REJECTED, TokenizedSet
from tpu_tune.errors import UserError

# Of each token 0 or 1: what is no padding, and what is to be predicted. TRL and transformers know them by these names.
_PADDING_MASK, _LOSS_MASKS = "attention_mask", ("completion_mask", "assistant_masks")
_ROLE = "role"  # `TokenizedSet.roles`
METADATA = b"tpu_tune"  # key of the schema's metadata, and of a batch's
# Columns that say nothing which is not known without them: pandas' index, and what collators add.
_IDLE = {"__index_level_0__", "length", "token_type_ids", "special_tokens_mask"}
logger = logging.getLogger(__name__)
_PIECE = 2**18  # values that are looked at together


def schema(about: dict[str, Any], rated: bool = False) -> pa.Schema:
    """The schema of a file; `about` (max_length, tokenizer, format) is kept in it as JSON.

    Args:
      rated: its examples are rated answers, and have a role.
    """
    fields = [pa.field(name, pa.list_(pa.int64())) for name in ("input_ids", "labels")]
    fields += [pa.field(_ROLE, pa.int8())] if rated else []
    return pa.schema(fields, {METADATA: json.dumps(about, sort_keys=True).encode()})


def write_batch(writer: pa.RecordBatchWriter, data: TokenizedSet, usual: str) -> None:
    """Append the examples of a set as one record batch.

    Where a row was cut into several examples, the batch's metadata says how many examples each row has made, so that
    a row held out for evaluation is held out whole. It also has the rows' formats where they are not what the file's
    own metadata says, `usual`.
    """
    offsets = pa.array(data.offsets.astype(np.int32))
    tokens = data.tokens.astype(np.int64)
    columns = [tokens, np.where(data.loss_mask, tokens, IGNORE)]
    arrays = {
        name: pa.ListArray.from_arrays(offsets, pa.array(column))
        for name, column in zip(("input_ids", "labels"), columns, strict=True)
    }
    if data.roles is not None:
        arrays[_ROLE] = pa.array(data.roles, pa.int8())
    _, counts = np.unique(data.source_rows, return_counts=True)
    about: dict[str, Any] = {"examples_per_row": counts.tolist()} if (counts > 1).any() else {}
    if data.summary["formats"] != {usual: data.summary["formats"].get(usual)}:
        about["formats"] = data.summary["formats"]
    writer.write_batch(pa.record_batch(arrays), {METADATA: json.dumps(about).encode()} if about else None)


def is_tokenized(source: str) -> bool:
    """Whether a source is an Arrow file that holds token ids; one may hold rows of text, too.

    Raises:
      UserError: it is named .arrow and cannot be read as such.
    """
    return Path(source).suffix.lower() == ".arrow" and "input_ids" in _open(source)[0].names


def _open(source: str) -> tuple[pa.Schema, Iterator[tuple[pa.RecordBatch, Any]]]:
    """As `columnar.open_arrow`, with errors that name the file."""
    try:
        schema, batches = columnar.open_arrow(source)
    except columnar.BadTable as error:
        raise UserError(f"{source}: {error}") from error
    return schema, _named(source, batches)


def _named(source: str, batches: Iterator[tuple[pa.RecordBatch, Any]]) -> Iterator[tuple[pa.RecordBatch, Any]]:
    try:
        yield from batches
    except columnar.BadTable as error:
        raise UserError(f"{source}: {error}") from error


def read_about(source: str) -> dict[str, Any]:
    """The file's own metadata: `max_length`, `tokenizer` (a hash), `format`; empty where another program wrote it."""
    return _about(_open(source)[0].metadata)


@dataclass(frozen=True)
class Values:
    """Tokens, or their loss mask, of the examples in Arrow files: an array (total,) that is sliced within one example.

    Attributes:
      columns: the values of each record batch, as they lie in the file.
      column, starts: (examples,) the record batch of each example, and its first value's index there.
      offsets: (examples + 1,) the index of each example's first value in this array, and the total.
      masks: return whether each token is predicted (a label other than -100), instead of the values.
    """

    columns: list[np.ndarray]
    column: np.ndarray
    starts: np.ndarray
    offsets: np.ndarray
    masks: bool

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        begin, end, step = where.indices(len(self))
        example = int(np.searchsorted(self.offsets, begin, side="right")) - 1
        if step != 1 or end > self.offsets[min(example + 1, len(self.offsets) - 1)]:
            raise IndexError("a slice of an Arrow file's values has to lie within one example")
        within = begin - int(self.offsets[example])
        start = int(self.starts[example]) + within
        values = self.columns[self.column[example]][start : start + max(0, end - begin)]
        if not self.masks:
            return values.astype(np.int32)
        mask = values != IGNORE
        if not within:
            mask[:1] = False  # nothing comes before it to predict it from
        return mask


@dataclass
class _Loaded:
    """What has been read of the files so far; `starts` and the like are lists of arrays, one a record batch."""

    ids: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    column: list[np.ndarray] = field(default_factory=list)
    starts: list[np.ndarray] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)
    source_rows: list[np.ndarray] = field(default_factory=list)
    roles: list[np.ndarray] = field(default_factory=list)
    file_rows: list[int] = field(default_factory=list)
    rows: int = 0
    sources: int = 0  # rows that the examples were made from
    truncated: int = 0
    eos_lost: int = 0
    split: int = 0
    largest: int = -1
    dropped: dict[str, int] = field(default_factory=dict)


def load(sources: list[str], max_length: int, objective: str = "") -> TokenizedSet:
    """Open tokenized files as one set.

    Args:
      objective: what they are for (`objective.name`); "": anything.
      max_length: longer examples are cut to it, those of plain text into blocks of it, as when text is tokenized.

    Returns:
      The set, whose `tokens` and `loss_mask` are `Values`.

    Raises:
      UserError: a file that cannot be read, or holds something else than token ids and labels, or rows that the
        objective does not learn from.
    """
    loaded, formats = _Loaded(), Counter()
    for source in sources:
        schema, batches = _open(source)
        about = _about(schema.metadata)
        if schema.get_field_index("input_ids") < 0:  # also where there are several of them
            raise UserError(f"{source}: has no one column input_ids; tokenize it again")
        plain = pa.types.is_integer(schema.field("input_ids").type)
        usual = str(about.get("format", "text" if plain else ""))
        used = {"input_ids", "labels", _ROLE, _PADDING_MASK, *_LOSS_MASKS, *_IDLE}
        if others := [name for name in schema.names if name not in used]:
            logger.warning("%s: columns that training does not use: %s", source, ", ".join(others))
        first, sources_before = loaded.rows, loaded.sources
        for batch, metadata in batches:
            ids, labels, bounds = _columns(source, batch, loaded.rows - first)
            if len(bounds) < 2:
                continue
            about = _about(metadata)
            per_row = about.get("examples_per_row") or [1] * (len(bounds) - 1)
            if not _counts_rows(per_row, len(bounds) - 1):
                raise UserError(f"{source}: its metadata does not fit its rows; tokenize it again")
            rows = loaded.sources + np.repeat(np.arange(len(per_row)), per_row)
            loaded.sources += len(per_row)
            kinds = about.get("formats") or {usual: len(per_row)}
            if not isinstance(kinds, dict) or not all(type(count) is int for count in kinds.values()):
                raise UserError(f"{source}: its metadata does not fit its rows; tokenize it again")
            formats.update(kinds)
            roles = _roles(source, batch)
            _check_roles(source, roles, rows, objective)
            batch_rows = _Batch(source, loaded.rows - first, ids, labels, bounds, roles)
            paired = learns_from(objective) != SINGLE and bool(roles.any()) and _are_pairs(roles, rows)
            _add(loaded, batch_rows, rows, max_length, (list(kinds) == ["text"], paired))
        loaded.file_rows.append(loaded.sources - sources_before)
    return _finish(loaded, formats)


def _counts_rows(per_row: Any, examples: int) -> bool:
    """Whether what a file says of its rows' examples are counts that add up to its examples."""
    counts = isinstance(per_row, list) and all(type(count) is int and 0 < count <= examples for count in per_row)
    return counts and sum(per_row) == examples


@dataclass(frozen=True)
class _Batch:
    """One record batch.

    Attributes:
      source: the file.
      rows_before: how many rows of the file come before it.
      ids, labels: (values,) of all its rows.
      bounds: (rows + 1,) where each row begins in them, and the last one ends.
      roles: (rows,) int8, as in `TokenizedSet`.
    """

    source: str
    rows_before: int
    ids: np.ndarray
    labels: np.ndarray
    bounds: np.ndarray
    roles: np.ndarray


def _roles(source: str, batch: pa.RecordBatch) -> np.ndarray:
    if _ROLE not in batch.schema.names:
        return np.zeros(len(batch), np.int8)
    column = batch.column(_ROLE)
    if (
        not pa.types.is_integer(column.type)
        or column.null_count
        or not np.isin(column, (PLAIN, CHOSEN, REJECTED)).all()
    ):
        raise UserError(f"{source}: its column {_ROLE} must hold {PLAIN}, {CHOSEN} (chosen) or {REJECTED} (rejected)")
    return column.to_numpy().astype(np.int8)


def _check_roles(source: str, roles: np.ndarray, rows: np.ndarray, objective: str) -> None:
    """Refuse examples that an objective does not learn from; pairs have to be of one row, the chosen one first."""
    wanted = learns_from(objective)
    if wanted == ROWS and roles.any():
        raise UserError(f"{source}: holds rated answers, which objective.name={objective} does not heed")
    if wanted in (PAIRED, SINGLE) and not roles.all():
        raise UserError(f"{source}: holds rows without a rating; objective.name={objective} learns from rated answers")
    if wanted == PAIRED and not _are_pairs(roles, rows):
        raise UserError(
            f"{source}: holds single rated answers; objective.name={objective} learns from pairs, kto from single ones"
        )


def _are_pairs(roles: np.ndarray, rows: np.ndarray) -> bool:
    ordered = np.array_equal(roles, np.tile(np.asarray([CHOSEN, REJECTED], np.int8), len(roles) // 2))
    return ordered and np.array_equal(rows[::2], rows[1::2])


def _add(loaded: _Loaded, batch: _Batch, rows: np.ndarray, max_length: int, kind: tuple[bool, bool]) -> None:
    """Take in one record batch: cut what is too long, check values, count targets, and leave out what has none.

    Args:
      kind: whether its examples are texts, which are cut into blocks, and whether they are pairs, which are not cut.
    """
    is_text, paired = kind
    bounds = batch.bounds
    lengths = np.diff(bounds)
    pieces = np.maximum(1, -(-lengths // max_length)) if is_text else np.ones_like(lengths)
    example = np.repeat(np.arange(len(lengths)), pieces)
    piece = np.arange(len(example)) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # 0, 1, ... within an example
    starts = bounds[:-1][example] + piece * max_length
    kept = bounds[1:][example] - starts
    kept = kept if paired else np.minimum(kept, max_length)
    targets, largest = _count_targets(batch, starts, kept)
    loaded.largest = max(loaded.largest, largest)
    cut = np.bool_(not is_text and not paired) & (lengths > max_length)
    loaded.truncated += int(cut.sum())
    loaded.eos_lost += int((batch.labels[bounds[1:][cut] - 1] != IGNORE).sum())
    loaded.split += int((pieces > 1).sum())
    for reason, of in (("no room for the answer within max_length", cut), ("nothing to predict", ~cut)):
        count = int(((targets == 0) & of[example]).sum())
        if count:
            loaded.dropped[reason] = loaded.dropped.get(reason, 0) + count
    good = targets > 0
    if paired:  # both or none
        whole = kept.reshape(-1, 2).sum(1) <= max_length
        good = np.repeat(good.reshape(-1, 2).all(1) & whole, 2)
        if count := int((~whole).sum()):
            loaded.dropped[LONG_PAIR] = loaded.dropped.get(LONG_PAIR, 0) + count
    loaded.column.append(np.full(good.sum(), len(loaded.ids), np.int32))
    loaded.ids.append(batch.ids)
    loaded.labels.append(batch.labels)
    for name, array in (
        ("starts", starts),
        ("lengths", kept),
        ("targets", targets),
        ("source_rows", rows[example]),
        ("roles", batch.roles[example]),
    ):
        getattr(loaded, name).append(array[good])
    loaded.rows += len(lengths)


def _count_targets(batch: _Batch, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the tokens to be predicted of each example, and the largest token id.

    Raises:
      UserError: a token id is negative, or a label is another token's.
    """
    targets, largest = np.zeros(len(starts), np.int64), -1
    for begin, end in _runs(starts, lengths):
        low, high = starts[begin], starts[end - 1] + lengths[end - 1]
        ids, labels = batch.ids[low:high], batch.labels[low:high]
        marked = labels != IGNORE
        wrong = (ids < 0) | (marked & (labels != ids))
        if wrong.any():
            at = int(np.argmax(wrong))
            row = batch.rows_before + int(np.searchsorted(batch.bounds, low + at, side="right"))
            raise UserError(
                f"{batch.source}, row {row}: input_ids {ids[at]} with the label {labels[at]}; a label must be the "
                "token's own id, or -100 where it is not predicted"
            )
        largest = max(largest, int(ids.max(initial=-1)))
        marked[starts[begin:end][lengths[begin:end] > 0] - low] = False  # the first of each example
        sums = np.concatenate([[0], np.cumsum(marked)])
        inner = starts[begin:end] - low
        targets[begin:end] = sums[inner + lengths[begin:end]] - sums[inner]
    return targets, largest


def _runs(starts: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cut examples, in order, into runs of about `_PIECE` values."""
    ends = starts + lengths
    begin = 0
    while begin < len(starts):
        end = max(begin + 1, int(np.searchsorted(ends, starts[begin] + _PIECE, side="right")))
        yield begin, end
        begin = end


def _finish(loaded: _Loaded, formats: Mapping[str, int]) -> TokenizedSet:
    def join(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)

    offsets = np.concatenate([[0], np.cumsum(join(loaded.lengths, np.int64))]).astype(np.int64)
    positions = (join(loaded.column, np.int32), join(loaded.starts, np.int64), offsets)
    targets, roles = join(loaded.targets, np.int64), join(loaded.roles, np.int8)
    formats = {name: count for name, count in formats.items() if name}
    summary = {
        "rows": loaded.rows,
        "examples": len(targets),
        "tokens": int(offsets[-1]),
        "target_tokens": int(targets.sum()),
        "truncated": loaded.truncated,
        "eos_lost": loaded.eos_lost,
        "split": loaded.split,
        "open_ended": 0,
        "rated": len(np.unique(join(loaded.source_rows, np.int64)[roles > 0])),
        "file_rows": loaded.file_rows,
        "dropped": dict(sorted(loaded.dropped.items())),
        "bad_rows": 0,
        "bad_examples": [],
        "max_token_id": loaded.largest,
        "formats": formats,
        "format": f"tokenized {in_words(formats)}".rstrip(),
    }
    return TokenizedSet(
        Values(loaded.ids, *positions, masks=False),
        Values(loaded.labels, *positions, masks=True),
        offsets,
        join(loaded.source_rows, np.int64),
        summary,
        targets,
        roles=roles if roles.any() else None,
    )


def _columns(source: str, batch: pa.RecordBatch, rows_before: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The batch's ids, its labels (the ids again where the file has none), and its examples' bounds in both.

    Labels are -100 where a mask of the file says that a token is not to be predicted, as TRL's collator has it, and
    padding is taken out. Only then are the arrays copies.
    """
    ids, bounds = _column(source, batch, "input_ids", rows_before)
    names = batch.schema.names
    labels = _column(source, batch, "labels", rows_before, bounds)[0] if "labels" in names else ids
    for name in _LOSS_MASKS:
        if name in names:
            mask = _column(source, batch, name, rows_before, bounds)[0]
            if not mask.all():
                labels = np.where(mask != 0, labels, IGNORE)
    if _PADDING_MASK in names:
        mask = _column(source, batch, _PADDING_MASK, rows_before, bounds)[0] != 0
        if not mask.all():
            ids, labels, bounds = _without_padding(source, ids, labels, bounds, mask, rows_before)
    return ids, labels, bounds


def _column(
    source: str, batch: pa.RecordBatch, name: str, rows_before: int, like: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The values of a column, and its rows' bounds in them, which are to be `like` those of `input_ids`."""
    try:
        values, bounds = _values(batch.column(name))
    except (TypeError, KeyError, pa.ArrowException) as error:
        what = "input_ids and labels have" if name in ("input_ids", "labels") else f"{name} has"
        raise UserError(f"{source}: {what} to be lists of whole numbers ({error})") from error
    # Lists of several batches may lie in one buffer, and begin anywhere in it.
    values, bounds = values[bounds[0] :], bounds - bounds[0]
    if like is not None and not np.array_equal(like, bounds):
        row = rows_before + (int(np.argmax(like != bounds)) if len(like) == len(bounds) else 1)
        raise UserError(f"{source}, row {row}: input_ids and {name} are not of the same length")
    return values[: bounds[-1]], bounds


def _without_padding(
    source: str, ids: np.ndarray, labels: np.ndarray, bounds: np.ndarray, mask: np.ndarray, rows_before: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take out the tokens that the attention mask leaves out before or behind each row's text.

    Raises:
      UserError: it leaves out some in the middle of a row, which another model would read differently.
    """
    begins = mask & ~np.concatenate([[False], mask[:-1]])
    begins[bounds[:-1][np.diff(bounds) > 0]] = mask[bounds[:-1][np.diff(bounds) > 0]]
    pieces = np.diff(np.concatenate([[0], np.cumsum(begins)])[bounds])
    if (pieces > 1).any():
        row = rows_before + int(np.argmax(pieces > 1)) + 1
        raise UserError(
            f"{source}, row {row}: attention_mask leaves out tokens in the middle; only padding is taken out"
        )
    kept = np.concatenate([[0], np.cumsum(mask)])[bounds]
    return ids[mask], labels[mask], kept


def _values(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The numbers in a column, without copying them, and where each list begins and the last one ends."""
    if isinstance(array, pa.FixedSizeListArray):
        array = array.cast(pa.list_(array.type.value_type))
    if isinstance(array, pa.ListArray | pa.LargeListArray):
        values, bounds = array.values, array.offsets.to_numpy().astype(np.int64)
    else:
        values, bounds = array, np.asarray([0, len(array)], np.int64)  # one block of text, as plain numbers
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    if not pa.types.is_integer(values.type):
        raise TypeError(f"they hold {values.type}")
    if array.null_count or values.null_count:
        raise TypeError("some are missing")
    return values.to_numpy(zero_copy_only=True), bounds


def _about(metadata: Any) -> dict[str, Any]:
    try:
        about = json_text.loads((metadata or {})[METADATA])
    except (KeyError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}
