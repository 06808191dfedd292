"""One `Layer` of the decoder: attention and MLP, and how they stand on the residual stream.

Nothing here knows how layers are stacked or which family they belong to.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tpu_tune.kernels.attention import attention
from tpu_tune.kernels.chunks import over_tokens
from tpu_tune.kernels.layout import Bias, TokenLayout
from tpu_tune.models import rope as rotary
from tpu_tune.models.activations import ACTIVATIONS
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.models.branch import Branch, linear, norm
from tpu_tune.models.delta_net import TapsState, delta_net, empty_taps_state
from tpu_tune.models.experts import load
from tpu_tune.models.mlp import SPARSE, mlp, sparse_mlp
from tpu_tune.models.names import LayerNames
from tpu_tune.models.self_attention import KeysValues, self_attention
from tpu_tune.tensors import dense


@dataclasses.dataclass(frozen=True)
class LayerContext:
    """What all layers share beside their own weights.

    Attributes:
      layout: indices and segments of queries and keys.
      angles: what each rotary embedding turns the tokens by.
      implementation: name of attention's implementation, see `kernels.attention`.
      mesh: the devices, for attention's kernels; None on one device.
      bias: learned bias on the scores, from relative positions; None without one.
      encoder: an encoder's last hidden states (None: its keys and values are in the cache) and the layout of
        cross-attention; None without an encoder.
      start: index in the cache at which new keys and values are written, None without a cache.
      chunk: number of tokens of each row that all but attention works on at one time; 0: all.
      kept: keys and values of earlier layers, by the layer's index, that later ones use (`LayerKind.keys_from`).
    """

    layout: TokenLayout
    angles: Mapping[rotary.Rope, rotary.Angles]
    implementation: str
    mesh: Mesh | None = None
    bias: Bias | None = None
    encoder: tuple[Array | None, TokenLayout] | None = None
    start: Array | None = None
    chunk: int = 0
    kept: Mapping[int, KeysValues] = dataclasses.field(default_factory=dict)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["own", "cross", "load"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Past:
    """What one layer, or a stack of layers on a leading axis, keeps of the tokens so far, for generation.

    Attributes:
      own: keys and values of the tokens so far; of a DeltaNet its taps and its state.
      cross: keys and values of an encoder's output.
      load: how busy these tokens kept each expert (`experts.load`); for the load-balancing loss, not kept.
    """

    own: KeysValues | TapsState | None = None
    cross: KeysValues | None = None
    load: Float[Array, "2 E"] | None = None


def empty_past(arch: Architecture, kind: LayerKind, batch: int, length: int, dtype: Any) -> Past:
    """Return what a layer of this kind keeps before the first token, with room for `length` of them."""
    if kind.delta is not None:
        return Past(empty_taps_state(kind.delta, batch, dtype))
    if kind.keys_from is not None:
        return Past()
    shape = (batch, length, *arch.heads(kind))
    return Past((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))


# The modules that the parts of a layer read, by their role in `LayerNames`.
_ATTENTION_OUT = ("o", "attention_norm", "attention_out_norm")
_MLP = ("mlp_norm", "gate_up", "gate", "up", "down", "mlp_out_norm")
_END = ("input_gate", "input_projection", "input_norm", "scalar")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer, ready to run: `layer(x, past)` returns new hidden states (B, T, D) and what the cache is to hold.

    Attention apart, a layer is functions of each token alone, which run over chunks of tokens where `context.chunk`
    says so.

    Attributes:
      arch: the model's facts.
      kinds: the kinds of layers this may be; they have the same leaves.
      kind: index of this layer's kind among them.
      leaves: this layer's leaves by path relative to the layer.
      context: what all layers share.
      input: what this layer gets of each token beside the hidden states, (B, T, P); None: nothing.
      keep: whether `past` is to have the keys and values without a cache too, for other layers.
    """

    arch: Architecture
    kinds: tuple[LayerKind, ...]
    kind: Array | int
    leaves: Mapping[str, Any]
    context: LayerContext
    input: Array | None = None
    keep: bool = False

    def __call__(self, x: Float[Array, "B T D"], past: Past) -> tuple[Float[Array, "B T D"], Past]:
        """Run the layer."""
        if self.names.cross_q:
            return self._with_cross_attention(x, past)
        return self._parallel(x, past) if self.arch.residual == "parallel" else self._sequential(x, past)

    @property
    def names(self) -> LayerNames:
        """The modules' paths, relative to the layer."""
        return self.kinds[0].names

    def _sequential(self, x: Array, past: Past) -> tuple[Array, Past]:
        """x = x + attention(norm(x)); x = x + mlp(norm(x)), or x = norm(x + ...) where norms follow."""
        attended, own = (delta_net if self.kinds[0].delta else self_attention)(self, x, past.own)
        ends = () if self.input is None else (self.input,)
        if self.kinds[0].experts:
            x = self.each_token(_add_attention, (x, attended), *_ATTENTION_OUT)
            real = self.context.layout.query_segments > 0
            tokens = (x, real.astype(jnp.float32), *ends)
            x, logits = self.each_token(_add_sparse_mlp, tokens, *_MLP, *SPARSE, *_END)
            return x, Past(own, load=load(self.kinds[0].experts, logits, real))
        tokens = (x, attended, *ends)
        return self.each_token(_add_attention_then_mlp, tokens, *_ATTENTION_OUT, *_MLP, *_END), Past(own)

    def _parallel(self, x: Array, past: Past) -> tuple[Array, Past]:
        """x = x + attention(norm(x)) + mlp(norm(x))."""
        attended, own = self_attention(self, x, past.own)
        return self.each_token(_add_attention_and_mlp, (x, attended), *_ATTENTION_OUT, *_MLP), Past(own)

    def _with_cross_attention(self, x: Array, past: Past) -> tuple[Array, Past]:
        """x = x + attention(norm(x)); x = x + cross_attention(norm(x), encoder); x = x + mlp(norm(x))."""
        attended, own = self_attention(self, x, past.own)
        x = self.each_token(_add_attention, (x, attended), *_ATTENTION_OUT)
        attended, cross = self._cross_attention(x, past.cross)
        x = self.each_token(_add_cross_attention, (x, attended), "cross_o")
        return self.each_token(_add_mlp, x, *_MLP), Past(own, cross)

    def each_token(self, function: Callable[[Layer, Branch, Any], Any], tokens: Any, *roles: str) -> Any:
        """Run a function of (layer, the modules of these roles, tokens), over chunks of tokens."""
        paths = {getattr(self.names, role) for role in roles}
        weights = {path: leaf for path, leaf in self.leaves.items() if path.rpartition(".")[0] in paths}
        mesh = self.context.mesh
        shards = mesh.shape["sequence"] if mesh is not None else 1
        run = lambda weights, tokens: function(self, Branch(weights), tokens)  # noqa: E731
        return over_tokens(run, weights, tokens, self.context.chunk, shards)

    def _cross_attention(self, x: Array, past: KeysValues | None) -> tuple[Float[Array, "B T HD"], KeysValues]:
        """Attend to the encoder; keys and values are made where its output is at hand, else taken from the cache."""
        arch, names = self.arch, self.names
        q = self.each_token(_cross_queries, x, "cross_norm", "cross_q")
        encoded, layout = self.context.encoder
        if encoded is None:
            k, v = past
        else:
            weights, shape = Branch(self.leaves), (*encoded.shape[:2], *arch.heads(self.kinds[0]))
            k, v = (linear(weights.at(name), encoded).reshape(shape) for name in (names.cross_k, names.cross_v))
        attended = attention(q, k, v, layout, scale=arch.attention_scale, implementation=self.context.implementation)
        return attended.reshape(*x.shape[:2], -1), (k, v)


def _cross_queries(layer: Layer, weights: Branch, x: Array) -> Array:
    """Return the queries (B, T, H, D) to an encoder's output."""
    arch, names = layer.arch, layer.names
    q = linear(weights.at(names.cross_q), norm(arch, weights, names.cross_norm, x))
    return q.reshape(*q.shape[:2], arch.num_heads, arch.head_dim)


def _add_attention(layer: Layer, weights: Branch, tokens: tuple[Array, Array]) -> Array:
    """Return x plus the projected attention; the sum is normed where norms follow."""
    arch, names, (x, attended) = layer.arch, layer.names, tokens
    attended = linear(weights.at(names.o), attended)
    if not arch.norm_first:
        return norm(arch, weights, names.attention_norm, x + attended)
    return x + _update(arch, norm(arch, weights, names.attention_out_norm, attended))


def _add_cross_attention(layer: Layer, weights: Branch, tokens: tuple[Array, Array]) -> Array:
    x, attended = tokens
    return x + linear(weights.at(layer.names.cross_o), attended)


def _add_mlp(layer: Layer, weights: Branch, x: Array) -> Array:
    """Return x plus its MLP; the sum is normed where norms follow."""
    arch, names = layer.arch, layer.names
    if not arch.norm_first:
        return norm(arch, weights, names.mlp_norm, x + mlp(layer, weights, x))
    update = mlp(layer, weights, norm(arch, weights, names.mlp_norm, x))
    return x + _update(arch, norm(arch, weights, names.mlp_out_norm, update))


def _add_sparse_mlp(layer: Layer, weights: Branch, tokens: tuple[Array, ...]) -> tuple[Array, Array]:
    """Return x plus its sparse MLP, and the router's logits."""
    arch, names, (x, real, *own_input) = layer.arch, layer.names, tokens
    normed = norm(arch, weights, names.mlp_norm, x)
    read = norm(arch, weights, names.experts_norm, x) if names.experts_norm else normed
    update, logits = sparse_mlp(layer, weights, read, x if names.router_scale else normed, real)
    if names.down:
        update = norm(arch, weights, names.experts_out_norm, update)
        update = update + norm(arch, weights, names.dense_out_norm, mlp(layer, weights, normed))
    x = x + _update(arch, norm(arch, weights, names.mlp_out_norm, update))
    return _end(layer, weights, x, own_input), logits


def _update(arch: Architecture, update: Array) -> Array:
    """Return what is added to the residual stream."""
    return update if arch.residual_scale == 1.0 else update * jnp.asarray(arch.residual_scale, update.dtype)


def _add_attention_then_mlp(layer: Layer, weights: Branch, tokens: tuple[Array, ...]) -> Array:
    x, attended, *own_input = tokens
    return _end(layer, weights, _add_mlp(layer, weights, _add_attention(layer, weights, (x, attended))), own_input)


def _end(layer: Layer, weights: Branch, x: Array, own_input: Sequence[Array]) -> Array:
    """Return what leaves the layer: with its own input, if it has one, and its scalar."""
    for part in own_input:
        x = _add_input(layer, weights, x, part)
    if layer.names.scalar:  # transformers keeps it as a buffer
        x = x * jax.lax.stop_gradient(dense(weights.at(layer.names.scalar).leaf("weight"))).astype(x.dtype)
    return x


def _add_input(layer: Layer, weights: Branch, x: Array, own_input: Array) -> Array:
    """Return x plus the layer's own input, as much of it as x lets through."""
    arch, names = layer.arch, layer.names
    gate = ACTIVATIONS[arch.activation](linear(weights.at(names.input_gate), x))
    update = linear(weights.at(names.input_projection), gate * own_input)
    return x + norm(arch, weights, names.input_norm, update)


def _add_attention_and_mlp(layer: Layer, weights: Branch, tokens: tuple[Array, Array]) -> Array:
    normed = norm(layer.arch, weights, layer.names.mlp_norm or layer.names.attention_norm, tokens[0])
    return _add_attention(layer, weights, tokens) + _update(layer.arch, mlp(layer, weights, normed))
