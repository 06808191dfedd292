"""Whatever a damaged tokenizer file makes transformers and tokenizers raise becomes one line."""

from __future__ import annotations

import contextlib
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


def check_tokenizer(path: str, tokenizer: Any) -> Any:
    """Return a tokenizer whose chat template is text, or name -> text.

    Raises:
      UserError: it is something else.
    """
    check({"chat_template": getattr(tokenizer, "chat_template", None)}, _TEMPLATE, path)
    return tokenizer
