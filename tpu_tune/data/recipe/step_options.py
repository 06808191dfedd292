"""Options of the steps that have none of their own as one dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tpu_tune.config.engine import key


@dataclass(frozen=True)
class SplitStep:
    """How rows are split.

    Attributes:
      ratio: `train,val` as the guide writes it, e.g. "0.99,0.01"; "" for `count`, or the guide's rule of thumb.
      count: so many rows for validation; None: by `ratio`.
      group_key: rows with the same value of this key stay together.
      stratify_key: each value of this key has the same share of its rows in validation, e.g. cluster.
      seed: decides which rows.
    """

    ratio: str = ""
    count: int | None = None
    group_key: str = ""
    stratify_key: str = ""
    seed: int = key(42, "", at_least=0, at_most=2**32 - 1)


@dataclass(frozen=True)
class TokenizeStep:
    """How rows become tokens.

    Attributes:
      tokenizer_path: Hugging Face id or directory, .gguf file, or tokenizer.json.
      max_length: tokens a row; text is cut into blocks of it, pairs and chats that are longer are left out.
      num_eos: ends of text after an answer or a text.
      train_on_source: label the prompt too.
      format: of the rows, as `data.format`; auto goes by the keys of each.
      columns: the rows' own key -> the format's key.
      chat_template: Jinja text or file; "" for the tokenizer's own.
      chat_template_kwargs: the template's variables; a row's own come first.
    """

    tokenizer_path: str = ""
    max_length: int = 2048
    num_eos: int = 1
    train_on_source: bool = False
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    chat_template: str = ""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
