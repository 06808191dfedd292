"""`load_params(source, architecture)`: a weight source becomes the parameter tree, streamed tensor by tensor.

Each Hugging Face tensor is read, turned to (in, out), quantized or cast, and written into its layer of the stacked
leaf. Host memory peaks at the resulting tree, one stacked leaf where the device keeps a copy of its own, and one
tensor in float32.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError, counted
from tpu_tune.models import Architecture, architecture, is_classifier, with_keys
from tpu_tune.models.wrappers import spellings
from tpu_tune.tensors import Module, QuantizedTensor
from tpu_tune.transforms import QuantizeConfig, quantize_weight, quantized_paths

log = logging.getLogger(__name__)

# Tensors that some files hold and no computation needs: buffers that the architecture implies, copies of embeddings.
_IGNORED = (
    "rotary_emb.inv_freq", "attention.bias", "attention.masked_bias", "masked_bias", "rope_freqs.weight", ".attn.bias",
    "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "EncDecAttention.relative_attention_bias.weight",
)  # fmt: skip


def load_params(
    source: WeightSource,
    architecture: Architecture,
    dtype: Any = jnp.float32,
    quantization: QuantizeConfig | None = None,
    place: Callable[[str, Any], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    only: Callable[[Module], bool] = lambda module: True,
) -> dict[str, Any]:
    """Read all weights into a parameter tree.

    Args:
      source: an opened model.
      architecture: the model's facts, which the tree must match.
      dtype: storage of the leaves that stay arrays.
      quantization: which weights are quantized as they are read, and how.
      place: (path, host leaf) -> leaf on its devices; by default the default device.
      progress: called with (tensors read, tensors in all).
      only: which modules are read.

    Raises:
      UserError: a tensor is missing, left over, or of the wrong shape, or a name to quantize matches nothing.
    """
    names = check_names(source, architecture)
    quantized = quantized_paths(architecture.modules(), quantization) if quantization else frozenset()
    place = place or (lambda path, leaf: jax.tree.map(jnp.asarray, leaf))
    params: dict[str, Any] = {}
    done = 0
    for module in architecture.modules():
        if module.tied_to or not only(module):
            continue
        for path in module.leaves():
            stack: Any = None
            for index, name in tensors_of(module, path):
                for place_in, value in _in_tree(module, path, index, source.read(names[name])):
                    value = _stored(value, dtype, quantization if path in quantized else None)
                    if not place_in:
                        stack = value
                        continue
                    if stack is None:
                        stack = jax.tree.map(
                            lambda part, module=module: _aligned((*module.stack, *part.shape), part.dtype), value
                        )
                    jax.tree.map(lambda whole, part, at=place_in: whole.__setitem__(at, part), stack, value)
                done += 1
                if progress:
                    progress(done, len(names))
            params[path] = place(path, stack)
    return params


def read_layer(source: WeightSource, architecture: Architecture, layer: int) -> dict[str, Any]:
    """Return one layer's leaves by their paths in the tree, as `load_params` would stack them.

    Args:
      source: an opened model whose names are checked.
      architecture: its facts; of an encoder-decoder, the layer is the decoder's.
      layer: the layer's index.
    """
    names, leaves = check_names(source, architecture), {}
    for module in architecture.modules():
        if module.layers_path != architecture.names.layers or layer not in module.layers:
            continue
        for path in module.leaves():
            parts = [
                value
                for index, name in tensors_of(module, path)
                if index[0] == module.layers.index(layer)
                for _, value in _in_tree(module, path, index, source.read(names[name]))
            ]
            leaves[path] = jax.tree.map(lambda *each: np.stack(each), *parts) if module.experts else parts[0]
    return leaves


def tensors_of(module: Module, path: str) -> list[tuple[tuple[int, ...], str]]:
    """Return (its index in the leaf, its name) for each tensor in a file that a leaf is made of.

    Args:
      module: a module with weights of its own.
      path: path of its weight or its bias. The index has an entry for the layer, and one for the expert where each
        has a tensor of its own.
    """
    suffix, tensors = path.rsplit(".", 1)[1], []
    for number, layer in enumerate(module.layers or (None,)):
        names = [module.tensor_name(name, suffix) for name in module.names_of(layer)]
        lead = () if layer is None else (number,)
        tensors += [((*lead, expert) if module.experts_path else lead, name) for expert, name in enumerate(names)]
    return tensors


def _in_tree(module: Module, path: str, index: tuple[int, ...], value: Any) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield (index in the leaf, value in the tree's order) for what one tensor holds: several experts, or one thing."""
    turned = module.from_torch if path == module.weight else module.interleave
    if not module.stacked_in_file:
        yield index, turned(value)
        return
    for expert in range(module.experts):
        yield (*index, expert), turned(jax.tree.map(lambda part, expert=expert: part[expert], value))


def _stored(value: Any, dtype: Any, quantization: QuantizeConfig | None) -> Any:
    """Return a matrix or vector as the tree stores it, in host memory."""
    if not isinstance(value, QuantizedTensor):
        value = quantize_weight(jnp.asarray(value), quantization) if quantization else value.astype(dtype, copy=False)
    return jax.tree.map(np.asarray, value)


def open_architecture(source: WeightSource) -> Architecture:
    """Return the architecture that a source's config describes.

    Raises:
      UserError: it is not known, or the config lacks something; the message names the model.
    """
    try:
        return architecture(source.config)
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from None


def with_stored_head(source: WeightSource) -> WeightSource:
    """Return a source whose config ties the head to the embedding if its tensors do, as transformers 5 decides it.

    A head that is stored and differs from the embedding is used, whatever the config says; it is what merging a trained
    head into a tied model leaves. T5's config says with `tie_word_embeddings` whether the states are scaled before the
    head: its head is tied where none is stored.

    Raises:
      UserError: a tensor cannot be read, or T5's encoder or decoder has an embedding of its own.
    """
    config = source.config
    if is_classifier(config):  # its head is never the embedding
        return source
    try:
        tied = architecture(with_keys(config, {"tie_word_embeddings": True}))
        is_tied = architecture(config).tied
    except UserError:  # whoever needs the architecture says what is wrong with it
        return source
    head, embedding = (
        next((name for name in source.shapes if _canonical(name, {path: None}, tied.names.tower) == path), "")
        for path in (f"{tied.names.head}.weight", f"{tied.names.embed}.weight")
    )
    own = bool(head) and not (embedding and _equal(source, head, embedding))
    if tied.encoder:
        for name in source.shapes:
            if name.endswith(".embed_tokens.weight") and embedding and not _equal(source, name, embedding):
                raise UserError(f"{source.path}: '{name}' is not the same as '{embedding}', which this family shares")
        scaled = architecture(config).head_scale != 1.0
        return dataclasses.replace(
            source, config={**config, "tie_word_embeddings": not own, "scale_decoder_outputs": scaled}
        )
    if is_tied and own:
        log.warning(
            "%s: its config ties the head to the embedding, and its files hold another '%s'; that is the head",
            source.path,
            head,
        )
        return dataclasses.replace(source, config=with_keys(config, {"tie_word_embeddings": False}))
    if tied.names.tower and not is_tied and not head and not _says_untied(config):
        return dataclasses.replace(source, config=with_keys(config, {"tie_word_embeddings": True}))
    return source


def _says_untied(config: Mapping[str, Any]) -> bool:
    """Whether a multimodal config says that it has a head of its own: older ones had the text model's word for it."""
    nested = config.get("text_config") or {}
    return config.get("tie_word_embeddings") is False and not nested.get("tie_word_embeddings")


def _equal(source: WeightSource, one: str, other: str) -> bool:
    if source.shapes[one] != source.shapes[other]:
        return False
    values = [source.read(name) for name in (one, other)]
    if any(isinstance(value, QuantizedTensor) for value in values):
        values = [value.dequantize() if isinstance(value, QuantizedTensor) else value.T for value in values]
    return np.array_equal(*values)


def check_names(source: WeightSource, architecture: Architecture) -> dict[str, str]:
    """Hold a source's tensors against the architecture; return expected name -> name in the file.

    Raises:
      UserError: naming what is missing, extra or misshapen.
    """
    expected = torch_shapes(architecture)
    held, extra, _ = sorted_names(source, architecture)
    missing = [name for name in expected if name not in held]
    if missing:
        near = difflib.get_close_matches(missing[0], extra, 1)
        hint = f" (the file has '{near[0]}')" if near else ""
        raise UserError(
            f"{source.path}: {counted(len(missing), 'tensor is', 'tensors are')} missing: {_some(missing)}{hint}"
        )
    if extra:
        raise UserError(
            f"{source.path}: {counted(len(extra), 'tensor is', 'tensors are')} not part of a {architecture.family} "
            f"model: {_some(extra)}"
        )
    for name, shape in expected.items():
        if tuple(source.shapes[held[name]]) != shape:
            raise UserError(
                f"{source.path}: tensor '{held[name]}' has shape {tuple(source.shapes[held[name]])}, "
                f"the config asks for {shape}"
            )
    return {name: held[name] for name in expected}


def sorted_names(source: WeightSource, architecture: Architecture) -> tuple[dict[str, str], list[str], list[str]]:
    """Sort a source's tensors by what they are to the architecture; nothing is checked.

    Returns:
      Expected name -> name in the file; the names that have no place in the model; and those left aside: the other
      parts of a multimodal model, and heads that predict further tokens (`mtp.*`).
    """
    expected, tower = torch_shapes(architecture), architecture.names.tower
    canonical = {name: _canonical(name, expected, tower) for name in source.shapes}
    held = {there: name for name, there in canonical.items()}
    tied = {f"{module.path}.weight" for module in architecture.modules() if module.tied_to}
    # What the text part's names begin with in these files: whatever else begins so belongs to it.
    begins = {
        name.removesuffix(there.removeprefix(tower)) + "."
        for name, there in canonical.items()
        if tower and there in expected and there.startswith(f"{tower}.")
    }
    unused = unused_tensors(architecture)
    extra, aside = [], []
    for name, there in canonical.items():
        if there in expected or there in tied or (tied and there == "lm_head.weight"):
            continue
        if name.startswith("mtp.") or (begins and not name.startswith(tuple(begins))):
            aside.append(name)
        elif not there.endswith(_IGNORED) and there not in unused:
            extra.append(name)
    return held, extra, aside


def unused_tensors(architecture: Architecture) -> frozenset[str]:
    """Return the Hugging Face names of keys' and values' tensors in layers that use another layer's, not these."""
    unused, kinds = set(), architecture.layer_kinds
    for layer, kind in enumerate(kinds):
        names = kinds[kind.keys_from].names if kind.keys_from is not None else None
        parts = {names.k, names.v, names.k_norm} - {""} if names else ()
        at = f"{architecture.names.layers}.{layer}"
        unused |= {f"{at}.{part}.{suffix}" for part in parts for suffix in ("weight", "bias")}
    return frozenset(unused)


def torch_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return Hugging Face tensor name -> shape in torch layout."""
    shapes = {}
    for module in architecture.modules():
        if module.tied_to:
            continue
        for path in module.leaves():
            shape = module.torch_shape if path == module.weight else module.stacked_in_file + module.shape[-1:]
            shapes |= {name: shape for _, name in tensors_of(module, path)}
    return shapes


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialised array that JAX takes over on the CPU without a copy: it asks for 64-byte alignment."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _canonical(name: str, expected: Mapping[str, Any], tower: str = "") -> str:
    """Return the expected name for a file's: transformers 5 calls NeoX's head lm_head, base models drop a prefix.

    The text part of a multimodal model, whose names begin with `tower`, may lie at another path in the files.
    """
    if name in expected:
        return name
    if name == "lm_head.weight" and "embed_out.weight" in expected:
        return "embed_out.weight"
    for prefix in ("model.", "gpt_neox.", "transformer.", "model.decoder."):
        if prefix + name in expected:
            return prefix + name
    for meant in spellings(name, tower) if tower else ():
        if meant in expected or meant == "lm_head.weight":
            return meant
    return name


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
