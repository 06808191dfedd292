"""A decoder layer by layer: what the first layer gets, and one layer on the hidden states of some rows.

For what looks at one layer's weights at a time and never holds the model; training scans the layers (`scan.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_tune.kernels.layout import TokenLayout
from tpu_tune.models import rope as rotary
from tpu_tune.models.architecture import Architecture
from tpu_tune.models.decoder import Decoder, Params
from tpu_tune.models.layers import Layer, LayerContext, Past
from tpu_tune.models.scan import Execution
from tpu_tune.models.self_attention import KeysValues
from tpu_tune.tensors.observed import Observed

# Paths of matrices that share their inputs -> these, (rows, in), and the number that counts: of a matrix of its own ()
# int32, and rows of padding are 0; of experts (experts,), and the rows lie sorted by expert, padding behind the last.
Inputs = dict[tuple[str, ...], tuple[Float[Array, "rows in"], Int[Array, "*experts"]]]


@functools.partial(jax.jit, static_argnames=("arch", "execution"))
def layer_inputs(
    arch: Architecture, execution: Execution, params: Params, input_ids: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T D"], Float[Array, "L B T P"] | None]:
    """Return the hidden states before the first layer, and what each layer gets beside them (None: nothing).

    Args:
      arch: a decoder without an encoder.
      execution: the dtype of activations.
      params: the leaves outside of the layers.
      input_ids, positions: the tokens, and the place of each in its document.
    """
    return Decoder(arch, params, execution).before_layers(input_ids, positions)


@functools.partial(jax.jit, static_argnames=("arch", "execution", "layer", "observed"))
def run_layer(
    arch: Architecture,
    execution: Execution,
    layer: int,
    leaves: Mapping[str, Any],
    x: Float[Array, "B T D"],
    tokens: tuple[Int[Array, "B T"], Int[Array, "B T"], Mapping[int, KeysValues], Array | None],
    observed: Sequence[str] = (),
) -> tuple[Float[Array, "B T D"], KeysValues | None, Inputs]:
    """Run one layer without a cache.

    Args:
      arch: a decoder without an encoder.
      execution: dtype and attention.
      layer: a layer of the kind that is run; layers of one kind are compiled once, by `first_of_kind`.
      leaves: the layer's leaves by path relative to the layer.
      x: hidden states.
      tokens: positions, segments (0: padding), keys and values of earlier layers that this one uses by their layer, and
        what it gets beside the hidden states.
      observed: relative paths of matrices whose inputs are wanted.

    Returns:
      New hidden states, the layer's keys and values, and the observed matrices' inputs.
    """
    positions, segments, kept, own_input = tokens
    kind, seen = arch.layer_kinds[layer], {}
    index = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    context = LayerContext(
        layout=TokenLayout(index, index, segments, segments, arch.causal, True),
        angles={kind.rope: rotary.tables(kind.rope, positions)} if kind.rope is not None else {},
        implementation=execution.attention,
        kept=kept,
    )
    inside = {path: Observed(leaf, path, seen) if path in observed else leaf for path, leaf in leaves.items()}
    x, past = Layer(arch, (kind,), 0, inside, context, own_input, keep=True)(x, Past())
    return x, past.own, _inputs(seen, segments > 0)


def first_of_kind(arch: Architecture, layer: int) -> int:
    """Return the first layer of a layer's kind, which stands for it in `run_layer`."""
    return arch.layer_kinds.index(arch.layer_kinds[layer])


def _inputs(seen: Mapping[str, tuple[Array, Array | None]], real: Array) -> Inputs:
    sharing: dict[int, list[str]] = {}
    for path, (x, _) in seen.items():
        sharing.setdefault(id(x), []).append(path)

    def rows(x: Array, sizes: Array | None) -> tuple[Array, Array]:
        if sizes is not None:
            return x, sizes
        return jnp.where(real[..., None], x, 0).reshape(-1, x.shape[-1]), jnp.sum(real, dtype=jnp.int32)

    return {tuple(paths): rows(*seen[paths[0]]) for paths in sharing.values()}
