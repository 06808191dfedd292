"""`WeightSource`: one small interface over Hugging Face directories and GGUF files.

A source names its tensors as Hugging Face does and reads them one at a time, so that whoever loads a model holds the
finished tree and a single tensor, whatever the file format. `source.open_source` makes one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tpu_tune.tensors import QuantizedTensor


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """An opened model: its configuration, what tensors it has, and how to read one.

    Attributes:
      path: the local file or directory, for messages and for what is copied beside the weights.
      config: the content of a Hugging Face `config.json` (`model_type`, `hidden_size`, ...).
      shapes: Hugging Face tensor name -> shape in torch layout, (out, in) for a linear layer.
      read: reads one tensor in torch layout and in the file's dtype (bfloat16 through ml_dtypes). A matrix that the
        file stores in a 4-bit format we know comes as a `QuantizedTensor`, already (in, out).
      load_tokenizer: builds the tokenizer, chat template included.
      fingerprint: changes when the weights do; run checkpoints record it.
      base_of: the adapter directory whose base the weights are (`adapter_base.base_of_adapter`), "" for no one's.
      added_tokens: token -> id of what `vocabulary.with_added_tokens` was asked to add.
      new_head: whether its classification or reward head is in no file (`heads.with_head`).
      parts: name of a tensor in the files -> its shape there, and the names above of the tensors whose rows it holds
        one after the other (`stacked_experts`).
      quantized: says what of its files is quantized and what becomes of it, "" for nothing; it may read small tensors.
      chat_template: what `chat_template.with_template` put in place of the tokenizer's own, or "".
    """

    path: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray | QuantizedTensor]
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    fingerprint: str
    base_of: str = ""
    added_tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    chat_template: str | Mapping[str, str] = ""
    new_head: bool = False
    quantized: Callable[[], str] = str
    parts: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = dataclasses.field(default_factory=dict)
