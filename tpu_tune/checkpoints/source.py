"""`open_source(path)`: open a Hugging Face directory, a hub id or a GGUF file as a `WeightSource`."""

from __future__ import annotations

import os

from tpu_tune.checkpoints import storage
from tpu_tune.checkpoints.gguf import open_gguf
from tpu_tune.checkpoints.huggingface import open_huggingface
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError

_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.jinja", "*.txt"]
# Fetched only where there are no safetensors: many repositories hold both, which are the same bytes twice.
_HUB_PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin"]


def open_source(path: str) -> WeightSource:
    """Open a `.gguf` file, a Hugging Face directory, or a hub id (fetched through huggingface_hub's cache).

    What is in a bucket is copied to this machine first (`storage.local_copy`): weights are read by seeking.

    Raises:
      UserError: nothing usable is there; the message says what was looked for.
    """
    if not path:
        raise UserError("model.path is empty; give a Hugging Face id, a local directory, or a .gguf file")
    path = storage.local_copy(path)
    if path.endswith(".gguf"):
        return open_gguf(path)
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
