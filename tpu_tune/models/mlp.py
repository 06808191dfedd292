"""The dense MLP of a layer: down(act(gate x) * up x), or down(act(up x)) where there is no gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Array, Float

from tpu_tune.models.activations import ACTIVATIONS
from tpu_tune.models.architecture import gate_unit
from tpu_tune.models.branch import Branch, linear

if TYPE_CHECKING:
    from tpu_tune.models.layers import Layer


def mlp(layer: Layer, weights: Branch, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Return the MLP of x, already normed."""
    names, activation = layer.names, ACTIVATIONS[layer.arch.activation]
    if names.gate_up:
        both = linear(weights.at(names.gate_up), x)
        unit = gate_unit(both.shape[-1] // 2)
        both = both.reshape(*x.shape[:-1], -1, 2, unit // 2)
        gate, up = (both[..., half, :].reshape(*x.shape[:-1], -1) for half in (0, 1))
        inner = activation(gate) * up
    elif names.gate:
        inner = activation(linear(weights.at(names.gate), x)) * linear(weights.at(names.up), x)
    else:
        inner = activation(linear(weights.at(names.up), x))
    return linear(weights.at(names.down), inner)
