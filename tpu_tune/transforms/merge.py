"""`merge`: adapters added into the weights, one leaf at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from tpu_tune.tensors import Module, dense


def merged_tensors(params: Mapping[str, Any], modules: list[Module]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (Hugging Face tensor name, float32 array in torch layout), one layer of one leaf at a time.

    Experts come last, and layer by layer, so that what a file holds in one tensor comes together.

    A tied head is left out unless an adapter or a trained embedding sets it apart from the embedding; then its own
    weight is yielded and the caller must untie the model.

    Args:
      params: a combined tree (see `methods.combine`).
      modules: the model's modules.
    """
    places = [(module, layer) for module in modules for layer in module.layers or (None,)]
    places.sort(key=lambda place: (place[0].experts > 0, place[1] if place[0].experts else 0))
    for module, layer in places:
        for suffix in ("weight", "bias"):
            leaf = params.get(f"{module.path}.{suffix}")
            if leaf is not None:
                yield from _layer_tensors(module, leaf, suffix, layer)


def _layer_tensors(module: Module, leaf: Any, suffix: str, layer: int | None) -> Iterator[tuple[str, np.ndarray]]:
    def one(*at: int) -> np.ndarray:
        value = np.asarray(_part_of(leaf, at) if at else dense(leaf))
        return module.to_torch(value) if suffix == "weight" else module.deinterleave(value)

    lead = () if layer is None else (module.layers.index(layer),)
    names = [module.tensor_name(name, suffix) for name in module.names_of(layer)]
    if not module.experts:
        yield names[0], one(*lead)
    elif module.stacked_in_file:
        yield names[0], np.stack([one(*lead, expert) for expert in range(module.experts)])
    else:
        for expert, name in enumerate(names):
            yield name, one(*lead, expert)


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
def _part_of(leaf: Any, index: tuple[int, ...]) -> Any:
    return dense(jax.tree.map(lambda stacked: stacked[index], leaf))
