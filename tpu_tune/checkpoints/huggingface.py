"""Reading Hugging Face model directories: `config.json` and the weights, in one file or in shards with an index.

The weights are `.safetensors` files, or, where there are none, `pytorch_model.bin` (see `torch_file`). Opening reads
headers only; a tensor is read when it is asked for, by seeking to its bytes (see `stored_tensor`).

The format of safetensors (its README): eight bytes with the header's length, little endian, then the header in JSON,
then the tensors' bytes, row-major; `data_offsets` count from the header's end.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from tpu_tune.checkpoints import json_text
from tpu_tune.checkpoints.params import with_stored_head
from tpu_tune.checkpoints.prequantized import as_unquantized
from tpu_tune.checkpoints.stacked_experts import with_experts_apart
from tpu_tune.checkpoints.stored_tensor import StoredTensor, read_tensor
from tpu_tune.checkpoints.tokenizer_errors import by_transformers, check_tokenizer, tokenizer_errors
from tpu_tune.checkpoints.torch_file import read_torch_header
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError
from tpu_tune.models.values import TEXT, check, listing, shown, whole

_SAMPLE_BYTES = 4096
_LONGEST_HEADER = 100_000_000  # bytes; safetensors itself reads no longer one
_ENTRY_KINDS = {
    "dtype": TEXT,
    "shape": listing(whole(0, 2**48)),
    "data_offsets": listing(whole(0, 2**60)),
}


def open_huggingface(directory: str) -> WeightSource:
    """Open a model directory as Hugging Face writes it; only headers are read, and a tied head that is stored.

    Quantized matrices appear under the names and with the shapes that they would have unquantized (`prequantized`).

    Args:
      directory: holds `config.json`, the tokenizer's files, and `model.safetensors` or `pytorch_model.bin` (or shards
        of either, with their index).

    Raises:
      UserError: a file is missing, cut short or not what its name says, or the weights are quantized in a way that
        is not read here; the message names the file.
    """
    directory = os.fspath(directory)
    config = read_config(directory)
    tensors = _stored_tensors(directory)
    read = functools.partial(_read_named, tensors)
    shapes, read, quantized = as_unquantized(directory, config, tensors, read)
    source = WeightSource(
        path=directory,
        config=config,
        shapes=shapes,
        read=read,
        load_tokenizer=functools.partial(load_tokenizer, directory),
        fingerprint=_fingerprint(directory, tensors),
        quantized=quantized,
    )
    return with_stored_head(with_experts_apart(source))


def load_tokenizer(directory: str) -> Any:
    """Build the tokenizer that a directory holds, chat template included.

    Raises:
      UserError: there is none, or transformers cannot read it.
    """
    with tokenizer_errors(f"{directory}: no usable tokenizer (tokenizer.json and the like) in it"):
        tokenizer = by_transformers(directory, local_files_only=True)
    return check_tokenizer(directory, tokenizer)


def read_header(path: str) -> dict[str, StoredTensor]:
    """Read one `.safetensors` file's header and check it against the file's size.

    Raises:
      UserError: the file is missing, cut short, or not a safetensors file.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > size:
            raise UserError(f"{path}: cut short or not a safetensors file ({size} bytes); fetch it again")
        if start - 8 > _LONGEST_HEADER:
            raise UserError(
                f"{path}: its header has {start - 8:,} bytes, more than {_LONGEST_HEADER:,}; fetch it again"
            )
        text = file.read(start - 8)
    try:
        header = json_text.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: its header is not a safetensors header; fetch the file again") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is not a safetensors header; fetch the file again")
    header.pop("__metadata__", None)
    tensors = {name: _header_entry(path, start, name, entry) for name, entry in header.items()}
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=start)
    if end > size:
        raise UserError(f"{path}: cut short: its header promises {end} bytes, it has {size}; fetch it again")
    return tensors


def _header_entry(path: str, start: int, name: str, entry: Any) -> StoredTensor:
    """What a header says of one tensor, checked; `start` is where the tensors' bytes begin."""
    where = f"{path}: its header is not a safetensors header"
    if not isinstance(entry, dict) or not set(_ENTRY_KINDS) <= set(entry):
        raise UserError(f"{where}: {shown(name)} has no {', '.join(_ENTRY_KINDS)}; fetch the file again")
    if not name.isprintable():  # half a surrogate pair, which no UTF-8 has, among others
        raise UserError(f"{where}: {shown(name)} is no tensor's name; fetch the file again")
    check(entry, _ENTRY_KINDS, f"{where}: {name}")
    offsets = entry["data_offsets"]
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{where}: {name} lies from and to {shown(offsets)}; fetch the file again")
    begin, end = offsets
    return StoredTensor(path, start + begin, end - begin, entry["dtype"], tuple(entry["shape"]))


_HeaderReader = Callable[[str], dict[str, StoredTensor]]
# What a directory's weights are called, in the order of preference; shards have `<name>.index.json`.
_FORMATS: dict[str, _HeaderReader] = {"model.safetensors": read_header, "pytorch_model.bin": read_torch_header}


def _read_named(tensors: dict[str, StoredTensor], name: str) -> np.ndarray:
    return read_tensor(name, tensors[name])


def read_config(directory: str) -> dict[str, Any]:
    """Read a model directory's config.json; no weights need to be there.

    Raises:
      UserError: there is none, or it says no model_type.
    """
    if not os.path.isdir(directory):
        raise UserError(f"{directory}: not a directory; give a model directory, a Hugging Face id or a .gguf file")
    path = os.path.join(directory, "config.json")
    if not os.path.isfile(path):
        if os.path.isfile(os.path.join(directory, "adapter_config.json")):
            raise UserError(f"{directory}: this is a PEFT adapter; give it as model.adapter and its base as model.path")
        raise UserError(f"{directory}: has no config.json, so it is not a Hugging Face model directory")
    config = _read_json(path)
    if "model_type" not in config:
        raise UserError(f"{path}: has no model_type, so the architecture is unknown")
    check(config, {"model_type": TEXT}, path)
    older = os.path.join(directory, "quantize_config.json")  # AutoGPTQ's, from before it was told in config.json
    if "quantization_config" not in config and os.path.isfile(older):
        return {**config, "quantization_config": {"quant_method": "gptq", **_read_json(older)}}
    return config


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            content = json_text.loads(file.read())
    except ValueError as error:  # bad JSON and bad UTF-8
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__} where a JSON object is expected")
    return content


def _stored_tensors(directory: str) -> dict[str, StoredTensor]:
    """All tensors of a directory, by name, from the single file or from the shards that the index names.

    safetensors go first, as in transformers: they hold the same and need no unpickling.
    """
    for single, read in _FORMATS.items():
        if os.path.isfile(os.path.join(directory, single)):
            return read(os.path.join(directory, single))
        if os.path.isfile(os.path.join(directory, f"{single}.index.json")):
            return _sharded_tensors(directory, f"{single}.index.json", read)
    looked_for = " nor ".join(f"{single} or {single}.index.json" for single in _FORMATS)
    raise UserError(f"{directory}: has no weights: neither {looked_for}")


def _sharded_tensors(directory: str, index: str, read: _HeaderReader) -> dict[str, StoredTensor]:
    weight_map = _read_json(os.path.join(directory, index)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{os.path.join(directory, index)}: has no weight_map from tensor to file")
    shards = {}
    for file in sorted(set(weight_map.values())):
        path = os.path.join(directory, file)
        if not os.path.isfile(path):
            raise UserError(f"{path}: this shard is missing ({index} names it); fetch it again")
        shards[file] = read(path)
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise UserError(f"{os.path.join(directory, file)}: does not hold {name}, which {index} says it does")
    return {name: shards[file][name] for name, file in weight_map.items()}


def _fingerprint(directory: str, tensors: dict[str, StoredTensor]) -> str:
    """Hash of config.json and, for each tensor, its name, dtype, shape, file size and first 4 KiB."""
    digest = hashlib.sha256()
    with open(os.path.join(directory, "config.json"), "rb") as file:
        digest.update(file.read())
    by_file: dict[str, list[str]] = {}
    for name in sorted(tensors):
        by_file.setdefault(tensors[name].file, []).append(name)
    for path, names in sorted(by_file.items()):
        digest.update(f"{os.path.basename(path)} {os.path.getsize(path)}".encode())
        with open(path, "rb") as file:
            for name in names:
                tensor = tensors[name]
                digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
                file.seek(tensor.offset)
                digest.update(file.read(min(tensor.nbytes, _SAMPLE_BYTES)))
    return digest.hexdigest()
