"""Texts set right: broken characters repaired, e-mail addresses and phone numbers masked."""

from __future__ import annotations

import functools
import re
from typing import Any

from tpu_tune.data.extra import extra_library
from tpu_tune.errors import UserError

EMAIL, PHONE = "[EMAIL]", "[PHONE]"

# Not an address: image@2x.png, git@github.com:user/repo, @user@mastodon.example, x@W.T and q@k.transpose() in code. The
# bounds on the lengths are those of RFC 5321; with the look-behind they also keep the search linear. Letters are those
# of scripts that put blanks between words: in Chinese or Japanese an address stands right beside the text.
_L = r"[^\W\u1100-\u11ff\u2e80-\uffff]"
_EMAIL = re.compile(
    rf"(?<![.+%@-])(?<!{_L})(?:{_L}|[+%-])(?:{_L}|[.+%'-]){{0,63}}@"
    rf"(?:(?!_){_L}(?:(?:{_L}|-){{0,61}}(?!_){_L})?\.){{1,8}}"
    r"(?!(?:png|jpe?g|gif|webp|svg|ico|bmp|html?|js|css|py|json)\b)"
    rf"(?:xn--[a-z0-9-]{{2,59}}|(?:(?![\d_]){_L}){{2,24}})(?!{_L}|[@(\[]|-{_L})(?!:[\w/~])",
    re.IGNORECASE,
)
_MAYBE_PHONE = re.compile(r"\d(?:\D{0,3}\d){6}")
# A run of digits alone is more often an identifier; behind one of these words it is a phone number.
_CALLED = re.compile(r"\b(?:phone|telephone|tel|mobile|cell|fax|call|text|sms|whatsapp)\b[^\d\n]{0,20}$", re.IGNORECASE)


def fix_unicode(text: str) -> str:
    """Repair mojibake, half surrogates, control characters and line breaks, and normalise to NFC, with ftfy.

    Curly quotes, full-width characters and HTML entities stay: they are no damage, and entities may be what a text is
    about.
    """
    ftfy = extra_library("ftfy", "ftfy", "--fix-unicode")
    return ftfy.fix_text(text, uncurl_quotes=False, fix_character_width=False, unescape_html=False)


def mask_emails(text: str) -> str:
    """Write [EMAIL] for every e-mail address."""
    return _EMAIL.sub(EMAIL, text) if "@" in text else text


def mask_phones(text: str, region: str) -> str:
    """Write [PHONE] for every phone number that is possible in its country, as phonenumbers tells.

    A number without + and without anything between its digits is masked only behind a word like "phone" or "call".

    Args:
      region: whose numbers are known without a country code; "" for none.
    """
    if not _MAYBE_PHONE.search(text):
        return text
    phonenumbers = _phonenumbers()
    pieces, done = [], 0
    for match in phonenumbers.PhoneNumberMatcher(text, region or None, phonenumbers.Leniency.STRICT_GROUPING):
        before = text[max(0, match.start - 40) : match.start]
        if match.raw_string.isdigit() and not _CALLED.search(before):
            continue
        pieces += [text[done : match.start], PHONE]
        done = match.end
    return "".join([*pieces, text[done:]])


@functools.cache
def _phonenumbers() -> Any:
    return extra_library("phonenumbers", "phonenumbers", "--mask-phone")


def check_region(region: str) -> None:
    """Look a region up.

    Raises:
      UserError: phonenumbers is not installed, or does not know the region.
    """
    known = _phonenumbers().SUPPORTED_REGIONS
    if region and region not in known:
        raise UserError(f"the phone region '{region}' is unknown; known: {' '.join(sorted(known))}")
