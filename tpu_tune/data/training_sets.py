"""The data of a training run: sources -> formats -> tokens (cached) -> a held-out part -> packed rows."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpu_tune.config import source_paths
from tpu_tune.data import arrow, cache, mixture
from tpu_tune.data.formats import check_renamed, detect, in_words
from tpu_tune.data.loading import PackedRows
from tpu_tune.data.packing import one_per_row, pack
from tpu_tune.data.pairs import PairRows, pair_rows
from tpu_tune.data.preference_rows import preference_rows
from tpu_tune.data.preferences import PAIRED, ROWS, SINGLE, learns_from
from tpu_tune.data.sources import is_hub, read_rows, resolve
from tpu_tune.data.tokenize_options import TokenizeOptions, options_from_config
from tpu_tune.data.tokenized_set import TokenizedSet, merge
from tpu_tune.data.tokenizing import past_template
from tpu_tune.data.workers import tokenize_parallel
from tpu_tune.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Datasets:
    """What a run trains and evaluates on.

    Attributes:
      train: packed (or padded) rows; of a mixture `MixedRows`.
      eval: the same for the held-out rows, or None.
      summary: for `train` and `eval`, the format found, and counts of rows, tokens, and of what was cut or dropped.
        Where the evaluation rows are a split of the training file, counts other than `used_*` are the whole file's.
      eval_parts: source -> its held-out rows, where there are several sources.
    """

    train: PackedRows | PairRows | mixture.MixedRows
    eval: PackedRows | PairRows | None
    summary: dict[str, Any]
    eval_parts: Mapping[str, PackedRows | PairRows] = dataclasses.field(default_factory=dict)

    def eval_part(self, name: str) -> PackedRows | PairRows:
        """One of `eval_parts`, with what is known of its examples by now."""
        rows = self.eval_parts[name]
        return dataclasses.replace(rows, reference=self.eval.reference) if isinstance(rows, PackedRows) else rows


def load_data(config: Any, tokenizer: Any, vocab_size: int | None = None, start_token: int | None = None) -> Datasets:
    """Read, tokenize, split and pack the data of a configuration.

    Args:
      config: the whole configuration; `config.data` is read, and of answers to judge `config.objective`.
      tokenizer: a Hugging Face tokenizer. It needs no pad token: padding is token 0 in segment 0.
      vocab_size: rows of the model's embedding, to hold the token ids against.
      start_token: of an encoder-decoder: the id before its answers. Its rows are `PairRows`, padded and not packed.

    Raises:
      UserError: data that cannot be read or understood, tokens that the model does not have, or nothing to train on.
    """
    data, objective, pairs = config.data, config.objective.name, start_token is not None
    _check_use(data, objective, pairs)
    sources = mixture.sources_of(data.train)
    mixture.check(sources, data.mix_strategy)
    if len(sources) > 1 and data.max_train_samples:
        raise UserError("data.max_train_samples is of one source; give each of several a count")
    files = [resolve(source.path) for source in sources]
    name, eval_name = (", ".join(source_paths(value)) for value in (data.train, data.eval))
    options = options_from_config(data, tokenizer, pairs, objective)
    tokenized = functools.partial(_tokenized, data=data, tokenizer=tokenizer, vocab_size=vocab_size, options=options)
    train = tokenized([file for named, _ in files for file in named], name)
    _warn(name, train.summary)
    if note := past_template(train.summary, options, "data.format"):
        logger.warning("%s: %s", name, note)
    groups = _by_source(train, [len(named) for named, _ in files])
    held_out, held_groups, held_sources = None, [], sources
    if data.eval:
        held_sources = mixture.sources_of(data.eval, "data.eval")
        held_files = [held or named for named, held in (resolve(source.path) for source in held_sources)]
    else:
        held_files = [held or [] for _, held in files]
    if any(held_files) and not (data.eval_dataset_size and not data.eval):
        held_out = tokenized([file for held in held_files for file in held], eval_name or name)
        _warn(eval_name or f"{name} (evaluation files)", held_out.summary)
        held_groups = _by_source(held_out, list(map(len, held_files)))
    elif data.eval_ratio > 0 or data.eval_dataset_size:
        groups, held_groups = _hold_out(train, groups, data, name)
        held_out = train if any(map(len, held_groups)) else None
    groups = [_first(train, group, data.max_train_samples) for group in groups]
    rows = functools.partial(_rows, config=config, start_token=start_token)
    train_rows, counts = _mixed(train, groups, sources, config, rows)
    summary = {"train": {**_summarise(train_rows), **({"sources": counts} if counts else {})}}
    eval_rows, eval_parts = None, {}
    if held_out is not None:
        held_groups = [_first(held_out, group, data.max_eval_samples) for group in held_groups]
        eval_rows = rows(held_out, np.concatenate(held_groups))
        summary["eval"] = _summarise(eval_rows)
        there = [(source.name, group) for source, group in zip(held_sources, held_groups, strict=True) if len(group)]
        if len(there) > 1 and learns_from(objective) != SINGLE:
            eval_parts = {source: rows(held_out, group) for source, group in there}
    for part, figures in summary.items():
        _report(part, figures)
    return Datasets(train_rows, eval_rows, summary, eval_parts)


def _check_use(data: Any, objective: str, pairs: bool) -> None:
    if pairs and data.train_on_source:
        raise UserError(
            "data.train_on_source: an encoder-decoder has no loss on what its encoder reads; set it to False"
        )
    if learns_from(objective) != ROWS and data.train_on_source:
        raise UserError(f"data.train_on_source: objective.name={objective} rates answers only; set it to False")
    if learns_from(objective) != ROWS and pairs:
        raise UserError(f"objective.name={objective}: an encoder-decoder has sft alone; set objective.name=sft")


def _by_source(data: TokenizedSet, files: Sequence[int]) -> list[np.ndarray]:
    """The examples of each source, which is made of so many of the set's files."""
    if len(files) == 1:
        return [np.arange(len(data))]
    ends = np.cumsum(data.summary["file_rows"])
    file = np.searchsorted(ends, data.source_rows, side="right")
    source = np.searchsorted(np.cumsum(files), file, side="right")
    return [np.flatnonzero(source == number) for number in range(len(files))]


def _hold_out(
    train: TokenizedSet, groups: list[np.ndarray], data: Any, name: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Split each source's examples: `data.eval_ratio` of each, or `data.eval_dataset_size` rows of all together."""
    if data.eval_dataset_size:
        try:
            kept, held = split_rows(train.source_rows, data.eval_dataset_size, data.data_seed)
        except UserError as error:
            raise UserError(f"data.eval_dataset_size: {name} {error}") from error
        split = [(np.intersect1d(group, kept), np.intersect1d(group, held)) for group in groups]
    else:
        split = [
            tuple(group[part] for part in split_rows(train.source_rows[group], data.eval_ratio, data.data_seed))
            for group in groups
        ]
    if not any(len(held) for _, held in split):
        logger.warning("%s holds one usable row: there is none to hold out for evaluation", name)
    return [kept for kept, _ in split], [held for _, held in split]


def _mixed(
    train: TokenizedSet,
    groups: list[np.ndarray],
    sources: Sequence[mixture.Source],
    config: Any,
    rows: Callable[[TokenizedSet, np.ndarray], Any],
) -> tuple[Any, dict[str, int]]:
    """The rows to train on, and of several sources how many rows of each an epoch shows."""
    data = config.data
    sizes = [len(np.unique(train.source_rows[group])) for group in groups]
    if 0 in sizes and len(sizes) > 1:
        raise UserError(f"{sources[sizes.index(0)].path}: has no rows to train on; take it out of data.train")
    counts = mixture.rows_per_epoch(sources, sizes, data.mix_strategy)
    shown = {source.name: count for source, count in zip(sources, counts, strict=True)} if len(sources) > 1 else {}
    for source, count, size in zip(sources, counts, sizes, strict=True):
        if len(sources) > 1 or count != size:
            logger.info("%s: %d of its %d rows an epoch", source.path, count, size)
    if counts == sizes:
        return rows(train, np.sort(np.concatenate(groups))), shown
    draw = mixture.Draw(groups, train.source_rows, counts, data.data_seed)
    first = rows(train, draw.epoch(0))
    if learns_from(config.objective.name) != ROWS or isinstance(first, PairRows):
        return first, shown  # the shapes of these rows depend on what is in them: they are the same in every epoch
    return mixture.MixedRows(lambda epoch: rows(train, draw.epoch(epoch))), shown


def _first(data: TokenizedSet, examples: np.ndarray, count: int) -> np.ndarray:
    """Return the examples of the first `count` rows among those of `examples`; 0: all."""
    rows = data.source_rows[examples]
    return examples[np.isin(rows, np.unique(rows)[:count])] if count else examples


def split_rows(source_rows: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a seeded share of the rows: at least one, never all (none of a single one).

    Args:
      source_rows: (examples,) the row that each example comes from; a row's examples stay together.
      share: share of the rows, in (0, 1), or from 1 on their number.
      seed: decides which.

    Returns:
      (train examples, eval examples), sorted index arrays.

    Raises:
      UserError: so many rows that none are left to train on.
    """
    rows = np.unique(source_rows)
    if share >= max(1, len(rows)):
        raise UserError(f"has {len(rows)} rows, and {share:g} are to be held out; some must be left to train on")
    if len(rows) < 2:
        return np.arange(len(source_rows)), np.zeros(0, np.int64)
    count = int(np.clip(share if share >= 1 else round(len(rows) * share), 1, len(rows) - 1))
    held_out = np.random.default_rng(seed).permutation(rows)[:count]
    is_eval = np.isin(source_rows, held_out)
    return np.flatnonzero(~is_eval), np.flatnonzero(is_eval)


def _tokenized(
    sources: list[str], name: str, data: Any, tokenizer: Any, vocab_size: int | None, options: TokenizeOptions
) -> TokenizedSet:
    """Tokenize sources, or find them in the cache, and check that there is something to learn."""
    tokenized = [source for source in sources if arrow.is_tokenized(source)]
    if tokenized:
        _check_tokenized(sources, tokenized, name, tokenizer, options.encoder_decoder)
        if data.train_on_source or data.response_markers:
            logger.warning("%s is tokenized, and its own labels say what is trained on", name)
        result = arrow.load(sources, data.max_length, options.objective)
        _check(result, name, vocab_size)
        return result
    read = {source: read_rows(source, skip_bad_rows=data.skip_bad_rows) for source in sources if is_hub(source)}
    root = cache.directory(data.cache_dir)
    key = cache.fingerprint(sources, [row for rows, _ in read.values() for row in rows], tokenizer, options)
    result = cache.load(root, key)
    if result is not None:
        logger.info("using the tokenized data of %s in %s", name, root / "tokenized" / key)
    else:
        result = _tokenize_sources(sources, read, options, tokenizer, data.num_workers)
        cache.save(root, key, result)
    _check(result, name, vocab_size)
    return result


def _check_tokenized(sources: list[str], tokenized: list[str], name: str, tokenizer: Any, pairs: bool) -> None:
    """Refuse or warn before a tokenized file is trained on that was made for something else."""
    if pairs:
        raise UserError(f"{name}: an encoder-decoder reads rows with an input and an output, not tokenized ones")
    others = [source for source in sources if source not in tokenized]
    if others:
        raise UserError(
            f"{name}: holds tokenized rows ({tokenized[0]}) and others ({others[0]}), perhaps the same ones twice; "
            "name one file"
        )
    own = cache.tokenizer_hash(tokenizer)
    for source in tokenized:
        stored = arrow.read_about(source).get("tokenizer", own)
        if stored != own:
            logger.warning(
                "%s was tokenized with another tokenizer than this model's, or another version of it", source
            )


def _tokenize_sources(
    sources: list[str], read: dict[str, tuple], options: TokenizeOptions, tokenizer: Any, num_workers: int
) -> TokenizedSet:
    sets, bad, counts, first = [], [], [], 0
    for source in sources:
        rows, bad_in_source = read.get(source) or read_rows(source, skip_bad_rows=options.skip_bad_rows)
        if not sets and not options.skip_bad_rows:
            try:
                detect(rows[0], options.format, options.columns)
            except UserError as error:
                raise UserError(f"{source}: {error}") from error
        one = tokenize_parallel(rows, tokenizer, options, f"{source}, row", num_workers=num_workers)
        sets.append(dataclasses.replace(one, source_rows=one.source_rows + first))
        counts.append(len(rows))
        bad += bad_in_source
        first += len(rows)
    result = merge(sets)
    summary = {**result.summary, "file_rows": counts}
    result = dataclasses.replace(result, summary=summary)
    check_renamed(sources[0], options.columns, summary["renamed"], sum(summary["formats"].values()))
    summary["format"] = in_words(summary["formats"])
    summary["rows"] += len(bad)
    summary["bad_rows"] += len(bad)
    summary["bad_examples"] = [*map(str, bad), *summary["bad_examples"]][:5]
    return result


def _check(data: TokenizedSet, name: str, vocab_size: int | None) -> None:
    summary = data.summary
    if not len(data):
        reasons = [f"{reason}: {count}" for reason, count in summary["dropped"].items()]
        if summary["bad_rows"]:
            reasons.append(f"bad: {summary['bad_rows']}, first {summary['bad_examples'][0]}")
        raise UserError(f"{name}: none of the {summary['rows']} rows has anything to learn ({'; '.join(reasons)})")
    if vocab_size is not None and summary["max_token_id"] >= vocab_size:
        raise UserError(
            f"{name}: token id {summary['max_token_id']} is outside the model's vocabulary of {vocab_size}; "
            "the tokenizer does not belong to this model"
        )


def _rows(data: TokenizedSet, examples: np.ndarray, config: Any, start_token: int | None) -> PackedRows | PairRows:
    width, packing = config.data.max_length, config.data.packing
    if start_token is not None:
        return pair_rows(data, examples, width, start_token)
    if (kind := learns_from(config.objective.name)) != ROWS:
        return preference_rows(data, examples, width, packing, None if kind == PAIRED else mismatch_group(config))
    lengths = data.lengths
    if packing:
        packed = pack(lengths[examples], width)
    else:
        # One width for training and evaluation: that of the longest of all.
        width = one_per_row(lengths, width).width
        packed = dataclasses.replace(one_per_row(lengths[examples], width), width=width)
    return PackedRows(data, dataclasses.replace(packed, documents=examples[packed.documents]))


def mismatch_group(config: Any) -> int:
    """Return among how many consecutive answers KTO exchanges answers, as TRL in each micro-batch; 0: among none."""
    exchanges = learns_from(config.objective.name) == SINGLE and "apo_zero_unpaired" not in config.objective.loss_type
    return config.train.per_device_train_batch_size if exchanges else 0


def _summarise(rows: PackedRows | PairRows) -> dict[str, Any]:
    """The set's counts, and under `packed_*` those of the rows made of this part of it."""
    data, documents = rows.data, rows.documents
    tokens = int(data.lengths[documents].sum())
    targets = int(data.count_targets()[documents].sum())
    return {
        **data.summary,
        "used_examples": len(documents),
        "used_tokens": tokens,
        "used_target_tokens": targets,
        "packed_rows": len(rows),
        "width": rows.width,
        "fill": round(tokens / max(1, rows.capacity), 4),
    }


def _report(name: str, summary: dict[str, Any]) -> None:
    logger.info(
        "%s: %d examples (%s), %d tokens, %d of them targets, in %d rows of %d (%.0f%% full)",
        name,
        summary["used_examples"],
        summary["format"],
        summary["used_tokens"],
        summary["used_target_tokens"],
        summary["packed_rows"],
        summary["width"],
        100 * summary["fill"],
    )


def _warn(name: str, summary: dict[str, Any]) -> None:
    """Say aloud what of a set is not trained on as it was written."""
    for reason, count in summary["dropped"].items():
        logger.warning("%s: %d rows left out: %s", name, count, reason)
    for key, count in summary.get("unused", {}).items():
        logger.warning("%s: '%s' of %d rows is not used: it is not in the text that is trained on", name, key, count)
    if summary["bad_rows"]:
        logger.warning("%s: %d bad rows skipped, first %s", name, summary["bad_rows"], summary["bad_examples"][0])
    if summary["truncated"]:
        text = "%s: %d rows cut to length, %d of them lost the end of an answer"
        logger.warning(text, name, summary["truncated"], summary["eos_lost"])
    if summary["open_ended"]:
        text = "%s: the chat template ends %d chats without an end token, so the model will not learn to stop"
        logger.warning(text, name, summary["open_ended"])
