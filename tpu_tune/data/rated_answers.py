"""Rated answers to token ids, as TRL has them: the prompt's ids, and those of prompt and answer as one text.

The answer is what the second have beyond the first, its end included: EOS behind a text, in a chat all that the
template writes. Of an answer of several messages, tool calls and their results, only the assistant's are marked, as in
a chat. The two answers of a pair stand in one row, so both are kept whole or none; a single answer is cut.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tpu_tune.data import chat as chats
from tpu_tune.data.marks import Marks, missing_ends, with_bos
from tpu_tune.data.messages import RowError
from tpu_tune.data.preferences import EQUAL, LONG_PAIR, SINGLE
from tpu_tune.data.samples import Chat, Rated
from tpu_tune.data.tokenize_options import TokenizeOptions

LONG = "longer than max_length"
Example = tuple[np.ndarray, np.ndarray, int]  # ids, mask, role


@dataclass(frozen=True)
class Answer:
    """An answer ready for the tokenizer.

    Attributes:
      prompt, whole: the text before it, and that with it.
      role: as in `Rated`.
      spans: characters of the whole that are marked; None: all behind the prompt.
      is_chat: the template has written it, special tokens and all.
    """

    prompt: str
    whole: str
    role: int
    spans: tuple[tuple[int, int], ...] | None = None
    is_chat: bool = False


def prepare(sample: Rated, tokenizer: Any, marks: Marks, options: TokenizeOptions) -> tuple[Answer, ...]:
    """Write out a row's answers, each with its prompt.

    Raises:
      UserError: there is no template, or it is not valid Jinja.
      RowError: the template refuses a chat, or does not begin it with its prompt.
    """
    answers = []
    for one, role in zip(sample.answers, sample.roles, strict=True):
        if isinstance(one, Chat):
            answers.append(_rendered(one, role, tokenizer, chats.template_of(options.chat_template, one)))
        else:
            bos = marks.bos if options.always_bos and not one.source.startswith(marks.bos) else ""
            end = marks.eos * missing_ends(one.target, marks, options)
            answers.append(Answer(bos + one.source, bos + one.source + one.target + end, role))
    for number, answer in enumerate(answers):
        if answer.is_chat:
            others = [answer] if options.learns_from == SINGLE else answers
            answers[number] = replace(answer, prompt=_common(answer.prompt, [one.whole for one in others]))
    return tuple(answers)


def _common(prompt: str, wholes: Sequence[str]) -> str:
    """A chat's prompt up to where an answer parts from a thought that its end opens (or opens and closes)."""
    least = len(chats.THOUGHT.sub("", prompt))
    return prompt[: max(least, min(len(os.path.commonprefix([prompt, whole])) for whole in wholes))]


def _rendered(sample: Chat, role: int, tokenizer: Any, template: str) -> Answer:
    whole = chats.render(tokenizer, template, sample)
    prompt = chats.render(tokenizer, template, chats.first_messages(sample, sample.first_target), True)
    whole = whole.removesuffix(chats.constant_header(tokenizer, template, sample, whole))
    spans = None
    if len(sample.messages) - sample.first_target > 1:
        spans = tuple(chats.assistant_spans(tokenizer, template, sample)[1])
    return Answer(prompt, whole, role, spans, is_chat=True)


def texts(answers: Sequence[Answer]) -> list[str]:
    """The texts to be tokenized: of each answer its prompt, and the whole."""
    return [text for answer in answers for text in (answer.prompt, answer.whole)]


def examples(
    answers: Sequence[Answer],
    pieces: Sequence[tuple[np.ndarray, Any]],
    marks: Marks,
    options: TokenizeOptions,
    counts: Counter,
    dropped: Counter,
) -> list[Example]:
    """Make the examples of a row: both answers of a pair or none, or for an objective on single ones each by itself.

    Args:
      pieces: ids and offsets of each of its `texts`.
      counts, dropped: take what was cut, and why what is missing was left out.

    Raises:
      RowError: a prompt is no beginning of prompt and answer, or two answers are equal.
    """
    complete = [_encode(*each, marks) for each in zip(answers, pieces[::2], pieces[1::2], strict=True)]
    if len(complete) == 2 and np.array_equal(complete[0][0], complete[1][0]):
        raise RowError(EQUAL)
    single = options.learns_from == SINGLE or len(answers) == 1
    if single and options.drop_long:
        long = [len(ids) > options.max_length for ids, _ in complete]
        dropped.update({LONG: sum(long)} if any(long) else {})
        complete = [one for one, is_long in zip(complete, long, strict=True) if not is_long]
        answers = [one for one, is_long in zip(answers, long, strict=True) if not is_long]
    made = []
    for answer, (ids, mask) in zip(answers, complete, strict=True):
        kept_ids, kept_mask = _cut(ids, mask, answer, options, options.max_length if single else len(ids))
        counts["truncated"] += len(kept_ids) < len(ids)
        counts["eos_lost"] += int(kept_mask.sum()) < int(mask.sum())
        # Behind a template's closing token a line break may stand.
        counts["open_ended"] += answer.is_chat and marks.closing_ids.isdisjoint(ids[mask][-2:].tolist())
        made.append((kept_ids, kept_mask, answer.role))
    if single:
        short = sum(not mask.any() for _, mask, _ in made)
        dropped.update({"no room for the answer within max_length": short} if short else {})
        return [one for one in made if one[1].any()]
    reason = ""
    if sum(len(ids) for ids, *_ in made) > options.max_length:
        reason = LONG_PAIR
    elif np.array_equal(made[0][0], made[1][0]):
        reason = "the two answers are equal once they are cut"
    dropped.update({reason: 1} if reason else {})
    return [] if reason else made


def _encode(
    answer: Answer, prompt: tuple[np.ndarray, Any], whole: tuple[np.ndarray, Any], marks: Marks
) -> tuple[np.ndarray, np.ndarray]:
    before, ids = prompt[0], whole[0]
    if not answer.is_chat:
        before, ids = with_bos(before, marks), with_bos(ids, marks)
    if not np.array_equal(ids[: len(before)], before):
        end, joined = answer.prompt[-20:], answer.whole.startswith(answer.prompt)
        how = f"is {'tokenized' if joined else 'rendered'} otherwise once an answer follows"
        way_out = "; begin the answer, not end the prompt, with the blank" if answer.prompt.endswith(" ") else ""
        raise RowError(f"the prompt is no beginning of prompt and answer: its end {end!r} {how}{way_out}")
    mask = np.arange(len(ids)) >= max(1, len(before))  # nothing comes before the first token to predict it from
    if answer.spans is not None:
        mask &= chats.mask_from_spans(whole[1], answer.spans)
    return ids, mask


def _cut(
    ids: np.ndarray, mask: np.ndarray, answer: Answer, options: TokenizeOptions, most: int
) -> tuple[np.ndarray, np.ndarray]:
    if not answer.is_chat:
        begin = int(np.argmax(mask))
        kept = np.arange(len(ids))
        before, said = kept[:begin][: options.source_max_len or None], kept[begin:][: options.target_max_len or None]
        ids, mask = (values[np.concatenate([before, said])] for values in (ids, mask))
    return ids[:most], mask[:most]
