"""Where weights come from: one small interface over Hugging Face directories, hub ids and GGUF files.

A source names its tensors as Hugging Face does and reads them one at a time, so that whoever loads a model holds the
finished tree and a single tensor, whatever the file format.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tpu_tune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tpu_tune.tensors import QuantizedTensor

_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.jinja", "*.txt"]
# Fetched only where there are no safetensors: many repositories hold both, which are the same bytes twice.
_HUB_PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin"]


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """An opened model: its configuration, what tensors it has, and how to read one.

    Attributes:
      path: what the user wrote, for messages.
      config: the content of a Hugging Face `config.json` (`model_type`, `hidden_size`, ...).
      shapes: Hugging Face tensor name -> shape in torch layout, (out, in) for a linear layer.
      read: reads one tensor in torch layout and in the file's dtype (bfloat16 through ml_dtypes). A matrix that the
        file stores in a 4-bit format we know comes as a `QuantizedTensor`, already (in, out).
      load_tokenizer: builds the tokenizer, chat template included.
      fingerprint: changes when the weights do; run checkpoints record it.
      added_tokens: token -> id of what `vocabulary.with_added_tokens` was asked to add.
    """

    path: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray | QuantizedTensor]
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    fingerprint: str
    added_tokens: dict[str, int] = dataclasses.field(default_factory=dict)


def open_source(path: str) -> WeightSource:
    """Open a `.gguf` file, a Hugging Face directory, or a hub id (fetched through huggingface_hub's cache).

    Raises:
      UserError: nothing usable is there; the message says what was looked for.
    """
    if not path:
        raise UserError("model.path is empty; give a Hugging Face id, a local directory, or a .gguf file")
    if path.endswith(".gguf"):
        from tpu_tune.checkpoints.gguf import open_gguf

        return open_gguf(path)
    from tpu_tune.checkpoints.huggingface import open_huggingface

    return open_huggingface(path if os.path.exists(path) else _from_hub(path))


def _from_hub(name: str) -> str:
    """Fetch what training needs of a hub repository and return its local directory."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: there is no such file or directory")
    import huggingface_hub

    try:
        directory = huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES)
        weights = ("model.safetensors", "model.safetensors.index.json")
        if any(os.path.isfile(os.path.join(directory, file)) for file in weights):
            return directory
        return huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES + _HUB_PICKLES)
    except Exception as error:  # the client's many errors mean one thing to the user
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name}: not a local directory, and the Hugging Face hub did not give it ({reason})"
        ) from error
