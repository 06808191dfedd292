"""Walking the layers: `run_layers` scans each group's stacked leaves, every layer rematerialised by policy.

`Execution` says how, apart from the mathematics. Leaves that `jax.lax.scan` slices are arrays; quantized stacks stay
outside and are read layer by layer where they lie (`tensors.outside_scan`).
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
from tpu_tune.models.architecture import Architecture
from tpu_tune.models.groups import LayerGroup
from tpu_tune.models.layers import Layer, LayerContext, Past
from tpu_tune.tensors import Module, outside_scan

_LAYER_INPUT = "layer_input"
REMAT_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("projection"),
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
      attention: implementation, see `kernels.attention`.
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
    past: Past | None,
) -> tuple[Float[Array, "B T D"], Past | None]:
    """Run all layers.

    Args:
      arch: the model's facts.
      execution: how to run them.
      leaves: path -> stacked leaf.
      x: hidden states.
      context: what all layers share.
      past: keys and values of all layers, on a leading axis; None without a cache.

    Returns:
      New hidden states, and what the cache is to hold.
    """
    modules = [module for module in arch.modules() if module.layers_path == arch.names.layers]
    stacks = [
        _Stack(module, path, leaf)
        for module in modules
        for path, leaf in leaves.items()
        if path.rpartition(".")[0] == module.path
    ]
    written = []
    for group in arch.groups:
        x, new = _run_group(arch, execution, group, stacks, x, context, past)
        written.append(new)
    if past is None:
        return x, None
    return x, written[0] if len(written) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *written)


@dataclasses.dataclass(frozen=True)
class _Stack:
    """A stacked leaf, and where a group's layers lie in it."""

    module: Module
    path: str
    leaf: Any

    @property
    def name(self) -> str:
        """Path of the leaf relative to its layer."""
        return self.path[len(self.module.layers_path) :].partition(".")[2]

    def positions(self, group: LayerGroup) -> list[int]:
        """Return which layers of a group's pattern have the leaf."""
        return [position for position in range(group.period) if group.first + position in self.module.layers]

    def start(self, group: LayerGroup) -> int:
        """Return the index in the stack of the group's first layer that has the leaf."""
        return self.module.layers.index(group.first + self.positions(group)[0])

    def cut(self, group: LayerGroup, array: Array) -> Array:
        """Return a group's part of a stacked array: (repeats, ...), or (repeats, layers a repeat, ...) of a pattern."""
        count = len(self.positions(group))
        if group.repeats * count < array.shape[0]:
            array = jax.lax.slice_in_dim(array, self.start(group), self.start(group) + group.repeats * count)
        return array if group.period == 1 else array.reshape(group.repeats, count, *array.shape[1:])


def _run_group(
    arch: Architecture,
    execution: Execution,
    group: LayerGroup,
    stacks: list[_Stack],
    x: Array,
    context: LayerContext,
    past: Past | None,
) -> tuple[Array, Past]:
    """Scan over the repeats of a group's pattern; a pattern of several layers runs them one after the other."""
    stacks = [stack for stack in stacks if stack.positions(group)]
    split = {stack.path: _outside_scan(stack.leaf, execution) for stack in stacks}
    parts = {
        stack.path: jax.tree.map(lambda array, stack=stack: stack.cut(group, array), split[stack.path][0])
        for stack in stacks
    }

    def layer_at(position: int) -> Callable[[Array, tuple], tuple[Array, Past]]:
        kinds = _kinds_at(arch, group, position)

        def run_layer(x: Array, scanned: tuple[Array, Any, Array, Past]) -> tuple[Array, Past]:
            repeat, parts, kind, past = scanned
            if execution.mesh is None:  # the partitioner would gather what the constraint is put on
                # XLA's GPU compiler would like the backward loop's inputs transposed, and keep them all both ways.
                x = with_layout_constraint(x, Layout(major_to_minor=(0, 1, 2)))
            x = checkpoint_name(x, _LAYER_INPUT)
            leaves, names = {}, {}
            for stack in stacks:
                positions = stack.positions(group)
                if position in positions:
                    rank = positions.index(position)
                    part = parts[stack.path]
                    part = part if group.period == 1 else jax.tree.map(lambda array, rank=rank: array[rank], part)
                    index = stack.start(group) + repeat * len(positions) + rank
                    leaves[stack.path], names[stack.path] = split[stack.path][1](part, index), stack.name
            inside = {names[path]: leaf for path, leaf in execution.gather(leaves).items()}
            x, past = Layer(arch, kinds, kind, inside, context)(x, past)
            return execution.constrain(x), Past() if context.start is None else past

        remat = execution.remat
        return run_layer if remat == "none" else jax.checkpoint(run_layer, policy=REMAT_POLICIES[remat])

    layers = [layer_at(position) for position in range(group.period)]
    numbers = [
        [
            _kinds_at(arch, group, position).index(arch.layer_kinds[layer])
            for layer in group.layers[position :: group.period]
        ]
        for position in range(group.period)
    ]
    kinds = jnp.asarray(np.array(numbers, np.int32).T)  # (repeats, period)

    def run_pattern(x: Array, scanned: tuple[Array, Any, Array, Past]) -> tuple[Array, Past]:
        repeat, parts, kinds, past = scanned
        written = []
        for position, run_layer in enumerate(layers):
            own_past = jax.tree.map(lambda array, position=position: array[position], past)
            x, new = run_layer(x, (repeat, parts, kinds[position], own_past))
            written.append(new)
        return x, jax.tree.map(lambda *arrays: jnp.stack(arrays), *written)

    own = Past() if past is None else jax.tree.map(lambda array: array[group.first : group.layers.stop], past)
    if group.period == 1:
        return jax.lax.scan(layers[0], x, (jnp.arange(group.repeats), parts, kinds[:, 0], own))
    own = jax.tree.map(lambda array: array.reshape(group.repeats, group.period, *array.shape[1:]), own)
    x, written = jax.lax.scan(run_pattern, x, (jnp.arange(group.repeats), parts, kinds, own))
    return x, jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), written)


def _kinds_at(arch: Architecture, group: LayerGroup, position: int) -> tuple[Any, ...]:
    """Return the kinds of layers at a position of a group's pattern: they have the same leaves."""
    return tuple(dict.fromkeys(arch.layer_kinds[layer] for layer in group.layers[position :: group.period]))


def _outside_scan(leaf: Any, execution: Execution) -> tuple[Any, Callable[[Any, Array], Any]]:
    # On more devices `gather` takes the layer that the scan cuts out.
    return outside_scan(leaf, execution.plan) if execution.mesh is None else (leaf, lambda part, _: part)
