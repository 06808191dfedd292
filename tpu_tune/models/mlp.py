"""The MLP of a layer: down(act(gate x) * up x), or down(act(up x)) where there is no gate; and a sparse layer's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tpu_tune.models.activations import ACTIVATIONS
from tpu_tune.models.architecture import gate_unit
from tpu_tune.models.branch import PROJECTION, Branch, linear, unweighted_norm
from tpu_tune.models.experts import Dispatch, grouped_linear, over_experts, route, router_logits
from tpu_tune.tensors import dense

if TYPE_CHECKING:
    from tpu_tune.models.layers import Layer

# The modules of a sparse MLP, by their role in `LayerNames`.
_EXPERTS = ("expert_gate", "expert_up", "expert_gate_up", "expert_down")
SPARSE = (
    "router", "choice_bias", "router_scale", "expert_scale", "experts_norm", "experts_out_norm", "dense_out_norm",
    *_EXPERTS, "shared_gate", "shared_up", "shared_gate_up", "shared_down", "shared_switch",
)  # fmt: skip


def mlp(layer: Layer, weights: Branch, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Return the MLP of x, already normed."""
    names = layer.names
    return _mlp(layer, weights, x, names.gate, names.up, names.gate_up, names.down)


def sparse_mlp(
    layer: Layer, weights: Branch, x: Float[Array, "B T D"], routed: Float[Array, "B T D"], real: Float[Array, "B T"]
) -> tuple[Float[Array, "B T D"], Float[Array, "B T E"]]:
    """Return the sparse MLP of x, already normed, and the router's logits in float32; padding goes to no expert.

    Args:
      layer: the layer.
      weights: its modules of the roles `SPARSE`.
      x: what the experts read.
      routed: what the router reads.
      real: 0 where padding stands.
    """
    names, experts = layer.names, layer.kinds[0].experts
    router = weights.at(names.router)

    def vector(name: str) -> Array | None:
        return dense(weights.at(name).leaf("weight")) if name else None

    scale = vector(names.router_scale)
    if scale is not None:
        routed = unweighted_norm(layer.arch, routed) * scale * layer.arch.hidden_size**-0.5
    logits = router_logits(routed, router.leaf("weight"), router.leaf("bias"))
    scores, chosen = route(experts, logits, vector(names.choice_bias))
    scale = vector(names.expert_scale)
    if scale is not None:
        scores = scores * scale[chosen]
    chosen = jnp.where(real[..., None] > 0, chosen, experts.count)
    leaves = {role: weights.at(getattr(names, role)).leaves() for role in _EXPERTS if getattr(names, role)}

    def run(leaves: dict[str, Any], rows: Array, dispatch: Dispatch) -> Array:
        def product(role: str, rows: Array) -> Array:
            return grouped_linear(leaves[role], rows, dispatch, PROJECTION)

        if "expert_gate_up" in leaves:
            gate, up = halves(product("expert_gate_up", rows))
        else:
            gate, up = product("expert_gate", rows), product("expert_up", rows)
        return product("expert_down", _gated(layer, gate, up))

    y = over_experts(run, leaves, x, scores, chosen, experts.count, layer.context.mesh)
    if not names.shared_down:
        return y, logits
    shared = _mlp(layer, weights, x, names.shared_gate, names.shared_up, names.shared_gate_up, names.shared_down)
    if names.shared_switch:
        shared = jax.nn.sigmoid(linear(weights.at(names.shared_switch), x)) * shared
    return y + shared, logits


def _gated(layer: Layer, gate: Array, up: Array) -> Array:
    """Return what an expert's down projection reads."""
    experts = layer.kinds[0].experts
    if experts.clamp is not None:
        gate, up = jnp.minimum(gate, experts.clamp), jnp.clip(up, -experts.clamp, experts.clamp)
    if experts.gain is None:
        return ACTIVATIONS[layer.arch.activation](gate) * up
    return gate * jax.nn.sigmoid(gate * experts.gain) * (up + 1)


def _mlp(layer: Layer, weights: Branch, x: Array, gate: str, up: str, gate_up: str, down: str) -> Array:
    activation = ACTIVATIONS[layer.arch.activation]
    if gate_up:
        left, right = halves(linear(weights.at(gate_up), x))
        inner = activation(left) * right
    elif gate:
        inner = activation(linear(weights.at(gate), x)) * linear(weights.at(up), x)
    else:
        inner = activation(linear(weights.at(up), x))
    return linear(weights.at(down), inner)


def halves(both: Float[Array, "*tokens both"]) -> tuple[Array, Array]:
    """Return gate and up of their product in one matrix, whose columns lie unit by unit: see `Module.from_torch`."""
    lead, unit = both.shape[:-1], gate_unit(both.shape[-1] // 2)
    both = both.reshape(*lead, -1, 2, unit // 2)
    return both[..., 0, :].reshape(*lead, -1), both[..., 1, :].reshape(*lead, -1)
