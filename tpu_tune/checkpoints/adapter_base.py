"""The base that an adapter belongs to where that is not the model as it stands, as a pure transform of its source.

PEFT saves embeddings and head beside an adapter whose model was given more tokens, and puts them into the base on
loading; a head that an adapter trains in full (`modules_to_save`) is untied from the embedding. Of PiSSA
(arXiv:2404.02948) and OLoRA (arXiv:2406.01775) it takes the adapter's first values out of each adapted weight, when the
adapter is made and again whenever it is loaded (peft 0.21, `tuners/lora/layer.py`, `pissa_init` and `olora_init`); what
is taken is a function of the weight alone, the same up to rounding whoever computes it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from tpu_tune.checkpoints import storage
from tpu_tune.checkpoints.heads import with_head
from tpu_tune.checkpoints.huggingface import load_tokenizer
from tpu_tune.checkpoints.params import check_names, open_architecture
from tpu_tune.checkpoints.peft import PREFIX, REDONE_STARTS, is_saved, read_files, saved_embeddings
from tpu_tune.checkpoints.vocabulary import with_vocabulary
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError
from tpu_tune.models import SCORE, Architecture, label_names, with_keys
from tpu_tune.tensors import Module, QuantizedTensor
from tpu_tune.transforms import LoraConfig, find_targets

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def base_of_adapter(source: WeightSource, adapter: str) -> WeightSource:
    """Return the source with the weights that PEFT has below an adapter when it has loaded it.

    Args:
      source: the model that the adapter names as its base; not changed.
      adapter: a PEFT adapter directory.

    Raises:
      UserError: the adapter or the model cannot be read, or the adapter's base cannot be made from this model.
    """
    spec, tensors = read_files(adapter, open_architecture(source))
    source = _with_score(source, tensors)
    source = _with_own_head(source, spec)
    if spec.init_lora_weights in REDONE_STARTS:
        source = _with_residuals(source, adapter, spec)
    # Last: what is saved of the base is as it was under the adapter, its first values taken out.
    source = _with_embeddings(source, adapter, spec, tensors)
    return dataclasses.replace(source, base_of=adapter)


def _with_score(source: WeightSource, tensors: Mapping[str, np.ndarray]) -> WeightSource:
    """Give the source of a SEQ_CLS adapter the head that the adapter trains, where it has none of as many labels."""
    score = tensors.get(f"{PREFIX}{SCORE}.weight")
    if score is None or open_architecture(source).num_labels == len(score):
        return source
    return with_head(source, label_names({"num_labels": len(score)}))


def _with_embeddings(
    source: WeightSource, adapter: str, spec: LoraConfig, tensors: Mapping[str, np.ndarray]
) -> WeightSource:
    """Put the adapter's own embedding and head in the place of the model's."""
    architecture = open_architecture(source)
    names, size = check_names(source, architecture), architecture.vocab_size
    anew = _trained_anew(architecture, spec, tensors)
    kept = {key: one for key, one in saved_embeddings(architecture, spec, tensors).items() if one not in anew.values()}
    kept |= anew
    replaced: dict[str, np.ndarray] = {}
    for key, module in kept.items():
        name, value = names[f"{module.tied_to or module.path}.weight"], tensors[key]
        if value.shape[1:] != source.shapes[name][1:]:
            raise UserError(f"{adapter}: '{key}' has shape {value.shape}, the base model's is {source.shapes[name]}")
        if name in replaced and not np.array_equal(replaced[name], value):
            raise UserError(f"{adapter}: embedding and head differ in it, and the model {source.path} ties them")
        replaced[name] = value
    sizes = {len(tensors[key]) for key in kept} or {size}
    if sizes != {size}:
        absent = _absent(architecture, names, replaced)
        if len(sizes) > 1 or absent:
            raise UserError(
                f"{adapter}: it was trained over {max(sizes)} tokens, {source.path} has {size}, and it lacks the rows "
                f"of {' and '.join(absent) or 'some of embedding and head'}; give the model that it was trained over"
            )
    if not replaced:
        return source
    grown = sizes != {size}
    has_tokenizer = grown and any(storage.exists(os.path.join(adapter, file)) for file in _TOKENIZER_FILES)
    return dataclasses.replace(
        source,
        config=with_vocabulary(source.config, sizes.pop()) if grown else source.config,
        shapes=source.shapes | {name: value.shape for name, value in replaced.items()},
        read=functools.partial(_read_replaced, source, replaced),
        load_tokenizer=functools.partial(_tokenizer_of, adapter) if has_tokenizer else source.load_tokenizer,
        fingerprint=_fingerprint(source, adapter),
    )


def _trained_anew(architecture: Architecture, spec: LoraConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Module]:
    """Return tensor name -> module of what was grown and is trained in full: untied, its base is read by no one."""
    found = {}
    for module in architecture.modules() if not architecture.tied else ():
        name = f"{PREFIX}{module.path}.weight"
        per_token = module.path in (
            architecture.names.embed,
            "" if architecture.num_labels else architecture.names.head,
        )
        if per_token and is_saved(module, spec) and len(tensors.get(name, ())) not in (0, architecture.vocab_size):
            found[name] = module
    return found


def _absent(architecture: Architecture, names: Mapping[str, str], replaced: Mapping[str, Any]) -> list[str]:
    """Return the leaves with an entry for each token that are not replaced."""
    own = not architecture.tied and not architecture.num_labels
    heads = [module for module in architecture.modules() if module.is_head and own]
    leaves = [f"{architecture.names.embed}.weight", *[path for head in heads for path in head.leaves()]]
    return [path for path in leaves if names[path] not in replaced]


def _with_own_head(source: WeightSource, spec: LoraConfig) -> WeightSource:
    """Give a tied head that the adapter saves a weight of its own, which begins as the embedding's."""
    architecture = open_architecture(source)
    head = next(module for module in architecture.modules() if module.is_head)
    if not head.tied_to or not is_saved(head, spec):
        return source
    embedding = check_names(source, architecture)[f"{head.tied_to}.weight"]
    stored = {name: name for name in source.shapes if not name.endswith("lm_head.weight")} | {head.weight: embedding}
    scaling = {"scale_decoder_outputs": architecture.head_scale != 1.0} if architecture.encoder else {}
    return dataclasses.replace(
        source,
        config=with_keys(source.config, {"tie_word_embeddings": False, **scaling}),
        shapes={name: source.shapes[origin] for name, origin in stored.items()},
        read=functools.partial(_read_as, source, stored),
    )


def _read_as(source: WeightSource, stored: Mapping[str, str], name: str) -> Any:
    return source.read(stored[name])


def _tokenizer_of(adapter: str) -> Any:
    return load_tokenizer(storage.local_copy(adapter))


def _read_replaced(source: WeightSource, replaced: Mapping[str, np.ndarray], name: str) -> Any:
    return replaced[name] if name in replaced else source.read(name)


def _with_residuals(source: WeightSource, adapter: str, spec: LoraConfig) -> WeightSource:
    """Take the first values of a PiSSA or OLoRA adapter out of the weights that it adapts."""
    architecture = open_architecture(source)
    names = check_names(source, architecture)
    residuals = {}
    for target in find_targets(architecture.modules(), spec, architecture.default_targets).adapted:
        module = target.module
        if module.kind == "embedding":  # PEFT leaves these as they are
            continue
        for layer_name, rank, scale in zip(target.names, target.ranks, target.scales, strict=True):
            name = names[f"{module.tied_to or layer_name}.weight"]
            if spec.init_lora_weights == "pissa":
                residuals[name] = functools.partial(_without_principal, rank=rank)
            else:
                residuals[name] = functools.partial(_without_orthogonal, rank=rank, scale=scale)
    return dataclasses.replace(
        source,
        read=functools.partial(_read_residual, source, adapter, residuals),
        fingerprint=_fingerprint(source, adapter),
    )


def _read_residual(source: WeightSource, adapter: str, residuals: Mapping[str, Any], name: str) -> Any:
    value = source.read(name)
    if name not in residuals:
        return value
    if isinstance(value, QuantizedTensor):
        raise UserError(
            f"{adapter}: its base is derived from weights in full precision, and {source.path} has '{name}' quantized; "
            "give the unquantized model"
        )
    return residuals[name](np.asarray(value, np.float32))


def _without_principal(weight: np.ndarray, rank: int) -> np.ndarray:
    """Return a matrix without its `rank` largest singular values."""
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    return weight - (left[:, :rank] * values[:rank]) @ right[:rank]


def _without_orthogonal(weight: np.ndarray, rank: int, scale: float) -> np.ndarray:
    """Return a matrix, as its file has it, less `scale` times the first `rank` terms of its QR decomposition."""
    q, r = np.linalg.qr(weight)
    return weight - np.float32(scale) * (q[:, :rank] @ r[:rank])


def _fingerprint(source: WeightSource, adapter: str) -> str:
    return hashlib.sha256(json.dumps([source.fingerprint, adapter]).encode()).hexdigest()
