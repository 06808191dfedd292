"""Writing a Hugging Face model directory: sharded safetensors, config, tokenizer files as the original's.

Tensors come one at a time from a tree in torch layout; a shard is written when it is full, so that memory holds one
shard. Of a multimodal model the other parts come from its own files, as they are. The directory appears whole or not at
all.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tpu_tune.checkpoints import chat_template, mxfp4, storage, towers
from tpu_tune.checkpoints.ends import write_closing_end
from tpu_tune.checkpoints.stacked_experts import as_in_files
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.models import Architecture, with_keys
from tpu_tune.tensors import dense
from tpu_tune.transforms import merged_tensors, unties_head

SHARD_BYTES = 5_000_000_000
_CARRIED = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
# Those of them that stay true when tokens are added; the rest is then written from the tokenizer.
_STILL_TRUE = (
    "generation_config.json", "tokenizer.model", "vocab.json", "merges.txt", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def write_model(
    directory: str,
    params: Mapping[str, Any],
    source: WeightSource,
    architecture: Architecture,
    dtype: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a tree as a Hugging Face model.

    Args:
      directory: the directory to write; an existing one is replaced when the new one is complete.
      params: a tree, adapters and quantized leaves allowed; they are merged and dequantized.
      source: the opened base model; its config and tokenizer files are taken over, and what it has beside the tree's
        tensors: the other parts of a multimodal model, each in the dtype that it has.
      architecture: the model's facts.
      dtype: the tree's tensors' dtype; by default the original's (float32 where the original does not say), and experts
        that it has in mxfp4 stay in it where no adapter is on them.
      shard_bytes: largest shard.

    Raises:
      UserError: the directory cannot be written.
    """
    modules = architecture.modules()
    untied = unties_head(params, modules)
    name = dtype or stored_dtype(source.config)
    packed = {} if dtype else mxfp4.untouched(source.config, params, modules)
    params = {path: leaf for path, leaf in params.items() if path not in packed}
    names = towers.file_names(source, architecture)
    trained = (
        (names.get(tensor, tensor), value.astype(DTYPES[name]))
        for tensor, value in tensors_with_head(params, architecture, untied)
    )
    tensors = itertools.chain(
        as_in_files(trained, source), mxfp4.file_tensors(packed, modules), towers.left_aside(source, architecture)
    )
    with storage.whole_directory(directory) as aside:
        _write_shards(aside, tensors, shard_bytes)
        write_config(aside, source, name, untied, bool(packed))
        write_tokenizer(aside, source)
        write_closing_end(aside, source)


def tensors_with_head(
    params: Mapping[str, Any], architecture: Architecture, untied: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield all tensors as `merged_tensors`; a head that merging has untied from its embedding gets the weight it used.

    T5's scaling goes into the weight of such a head, since older readers scale the states of a tied one only.

    Args:
      params: a combined tree.
      architecture: the model's facts.
      untied: whether merging unties the head (`unties_head`).
    """
    head = f"{architecture.names.head}.weight"
    for name, value in merged_tensors(params, architecture.modules()):
        yield name, value * np.float32(architecture.head_scale) if untied and name == head else value
    for module in architecture.modules():
        if module.tied_to and untied and module.weight not in params:
            base = params[f"{module.tied_to}.weight"].base
            yield module.weight, np.asarray(dense(base)) * np.float32(architecture.head_scale)


def write_config(
    directory: str, source: WeightSource, dtype: str, untied: bool = False, quantized: bool = False
) -> None:
    """Write config.json: the source's, with the tensors' dtype, without a quantization that is no longer there."""
    gone = ("torch_dtype",) if quantized else ("quantization_config", "torch_dtype")
    config = {key: value for key, value in source.config.items() if key not in gone}
    config["dtype" if "torch_dtype" not in source.config else "torch_dtype"] = dtype
    if isinstance(config.get("text_config"), Mapping):
        text = config["text_config"]
        config["text_config"] = {**text, **{key: dtype for key in ("dtype", "torch_dtype") if key in text}}
    if untied:
        config = untied_config(config)
    with open(os.path.join(directory, "config.json"), "w", encoding="utf-8") as stream:
        json.dump(config, stream, indent=2)


def stored_dtype(config: Mapping[str, Any]) -> str:
    """Return the dtype that a config.json gives its model's tensors; a multimodal model's text model may say it."""
    nested = config.get("text_config")
    places = [config, nested if isinstance(nested, Mapping) else {}]
    said = [place[key] for place in places for key in ("dtype", "torch_dtype") if place.get(key)]
    return str(said[0] if said else "float32").removeprefix("torch.")


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json's content where merging has untied the head, as `tensors_with_head` writes it."""
    scaling = {"scale_decoder_outputs": False} if config["model_type"] == "t5" else {}
    return with_keys(config, {"tie_word_embeddings": False, **scaling})


def write_tokenizer(directory: str, source: WeightSource) -> None:
    """Copy the source's tokenizer and generation files byte for byte, or write them from a GGUF's metadata.

    Where tokens were added, the tokenizer is written anew with them, and what does not speak of them is copied. The
    chat template is the source's, which may not be the one in its files.
    """
    if os.path.isdir(source.path):
        for name in _STILL_TRUE if source.added_tokens else _CARRIED:
            if os.path.isfile(os.path.join(source.path, name)):
                shutil.copyfile(os.path.join(source.path, name), os.path.join(directory, name))
        if not source.added_tokens and os.path.isdir(os.path.join(source.path, chat_template.MORE)):
            shutil.copytree(os.path.join(source.path, chat_template.MORE), os.path.join(directory, chat_template.MORE))
        if source.added_tokens:
            source.load_tokenizer().save_pretrained(directory)
        if source.chat_template:
            chat_template.write_template(directory, source.chat_template)
        return
    source.load_tokenizer().save_pretrained(directory)
    ids = {key: source.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in source.config}
    with open(os.path.join(directory, "generation_config.json"), "w", encoding="utf-8") as stream:
        json.dump({"_from_model_config": True, **ids}, stream, indent=2)


def _write_shards(directory: str, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        if shard:
            file = os.path.join(directory, f"part-{len(shards)}.safetensors")
            save_file(
                {name: np.ascontiguousarray(value) for name, value in shard.items()}, file, metadata={"format": "pt"}
            )
            shards.append(list(shard))
            shard, size = {}, 0

    for name, value in tensors:
        if size + value.nbytes > shard_bytes:
            flush()
        shard[name] = value
        size += value.nbytes
        total += value.nbytes
    flush()
    if len(shards) == 1:
        os.replace(os.path.join(directory, "part-0.safetensors"), os.path.join(directory, "model.safetensors"))
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(os.path.join(directory, f"part-{number}.safetensors"), os.path.join(directory, file))
        weight_map |= dict.fromkeys(names, file)
    with open(os.path.join(directory, "model.safetensors.index.json"), "w", encoding="utf-8") as stream:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, stream, indent=2, sort_keys=True)
