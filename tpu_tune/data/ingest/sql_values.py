"""The values of an INSERT: literals, and the few functions that dumps hold, understood and not executed."""

from __future__ import annotations

import re
from typing import Any

from tpu_tune.data import streams
from tpu_tune.data.ingest.blobs import BadSource
from tpu_tune.data.ingest.encodings import too_long
from tpu_tune.data.ingest.sql_tokens import END, NAME, NUMBER, SIGN, STRING, WORD, Tokens


class _Unknown(Exception):
    """A value that only a database can tell."""


def read_name(tokens: Tokens) -> str:
    """Read a name such as `public.posts`; its last part."""
    name = str(tokens.next()[1])
    while tokens.peek() == (SIGN, "."):
        tokens.next()
        name = str(tokens.next()[1])
    return name


def read_row(tokens: Tokens) -> tuple[list[Any], str]:
    """Read `(value, value)`; (values, what is wrong with them)."""
    tokens.next()
    values: list[Any] = []
    reason = ""
    while True:
        try:
            values.append(_value(tokens))
        except _Unknown as error:
            values.append(None)
            reason = f"value {len(values)} is no literal ({error}); only a database can tell it"
        except RecursionError as error:
            raise BadSource(f"line {tokens.line()}: brackets in brackets without an end") from error
        token = tokens.next()
        if token not in ((SIGN, ","), (SIGN, ")")) and token[0] != END:
            reason = reason or f"value {len(values)} is no literal (near '{str(token[1])[:20]}')"
            _to_next_value(tokens)
            token = tokens.next()
        if token == (SIGN, ")"):
            return values, reason
        if token[0] == END:
            raise BadSource(f"line {tokens.line()}: it ends inside a row; is it cut short?")


def _to_next_value(tokens: Tokens) -> None:
    depth = 0
    while (token := tokens.peek())[0] != END:
        if depth == 0 and token in ((SIGN, ","), (SIGN, ")")):
            return
        depth += (token == (SIGN, "(")) - (token == (SIGN, ")"))
        tokens.next()


def _value(tokens: Tokens) -> Any:
    value = _single(tokens)
    while True:
        token = tokens.peek()
        if token == (SIGN, "||"):
            tokens.next()
            other = _single(tokens)
            value = None if value is None or other is None else _joined([str(value), str(other)])
        elif token == (SIGN, "::"):
            tokens.next()
            _type(tokens)
        elif token[0] == WORD and token[1].upper() == "COLLATE":
            tokens.next()
            read_name(tokens)
        else:
            return value


def _type(tokens: Tokens) -> None:
    """Pass over a type: `character varying(20)[]`."""
    while (token := tokens.peek())[0] in (WORD, NAME) or token in ((SIGN, "["), (SIGN, "]"), (SIGN, ".")):
        tokens.next()
    if token == (SIGN, "("):
        tokens.next()
        while (token := tokens.next())[0] != END and token != (SIGN, ")"):
            pass


def _single(tokens: Tokens) -> Any:
    kind, text = tokens.next()
    if kind == STRING:
        return text
    if kind == NUMBER:
        return _number(text)
    if kind == NAME and tokens.dialect == "mysql":  # there double quotes are a string's, too
        return text
    if (kind, text) == (SIGN, "("):
        value = _value(tokens)
        _expect(tokens, ")")
        return value
    if kind == SIGN and text in "+-":
        value = _single(tokens)
        if isinstance(value, int | float):
            return -value if text == "-" else value
        raise _Unknown(f"{text}{value}")
    if kind == WORD:
        return _word(tokens, text)
    if (kind, text) in ((SIGN, ")"), (SIGN, ",")) or kind == END:
        tokens.give_back((kind, text))
    raise _Unknown(f"'{text[:20]}'")


def _word(tokens: Tokens, text: str) -> Any:
    word = text.upper()
    if word in ("NULL", "DEFAULT"):
        return None
    if word in ("TRUE", "FALSE"):
        return word == "TRUE"
    if word.startswith("0X"):
        digits = text[2:]
        return bytes.fromhex("0" * (len(digits) % 2) + digits) if re.fullmatch("[0-9A-Fa-f]*", digits) else text
    token = tokens.peek()
    if token[0] == STRING:  # a character set before a string (_utf8mb4'..'), or a type (DATE '..')
        return _single(tokens)
    if token != (SIGN, "("):
        raise _Unknown(text[:40])
    tokens.next()
    arguments: list[Any] = []
    unknown = ""
    while tokens.peek() != (SIGN, ")"):
        try:
            arguments.append(_value(tokens))
        except _Unknown as error:
            unknown = str(error)
        token = tokens.peek()
        if word == "CAST" and token[0] == WORD and token[1].upper() == "AS":
            _type(tokens)
        elif token == (SIGN, ","):
            tokens.next()
        elif token != (SIGN, ")"):
            unknown = unknown or str(token[1])[:20]
            _to_next_value(tokens)
            if tokens.peek()[0] == END:
                break
    tokens.next()
    return _call(word, arguments, unknown)


def _expect(tokens: Tokens, sign: str) -> None:
    if tokens.peek() != (SIGN, sign):
        raise _Unknown(f"'{str(tokens.peek()[1])[:20]}'")
    tokens.next()


def _number(text: str) -> int | float:
    if len(text) > 4000:  # more digits than Python reads
        raise _Unknown("a number too long to read")
    return int(text) if text.isdigit() else float(text)


def _call(word: str, arguments: list[Any], unknown: str) -> Any:
    """The value of one of the functions that dumps hold."""
    texts = [str(argument) for argument in arguments if argument is not None]
    if not unknown and len(texts) == len(arguments):
        if word == "REPLACE" and len(texts) == 3:
            grown = texts[0].count(texts[1]) * (len(texts[2]) - len(texts[1])) if texts[1] else 0
            _check_length(len(texts[0]) + grown)
            return texts[0].replace(texts[1], texts[2]) if texts[1] else texts[0]
        if word in ("CHAR", "CHR", "NCHAR") and all(
            isinstance(code, int) and 0 <= code < 0x110000 for code in arguments
        ):
            return "".join(map(chr, arguments))
        if word == "CAST" and len(arguments) == 1:
            return arguments[0]
        if word == "CONCAT":
            return _joined(texts)
        if word == "UNISTR" and len(texts) == 1:
            return re.sub(
                r"\\(?:\\|\+([0-9A-Fa-f]{6})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|([0-9A-Fa-f]{4}))",
                lambda match: chr(min(int("".join(filter(None, match.groups())) or "5c", 16), 0x10FFFF)),
                texts[0],
            )
    raise _Unknown(f"{word}(...)" if not unknown else unknown)


def _joined(texts: list[str]) -> str:
    _check_length(sum(map(len, texts)))
    return "".join(texts)


def _check_length(characters: int) -> None:
    """Refuse a value before it is made: functions inside one another grow it tenfold each."""
    if characters > streams.MAX_ROW_BYTES:
        raise BadSource(f"a value of its functions is longer than {too_long()}")
