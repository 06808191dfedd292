"""JSON Lines, and JSON of any size: an array's elements, or the `data` or `messages` of an object, one at a time."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from tpu_tune.data import streams
from tpu_tune.data.ingest.blobs import BadSource, Blob, Tally
from tpu_tune.data.ingest.chats import discord_rows, is_discord
from tpu_tune.data.ingest.encodings import TextLines, buffered, byte_order_mark, decoded, misfit, too_long
from tpu_tune.data.ingest.ingest_options import IngestOptions
from tpu_tune.data.ingest.picking import picked

_DECODER = json.JSONDecoder()
_SPACE = " \t\n\r"


def read_json_lines(blob: Blob, options: IngestOptions, tally: Tally) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file with one JSON object a line."""
    with blob.open() as file:
        lines = streams.json_rows(
            enumerate(_lines(buffered(file), options.encoding), start=1), blob.name, tally.skipped
        )
        rows = ((f"{blob.name}:{number}", row) for number, row in lines)
        yield from picked(rows, options, tally, blob.name)


def _lines(stream: io.BufferedReader, encoding: str) -> Iterator[bytes | None]:
    """Lines in UTF-8, whatever the file's encoding; bytes that do not fit it stay, and are no UTF-8."""
    marked, _ = byte_order_mark(stream.peek(4)[:4])
    if (marked or encoding or "utf-8") == "utf-8":
        return streams.cut_lines(stream)
    lines = TextLines(stream, encoding)
    return (None if line is None else line.encode("utf-8", "surrogateescape") for line in lines)


def read_json(blob: Blob, options: IngestOptions, tally: Tally) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON file.

    It holds an array of objects, an object with such an array under `data`, objects one after the other, or a Discord
    channel as DiscordChatExporter writes it. `source` has the number of the item.
    """
    with blob.open() as file:
        scanner = _Scanner(decoded(file, options.encoding))
        if scanner.peek() == "":
            raise BadSource("is empty")
        header: dict[str, Any] = {}
        rows = _elements(blob.name, scanner, header, tally)
        # Reading the first element fills `header`, which says whether this is a chat export.
        first = next(rows, None)
        if first is None:
            return
        rest = _after(first, rows)
        if options.format == "discord" or is_discord(header, first[1]):
            yield from discord_rows(blob.name, header, rest, options, tally)
        else:
            yield from picked(rest, options, tally, blob.name)


def _after(first: tuple[str, dict], rest: Iterator[tuple[str, dict]]) -> Iterator[tuple[str, dict]]:
    yield first
    yield from rest


def _elements(name: str, scanner: _Scanner, header: dict[str, Any], tally: Tally) -> Iterator[tuple[str, dict]]:
    """Yield (where, object); `header` is filled with the keys before a streamed array of an object."""
    number = 0
    for value in _values(scanner, header):
        number += 1
        where = f"{name}, item {number}"
        if isinstance(value, _Bad):
            tally.skipped.add(where, value.reason)
        elif not isinstance(value, dict):
            tally.skipped.add(where, f"not a JSON object but a {type(value).__name__}")
        else:
            yield where, value


class _Bad:
    """An element that cannot be used."""

    def __init__(self, reason: str):
        self.reason = reason


def _values(scanner: _Scanner, header: dict[str, Any]) -> Iterator[Any]:
    while start := scanner.peek():
        if start == "[":
            yield from _array(scanner)
        elif start == "{":
            yield from _object(scanner, header)
        else:
            yield scanner.value()
        if scanner.peek() == ",":  # objects that lost their brackets
            scanner.take(",")


def _array(scanner: _Scanner) -> Iterator[Any]:
    scanner.take("[")
    if scanner.peek() == "]":
        scanner.take("]")
        return
    while True:
        yield scanner.value()
        if scanner.take(",]") == "]":
            return


def _object(scanner: _Scanner, header: dict[str, Any]) -> Iterator[Any]:
    """Yield the elements of `data`, or of a channel's `messages`; else the object itself."""
    scanner.take("{")
    found: dict[str, Any] = {}
    streamed = False
    start = scanner.passed()
    if scanner.peek() == "}":
        scanner.take("}")
        yield found
        return
    while True:
        key = scanner.value()
        if not isinstance(key, str):
            raise BadSource(f"not valid JSON (line {scanner.line()}: a key is not a string)")
        scanner.take(":")
        rows = key == "data" or (key == "messages" and ("channel" in found or "guild" in found))
        if rows and scanner.peek() == "[":
            header.update(found)
            streamed = True
            yield from _array(scanner)
            start = scanner.passed()
        else:
            found[key] = scanner.value()
            if scanner.passed() - start > streams.MAX_ROW_BYTES:
                raise BadSource(f"an object is longer than {too_long()} (line {scanner.line()})")
        if scanner.take(",}") == "}":
            break
    if not streamed:
        bad = next((value for value in found.values() if isinstance(value, _Bad)), None)
        yield bad or found


class _Scanner:
    """JSON values from a stream of text; holds no more than the current one."""

    def __init__(self, file: Any):
        self._file = file
        self._text, self._at, self._ended = "", 0, False
        self._dropped, self._lines = 0, 1

    def passed(self) -> int:
        """How many characters have been read over."""
        return self._dropped + self._at

    def line(self) -> int:
        """The line reached, from 1."""
        return self._lines + self._text.count("\n", 0, self._at)

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, characters: str) -> str:
        """Read over one of the characters `wanted`.

        Raises:
          BadSource: something else stands there.
        """
        found = self.peek()
        if not found or found not in characters:
            shown = f"'{found}'" if found else "the end of the file"
            raise BadSource(f"not valid JSON (line {self.line()}: {shown} where '{characters[0]}' should be)")
        self._at += 1
        return found

    def value(self) -> Any:
        """The next value, or `_Bad` where its bytes do not fit the encoding.

        Raises:
          BadSource: it is not valid JSON, or longer than a row may be.
        """
        self.peek()
        while True:
            reason = "it ends too early"
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                final = not error.msg.startswith("Unterminated string") and error.pos < len(self._text) - 64
                reason = error.msg
            except RecursionError:
                final, reason = True, "nested too deeply"
            except ValueError:  # Python reads numbers of up to 4,300 digits
                final, reason = True, "a number is too long"
            else:
                if end < len(self._text) or self._ended:  # else a number could go on
                    bad = misfit(self._text[self._at : end])
                    self._at = end
                    return _Bad("not valid in its encoding (UTF-8, unless --encoding names another)") if bad else value
                final = False
            if not final and len(self._text) - self._at > streams.MAX_ROW_BYTES:
                raise BadSource(f"a value is longer than {too_long()} (line {self.line()})")
            if final or not self._more():
                raise BadSource(f"not valid JSON (line {self.line()}: {reason})")

    def _more(self) -> bool:
        held = len(self._text) - self._at
        piece = self._file.read(max(2**16, held))
        if not piece:
            self._ended = True
            return False
        self._dropped += self._at
        self._lines += self._text.count("\n", 0, self._at)
        self._text = self._text[self._at :] + piece
        self._at = 0
        return True
