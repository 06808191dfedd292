"""Cut long text into rows of so many tokens: what the guide asks of unsupervised data.

Text is cut at the character where a token begins, and each piece is tokenized again by itself to see that it fits: next
to a cut a tokenizer may find other tokens. The pieces joined are the text, character for character.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tpu_tune.data.formats import own_format
from tpu_tune.data.sources import likely_encoding
from tpu_tune.data.streams import Skipped, progress, read_any, writing
from tpu_tune.errors import UserError

PLAIN = (".txt", ".text", ".md")
_BLOCK = 2**18  # characters of a plain text that are tokenized together


def chunk_file(
    path: str | os.PathLike,
    output: str | os.PathLike,
    tokenizer: Any,
    tokens: int = 2048,
    key: str = "text",
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Write a JSON Lines file whose texts have at most so many tokens, those of begin and end of text among them.

    Args:
      path: plain text (.txt, .md), read in blocks and cut without regard to its lines; or a data file of rows with a
        text each, whose other keys go with every piece.
      tokenizer: a fast one, for its character offsets.
      key: of the rows' text.

    Returns:
      `rows` with a text, `pieces` written of them, `whole`: rows of other formats, which have no such text and are
      written as they are; `bad_rows`, `output`.

    Raises:
      UserError: the file cannot be read, a row has no text, or one character takes more tokens than allowed.
    """
    path, output = os.fspath(path), os.fspath(output)
    if not tokenizer.is_fast:
        raise UserError("cutting text needs a fast tokenizer (tokenizer.json), for its character offsets")
    if os.path.exists(output) and os.path.exists(path) and os.path.samefile(path, output):
        raise UserError(f"{output}: is the input itself; name another output")
    skipped, rows, whole = Skipped(skip_bad), 0, 0
    with writing(output) as out:
        if Path(path).suffix.lower() in PLAIN:
            rows = 1
            for piece in progress(_pieces(_read(path), tokenizer, tokens), "chunk", unit="pieces"):
                out.write({"text": piece})
        else:
            for where, row in progress(read_any(path, skipped), "chunk"):
                text = row.get(key)
                if text is None and own_format(row) not in ("", "text"):
                    whole += 1
                    out.write(row)
                    continue
                if not isinstance(text, str):
                    skipped.add(where, f"no text in '{key}'; its keys: {', '.join(row)}")
                    continue
                rows += 1
                for piece in _pieces(iter([text]), tokenizer, tokens):
                    out.write({**row, key: piece})
        if out.count == whole:
            raise UserError(f"{path}: no text to cut")
    return {
        "rows": rows,
        "pieces": out.count - whole,
        "whole": whole,
        "bad_rows": skipped.count,
        "tokens": tokens,
        "output": output,
    }


def _read(path: str) -> Iterator[str]:
    """Blocks of a text file, its line breaks as they are."""
    position = 0
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while block := file.read(_BLOCK):
                position += len(block)
                yield block
    except UnicodeDecodeError as error:
        likely = likely_encoding(bytes(error.object))
        raise UserError(
            f"{path}: not valid UTF-8, after some {position:,} characters; save it as UTF-8 (perhaps it is {likely}: "
            f"tpu-tune data ingest --encoding {likely} reads such files)"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _pieces(blocks: Iterator[str], tokenizer: Any, tokens: int) -> Iterator[str]:
    """Cut a text that comes in blocks; the last piece of a block goes on in the next."""
    rest = ""
    for block in blocks:
        *complete, rest = cut_text(rest + block, tokenizer, tokens)
        yield from complete
    if rest:
        yield rest


def cut_text(text: str, tokenizer: Any, tokens: int) -> list[str]:
    """Cut a text into pieces of at most `tokens` tokens each; at least one piece, of an empty text an empty one.

    Raises:
      UserError: one character takes more.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # Where each token begins, and where all of them are over. Two tokens of one character begin at the same place.
    starts = np.asarray([*(start for start, _ in encoded["offset_mapping"]), len(text)], np.int64)
    pieces, at, token = [], 0, 0
    while at < len(text):
        take = tokens
        while True:
            stop = int(starts[min(token + take, len(starts) - 1)])
            if stop <= at:  # not one whole character
                take, stop = 1, int(starts[np.searchsorted(starts, at, side="right")])
            excess = _count(tokenizer, text[at:stop]) - tokens
            if excess <= 0:
                break
            if take == 1:
                raise UserError(f"{text[at:stop]!r} alone takes more than {tokens} tokens; allow more")
            take = max(1, take - excess)
        pieces.append(text[at:stop])
        at, token = stop, int(np.searchsorted(starts, stop))
    return pieces or [""]


def _count(tokenizer: Any, text: str) -> int:
    """Tokens of a text as a row: with what the tokenizer puts around it, and an end of text."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return len(ids) + (tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id])
