"""A tokenizer by transformers; whatever a damaged file makes it and tokenizers raise becomes one line."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.models.values import NOTHING, TEXT, check, mapping

_PANIC = "PanicException"  # of Rust code; no Exception, and importable from nowhere
_TEMPLATE = {"chat_template": NOTHING | TEXT | mapping(TEXT)}


@contextlib.contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Turn what the libraries raise into one line.

    Args:
      what: the file or directory, and what is wrong with it.

    Raises:
      UserError: in place of whatever is raised, but for what the user does (Ctrl-C) and what is one line already.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{what}: {reason}") from error


def by_transformers(path: str, **keys: Any) -> Any:
    """Return transformers' tokenizer of a directory or a hub id, without its warnings about the model's config.json.

    It reads that to find the tokenizer's class; whether the two fit together is for whoever uses both to say.
    """
    from transformers import AutoTokenizer

    said = logging.getLogger("transformers.configuration_utils")
    said.addFilter(_at_fault)
    try:
        return AutoTokenizer.from_pretrained(path, **keys)
    finally:
        said.removeFilter(_at_fault)


def _at_fault(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def check_tokenizer(path: str, tokenizer: Any) -> Any:
    """Return a tokenizer that makes ids of text, and whose chat template is text, or name -> text.

    Raises:
      UserError: the template is something else, or a setting that transformers looks at only when it is used (such as
        `model_max_length`) is of a wrong type.
    """
    check({"chat_template": getattr(tokenizer, "chat_template", None)}, _TEMPLATE, path)
    with tokenizer_errors(f"{path}: the tokenizer's files are damaged, it cannot be used"):
        tokenizer.decode(tokenizer("a b", verbose=False)["input_ids"])
    return tokenizer
