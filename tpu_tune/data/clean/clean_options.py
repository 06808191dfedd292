"""What `tpu-tune data clean` is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tpu_tune.config.engine import key
from tpu_tune.data import as_messages
from tpu_tune.data.clean.phrases import LISTS
from tpu_tune.data.formats import FORMATS
from tpu_tune.errors import UserError

ACTIONS = ("drop", "truncate")
SHINGLES = ("chars", "words")


@dataclass(frozen=True)
class CleanOptions:
    """The rules of a cleaning. The defaults drop rows with the guide's phrases, and exact duplicates.

    Attributes:
      lists: named lists of phrases to look for, of `phrases.LISTS`: guide, refusals, single-words.
      phrases: more phrases, as plain text.
      patterns: regular expressions to look for, with the syntax of the `regex` package (a superset of `re`).
      action: what a phrase or pattern does to its row. `drop` leaves the row out. `truncate` cuts the text where the
        sentence with the match begins; in a chat the later messages go too, as they answer what is cut away. A row
        without an answer left is dropped.
      prompts: look for phrases and patterns in what is not trained on too: prompts, system and user messages. A match
        there drops the row under either action, since a prompt with its end cut off asks something else.
      exact_duplicates: drop rows whose text, tools and roles equal an earlier row's, white space apart.
      near_duplicates: drop rows whose set of shingles has at least this Jaccard similarity, in (0, 1], with that of an
        earlier row which was kept. None: do not look.
      shingle: what a shingle is made of, `chars` or `words`.
      shingle_size: how many of them in a row.
      seed: of the hashes that find near duplicates.
      drop_empty: drop rows whose answers are all empty (white space, and no call of a tool): nothing is learnt from
        them.
      min_chars, max_chars, min_words, max_words: bounds on the row's text (prompt and answer together); 0 and None are
        no bound. Words are what white space separates.
      languages: ISO 639 codes; a row in another language is dropped, one whose language is uncertain is kept.
      repeated_text: take out of plain text the lines that stand at the top or the bottom of this share or more, in
        (0, 1], of a site's pages (`repeated`). None: do not look.
      fix_unicode: repair mojibake and broken characters.
      mask_email: write [EMAIL] for e-mail addresses.
      mask_phone: write [PHONE] for phone numbers.
      phone_region: whose numbers are known without a country code, an ISO 3166 code; "" for none.
      format: of the rows, as `data.format`.
      columns: renamed keys, as `data.columns`.
      as_format: `messages` writes every row so, whatever its format; "" leaves rows in theirs.
    """

    lists: tuple[str, ...] = ("guide",)
    phrases: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    action: str = "drop"
    prompts: bool = False
    exact_duplicates: bool = True
    near_duplicates: float | None = None
    shingle: str = "chars"
    shingle_size: int = 5
    seed: int = key(0, "", at_least=0, at_most=2**32 - 1)
    drop_empty: bool = False
    min_chars: int = 0
    max_chars: int | None = None
    min_words: int = 0
    max_words: int | None = None
    languages: tuple[str, ...] = ()
    repeated_text: float | None = None
    fix_unicode: bool = False
    mask_email: bool = False
    mask_phone: bool = False
    phone_region: str = "US"
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    as_format: str = ""


def check(options: CleanOptions) -> None:
    """Say what cannot be meant; what needs a library to check is checked where the rule is compiled.

    Raises:
      UserError: an option has a value that it cannot have.
    """
    as_messages.check(options.as_format)
    for name, value, known in (
        ("action", options.action, ACTIONS),
        ("shingle", options.shingle, SHINGLES),
        ("format", options.format, ("auto", *FORMATS)),
        *(("list of phrases", name, LISTS) for name in options.lists),
    ):
        if value not in known:
            raise UserError(f"the {name} '{value}' is unknown; known: {', '.join(known)}")
    if options.near_duplicates is not None and not 0 < options.near_duplicates <= 1:
        raise UserError(f"near duplicates have a similarity above 0 and at most 1, not {options.near_duplicates}")
    if options.repeated_text is not None and not 0 < options.repeated_text <= 1:
        raise UserError(f"repeated text is on a share of pages above 0 and at most 1, not {options.repeated_text}")
    if options.shingle_size < 1:
        raise UserError(f"a shingle has 1 {options.shingle} or more, not {options.shingle_size}")
    for unit, low, high in (
        ("chars", options.min_chars, options.max_chars),
        ("words", options.min_words, options.max_words),
    ):
        if low < 0 or (high is not None and high < low):
            raise UserError(
                f"no row can have at least {low} and at most {high} {unit}; change min_{unit} or max_{unit}"
            )
