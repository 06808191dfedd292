"""Walking the layers: `run_layers` scans each group's stacked leaves, every layer rematerialised by policy.

`Execution` says how, apart from the mathematics. Leaves that `jax.lax.scan` slices are arrays; quantized stacks stay
outside on one device and are read layer by layer where they lie (`tensors.outside_scan`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tpu_tune.kernels.quantized_matmul import MatmulPlan
from tpu_tune.kernels.splash import RESULT
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.models.branch import PROJECTION
from tpu_tune.models.groups import LayerGroup
from tpu_tune.models.layers import Layer, LayerContext, Past, empty_past
from tpu_tune.models.self_attention import KeysValues
from tpu_tune.tensors import Module, outside_scan

# What the layers keep for generation: for each group, for each position of its pattern, a `Past` stacked over the
# repeats. Layers of different kinds may keep different things.
Pasts = tuple[tuple[Past, ...], ...]
Kept = dict[int, KeysValues]  # of layers whose keys and values others use, by the layer's index
_LAYER_INPUT = "layer_input"
REMAT_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PROJECTION, RESULT),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How to run a decoder, apart from its mathematics.

    Attributes:
      dtype: the activations' dtype; norms, rotary angles and softmax are float32 whatever it is.
      attention: name of attention's implementation, see `kernels.attention`.
      mesh: the devices, for attention's kernels, each of which works on its device's part; None on one device.
      remat: none | full | dots | offload: what of a layer the backward pass recomputes; all but its input under full,
        which waits in the host's memory under offload.
      chunk: tokens of each row and device that a layer's projections and MLP work on at one time, in training; 0: all.
      plan: how products with quantized kernels are computed.
      gather: applied to one layer's leaves, by path, inside the rematerialised scan body; training constrains quantized
        codes there, so that they are gathered over fsdp instead of dequantized weights.
      constrain: applied to hidden states (B, T, D) between layers; training pins their sharding there.
      packed: whether rows with segments may hold several documents, see `kernels.layout.TokenLayout`.
    """

    dtype: Any = jnp.float32
    attention: str = "auto"
    mesh: Mesh | None = None
    remat: str = "none"
    chunk: int = 0
    plan: MatmulPlan = MatmulPlan()
    gather: Callable[[dict[str, Any]], dict[str, Any]] = lambda leaves: leaves
    constrain: Callable[[Array], Array] = lambda hidden: hidden
    packed: bool = True


def run_layers(
    arch: Architecture,
    execution: Execution,
    leaves: Mapping[str, Any],
    x: Float[Array, "B T D"],
    context: LayerContext,
    pasts: Pasts | None,
    inputs: Float[Array, "L B T P"] | None = None,
) -> tuple[Float[Array, "B T D"], Pasts | None, Float[Array, "2 E"] | None]:
    """Run all layers.

    Args:
      arch: the model's facts.
      execution: how to run them.
      leaves: path -> stacked leaf.
      x: hidden states.
      context: what all layers share.
      pasts: what the layers keep of the tokens so far; None without a cache.
      inputs: what each layer gets beside the hidden states; None: nothing.

    Returns:
      New hidden states, what the cache is to hold, and the load of the experts (`experts.load`) over all layers; None
      without experts, or with a cache.
    """
    modules = {module.path: module for module in arch.modules() if module.layers_path == arch.names.layers}
    written, kept = [], {}
    for index, group in enumerate(arch.groups):
        stacks = [
            _stack(modules[path.rpartition(".")[0]], path, leaf, group, execution)
            for path, leaf in leaves.items()
            if any(layer in group.layers for layer in modules[path.rpartition(".")[0]].layers)
        ]
        past = (Past(),) * group.period if pasts is None else pasts[index]
        own_inputs = None if inputs is None else inputs[group.first : group.layers.stop]
        given = dataclasses.replace(context, kept=kept)
        (x, new_kept), new = _run_group(arch, execution, group, stacks, x, given, past, own_inputs)
        kept = kept | new_kept
        written.append(new)
    if pasts is not None:
        return x, tuple(written), None
    loads = [jnp.sum(past.load, axis=0) for new in written for past in new if past.load is not None]
    return x, None, sum(loads) if loads else None


def empty_pasts(arch: Architecture, batch: int, length: int, dtype: Any) -> Pasts:
    """Return what the layers keep before the first token, with room for `length` of them."""

    def stacked(group: LayerGroup, kind: LayerKind) -> Past:
        past = empty_past(arch, kind, batch, length, dtype)
        return jax.tree.map(lambda array: jnp.repeat(array[None], group.repeats, axis=0), past)

    return tuple(
        tuple(stacked(group, arch.layer_kinds[group.first + position]) for position in range(group.period))
        for group in arch.groups
    )


@dataclasses.dataclass(frozen=True)
class _Stack:
    """A stacked leaf as one group's scan reads it.

    Attributes:
      path: the leaf's path in the tree.
      name: the path relative to its layer.
      positions: which layers of the group's pattern have the leaf.
      start: index in the stack of the group's first layer that has it.
      scanned: arrays for the scan's inputs, (repeats, ...), or (repeats, positions, ...) where a pattern has several
        layers.
      layer: function (one layer's part of `scanned`, index in the stack) -> the layer's leaf.
    """

    path: str
    name: str
    positions: tuple[int, ...]
    start: int
    scanned: Any
    layer: Callable[[Any, Array], Any]

    def at(self, position: int, repeat: Array, part: Any, is_pattern: bool) -> Any:
        """Return the leaf of the layer at a position of the pattern, given one repeat's part of `scanned`."""
        offset = self.positions.index(position)
        part = jax.tree.map(lambda array: array[offset], part) if is_pattern else part
        return self.layer(part, self.start + repeat * len(self.positions) + offset)


def _stack(module: Module, path: str, leaf: Any, group: LayerGroup, execution: Execution) -> _Stack:
    positions = tuple(position for position in range(group.period) if group.first + position in module.layers)
    start, count = module.layers.index(group.first + positions[0]), group.repeats * len(positions)
    # On a mesh the scan slices quantized stacks too: `Execution.gather` says how each slice lies on the devices.
    sliced, layer = outside_scan(leaf, execution.plan) if execution.mesh is None else (leaf, lambda part, index: part)

    def of_group(array: Array) -> Array:
        if count < array.shape[0]:
            array = jax.lax.slice_in_dim(array, start, start + count)
        return array if group.period == 1 else array.reshape(group.repeats, len(positions), *array.shape[1:])

    name = path[len(module.layers_path) :].partition(".")[2]
    return _Stack(path, name, positions, start, jax.tree.map(of_group, sliced), layer)


def _run_group(
    arch: Architecture,
    execution: Execution,
    group: LayerGroup,
    stacks: list[_Stack],
    x: Array,
    context: LayerContext,
    past: tuple[Past, ...],
    inputs: Array | None,
) -> tuple[tuple[Array, Kept], tuple[Past, ...]]:
    """Scan over the repeats of a group's pattern; the layers of a pattern run one after the other.

    Returns:
      The hidden states with the keys and values that layers of later groups use, and what the cache is to hold.
    """
    is_pattern = group.period > 1
    sources = {kind.keys_from for kind in arch.kinds} & {*group.layers}
    kept_positions = {(layer - group.first) % group.period for layer in sources}

    def layer_at(position: int, kinds: tuple[LayerKind, ...]) -> Callable[[Array, tuple], tuple[Array, Past]]:
        own = [stack for stack in stacks if position in stack.positions]
        names = {stack.path: stack.name for stack in own}

        def run_layer(x: Array, scanned: tuple[Array, Any, Array, Past, Any]) -> tuple[Array, Past]:
            repeat, parts, kind, past, own_input = scanned
            if execution.mesh is None:  # the partitioner would gather what the constraint is put on
                # XLA's GPU compiler would like the backward loop's inputs transposed, and keep them all both ways.
                x = with_layout_constraint(x, Layout(major_to_minor=(0, 1, 2)))
            x = checkpoint_name(x, _LAYER_INPUT)
            leaves = {stack.path: stack.at(position, repeat, parts[stack.path], is_pattern) for stack in own}
            inside = {names[path]: leaf for path, leaf in execution.gather(leaves).items()}
            keep = position in kept_positions
            x, past = Layer(arch, kinds, kind, inside, context, own_input, keep)(x, past)
            if context.start is not None:
                past = dataclasses.replace(past, load=None)
            return execution.constrain(x), past if context.start is not None or keep else Past(load=past.load)

        if execution.remat == "none":
            return run_layer
        return jax.checkpoint(run_layer, policy=REMAT_POLICIES[execution.remat])

    layer_kinds = [arch.layer_kinds[layer] for layer in group.layers]
    kinds = [tuple(dict.fromkeys(layer_kinds[position :: group.period])) for position in range(group.period)]
    kind_indices = [kinds[index % group.period].index(kind) for index, kind in enumerate(layer_kinds)]
    layers = [layer_at(position, kinds[position]) for position in range(group.period)]

    def run_pattern(carry: tuple[Array, Kept], scanned: tuple) -> tuple[tuple[Array, Kept], tuple[Past, ...]]:
        (x, kept), (repeat, parts, kind_indices, past, inputs) = carry, scanned
        written = []
        for position, run_layer in enumerate(layers):
            own_input = None if inputs is None else inputs[position]
            x, new = run_layer(x, (repeat, parts, kind_indices[position], past[position], own_input))
            written.append(Past(load=new.load) if context.start is None else new)
            for layer in sources & {group.first + position + number * group.period for number in range(group.repeats)}:
                is_layer = repeat == (layer - group.first) // group.period
                now = jax.tree.map(lambda new, old, here=is_layer: jnp.where(here, new, old), new.own, kept[layer])
                kept = kept | {layer: now}
        return (x, kept), tuple(written)

    def room(layer: int) -> KeysValues:
        cached = past[(layer - group.first) % group.period].own
        dtype = x.dtype if cached is None else cached[0].dtype
        return empty_past(arch, arch.layer_kinds[layer], *context.layout.key_index.shape, dtype).own

    parts = {stack.path: stack.scanned for stack in stacks}
    indices = jnp.asarray(np.array(kind_indices, np.int32).reshape(group.repeats, group.period))
    if inputs is not None:
        inputs = inputs.reshape(group.repeats, group.period, *inputs.shape[1:])
    start = (x, {layer: room(layer) for layer in sources})
    return jax.lax.scan(run_pattern, start, (jnp.arange(group.repeats), parts, indices, past, inputs))
