"""Optimizer state in host memory between steps (`train.optim_offload`), what the guide's paged optimizers are for.

The state of one layer of one leaf at a time comes to the device, is updated there and goes back: a loop over the
layers, because XLA starts all transfers that nothing holds back at once, and then the device holds the whole state
after all. Leaves that are there once (embedding, head) come whole. The numbers are those of one update of all leaves,
for every optimizer here treats each layer of each leaf by itself. Only the memory kind of a leaf's sharding says where
it waits, so a checkpoint is the same with and without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tpu_tune.tensors import LeafSpec

Update = Callable[[Any, Any, Any], tuple[Any, Any]]  # (gradients, optimizer state, weights) -> (weights, state)

_HOST = "pinned_host"


def waits(state: Any, specs: Mapping[str, LeafSpec]) -> Any:
    """Return a tree of bools: which arrays of an optimizer's state wait in host memory.

    Matrices do. Counters, and what is one vector a layer (norms, factored moments), stay: they are small, and libtpu
    0.0.42 aborts at a slice of one row between host and device.

    Args:
      state: the optimizer's state, of arrays or shapes.
      specs: path -> facts of every trained leaf.
    """

    def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        leading = max((specs[key].leading for key in keys if key in specs), default=0)
        return leaf.ndim >= 2 + leading

    return jax.tree_util.tree_map_with_path(is_matrix, state)


def to_host(shardings: Any, waiting: Any) -> Any:
    """Return the shardings of an optimizer's state with those that `waits` names in host memory."""
    return jax.tree.map(
        lambda sharding, goes: sharding.with_memory_kind(_HOST) if goes else sharding, shardings, waiting
    )


def update_each(
    update: Update,
    grads: Mapping[str, Array],
    state: Any,
    weights: Mapping[str, Array],
    is_finite: Array,
    shardings: Any,
    specs: Mapping[str, LeafSpec],
) -> tuple[dict[str, Array], Any]:
    """Return (weights, state) after an update of one layer of one leaf after the other.

    Args:
      update: the optimizer's update, which can be called with the same three trees of some paths and layers only.
      grads: path -> gradient.
      state: the optimizer's state; what belongs to a leaf stands in a dict under its path, and has its axis 0.
      weights: path -> leaf.
      is_finite: bool; where it is False, `update` changes nothing. Layers are then not visited. That their number is
        not known beforehand also keeps XLA from taking loops apart whose transfers then need more semaphores than a TPU
        has.
      shardings: shardings of the state: where its leaves lie and are to lie again.
      specs: path -> facts of every trained leaf.
    """
    new_weights, new_state = {}, state
    for path in grads:
        part, part_shardings = _part(state, path, grads), _part(shardings, path, grads)
        arguments = update, path, grads[path], part, weights[path], part_shardings
        new_weights[path], part = _each_layer(*arguments, is_finite) if specs[path].stacked else _whole(*arguments)
        new_state = _merged(new_state, part, grads)
    return new_weights, new_state


def _whole(update: Update, path: str, grad: Array, state: Any, weight: Array, shardings: Any) -> tuple[Array, Any]:
    new_weights, state = update({path: grad}, _fetched(state, shardings), {path: weight})
    return new_weights[path], _returned(state, shardings)


def _each_layer(
    update: Update, path: str, grad: Array, state: Any, weight: Array, shardings: Any, is_finite: Array
) -> tuple[Array, Any]:
    def at(leaf: Array, layer: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(leaf, layer, 1) if leaf.ndim else leaf

    def put(leaf: Array, new: Array, layer: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(leaf, new, layer, 0) if leaf.ndim else new

    def one_layer(layer: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        weight, carried = carry
        # Counters are those from before the step in every layer.
        part = jax.tree.map(lambda new, old: at(new if new.ndim else old, layer), carried, state)
        new_weights, part = update({path: at(grad, layer)}, _fetched(part, shardings), {path: at(weight, layer)})
        carried = jax.tree.map(lambda leaf, new: put(leaf, new, layer), carried, _returned(part, shardings))
        return put(weight, new_weights[path], layer), carried

    return jax.lax.fori_loop(0, jnp.where(is_finite, weight.shape[0], 0), one_layer, (weight, state))


def _fetched(state: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.device_put(leaf, sharding.with_memory_kind("device")), state, shardings
    )


def _returned(state: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, sharding: jax.device_put(leaf, sharding) if leaf.ndim else leaf, state, shardings)


def _by_path(paths: Mapping[str, Any]) -> Callable[[Any], bool]:
    return lambda node: isinstance(node, dict) and set(node) == set(paths)


def _part(tree: Any, path: str, paths: Mapping[str, Any]) -> Any:
    """Return a state's part for one leaf, with the counters that all share."""
    is_dict = _by_path(paths)
    return jax.tree.map(lambda node: {path: node[path]} if is_dict(node) else node, tree, is_leaf=is_dict)


def _merged(tree: Any, part: Any, paths: Mapping[str, Any]) -> Any:
    """Return a state with one leaf's part in it, and its counters."""
    is_dict = _by_path(paths)
    nodes, structure = jax.tree.flatten(tree, is_leaf=is_dict)
    parts = structure.flatten_up_to(part)
    return structure.unflatten(
        [{**node, **new} if is_dict(node) else new for node, new in zip(nodes, parts, strict=True)]
    )
