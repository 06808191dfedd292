"""`merge`: adapters added into the weights, one leaf at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from tpu_tune.tensors import Module, dense


def merged_tensors(params: Mapping[str, Any], modules: list[Module]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (Hugging Face tensor name, float32 array in torch layout), one layer of one leaf at a time.

    A tied head is left out unless an adapter or a trained embedding sets it apart from the embedding; then its own
    weight is yielded and the caller must untie the model.

    Args:
      params: a combined tree (see `methods.combine`).
      modules: the model's modules.
    """
    for module in modules:
        if module.weight not in params:
            continue
        for index, layer in enumerate(module.layers or (None,)):
            for suffix in ("weight", "bias"):
                leaf = params.get(f"{module.path}.{suffix}")
                if leaf is None:
                    continue
                value = np.asarray(_layer_of(leaf, index) if module.layers else dense(leaf))
                value = module.to_torch(value) if suffix == "weight" else module.deinterleave(value)
                yield module.tensor_name(module.name(layer), suffix), value


def unties_head(params: Mapping[str, Any], modules: list[Module]) -> bool:
    """Return whether merging gives a tied head a weight of its own."""
    for module in modules:
        if module.tied_to:
            embedding = params[f"{module.tied_to}.weight"]
            return module.weight in params or getattr(embedding, "unties_head", hasattr(embedding, "base"))
    return False


def merge(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree with every leaf that wraps another replaced by its merged float32 array; others as they are."""
    return {path: dense(leaf) if hasattr(leaf, "base") else leaf for path, leaf in params.items()}


@jax.jit
def _layer_of(leaf: Any, index: int) -> Any:
    return dense(jax.tree.map(lambda stacked: stacked[index], leaf))
