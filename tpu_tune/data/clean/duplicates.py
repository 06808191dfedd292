"""Duplicate rows: the same text as an earlier row's, or nearly the same.

Exact: 16 bytes of a hash of the row's roles, texts and tools (white space apart, Unicode in NFC) are remembered a row.

Near: the shingles of a text are its runs of `shingle_size` characters or words, in small letters, Unicode in NFKC,
white space as single blanks; two texts are near where the Jaccard similarity of their sets of shingles (shared / all)
reaches the threshold. A MinHash-LSH index (rensa, in Rust) proposes earlier rows, then the similarity is computed
exactly, so that no row is dropped which is less similar. The number of bands is such that a pair at the threshold is
proposed with probability 0.995 at least. A row is compared with rows that were kept only: of a group the first stays,
and every dropped row has its like among those kept. A kept row costs about 2 kB of memory; the texts lie in a file
without a name, as large as they are. Time grows with the rows, except for rows made from one template that are alike
but not enough to be dropped: each meets all others as candidates.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import unicodedata
from array import array
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

from tpu_tune.data.clean.clean_options import CleanOptions
from tpu_tune.data.clean.rules import Hit, snippet
from tpu_tune.data.clean.texts import fields, parts, visible
from tpu_tune.data.extra import extra_library
from tpu_tune.data.formats import format_of

MAX_HASHES = 160
FOUND = 0.995  # of pairs at the threshold, by the theory of the index
MARGIN = 4.0  # standard deviations of a signature's estimate: candidates estimated to be further off are not read


def bands(threshold: float) -> tuple[int, int]:
    """Bands and hashes a band: the most selective index with at most `MAX_HASHES` hashes that still finds `FOUND`.

    A pair of similarity s is proposed with probability 1 - (1 - s**hashes)**bands (Leskovec, Rajaraman and Ullman,
    Mining of Massive Datasets, section 3.4).
    """
    best = (MAX_HASHES, 1)
    for hashes in range(1, MAX_HASHES + 1):
        missed = 1 - threshold**hashes
        count = math.ceil(math.log(1 - FOUND) / math.log(missed)) if missed > 0 else 1
        if count * hashes > MAX_HASHES:
            break
        best = (count, hashes)
    return best


def identity(row: Mapping[str, Any], options: CleanOptions) -> bytes:
    """16 bytes that are the same for rows of the same format, roles, texts and tools, white space apart."""
    format, columns = _read_as(row, options)
    digest = hashlib.blake2b(format.encode(), digest_size=16)
    for key, name in fields(row, format, columns).items():
        digest.update(f"\0{key}\0".encode())
        _feed(digest, row[name])
    return digest.digest()


def _read_as(row: Mapping[str, Any], options: CleanOptions) -> tuple[str, Mapping[str, str]]:
    """The format of a cleaned row, and its columns' new names."""
    if options.as_format:
        return format_of(row), {}
    return format_of(row, options.format, options.columns), options.columns


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, str):
        text = " ".join(unicodedata.normalize("NFC", value).split())
        digest.update(b"s" + text.encode("utf-8", "surrogatepass") + b"\0")
    elif isinstance(value, Mapping):
        digest.update(b"{")
        for key in sorted(value, key=str):
            if value[key] is not None:
                _feed(digest, str(key))
                _feed(digest, value[key])
        digest.update(b"}")
    elif isinstance(value, list | tuple):
        digest.update(b"[")
        for item in value:
            _feed(digest, item)
        digest.update(b"]")
    else:
        digest.update(repr(value).encode() + b"\0")


def near_text(row: Mapping[str, Any], options: CleanOptions) -> str:
    """What near duplicates are compared by: all texts of the row, in small letters, white space as single blanks."""
    found = parts(row, *_read_as(row, options))
    return " ".join(unicodedata.normalize("NFKC", visible(row, found)).casefold().split())


def shingles(text: str, unit: str, size: int) -> set[str]:
    """The set of runs of `size` characters or words; a shorter text is one shingle, an empty one none."""
    if unit == "chars":
        return {text[i : i + size] for i in range(max(1, len(text) - size + 1))} if text else set()
    words = text.split()
    return {" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))} if words else set()


class Duplicates:
    """Says of each row, in turn, whether an equal or similar one came before it.

    Args:
      options: the rules of the cleaning.
      scratch: directory for the file of texts; None for the system's own. Only near duplicates need it.

    Raises:
      UserError: rensa is not installed.
    """

    def __init__(self, options: CleanOptions, scratch: str | os.PathLike | None = None):
        self._options = options
        self._digests: set[bytes] = set()
        self._near = _Near(options, scratch) if options.near_duplicates is not None else None

    def check(self, row: Mapping[str, Any], where: str = "") -> Hit | None:
        """Say why the row is a duplicate; None where it is not, and then it is remembered.

        Args:
          where: names the row to those that are like it.
        """
        if self._options.exact_duplicates:
            digest = identity(row, self._options)
            if digest in self._digests:
                return Hit("exact duplicate", "dropped", snippet(near_text(row, self._options)))
            self._digests.add(digest)
        if self._near:
            text = near_text(row, self._options)
            if found := self._near.check(text, where):
                similarity, other = found
                return Hit("near duplicate", "dropped", f"{similarity:.2f} like {other}: {snippet(text)}")
        return None

    def close(self) -> None:
        """Remove the file of texts."""
        if self._near:
            self._near.texts.close()


class _Near:
    """The kept rows' signatures in memory, their texts in a file."""

    def __init__(self, options: CleanOptions, scratch: str | os.PathLike | None):
        self.options = options
        self.rensa = extra_library("rensa", "rensa", "--near-duplicates")
        count, hashes = bands(options.near_duplicates)
        self.hashes = count * hashes
        self.index = self.rensa.RMinHashLSH(options.near_duplicates, self.hashes, count)
        self.signatures = np.zeros((1024, self.hashes), np.uint32)
        self.texts: IO[bytes] = tempfile.TemporaryFile(dir=scratch, buffering=0)
        self.offsets = array("q", [0])
        threshold = options.near_duplicates
        self.least = threshold - MARGIN * math.sqrt(threshold * (1 - threshold) / self.hashes)

    def check(self, text: str, where: str) -> tuple[float, str] | None:
        """The similarity with a kept row, and that row's name; None where there is none, and then this one is kept."""
        own = shingles(text, self.options.shingle, self.options.shingle_size)
        if not own:
            return None
        sketch = self.rensa.RMinHash(self.hashes, self.options.seed)
        sketch.update(list(own))
        signature = np.asarray(sketch.digest(), np.uint32)
        candidates = np.asarray(sorted(set(self.index.query(sketch))), np.int64)
        if len(candidates):
            estimates = (self.signatures[candidates] == signature).mean(axis=1)
            order = np.argsort(-estimates, kind="stable")
            for candidate in candidates[order[estimates[order] >= self.least]]:
                other, name = self._read(int(candidate))
                shared = len(own & other)
                similarity = shared / (len(own) + len(other) - shared)
                if similarity >= self.options.near_duplicates:
                    return similarity, name
        self._keep(sketch, signature, text, where)
        return None

    def _keep(self, sketch: Any, signature: np.ndarray, text: str, where: str) -> None:
        number = len(self.offsets) - 1
        if number == len(self.signatures):
            self.signatures = np.concatenate([self.signatures, np.zeros_like(self.signatures)])
        self.signatures[number] = signature
        self.index.insert(number, sketch)
        record = f"{where}\n{text}".encode("utf-8", "surrogatepass")
        self.texts.write(record)
        self.offsets.append(self.offsets[-1] + len(record))

    def _read(self, number: int) -> tuple[set[str], str]:
        start, end = self.offsets[number : number + 2]
        record = os.pread(self.texts.fileno(), end - start, start).decode("utf-8", "surrogatepass")
        where, _, text = record.partition("\n")
        return shingles(text, self.options.shingle, self.options.shingle_size), where
