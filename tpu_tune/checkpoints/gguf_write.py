"""Writing a GGUF file, as llama.cpp's convert_hf_to_gguf.py writes it.

Tensors come one at a time; their bytes are put into a temporary file beside the output until all are known, since
GGUF's header stands first and holds their sizes. The file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import gguf
import numpy as np

from tpu_tune.checkpoints import gguf_k_quants, prompts, storage
from tpu_tune.checkpoints.gguf_families import FAMILIES
from tpu_tune.checkpoints.gguf_file import open_gguf_file
from tpu_tune.checkpoints.gguf_metadata import gguf_metadata
from tpu_tune.checkpoints.gguf_mixtures import FORMATS, Format, fitting, formats_of
from tpu_tune.checkpoints.gguf_tokenizer_write import (
    TEMPLATE,
    end_of_turn,
    fit_to_rows,
    template_metadata,
    tokenizer_metadata,
)
from tpu_tune.checkpoints.huggingface_write import untied_config
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError
from tpu_tune.models import architecture as architecture_of
from tpu_tune.models import is_classifier

_ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
_LARGEST_F16 = float(np.finfo(np.float16).max)


def check_family(config: dict[str, Any]) -> None:
    """Raise a UserError if llama.cpp knows no models of this configuration; nothing is read or written."""
    if is_classifier(config):
        raise UserError(
            "a GGUF file of a classification or reward head is not implemented; without --gguf the result is written "
            "as PEFT and transformers read it"
        )
    gguf_metadata(config)


# Model types that llama.cpp opens only with a head in the file (a T5: scales only so): embedding, head.
_HEADS = {
    "t5": ("shared.weight", "lm_head.weight"),
    "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
}


def write_gguf(
    path: str, tensors: Iterable[tuple[str, np.ndarray]], source: WeightSource, kind: str = "f16", untied: bool = False
) -> None:
    """Write a model as one GGUF file.

    Args:
      path: file to write; an existing one is replaced when the new one is complete.
      tensors: Hugging Face name and float32 array in Hugging Face's layout, one at a time; a tied head is left out
        (not a T5's, with the scaling that llama.cpp does not do, nor a GPT-NeoX's, which it does not tie).
      source: the model's origin; configuration and tokenizer are taken from it.
      kind: number format of the matrices, one of `gguf_mixtures.FORMATS`; rows that its blocks do not divide have a
        format of smaller blocks, or F16. Vectors, norms and learned positions are float32, as in llama.cpp.
      untied: the head has a weight of its own although the source's configuration ties it.

    Raises:
      UserError: a family of which no GGUF is written, GGUF cannot express the configuration or the tokenizer, a weight
        does not fit into half precision, or the file cannot be written.
    """
    config = untied_config(source.config) if untied else source.config
    architecture, metadata, extra = gguf_metadata(config)
    writer = _Writer(None, architecture)
    try:
        with storage.whole_file(path) as aside, tempfile.TemporaryFile(dir=os.path.dirname(aside) or ".") as data:
            shapes = {}
            formats = _formats(source, config, untied, kind)
            for name, array in extra.items():
                _append(data, writer, name, array, formats[name])
            for name, array in as_llama_cpp_has_it(tensors, config):
                shapes[name] = array.shape
                stored, array = _to_gguf(architecture, config, source, name, array)
                _append(data, writer, stored, array, formats[stored])
            tokenizer = _tokenizer(source, _vocabulary_rows(shapes), architecture)
            general = {
                "general.type": "model",
                "general.name": _name(path, architecture, tokenizer),
                "general.file_type": int(FORMATS[kind][1]),
                "general.quantization_version": gguf.GGML_QUANT_VERSION,
            }
            taught = {f"{prompts.RECORD}.{prompts.KEY}": form} if (form := prompts.recorded(config)) else {}
            for key, value in (general | metadata | tokenizer | taught).items():
                _add(writer, key, value)
            writer.write_header_to_file(path=aside)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            # Not by the writer, which writes with `ndarray.tofile` and does not notice a disk that fills at the end.
            with open(aside, "ab") as file:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                data.seek(0)
                shutil.copyfileobj(data, file, 1 << 24)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # a full disk fails again when the rest of a buffer is written
            writer.close()


def as_llama_cpp_has_it(
    tensors: Iterable[tuple[str, np.ndarray]], config: dict[str, Any]
) -> Iterable[tuple[str, np.ndarray]]:
    """Return the tensors, those changed that llama.cpp stores as another family's or not in one piece."""
    if config["model_type"] == "granitemoehybrid":
        return _as_granite(tensors)
    return _with_head(tensors, config)


def _as_granite(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a dense Granite 4 under Granite 3's names, gate and up apart."""
    for name, array in tensors:
        layer, _, part = name.partition(".shared_mlp.")
        if part == "input_linear.weight":
            gate, up = np.split(array, 2)
            yield f"{layer}.mlp.gate_proj.weight", gate
            yield f"{layer}.mlp.up_proj.weight", up
        else:
            yield (f"{layer}.mlp.down_proj.weight" if part else name), array


def _with_head(tensors: Iterable[tuple[str, np.ndarray]], config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors, with a head also where it is tied if llama.cpp needs one; it never scales a T5's states."""
    embedding, head = _HEADS.get(config["model_type"], ("", ""))
    found = None
    for name, array in tensors:
        if name == head:
            found = array
            continue
        if name == embedding and found is None:
            found = array
        yield name, array
    if found is not None:
        yield head, found * np.float32(architecture_of(config).head_scale)


def _to_gguf(
    architecture: str, config: dict[str, Any], source: WeightSource, name: str, array: np.ndarray
) -> tuple[str, np.ndarray]:
    """GGUF's name of a tensor, and the tensor as GGUF has it."""
    family = FAMILIES[architecture]
    stored = family.gguf_name(name, source.shapes)
    if stored is None:
        raise UserError(f"{name} has no place in a GGUF file of the family {architecture}; export it with --merge")
    if stored == "output.weight" and gguf.MODEL_TENSOR.OUTPUT not in gguf.MODEL_TENSORS[_kind(architecture)]:
        raise UserError(
            f"llama.cpp ties the head of every {architecture} model to its embedding, and this one has a head of its "
            "own (the embedding was trained or adapted); export it with --merge"
        )
    return stored, family.to_gguf(name, array, config)


def _kind(architecture: str) -> gguf.MODEL_ARCH:
    return next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)


def _formats(source: WeightSource, config: dict[str, Any], untied: bool, kind: str) -> dict[str, Format]:
    """Return GGUF name -> number format of all tensors that will be written, before any is."""
    architecture, metadata, extra = gguf_metadata(config)
    nothing = np.empty((2, 0), np.float32)
    there = [name for name, _ in as_llama_cpp_has_it(((name, nothing) for name in source.shapes), config)]
    stored = {*extra, *(FAMILIES[architecture].gguf_name(name, source.shapes) for name in there)} - {None}
    if untied:
        stored.add("output.weight")
    elif config.get("tie_word_embeddings") and config["model_type"] not in _HEADS:
        stored.discard("output.weight")  # a copy in the source's file, which is not written
    return formats_of(stored, metadata | {"general.architecture": architecture}, kind)


def _append(stream: Any, writer: gguf.GGUFWriter, name: str, array: np.ndarray, number: Format) -> None:
    """Put a tensor's bytes, filled up to the alignment, at the end of a file and its description into the writer."""
    array = np.ascontiguousarray(array, np.float32)
    number = Format.F32 if _is_plain(name, array) else fitting(number, array.shape[-1])
    if number == Format.F16 and np.max(np.abs(array), initial=0.0) > _LARGEST_F16:
        raise UserError(f"{name} has values beyond {_LARGEST_F16:.0f}, the largest of f16; write bf16 instead")
    quantize = gguf_k_quants.quantize if number in gguf_k_quants.QUANTIZERS else gguf.quantize
    content = quantize(array, number)
    writer.add_tensor_info(name, content.shape, content.dtype, content.nbytes, raw_dtype=number)
    stream.write(content.tobytes())
    stream.write(bytes(-content.nbytes % _ALIGNMENT))


def _is_plain(name: str, array: np.ndarray) -> bool:
    """Whether convert_hf_to_gguf.py, `prepare_tensors`, leaves a tensor in float32."""
    vector = array.ndim <= 1 or name.endswith("_norm.weight") or not name.endswith(".weight")
    return vector or name == "position_embd.weight"


def _vocabulary_rows(shapes: dict[str, tuple[int, ...]]) -> int:
    """Rows of the embedding, whatever the family calls it."""
    embeddings = {family.names["token_embd"] for family in FAMILIES.values()}
    return next(shape[0] for name, shape in shapes.items() if name.removesuffix(".weight") in embeddings)


def _name(path: str, architecture: str, tokenizer: dict[str, Any]) -> str:
    """The file's name without its ending, except for what llama.cpp reads out of it.

    It lets special tokens swallow the blanks behind them in a model whose name has `phi-3` or `phi3` in it, and fails
    where such a model lacks one of four tokens (llama-vocab.cpp, `_set_tokenid_attr`).
    """
    name = os.path.splitext(os.path.basename(path))[0]
    if architecture == "phi3" and {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= set(tokenizer["tokenizer.ggml.tokens"]):
        return name if re.search("phi-?3", name, re.IGNORECASE) else f"Phi-3 {name}"
    return re.sub("phi-?3", "Phi 3", name, flags=re.IGNORECASE)


def _tokenizer(source: WeightSource, rows: int, architecture: str) -> dict[str, Any]:
    """The tokenizer's metadata, as the source's where that is a GGUF file."""
    if source.path.endswith(".gguf") and os.path.isfile(source.path) and not source.added_tokens:
        metadata = open_gguf_file(source.path).metadata
        kept = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
        if source.chat_template:
            kept = {key: value for key, value in kept.items() if not key.startswith(TEMPLATE)}
            kept |= template_metadata(source.chat_template)
        if TEMPLATE in kept:
            kept |= end_of_turn(source.load_tokenizer(), kept)
        return fit_to_rows(kept, rows)
    return tokenizer_metadata(source.load_tokenizer(), rows, architecture)


class _Writer(gguf.GGUFWriter):
    """gguf's, which writes no empty list: llama.cpp opens no byte-level tokenizer without a list of its merges."""

    def _pack_val(self, val: Any, vtype: gguf.GGUFValueType, add_vtype: bool, *rest: Any, **more: Any) -> bytes:
        if vtype != gguf.GGUFValueType.ARRAY or len(val):
            return super()._pack_val(val, vtype, add_vtype, *rest, **more)
        kind = struct.pack("<I", vtype) if add_vtype else b""
        return kind + struct.pack("<IQ", gguf.GGUFValueType.STRING, 0)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add one metadata value under the GGUF type that llama.cpp expects of such a value."""
    if isinstance(value, np.ndarray):
        value = value.tobytes() if value.dtype.itemsize == 1 else value.tolist()
    if isinstance(value, (list, bytes)) and not value:
        writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY)
    elif isinstance(value, (list, bytes)):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
