"""Tokenized sets on disk, under a hash of everything that decides their content.

One set is a directory of .npy files and a summary. It is written aside and renamed, so that a killed process leaves no
half of one, and it is read memory-mapped. A cache that cannot be written is no reason to stop.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tpu_tune.checkpoints import json_text, storage
from tpu_tune.data.sources import is_hub
from tpu_tune.data.tokenize_options import TokenizeOptions
from tpu_tune.data.tokenized_set import TokenizedSet

logger = logging.getLogger(__name__)

_VERSION = 5  # raise it when the same input would give other tokens, or a summary other counts
_ARRAYS = ("tokens", "loss_mask", "offsets", "source_rows")


def directory(cache_dir: str = "") -> Path:
    """Return `cache_dir`, or $TPU_TUNE_CACHE, or ~/.cache/tpu_tune."""
    return Path(cache_dir or os.environ.get("TPU_TUNE_CACHE") or Path.home() / ".cache" / "tpu_tune").expanduser()


def fingerprint(sources: list[str], rows: list[dict] | None, tokenizer: Any, options: TokenizeOptions) -> str:
    """Hash the content of the sources, the tokenizer and the options.

    Args:
      sources: files, hashed by their bytes, or hub splits, hashed by `rows`.
      rows: the rows of hub splits; None for files.
    """
    digest = hashlib.sha256()

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "little") + part)

    add(str(_VERSION).encode())
    # Not the objective itself, but the rows that it learns from: several learn from the same.
    fields = {**dataclasses.asdict(options), "objective": options.learns_from}
    add(json.dumps(fields, sort_keys=True).encode())
    add(_describe_tokenizer(tokenizer))
    for source in sources:
        if not is_hub(source):
            add(_digest(source) + Path(source).suffix.encode())
    for row in rows or []:
        add(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def _digest(source: str) -> bytes:
    if storage.is_remote(source):
        return hashlib.sha256(storage.read_bytes(source)).digest()
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash what decides a tokenizer's ids; its chat template is no part of it."""
    return hashlib.sha256(_describe_tokenizer(tokenizer)).hexdigest()[:32]


def _describe_tokenizer(tokenizer: Any) -> bytes:
    # What is put before a text by default is not always in the serialized form. The call also resets the truncation
    # and padding that earlier calls have left in it.
    trial = list(tokenizer("a")["input_ids"])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = backend.to_str()
    else:
        state = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return f"{json.dumps([special, trial], sort_keys=True)}{state}".encode()


def _names(summary: dict[str, Any]) -> tuple[str, ...]:
    return (*_ARRAYS, "roles") if summary["rated"] else _ARRAYS


def load(root: Path, key: str) -> TokenizedSet | None:
    """Return the stored set, memory-mapped, or None where there is none (or a damaged one)."""
    folder = root / "tokenized" / key
    if not os.path.isdir(folder):  # which is False, not an error, for a name that is too long
        return None
    try:
        summary = json_text.loads((folder / "summary.json").read_bytes())
        arrays = {}
        for name in _names(summary):
            file = folder / f"{name}.npy"
            # An empty array cannot be mapped.
            arrays[name] = np.load(file, mmap_mode="r" if summary["examples"] else None)
        if len(arrays["tokens"]) != summary["tokens"] or len(arrays["offsets"]) != summary["examples"] + 1:
            raise ValueError("arrays and summary disagree")
        return TokenizedSet(**arrays, summary=summary)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s); tokenizing again", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def save(root: Path, key: str, data: TokenizedSet) -> None:
    """Write a set aside and rename it into place; a failure is logged and otherwise ignored."""
    aside = ""
    try:
        parent = root / "tokenized"
        parent.mkdir(parents=True, exist_ok=True)
        aside = os.path.join(parent, f".{key}.{secrets.token_hex(4)}")
        os.mkdir(aside)  # not by tempfile, whose directories nobody else who shares the cache could read
        for name in _names(data.summary):
            np.save(os.path.join(aside, f"{name}.npy"), getattr(data, name))
        Path(aside, "summary.json").write_text(json.dumps(data.summary, indent=1), encoding="utf-8")
        os.rename(aside, parent / key)
    except OSError as error:
        if os.path.isdir(root / "tokenized" / key):
            logger.info("another process has stored the same tokenized data")
        else:
            logger.warning("tokenized data could not be cached in %s (%s); going on without", root, error)
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)
