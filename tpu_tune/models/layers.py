"""What the decoder is made of: norms, attention, MLP, and one layer of them, as functions of an Architecture.

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
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.tensors import embed, matmul, unembed

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
class Surroundings:
    """What all layers see beside their own weights.

    Attributes:
      places: of queries and keys.
      angles: cosines and sines of each rotary embedding.
      implementation: of attention.
      mesh: for its kernels; None on one device.
      bias: on the scores, from learned relative positions; or None.
      memory: an encoder's output and its places, for cross-attention; or None.
      start: where new keys and values are written in a cache, None without one.
      chunk: tokens of each row that what is not attention works on at one time; 0: all.
    """

    places: TokenLayout
    angles: Mapping[rotary.Rope, tuple[Array, Array]]
    implementation: str
    mesh: Mesh | None = None
    bias: Bias | None = None
    memory: tuple[Array | None, TokenLayout] | None = None
    start: Array | None = None
    chunk: int = 0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["own", "cross"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Past:
    """Keys and values of one layer, or of all on a leading axis: of the tokens so far, and of an encoder's output."""

    own: KeysValues | None = None
    cross: KeysValues | None = None


def layer(
    arch: Architecture,
    leaves: Mapping[str, Any],
    x: Float[Array, "B T D"],
    kind: Array | int,
    around: Surroundings,
    past: Past,
) -> tuple[Float[Array, "B T D"], Past]:
    """Run one layer.

    Attention apart, a layer is functions of each token alone: `_heads` before it, `_sum` and `_fed` behind it. They run
    over chunks of tokens where `around.chunk` says so.

    Args:
      arch: the facts.
      leaves: this layer's, by path.
      x: hidden states.
      kind: index into `arch.kinds`.
      around: what all layers share.
      past: what the cache holds for this layer.

    Returns:
      New hidden states, and what the cache is to hold.
    """
    names = arch.names

    def each_token(function: Callable[[Architecture, Branch, Any], Any], tokens: Any, *modules: str) -> Any:
        """Run a function of (architecture, these modules, tokens)."""
        wanted = {path: leaf for path, leaf in leaves.items() if path.rpartition(".")[0] in modules}
        shards = around.mesh.shape["sequence"] if around.mesh is not None else 1

        def run(wanted: Mapping[str, Any], tokens: Any) -> Any:
            return function(arch, Branch(wanted), tokens)

        return over_tokens(run, wanted, tokens, around.chunk, shards)

    into = (names.attention_norm, names.qkv, names.q, names.k, names.v, names.q_norm, names.k_norm)
    out = (names.o, names.attention_norm, names.attention_out_norm)
    mlp = (names.mlp_norm, names.gate_up, names.gate, names.up, names.down, names.mlp_out_norm)
    seen, own = _attend(arch, each_token(_heads, x, *into), kind, around, past.own)
    if arch.residual == "parallel":
        return each_token(_parallel, (x, seen), *out, *mlp), Past(own)
    if not names.cross_q:
        return each_token(lambda *given: _fed(*given[:2], _sum(*given)), (x, seen), *out, *mlp), Past(own)
    x = each_token(_sum, (x, seen), *out)
    q = each_token(_cross_queries, x, names.cross_norm, names.cross_q)
    seen, cross = _cross_attention(arch, Branch(leaves), q, around, past.cross)
    x = each_token(
        lambda arch, weights, tokens: tokens[0] + linear(weights.at(names.cross_o), tokens[1]), (x, seen), names.cross_o
    )
    return each_token(_fed, x, *mlp), Past(own, cross)


def _heads(arch: Architecture, weights: Branch, x: Array) -> tuple[Array, Array, Array]:
    """Return queries (B, T, H, D), keys and values (B, T, K, D) of a layer's input, without positions."""
    names, heads, groups, size = arch.names, arch.num_heads, arch.num_kv_heads, arch.head_dim
    batch, length, _ = x.shape
    if arch.norm_first:
        x = norm(arch, weights.at(names.attention_norm), x)
    if names.qkv:  # in the tree, fused columns lie group by group: see `Module.from_torch`
        fused = linear(weights.at(names.qkv), x).reshape(batch, length, groups, heads // groups + 2, size)
        q, k, v = fused[:, :, :, :-2].reshape(batch, length, heads, size), fused[:, :, :, -2], fused[:, :, :, -1]
    else:
        q = linear(weights.at(names.q), x).reshape(batch, length, heads, size)
        k = linear(weights.at(names.k), x).reshape(batch, length, groups, size)
        v = linear(weights.at(names.v), x).reshape(batch, length, groups, size)
    if names.q_norm:
        q, k = norm(arch, weights.at(names.q_norm), q), norm(arch, weights.at(names.k_norm), k)
    return q, k, v


def _attend(
    arch: Architecture,
    heads: tuple[Array, Array, Array],
    kind: Array | int,
    around: Surroundings,
    past: KeysValues | None,
) -> tuple[Float[Array, "B T HD"], KeysValues | None]:
    """Turn queries and keys to their positions and attend."""

    def attend(kind: LayerKind, q: Array, k: Array, v: Array) -> tuple[Array, KeysValues | None]:
        if kind.rope is not None:
            q, k = (rotary.rotate(part, kind.rope, *around.angles[kind.rope]) for part in (q, k))
        entry = None
        if past is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), around.start, axis=1)
                for old, new in zip(past, (k, v), strict=True)
            )
            entry = (k, v)
        seen = attention(
            q,
            k,
            v,
            around.places,
            window=kind.window,
            scale=arch.attention_scale,
            cap=arch.attention_soft_cap,
            bias=around.bias,
            implementation=around.implementation,
            mesh=around.mesh,
        )
        return seen, entry

    # The kinds differ in static facts (windows, rotary tables) that attention's kernels need to know; the products
    # around it are the same, so that only this part is compiled once a kind.
    branches = [functools.partial(attend, kind) for kind in arch.kinds]
    seen, entry = branches[0](*heads) if len(branches) == 1 else jax.lax.switch(kind, branches, *heads)
    return seen.reshape(*seen.shape[:2], -1), entry


def _sum(arch: Architecture, weights: Branch, tokens: tuple[Array, Array]) -> Array:
    """Return a layer's input plus what attention saw, normed where norms follow."""
    x, seen = tokens
    attended = linear(weights.at(arch.names.o), seen)
    if not arch.norm_first:
        return norm(arch, weights.at(arch.names.attention_norm), x + attended)
    if arch.names.attention_out_norm:
        attended = norm(arch, weights.at(arch.names.attention_out_norm), attended)
    return x + attended


def _fed(arch: Architecture, weights: Branch, x: Array) -> Array:
    """Return x plus its MLP."""
    names = arch.names
    if not arch.norm_first:
        return norm(arch, weights.at(names.mlp_norm), x + _mlp(arch, weights, x))
    fed = _mlp(arch, weights, norm(arch, weights.at(names.mlp_norm), x))
    return x + (norm(arch, weights.at(names.mlp_out_norm), fed) if names.mlp_out_norm else fed)


def _parallel(arch: Architecture, weights: Branch, tokens: tuple[Array, Array]) -> Array:
    """Return a layer's input plus what attention saw plus the input's own MLP."""
    x, seen = tokens
    read = norm(arch, weights.at(arch.names.mlp_norm or arch.names.attention_norm), x)
    return _sum(arch, weights, (x, seen)) + _mlp(arch, weights, read)


def _cross_queries(arch: Architecture, weights: Branch, x: Array) -> Array:
    """Return the queries (B, T, H, D) to an encoder's output."""
    q = linear(weights.at(arch.names.cross_q), norm(arch, weights.at(arch.names.cross_norm), x))
    return q.reshape(*q.shape[:2], arch.num_heads, arch.head_dim)


def _cross_attention(
    arch: Architecture, weights: Branch, q: Array, around: Surroundings, past: KeysValues | None
) -> tuple[Float[Array, "B T HD"], KeysValues]:
    """Attend to the encoder: its keys and values are made where its output is at hand, else taken from the cache."""
    names, groups, size = arch.names, arch.num_kv_heads, arch.head_dim
    batch, length, _, _ = q.shape
    encoded, places = around.memory
    if encoded is None:
        k, v = past
    else:
        k, v = (
            linear(weights.at(name), encoded).reshape(batch, -1, groups, size)
            for name in (names.cross_k, names.cross_v)
        )
    seen = attention(q, k, v, places, scale=arch.attention_scale, implementation=around.implementation)
    return seen.reshape(batch, length, -1), (k, v)


def _mlp(arch: Architecture, weights: Branch, x: Array) -> Array:
    names, activation = arch.names, ACTIVATIONS[arch.activation]
    if names.gate_up:
        both = linear(weights.at(names.gate_up), x)
        both = both.reshape(*x.shape[:-1], -1, 2, arch.gate_unit // 2)
        gate, up = (both[..., part, :].reshape(*x.shape[:-1], -1) for part in (0, 1))
        inner = activation(gate) * up
    elif names.gate:
        inner = activation(linear(weights.at(names.gate), x)) * linear(weights.at(names.up), x)
    else:
        inner = activation(linear(weights.at(names.up), x))
    return linear(weights.at(names.down), inner)


def linear(module: Branch, x: Array) -> Array:
    """Return x @ weight + bias in x's dtype."""
    y = checkpoint_name(matmul(x, module.leaf("weight")), "projection")
    bias = module.leaf("bias")
    return y if bias is None else y + _plain(bias).astype(y.dtype)


def norm(arch: Architecture, module: Branch, x: Array) -> Array:
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) in float32.

    A plain RMSNorm is rounded before the weight, one whose weight is stored with an offset after it, as HF does.
    """
    wide = x.astype(jnp.float32)
    if arch.norm == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + arch.norm_eps)
    weight, bias = _plain(module.leaf("weight")), module.leaf("bias")
    if bias is None and not arch.norm_offset:
        return weight.astype(x.dtype) * normed.astype(x.dtype)
    scaled = (weight.astype(jnp.float32) + arch.norm_offset) * normed
    return (scaled if bias is None else scaled + _plain(bias).astype(jnp.float32)).astype(x.dtype)


def _plain(leaf: Any) -> Array:
    """Return a norm's weight or a bias; a trained copy (modules_to_save) counts as itself."""
    return getattr(leaf, "value", leaf)


def relative_bias(arch: Architecture, table: Any) -> Bias:
    """Return the function from places to the learned bias on the scores, (B, heads, T, S) float32."""

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
