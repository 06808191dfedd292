"""Which language a text is in, where that can be determined.

py3langid (a small model inside the package, 140 languages) gives probabilities. A text counts as being in another
language where it has at least 20 bytes of letters (20 Latin ones, 7 Chinese), its likeliest language has at least half
of the probability, and the allowed languages have less than a tenth together: short answers, code, numbers and names
are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from tpu_tune.data.extra import extra_library
from tpu_tune.errors import UserError

MIN_LETTER_BYTES = 20
MIN_PROBABILITY = 0.5  # of the likeliest
MAX_ALLOWED = 0.1  # of the allowed languages, together
MAX_CHARS = 2000  # read of a text; more tells no more


@functools.cache
def _identifier() -> Any:
    langid = extra_library("py3langid.langid", "py3langid", "--language")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def check_languages(languages: Sequence[str]) -> None:
    """Load the model and look the codes up.

    Raises:
      UserError: py3langid is not installed, or does not know a language.
    """
    known = _identifier().labels if languages else ()
    unknown = [language for language in languages if language not in known]
    if unknown:
        raise UserError(f"the language '{unknown[0]}' is unknown; known: {' '.join(sorted(known))}")


def other_language(text: str, languages: Sequence[str]) -> str:
    """The ISO 639 code of the text's language where it can be determined and is none of `languages`, else ""."""
    text = text[:MAX_CHARS]
    letters = sum(len(character.encode("utf-8", "replace")) for character in text if character.isalpha())
    if letters < MIN_LETTER_BYTES:
        return ""
    ranked = _identifier().rank(text)
    best, probability = ranked[0]
    share = sum(share for language, share in ranked if language in languages)
    # "zxx" is what the model calls text without any language.
    is_certain = best != "zxx" and probability >= MIN_PROBABILITY and share < MAX_ALLOWED
    return best if is_certain and best not in languages else ""
