"""Rows as vectors of one length, written to a memory-mapped .npy file: by a model's hidden states, or by their words.

The words: TF-IDF with the vocabulary and the reduction (truncated SVD) learned on a sample of the rows, so that two
passes do for any number of them. All vectors have length 1, so that Euclidean distances, which k-means needs, go by
their angles.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tpu_tune.data.extra import extra_library
from tpu_tune.data.streams import progress
from tpu_tune.errors import UserError

WINDOW = 8192  # rows whose texts are held at one time
TFIDF_SAMPLE = 20_000  # rows that vocabulary and reduction are learned on
_WORDS = 50_000  # of the vocabulary, the most frequent ones
_DIMENSIONS = 100  # of the reduced vectors; what scikit-learn recommends for latent semantic analysis
# Words of two letters or digits and more; of scripts without spaces each character.
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = rf"[{_UNSPACED}]|[^\W{_UNSPACED}]{{2,}}"


def open_features(path: str | os.PathLike, rows: int, width: int) -> np.memmap:
    """Make a .npy file of (rows, width) float32.

    Raises:
      UserError: the disk has no room for it.
    """
    features = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, width))
    if hasattr(os, "posix_fallocate"):  # a full disk would otherwise end the process when it is written to
        try:
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        except OSError as error:
            raise UserError(
                f"{os.path.dirname(path)}: no room for the vectors of {rows:,} rows, {features.nbytes / 1e9:.2f} GB "
                f"({error.strerror})"
            ) from error
    return features


def tfidf_features(
    sample: list[str], windows: Iterable[list[str]], rows: int, path: str | os.PathLike, seed: int
) -> Float[np.ndarray, "n d"]:
    """Write every row's reduced TF-IDF vector; a last column of its own is for rows without a known word.

    Args:
      sample: texts to learn from.
      windows: all texts, `rows` of them.
      path: the .npy file to make.
      seed: of the SVD.

    Raises:
      UserError: the sample has no words.
    """
    decomposition = extra_library("sklearn.decomposition", "scikit-learn", "data cluster")
    extraction = extra_library("sklearn.feature_extraction.text", "scikit-learn", "data cluster")
    words = extraction.TfidfVectorizer(
        token_pattern=WORD,
        max_features=_WORDS,
        min_df=2 if len(sample) >= 1000 else 1,
        sublinear_tf=True,
        dtype=np.float32,
    )
    try:
        words.fit(sample)
    except ValueError:  # its way to say that there is no word
        raise UserError(
            "the rows have no words to tell them apart by; give --model to read them with a model"
        ) from None
    # scikit-learn adds 1 to log(rows / rows with the word); without it, a word of all rows says nothing about any.
    words.idf_ = words.idf_ - 1
    counted = words.transform(sample)
    dimensions = min(_DIMENSIONS, min(counted.shape) - 1)
    if dimensions < 2:  # a row or two, or a word or two
        dimensions, reduce = counted.shape[1], lambda counts: counts.toarray()
    else:
        reduce = decomposition.TruncatedSVD(dimensions, random_state=seed).fit(counted).transform
    features, at = open_features(path, rows, dimensions + 1), 0
    for texts in _counted(windows, rows, "words"):
        block = features[at : at + len(texts)]
        block[:, :-1] = _unit(reduce(words.transform(texts)))
        block[:, -1] = ~block[:, :-1].any(axis=1)
        at += len(texts)
    features.flush()
    return features


def wordless(features: Float[np.ndarray, "n d"]) -> Int[np.ndarray, "m"]:
    """Return the rows without a known word, of what `tfidf_features` wrote."""
    return np.flatnonzero(features[:, -1])


def model_features(
    model: Any, windows: Iterable[list[str]], rows: int, path: str | os.PathLike, **options: Any
) -> Float[np.ndarray, "n d"]:
    """Write every row's embedding, each column first brought to mean 0 and variance 1.

    Some columns of a language model's hidden states are so much larger than all others that distances would go by them
    alone; bringing columns to one scale cures it (Timkey and van Schijndel, arXiv:2109.04404).

    Args:
      model: loaded.
      windows: all texts, `rows` of them.
      path: the .npy file to make.
      **options: of `inference.embeddings.embed`.
    """
    from tpu_tune.inference.embeddings import embed

    features, at = None, 0
    for part in embed(model, _counted(windows, rows, "embedding"), **options):
        if features is None:
            features = open_features(path, rows, part.shape[1])
        features[at : at + len(part)] = part
        at += len(part)
    blocks = [slice(begin, begin + WINDOW) for begin in range(0, rows, WINDOW)]
    mean = sum(features[block].sum(axis=0, dtype=np.float64) for block in blocks) / rows
    squares = sum(np.square(features[block] - mean).sum(axis=0) for block in blocks) / rows
    scale = 1 / np.sqrt(np.where(squares > 0, squares, 1))
    for block in blocks:
        features[block] = _unit((features[block] - mean) * scale)
    features.flush()
    return features


def _counted(windows: Iterable[list[str]], rows: int, what: str) -> Iterator[list[str]]:
    with progress(None, what, total=rows) as bar:
        for texts in windows:
            yield texts
            bar.update(len(texts))


def _unit(vectors: np.ndarray) -> Float[np.ndarray, "n d"]:
    """Bring vectors to length 1; zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)
