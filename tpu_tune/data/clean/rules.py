"""The rules that look at one row alone, as one plain function.

`row_cleaner(options)` compiles them into a function from a row to (the row or None, the rules that it met). It pickles,
so that any engine may run it in any process; finding duplicates (`duplicates`) is a pass of its own behind it.

The rules are applied in this order: text repeated on a site's pages, unicode repair, masks (so that no report shows
what they hide), phrases, patterns, empty answers, bounds, language. A row that one of them drops is not looked at by
the others.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import regex

from tpu_tune.data.as_messages import as_messages
from tpu_tune.data.clean import language, repair
from tpu_tune.data.clean.clean_options import CleanOptions, check
from tpu_tune.data.clean.phrases import Phrase, compile_lists
from tpu_tune.data.clean.repeated import Repeated, site_of
from tpu_tune.data.clean.texts import Part, cut, parts, replace, says_nothing, visible
from tpu_tune.data.formats import RowError, format_of
from tpu_tune.errors import UserError

EMPTY = "empty answer"
REPEATED = "text repeated on a site's pages"
PATTERN_SECONDS = 5.0  # for one pattern in one text, then it is taken for one that would never end

# Where a sentence ends: the next one, or the next line, begins behind it.
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]*_]{0,4}\s+|[。！？][”』」]?|\n\s*")


@dataclass(frozen=True)
class Hit:
    """A rule that a row met.

    Attributes:
      rule: its name in reports.
      effect: what it did: `dropped` the row, `cut` it short, `changed` it, or had it `rewritten` in another format.
      snippet: the place in the text; of a changed text, after the change.
    """

    rule: str
    effect: str
    snippet: str


@dataclass(frozen=True)
class Rules:
    """CleanOptions, checked and compiled. Pickles."""

    options: CleanOptions
    phrases: tuple[Phrase, ...]
    patterns: tuple[Any, ...]
    repeated: Repeated | None = None


Cleaner = Callable[[Mapping[str, Any]], tuple[Mapping[str, Any] | None, list[Hit]]]


def row_cleaner(options: CleanOptions, repeated: Repeated | None = None) -> Cleaner:
    """Compile the rules.

    Args:
      repeated: what `repeated.find_repeated` found in all rows; `options.repeated_text` does nothing without it.

    Returns:
      `clean_row` with its rules: row -> (row or None, hits). A row that no rule changes is returned itself. It raises
      `formats.RowError` for a row of no known format, or on which a pattern takes too long.

    Raises:
      UserError: an option cannot be meant, a regular expression is none, or a library is missing.
    """
    check(options)
    language.check_languages(options.languages)
    if options.mask_phone:
        repair.check_region(options.phone_region)
    if options.fix_unicode:
        repair.fix_unicode("")
    phrases = compile_lists(options.lists, options.phrases)
    patterns = tuple(map(_compile_pattern, options.patterns))
    return functools.partial(clean_row, Rules(options, phrases, patterns, repeated))


def _compile_pattern(text: str) -> Any:
    try:
        pattern = regex.compile(text)
    except regex.error as error:
        raise UserError(f"the pattern '{text}' is not a regular expression ({error})") from error
    if pattern.match(""):
        raise UserError(f"the pattern '{text}' matches the empty text, and so every row; make it ask for something")
    return pattern


def clean_row(rules: Rules, row: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, list[Hit]]:
    """Apply the rules to one row; see `row_cleaner`."""
    options = rules.options
    format = format_of(row, options.format, options.columns)
    found = parts(row, format, options.columns)
    hits: list[Hit] = []

    if rules.repeated and format == "text":
        text, taken = rules.repeated.without(found[0].text, site_of(row))
        if taken:
            hits.append(Hit(REPEATED, "changed" if text else "dropped", snippet(taken)))
        if not text and taken:
            return None, hits
        row, found = replace(row, {found[0].path: text}) if taken else row, [dataclasses.replace(found[0], text=text)]
    edits = _edits(options)
    for number, (name, edit) in enumerate(edits):
        changes = {part.path: new for part in found if (new := edit(part.text)) != part.text}
        if changes:
            first = next(part for part in found if part.path in changes)
            shown = changes[first.path]
            for _, later in edits[number + 1 :]:
                shown = later(shown)
            hits.append(Hit(name, "changed", _difference(first.text, shown)))
            row = replace(row, changes)
            found = [Part(part.path, changes.get(part.path, part.text), part.answer) for part in found]
    while noise := _noise(found, rules):
        part, matches = noise
        start = min(match.start for match in matches)
        shorter = None
        if options.action == "truncate" and part.answer:
            shorter = cut(row, format, part, _sentence_start(part.text, start))
        effect = "dropped" if shorter is None else "cut"
        known = {hit.rule for hit in hits}
        hits += [
            Hit(match.rule, effect, snippet(part.text, match.start, match.end))
            for match in matches
            if effect == "dropped" or match.rule not in known
        ]
        if shorter is None:
            return None, hits
        row, found = shorter, parts(shorter, format, options.columns)
    if options.drop_empty and says_nothing(row, found):
        hits.append(Hit(EMPTY, "dropped", snippet(visible(row, found))))
        return None, hits
    if reason := _out_of_bounds(row, found, options):
        hits.append(Hit(reason, "dropped", snippet(visible(row, found))))
        return None, hits
    if options.as_format and (format != "messages" or options.columns):
        shown = snippet(visible(row, found))
        hits.append(Hit(f"written as {options.as_format}, from {format}", "rewritten", shown))
        row = as_messages(row, format, options.columns)
    return row, hits


def _edits(options: CleanOptions) -> list[tuple[str, Callable[[str], str]]]:
    edits = []
    if options.fix_unicode:
        edits.append(("unicode repaired", repair.fix_unicode))
    if options.mask_email:
        edits.append(("e-mail masked", repair.mask_emails))
    if options.mask_phone:
        edits.append(("phone masked", functools.partial(repair.mask_phones, region=options.phone_region)))
    return edits


@dataclass(frozen=True)
class _Match:
    rule: str
    start: int
    end: int


def _noise(found: list[Part], rules: Rules) -> tuple[Part, list[_Match]] | None:
    """The first text with phrases or patterns in it, each one's first match, in the order of the rules."""
    for part in found:
        if not (part.answer or rules.options.prompts):
            continue
        lowered = part.text.lower()
        matches = []
        for phrase in rules.phrases:
            if phrase.anchor in lowered and (match := phrase.pattern.search(part.text)):
                matches.append(_Match(f"phrase: {phrase.text}", *match.span()))
        for pattern in rules.patterns:
            try:
                match = pattern.search(part.text, timeout=PATTERN_SECONDS)
            except TimeoutError as error:
                text = f"the pattern '{pattern.pattern}' takes more than {PATTERN_SECONDS:g} s here; make it simpler"
                raise RowError(text) from error
            if match:
                matches.append(_Match(f"pattern: {pattern.pattern}", *match.span()))
        if matches:
            return part, matches
    return None


def _sentence_start(text: str, position: int) -> int:
    """Where the sentence around a position begins; an abbreviation with a full stop counts as an end."""
    start = 0
    for match in _SENTENCE_END.finditer(text, 0, position):
        start = match.end()
    return start


def _out_of_bounds(row: Mapping[str, Any], found: list[Part], options: CleanOptions) -> str:
    bounded = options.min_chars or options.min_words or not (options.max_chars is options.max_words is None)
    if not (bounded or options.languages):
        return ""
    text = "\n".join(part.text for part in found)
    for unit, low, high, measure in (
        ("characters", options.min_chars, options.max_chars, len),
        ("words", options.min_words, options.max_words, lambda text: len(text.split())),
    ):
        if low and measure(text) < low:
            return f"fewer than {low} {unit}"
        if high is not None and measure(text) > high:
            return f"more than {high} {unit}"
    if options.languages and (other := language.other_language(text, options.languages)):
        return f"language: {other}"
    return ""


def snippet(text: str, start: int = 0, end: int = 0, around: int = 40) -> str:
    """A line with the text between two positions and some characters around it."""
    end = min(max(end, start), start + 80)
    left, right = max(0, start - around), min(len(text), end + around)
    line = " ".join(text[left:right].split())
    return ("…" if left else "") + line + ("…" if right < len(text) else "")


def _difference(old: str, new: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    return snippet(new, same)
