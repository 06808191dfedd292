"""What the decoder is made of: norms, attention, MLP, and one `Layer` of them, as functions of an Architecture.

`Branch` gives a layer's leaves the shape of a module. Nothing here knows how layers are stacked or which family they
belong to.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tpu_tune.kernels.attention import attention
from tpu_tune.kernels.chunks import over_tokens
from tpu_tune.kernels.layout import Bias, TokenLayout, soft_cap
from tpu_tune.models import rope as rotary
from tpu_tune.models.activations import ACTIVATIONS
from tpu_tune.models.architecture import Architecture, LayerKind, LayerNames, gate_unit
from tpu_tune.tensors import dense, embed, matmul, unembed

PROJECTION = "projection"  # name of the outputs of linear layers, which model.remat=dots keeps
KeysValues = tuple[Array, Array]  # (B, S, kv heads, head_dim) each


class Branch(nnx.Module):
    """A module without mathematics of its own: children, and leaves named `weight` and `bias`."""

    def __init__(self, leaves: Mapping[str, Any]):
        """Hang each leaf at its dotted path below this module."""
        children: dict[str, dict[str, Any]] = {}
        for path, leaf in leaves.items():
            name, _, rest = path.partition(".")
            if rest:
                children.setdefault(name, {})[rest] = leaf
            else:
                setattr(self, name, nnx.Param(leaf))
        for name, below in children.items():
            setattr(self, name, Branch(below))

    def at(self, path: str) -> Branch:
        """Return the module at a dotted path."""
        return functools.reduce(getattr, path.split("."), self)

    def leaf(self, name: str) -> Any:
        """Return the leaf of that name here, or None."""
        return getattr(self, name).get_value() if hasattr(self, name) else None


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
    """

    layout: TokenLayout
    angles: Mapping[rotary.Rope, rotary.Angles]
    implementation: str
    mesh: Mesh | None = None
    bias: Bias | None = None
    encoder: tuple[Array | None, TokenLayout] | None = None
    start: Array | None = None
    chunk: int = 0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["own", "cross"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Past:
    """Keys and values of one layer, or of all on a leading axis: of the tokens so far, and of an encoder's output."""

    own: KeysValues | None = None
    cross: KeysValues | None = None


# The modules that the parts of a layer read, by their role in `LayerNames`.
_QKV = ("attention_norm", "qkv", "q", "k", "v", "q_norm", "k_norm")
_ATTENTION_OUT = ("o", "attention_norm", "attention_out_norm")
_MLP = ("mlp_norm", "gate_up", "gate", "up", "down", "mlp_out_norm")


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
    """

    arch: Architecture
    kinds: tuple[LayerKind, ...]
    kind: Array | int
    leaves: Mapping[str, Any]
    context: LayerContext

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
        attended, own = self._attention(x, past.own)
        return self._each_token(_add_attention_then_mlp, (x, attended), *_ATTENTION_OUT, *_MLP), Past(own)

    def _parallel(self, x: Array, past: Past) -> tuple[Array, Past]:
        """x = x + attention(norm(x)) + mlp(norm(x))."""
        attended, own = self._attention(x, past.own)
        return self._each_token(_add_attention_and_mlp, (x, attended), *_ATTENTION_OUT, *_MLP), Past(own)

    def _with_cross_attention(self, x: Array, past: Past) -> tuple[Array, Past]:
        """x = x + attention(norm(x)); x = x + cross_attention(norm(x), encoder); x = x + mlp(norm(x))."""
        attended, own = self._attention(x, past.own)
        x = self._each_token(_add_attention, (x, attended), *_ATTENTION_OUT)
        attended, cross = self._cross_attention(x, past.cross)
        x = self._each_token(_add_cross_attention, (x, attended), "cross_o")
        return self._each_token(_add_mlp, x, *_MLP), Past(own, cross)

    def _each_token(self, function: Callable[[Layer, Branch, Any], Any], tokens: Any, *roles: str) -> Any:
        """Run a function of (layer, the modules of these roles, tokens), over chunks of tokens."""
        paths = {getattr(self.names, role) for role in roles}
        weights = {path: leaf for path, leaf in self.leaves.items() if path.rpartition(".")[0] in paths}
        mesh = self.context.mesh
        shards = mesh.shape["sequence"] if mesh is not None else 1
        run = lambda weights, tokens: function(self, Branch(weights), tokens)  # noqa: E731
        return over_tokens(run, weights, tokens, self.context.chunk, shards)

    def _attention(self, x: Array, past: KeysValues | None) -> tuple[Float[Array, "B T HD"], KeysValues | None]:
        """Attend from the normed x to itself and to what came before, without the output projection."""
        arch, context = self.arch, self.context
        qkv = self._each_token(_qkv, x, *_QKV)

        def attend(kind: LayerKind, q: Array, k: Array, v: Array) -> tuple[Array, KeysValues | None]:
            if kind.rope is not None:
                angles = context.angles[kind.rope]
                q, k = (rotary.rotate(part, kind.rope, angles) for part in (q, k))
                q = rotary.scale_queries(q, angles)
            if arch.qk_norm_last:
                q, k = _normed_queries_keys(self, Branch(self.leaves), q, k)
            entry = None
            if past is not None:
                k, v = (
                    jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), context.start, axis=1)
                    for old, new in zip(past, (k, v), strict=True)
                )
                entry = (k, v)
            attended = attention(
                q,
                k,
                v,
                context.layout,
                window=kind.window,
                scale=arch.attention_scale,
                cap=arch.attention_soft_cap,
                bias=context.bias,
                implementation=context.implementation,
                mesh=context.mesh,
            )
            return attended, entry

        # The kinds differ in static facts (windows, rotary tables) that attention's kernels need to know; the products
        # around it are the same, so that only this part is compiled once a kind.
        branches = [functools.partial(attend, kind) for kind in self.kinds]
        attended, entry = branches[0](*qkv) if len(branches) == 1 else jax.lax.switch(self.kind, branches, *qkv)
        return attended.reshape(*attended.shape[:2], -1), entry

    def _cross_attention(self, x: Array, past: KeysValues | None) -> tuple[Float[Array, "B T HD"], KeysValues]:
        """Attend to the encoder; keys and values are made where its output is at hand, else taken from the cache."""
        arch, names = self.arch, self.names
        q = self._each_token(_cross_queries, x, "cross_norm", "cross_q")
        encoded, layout = self.context.encoder
        if encoded is None:
            k, v = past
        else:
            weights, shape = Branch(self.leaves), (*encoded.shape[:2], arch.num_kv_heads, arch.head_dim)
            k, v = (linear(weights.at(name), encoded).reshape(shape) for name in (names.cross_k, names.cross_v))
        attended = attention(q, k, v, layout, scale=arch.attention_scale, implementation=self.context.implementation)
        return attended.reshape(*x.shape[:2], -1), (k, v)


def _qkv(layer: Layer, weights: Branch, x: Array) -> tuple[Array, Array, Array]:
    """Return queries (B, T, H, D), keys and values (B, T, K, D) of a layer's input, without positions."""
    arch, names = layer.arch, layer.names
    heads, groups, size = arch.num_heads, arch.num_kv_heads, arch.head_dim
    batch, length, _ = x.shape
    if arch.norm_first:
        x = norm(arch, weights, names.attention_norm, x)
    if names.qkv:  # in the tree, fused columns lie group by group: see `Module.from_torch`
        fused = linear(weights.at(names.qkv), x).reshape(batch, length, groups, heads // groups + 2, size)
        q, k, v = fused[:, :, :, :-2].reshape(batch, length, heads, size), fused[:, :, :, -2], fused[:, :, :, -1]
    else:
        q = linear(weights.at(names.q), x).reshape(batch, length, heads, size)
        k = linear(weights.at(names.k), x).reshape(batch, length, groups, size)
        v = linear(weights.at(names.v), x).reshape(batch, length, groups, size)
    if not arch.qk_norm_last:
        q, k = _normed_queries_keys(layer, weights, q, k)
    return q, k, v


def _normed_queries_keys(layer: Layer, weights: Branch, q: Array, k: Array) -> tuple[Array, Array]:
    """Return queries (B, T, H, D) and keys (B, T, K, D), normed where the layer norms them."""
    arch, names = layer.arch, layer.names
    whole = lambda part: part.reshape(*part.shape[:2], -1) if arch.qk_norm == "projection" else part  # noqa: E731
    normed = (norm(arch, weights, name, whole(part)) for name, part in ((names.q_norm, q), (names.k_norm, k)))
    return tuple(part.reshape(before.shape) for part, before in zip(normed, (q, k), strict=True))


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
        return norm(arch, weights, names.mlp_norm, x + _mlp(layer, weights, x))
    update = _mlp(layer, weights, norm(arch, weights, names.mlp_norm, x))
    return x + _update(arch, norm(arch, weights, names.mlp_out_norm, update))


def _update(arch: Architecture, update: Array) -> Array:
    """Return what is added to the residual stream."""
    return update if arch.residual_scale == 1.0 else update * jnp.asarray(arch.residual_scale, update.dtype)


def _add_attention_then_mlp(layer: Layer, weights: Branch, tokens: tuple[Array, Array]) -> Array:
    return _add_mlp(layer, weights, _add_attention(layer, weights, tokens))


def _add_attention_and_mlp(layer: Layer, weights: Branch, tokens: tuple[Array, Array]) -> Array:
    normed = norm(layer.arch, weights, layer.names.mlp_norm or layer.names.attention_norm, tokens[0])
    return _add_attention(layer, weights, tokens) + _update(layer.arch, _mlp(layer, weights, normed))


def _mlp(layer: Layer, weights: Branch, x: Array) -> Array:
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


def linear(module: Branch, x: Array) -> Array:
    """Return x @ weight + bias in x's dtype."""
    y = checkpoint_name(matmul(x, module.leaf("weight")), PROJECTION)
    bias = module.leaf("bias")
    return y if bias is None else y + dense(bias).astype(y.dtype)


def norm(arch: Architecture, weights: Branch, name: str, x: Array) -> Array:
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) in float32; x itself where `name` is "".

    RMSNorm casts to the dtype of x, then scales; LayerNorm, and RMSNorm with an offset (Gemma), scale first: as
    Hugging Face does.
    """
    if not name:
        return x
    wide = x.astype(jnp.float32)
    if arch.norm == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + arch.norm_eps)
    if not arch.norm_weights:
        return normed.astype(x.dtype)
    module = weights.at(name)
    weight, bias = dense(module.leaf("weight")), module.leaf("bias")
    if arch.norm == "rms" and not arch.norm_offset:
        return weight.astype(x.dtype) * normed.astype(x.dtype)
    scaled = (weight + arch.norm_offset) * normed
    return (scaled if bias is None else scaled + dense(bias)).astype(x.dtype)


def relative_bias(arch: Architecture, table: Any) -> Bias:
    """Return the function from indices to the learned bias on the scores, (B, heads, T, S) float32."""

    def bias(query_index: Int[Array, "B T"], key_index: Int[Array, "B S"]) -> Float[Array, "B H T S"]:
        distance = key_index[:, None, :] - query_index[:, :, None]
        return jnp.moveaxis(embed(buckets_of(arch, distance), table, jnp.float32), -1, 1)

    return bias


def buckets_of(arch: Architecture, distance: Int[Array, "..."]) -> Int[Array, "..."]:
    """T5's buckets (arXiv:1910.10683, section 2.1): exact to half their number, then logarithmic to `max_distance`.

    Without `causal`, one half of the buckets is for what lies ahead.
    """
    count = arch.relative.buckets
    if arch.causal:
        first, distance = 0, jnp.maximum(-distance, 0)
    else:
        count //= 2
        first, distance = jnp.where(distance > 0, count, 0), jnp.abs(distance)
    exact = count // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / jnp.log(arch.relative.max_distance / exact)
    far = jnp.minimum(exact + (ratio * (count - exact)).astype(jnp.int32), count - 1)
    return first + jnp.where(distance < exact, distance, far)


def apply_head(
    arch: Architecture, leaves: Mapping[str, Any], hidden: Float[Array, "*batch D"]
) -> Float[Array, "*batch V"]:
    """Apply `Decoder.head_leaves`, as a pure function for the chunked cross-entropy."""
    if arch.head_scale != 1.0:
        hidden = hidden * jnp.asarray(arch.head_scale, hidden.dtype)
    if "embedding" in leaves:
        logits = unembed(hidden, leaves["embedding"])
    else:
        logits = matmul(hidden, leaves["weight"])
    if "bias" in leaves:
        logits = logits + leaves["bias"].astype(logits.dtype)
    return soft_cap(logits, arch.logit_soft_cap)
