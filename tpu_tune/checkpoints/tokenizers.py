"""A model's tokenizer alone, without its weights, and how a text to go on from is encoded, in training and in use."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from tpu_tune.checkpoints.gguf_file import open_gguf_file
from tpu_tune.checkpoints.gguf_tokenizer import build_tokenizer
from tpu_tune.checkpoints.huggingface import load_tokenizer
from tpu_tune.checkpoints.tokenizer_errors import by_transformers, check_tokenizer, tokenizer_errors
from tpu_tune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # what published tokenizers call the end of a text


def open_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a model.

    Args:
      path: a Hugging Face directory or hub id, a `.gguf` file, or a `tokenizer.json`. Where nothing beside a
        `tokenizer.json` says which token ends a text, the first known name of one in its vocabulary is taken.

    Raises:
      UserError: there is no usable tokenizer.
    """
    if not path:
        raise UserError("no tokenizer given; give a Hugging Face id, a local directory or a .gguf file")
    if path.endswith(".gguf"):
        file = open_gguf_file(path)
        return build_tokenizer(file.path, file.metadata)
    local = os.path.expanduser(path)
    if os.path.isdir(local):
        alone = os.path.join(local, "tokenizer.json")
        return _from_file(alone) if os.path.isfile(alone) and not _has_config(alone) else load_tokenizer(local)
    if os.path.isfile(local):
        return load_tokenizer(os.path.dirname(local) or ".") if _has_config(local) else _from_file(local)
    if path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise UserError(f"{path}: there is no such file or directory")
    with tokenizer_errors(f"{path}: not a local directory, and the Hugging Face hub did not give its tokenizer"):
        tokenizer = by_transformers(path)
    return check_tokenizer(path, tokenizer)


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts BOS before a text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text to go on from, as training encodes a prompt.

    BOS stands before it where the tokenizer adds one and the text does not begin with it; the EOS that some tokenizers
    add is no part of a text to go on from.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not tokenizer.bos_token or ids[:1] == [tokenizer.bos_token_id] or not adds_bos(tokenizer):
        return ids
    return [tokenizer.bos_token_id, *ids]


def with_bos(tokenizer: Any, text: str) -> str:
    """Return a text that begins with BOS, where there is one, as QLoRA writes it (`data.add_bos_token=always`)."""
    bos = tokenizer.bos_token or ""
    return text if text.startswith(bos) else bos + text


def _has_config(file: str) -> bool:
    beside = os.path.join(os.path.dirname(file), "tokenizer_config.json")
    return os.path.basename(file) == "tokenizer.json" and os.path.isfile(beside)


def _from_file(path: str) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    with tokenizer_errors(f"{path}: not a tokenizer.json"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=path)
    vocabulary = tokenizer.get_vocab()
    known = [token for token in _ENDS if token in vocabulary]
    if known:
        tokenizer.eos_token = known[0]
        logger.info("%s does not say which token ends a text; taking %s", path, known[0])
    return tokenizer
