"""Rows to token ids with a loss mask.

`tokenize_rows` is a plain function of (rows, tokenizer, options). What is left out or cut is counted by reason, and
never silently trained on.

The mask says which tokens are to be predicted:
* text: every one (or, with response markers, those of the responses);
* pair: the target and EOS (or everything with `train_on_source`); what it goes on from is encoded as a prompt is
  (`tokenizers.encode_text`), or with `always_bos` as the collator of qlora has it;
* chat: what the assistant says (or everything with `train_on_source`).
An example's first token is never predicted, so it is never marked. For an encoder-decoder every row is a pair, and EOS
ends its source too: what is marked goes to the decoder (`pairs`), and each side is cut by itself, before its EOS, as
Hugging Face truncates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tpu_tune.data import chat as chats
from tpu_tune.data import preferences, rated_answers
from tpu_tune.data.formats import (
    AS_CHAT,
    PAIRS,
    RATED,
    Chat,
    Pair,
    Rated,
    Sample,
    Text,
    bare,
    columns_of,
    convert,
    format_of,
    rename,
    unused_keys,
)
from tpu_tune.data.labels import labelled, read_label
from tpu_tune.data.marks import Marks, missing_ends, read_marks, with_bos
from tpu_tune.data.messages import RowError, is_context_only
from tpu_tune.data.sources import BadRow, with_advice
from tpu_tune.data.tokenize_options import TokenizeOptions
from tpu_tune.data.tokenized_set import PLAIN, TokenizedSet
from tpu_tune.errors import UserError, counted

_BATCH = 1024  # rows whose texts go to the tokenizer together; its own threads share them


def tokenize_rows(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    options: TokenizeOptions,
    where: str | Sequence[str] = "row",
    first: int = 0,
) -> TokenizedSet:
    """Tokenize rows, each in its own format or all in the one that the options name.

    Args:
      rows: dictionaries as `sources.read_rows` gives them.
      tokenizer: a Hugging Face tokenizer; chats and response markers need a fast one, for its character offsets.
      options: format, lengths and masks.
      where: for messages, the rows' source, or where each of them stands.
      first: index of the first row, for messages and `source_rows`.

    Raises:
      UserError: a bad row (unless `options.skip_bad_rows`), a template from which no mask can be had, or for an
        encoder-decoder a row that is no pair.
    """
    if options.response_markers:
        _check_fast(tokenizer)

    def where_is(index: int) -> str:
        return f"{where} {index + 1}" if isinstance(where, str) else where[index - first]

    marks = read_marks(tokenizer)
    counts, formats, dropped, unused, bad = Counter(), Counter(), Counter(), Counter(), []
    format, labels = "", {}
    made: list[tuple[int, np.ndarray, np.ndarray, int]] = []

    def refuse(index: int, error: RowError) -> None:
        kinds.pop(index, None)
        bad.append(BadRow(where_is(index), str(error)))
        if not options.skip_bad_rows:
            raise UserError(with_advice(bad[-1], "fix it or set data.skip_bad_rows=True")) from error

    for start in range(0, len(rows), _BATCH):
        samples, kinds = [], {}
        for index, row in enumerate(rows[start : start + _BATCH], start=first + start):
            try:
                format = format_of(row, options.format, options.columns, format)
                _check_use(row, format, options, where_is(index))
                sample = convert(row, format, options.columns)
                if options.judges:
                    labels[index] = read_label(options.labels, rename(row, options.columns))
                if options.encoder_decoder and not isinstance(sample, Pair):
                    raise UserError(_no_pair(sample, where_is(index)))
                sample, unread = _for_template(sample, tokenizer, options)
                if isinstance(sample, Chat) and sample.says_nothing and not options.train_on_source:
                    dropped["empty answer"] += 1
                else:
                    samples.append((index, _prepare(sample, tokenizer, marks, options)))
                kinds[index] = format
                counts.update({_kind(sample): 1, "renamed": bool(columns_of(row, options.columns))})
                counts["rated"] += isinstance(sample, Rated)
                unused.update([*unused_keys(row, format, options.columns), *unread])
            except RowError as error:
                refuse(index, error)
        made += _encode(samples, tokenizer, marks, options, (counts, dropped), refuse)
        formats.update(kinds.values())
    figures = {
        "rows": len(rows),
        "formats": dict(sorted(formats.items())),
        "chats": counts["Chat"],
        "pairs": counts["Pair"],
        **{name: counts[name] for name in ("rated", "renamed", "truncated", "eos_lost", "split", "open_ended")},
        "dropped": dict(sorted(dropped.items())),
        "unused": dict(sorted(unused.items())),
        "bad_rows": len(bad),
        "bad_examples": [str(row) for row in bad[:5]],
    }
    flat = _flat(made, figures)
    return labelled(flat, labels, options.pad_token) if options.judges else flat


def _flat(made: Sequence[tuple[int, np.ndarray, np.ndarray, int]], figures: dict[str, Any]) -> TokenizedSet:
    """Lay examples, (row, ids, mask, role) each, one after the other, and add their counts to the figures."""
    rows, ids, masks, roles = zip(*made, strict=True) if made else ((), (), (), ())
    tokens = np.concatenate([np.zeros(0, np.int32), *ids]).astype(np.int32, copy=False)
    loss_mask = np.concatenate([np.zeros(0, bool), *masks])
    summary = {
        **figures,
        "examples": len(made),
        "tokens": len(tokens),
        "target_tokens": int(loss_mask.sum()),
        "max_token_id": int(tokens.max(initial=-1)),
    }
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in ids], dtype=np.int64)]).astype(np.int64)
    return TokenizedSet(
        tokens,
        loss_mask,
        offsets,
        np.asarray(rows, np.int64),
        summary,
        roles=np.asarray(roles, np.int8) if figures["rated"] else None,
    )


def _check_use(row: Mapping[str, Any], format: str, options: TokenizeOptions, where: str) -> None:
    try:
        preferences.check_use(options.objective, bare(format), rename(row, options.columns))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _kind(sample: Sample) -> str:
    """What of a row becomes tokens: a text, a pair or a chat; of rated answers, what each of them is."""
    return type(sample.answers[0] if isinstance(sample, Rated) else sample).__name__


def _check_fast(tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        raise UserError("chats and response markers need a fast tokenizer (tokenizer.json), for its offsets")


def past_template(summary: Mapping[str, Any], options: TokenizeOptions, option: str) -> str:
    """Say that pairs are trained on without the chat template that the tokenizer has; "" where that is not so.

    Args:
      summary: of `tokenize_rows`, or sums of several.
      option: what names the format, for the way out: `data.format`, `--format`.
    """
    pairs = summary.get("pairs", 0)
    if not pairs or not options.chat_template or options.encoder_decoder:
        return ""
    formats = [name for name in (*PAIRS, *RATED) if name in summary["formats"]]
    rows = f"{counted(pairs, 'row')} ({', '.join(formats)}) {'is' if pairs == 1 else 'are'}"
    return (
        f"{rows} trained on without the tokenizer's chat template, through which a chat model is usually asked: "
        f"{option}=auto{AS_CHAT} makes prompt and answer its turns"
    )


@dataclass(frozen=True)
class _Spans:
    """A text with the character spans to be predicted."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Encoded:
    ids: np.ndarray
    mask: np.ndarray


def _for_template(sample: Sample, tokenizer: Any, options: TokenizeOptions) -> tuple[Sample, list[str]]:
    """Make a chat ready for its template; also name what it holds and the template does not read."""
    if isinstance(sample, Rated):
        made = [_for_template(answer, tokenizer, options) for answer in sample.answers]
        unread = dict.fromkeys(name for _, names in made for name in names)
        return replace(sample, answers=tuple(answer for answer, _ in made)), list(unread)
    if not isinstance(sample, Chat):
        return sample, []
    _check_fast(tokenizer)
    if options.train_on_source and any(map(is_context_only, sample.messages)):
        raise RowError(
            "a message is marked not to be trained on (weight, train or training), and data.train_on_source trains on "
            "everything; take one of them away"
        )
    template = chats.template_of(options.chat_template, sample)
    unread = chats.unread(template, sample)  # not of the configuration's variables, which are for every row
    variables = {**options.chat_template_kwargs, **sample.template_kwargs}
    chats.check_variables(tokenizer, variables)
    sample = replace(sample, template_kwargs=variables)
    return chats.with_arguments(tokenizer, template, sample), unread


def _prepare(sample: Sample, tokenizer: Any, marks: Marks, options: TokenizeOptions) -> Any:
    """What `_encode` takes: a text, a pair, `_Spans`, `_Encoded`, or a tuple of rated answers."""
    if isinstance(sample, Rated):
        return rated_answers.prepare(sample, tokenizer, marks, options)
    if isinstance(sample, Chat):
        template = chats.template_of(options.chat_template, sample)
        if chats.has_generation_tag(template):
            return _Encoded(*chats.encode_tagged(tokenizer, template, sample))
        text, spans = chats.assistant_spans(tokenizer, template, sample)
        return _Spans(text, tuple(spans))
    return sample


def _encode(
    samples: Sequence[tuple[int, Any]],
    tokenizer: Any,
    marks: Marks,
    options: TokenizeOptions,
    tallies: tuple[Counter, Counter],
    refuse: Callable[[int, RowError], None],
) -> Iterator[tuple[int, np.ndarray, np.ndarray, int]]:
    """Yield (row, ids, mask, role) of each example; `tallies` are what was cut, and what was left out and why."""
    counts, dropped = tallies
    texts = [text for _, sample in samples for text in _texts(sample, marks, options)]
    with_offsets = bool(options.response_markers) or any(_needs_offsets(sample) for _, sample in samples)
    encoded = _tokenize(tokenizer, texts, with_offsets)
    for index, sample in samples:
        pieces = [next(encoded) for _ in _texts(sample, marks, options)]
        if isinstance(sample, tuple):
            try:
                rated = rated_answers.examples(sample, pieces, marks, options, counts, dropped)
            except RowError as error:
                refuse(index, error)
            else:
                yield from ((index, *example) for example in rated)
            continue
        if isinstance(sample, Pair):
            pieces[0] = (with_bos(pieces[0][0], marks), None)
        if options.drop_long and _length(sample, pieces) > options.max_length:
            dropped["longer than max_length"] += 1
            continue
        if isinstance(sample, Text):
            examples = _text_examples(sample, *pieces[0], marks, options, counts)
            reason = "no response marker in the text" if options.response_markers else "empty text"
        elif isinstance(sample, Pair):
            make = _two_sides if options.encoder_decoder else _pair_examples
            examples = make(pieces[0][0], pieces[1][0], marks, options, counts)
            says_nothing = not (sample.target.replace(marks.eos, "") if marks.eos else sample.target)
            reason = "empty answer" if says_nothing else "no room for the answer within max_length"
            if options.encoder_decoder and not examples:
                reason = "nothing to read"
            if says_nothing and not options.train_on_source:
                examples = []  # only EOS is left to learn: to say nothing
        else:
            examples = _chat_examples(sample, pieces, marks, options, counts)
            reason = "nothing said by the assistant"
            if examples and len(examples[0][0]) == options.max_length:
                reason += " within max_length"
        kept = 0
        for ids, mask in examples:
            if mask.any():
                kept += 1
                yield index, ids, mask, PLAIN
            elif len(examples) > 1:
                dropped["part of a long text without a response"] += 1
        if not kept:
            dropped[reason] += 1


def _length(sample: Any, pieces: list) -> int:
    """Tokens of a row that may not be cut into blocks."""
    if isinstance(sample, Text):
        return 0
    return len(sample.ids) if isinstance(sample, _Encoded) else sum(len(ids) for ids, _ in pieces)


def _no_pair(sample: Sample, where: str) -> str:
    kind = {Text: "plain text", Rated: "a preference row"}.get(type(sample), "a chat")
    return (
        f"{where}: this is {kind}, and an encoder-decoder learns from rows with an input and an output; "
        "use input/output, prompt/completion or alpaca rows"
    )


def _needs_offsets(sample: Any) -> bool:
    if isinstance(sample, tuple):
        return any(answer.spans is not None for answer in sample)
    return isinstance(sample, _Spans)


def _texts(sample: Any, marks: Marks, options: TokenizeOptions) -> list[str]:
    if isinstance(sample, tuple):
        return rated_answers.texts(sample)
    if options.encoder_decoder:  # its pairs are read as Hugging Face's tokenizers read one text each
        return [sample.source, sample.target]
    if isinstance(sample, Pair):
        bos = marks.bos if options.always_bos and not sample.source.startswith(marks.bos) else ""
        return [bos + sample.source, sample.target + marks.eos * missing_ends(sample.target, marks, options)]
    return [] if isinstance(sample, _Encoded) else [sample.text]


def _tokenize(tokenizer: Any, texts: list[str], with_offsets: bool) -> Iterator[tuple[np.ndarray, Any]]:
    if not texts:
        return
    if not with_offsets and _is_plain(tokenizer):
        # Without offsets the core is quicker. What a call sets in it (no truncation) has been set by `read_marks`.
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield np.asarray(encoding.ids, np.int32), None
        return
    plain = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    extra = {"return_offsets_mapping": True} if with_offsets else {}
    encoded = tokenizer(texts, add_special_tokens=False, **plain, **extra)
    offsets = encoded["offset_mapping"] if with_offsets else [None] * len(texts)
    for ids, bounds in zip(encoded["input_ids"], offsets, strict=True):
        yield np.asarray(ids, np.int32), bounds


def _is_plain(tokenizer: Any) -> bool:
    """Whether a call of the tokenizer does nothing but ask its core; some classes look into the texts themselves."""
    if not tokenizer.is_fast:
        return False
    owners = [
        next((c for c in type(tokenizer).__mro__ if name in vars(c)), None) for name in ("__call__", "_encode_plus")
    ]
    return all(owner is not None and owner.__module__.startswith("transformers.tokenization_utils") for owner in owners)


def _text_examples(
    sample: Text, ids: np.ndarray, offsets: Any, marks: Marks, options: TokenizeOptions, counts: Counter
) -> list[tuple[np.ndarray, np.ndarray]]:
    if not len(ids):
        return []
    if options.response_markers:
        spans = response_spans(sample.text, options.response_markers, options.instruction_markers)
        mask = chats.mask_from_spans(offsets, spans)
        open_at_end = bool(spans) and spans[-1][1] == len(sample.text)
    else:
        mask, open_at_end = np.ones(len(ids), bool), True
    begun = with_bos(ids, marks)
    there = len(ids) - int(np.flatnonzero(np.append(-1, ids) != marks.eos_id)[-1])  # EOS that it ends in already
    ends = [marks.eos_id] * max(0, options.num_eos - there) if marks.eos_id is not None else []
    mask = np.concatenate([np.zeros(len(begun) - len(ids), bool), mask, np.full(len(ends), open_at_end)])
    ids = np.concatenate([begun, np.asarray(ends, np.int32)])
    width = options.max_length
    counts["split"] += len(ids) > width
    return [_example(ids[i : i + width], mask[i : i + width]) for i in range(0, len(ids), width)]


def _pair_examples(
    source: np.ndarray, target: np.ndarray, marks: Marks, options: TokenizeOptions, counts: Counter
) -> list[tuple[np.ndarray, np.ndarray]]:
    uncut = len(source) + len(target)
    source = source[: options.source_max_len or None]
    room = max(0, options.max_length - len(source))
    kept = target[: min(options.target_max_len or room, room)]
    counts["truncated"] += len(source) + len(kept) < uncut
    counts["eos_lost"] += len(kept) < len(target) and marks.eos_id is not None
    ids = np.concatenate([source, kept])[: options.max_length]
    mask = np.ones(len(ids), bool)
    if not options.train_on_source:
        mask[: len(source)] = False
    return [_example(ids, mask)]


def _two_sides(
    source: np.ndarray, target: np.ndarray, marks: Marks, options: TokenizeOptions, counts: Counter
) -> list[tuple[np.ndarray, np.ndarray]]:
    end = np.asarray([] if marks.eos_id is None else [marks.eos_id], np.int32)

    source, target = (ids[:-1] if len(end) and ids[-1:].tolist() == end.tolist() else ids for ids in (source, target))

    def cut(ids: np.ndarray, limit: int) -> np.ndarray:
        return np.append(ids[: min(limit or options.max_length, options.max_length) - len(end)], end)

    prompt, answer = cut(source, options.source_max_len), cut(target, options.target_max_len)
    if not len(prompt):
        return []
    lost = len(answer) < len(target) + len(end)
    counts["truncated"] += lost or len(prompt) < len(source) + len(end)
    counts["eos_lost"] += lost  # not EOS itself, but what stood before it
    return [_example(np.append(prompt, answer), np.arange(len(prompt) + len(answer)) >= len(prompt))]


def _chat_examples(
    sample: _Spans | _Encoded, pieces: list, marks: Marks, options: TokenizeOptions, counts: Counter
) -> list[tuple[np.ndarray, np.ndarray]]:
    if isinstance(sample, _Encoded):
        ids, mask = sample.ids, sample.mask
    else:
        ids, mask = pieces[0][0], chats.mask_from_spans(pieces[0][1], sample.spans)
    targets = np.flatnonzero(mask)
    if len(targets):
        counts["open_ended"] += int(ids[targets[-1]]) not in marks.closing_ids
        counts["eos_lost"] += bool(targets[-1] >= options.max_length)
    counts["truncated"] += len(ids) > options.max_length
    if options.train_on_source:
        mask = np.ones(len(ids), bool)
    return [_example(ids[: options.max_length], mask[: options.max_length])]


def _example(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mask = np.array(mask, bool)
    mask[:1] = False  # nothing comes before it to predict it from
    return ids, mask


def response_spans(
    text: str, response_markers: Sequence[str], instruction_markers: Sequence[str]
) -> list[tuple[int, int]]:
    """Find the character spans after a response marker, each up to the next instruction marker or the text's end."""
    spans, position = [], 0
    while True:
        found = [(at, -len(m)) for m in response_markers if m and (at := text.find(m, position)) >= 0]
        if not found:
            return spans
        at, negative = min(found)  # of markers that begin together the longest
        start = at - negative
        ends = [at for m in instruction_markers if m and (at := text.find(m, start)) >= 0]
        end = min(ends, default=len(text))
        spans.append((start, end))
        position = end
