"""`merge`: adapters added into the weights, one leaf at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from tpu_tune.tensors import LoraTensor, Module, TokensTensor, dense


def merged_tensors(params: Mapping[str, Any], modules: list[Module]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (Hugging Face tensor name, float32 array in torch layout), one layer of one leaf at a time.

    A tied head is left out unless an adapter or a trained embedding sets it apart from the embedding; then its own
    weight is yielded and the caller must untie the model.

    Args:
      params: a combined tree (see `split.combine`).
      modules: the model's modules.
    """
    for module in modules:
        if module.weight not in params:
            continue
        for layer in range(module.layers) if module.layers else [None]:
            for suffix in ("weight", "bias"):
                leaf = params.get(f"{module.path}.{suffix}")
                if leaf is None:
                    continue
                value = np.asarray(_dense_layer(leaf, layer))
                value = module.to_torch(value) if suffix == "weight" else module.deinterleave(value)
                yield f"{module.name(layer)}.{suffix}", value


def unties_head(params: Mapping[str, Any], modules: list[Module]) -> bool:
    """Return whether merging gives a tied head a weight of its own."""
    for module in modules:
        if module.tied_to:
            embedding = params[f"{module.tied_to}.weight"]
            return module.weight in params or (hasattr(embedding, "base") and not isinstance(embedding, TokensTensor))
    return False


def merge(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree with every adapted leaf replaced by its merged float32 array; other leaves as they are."""
    return {
        path: dense(leaf) if isinstance(leaf, (LoraTensor, TokensTensor)) else leaf for path, leaf in params.items()
    }


@jax.jit
def _layer_of(leaf: Any, layer: int) -> Any:
    return dense(jax.tree.map(lambda stacked: stacked[layer], leaf))


def _dense_layer(leaf: Any, layer: int | None) -> Any:
    return dense(leaf) if layer is None else _layer_of(leaf, layer)
