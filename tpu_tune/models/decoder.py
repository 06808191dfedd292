"""The one decoder: an nnx module over a parameter tree, for every decoder-only family.

`Decoder(architecture, params)` hangs the leaves of a flat parameter tree at their Hugging Face paths and is cheap
enough to be built inside a jitted function: the tree is the model's state, the module a view of it. Leaves may be
arrays or any of `tensors`' kinds. Stacked layers are walked by `jax.lax.scan`, rematerialised by policy.
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
from jaxtyping import Array, Float, Int

from tpu_tune.errors import UserError
from tpu_tune.kernels.attention import Places, attention
from tpu_tune.models import rope as rotary
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.tensors import embed, matmul, unembed

Params = Mapping[str, Any]  # path -> leaf

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

REMAT_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("projection"),
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How to run a decoder, apart from its mathematics.

    Attributes:
      dtype: of the activations; norms, rotary angles and softmax are float32 whatever it is.
      attention: implementation, see `kernels.attention`.
      remat: none | full | dots: what of a layer the backward pass recomputes.
      gather: applied to one layer's leaves inside the rematerialised scan body; training constrains quantized codes
        there, so that they are gathered over fsdp instead of dequantized weights.
      constrain: applied to hidden states (B, T, D) between layers; training pins their sharding there.
    """

    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: str = "none"
    gather: Callable[[dict[str, Any]], dict[str, Any]] = lambda leaves: leaves
    constrain: Callable[[Array], Array] = lambda hidden: hidden


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "segments", "length"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, for generation.

    Attributes:
      k, v: (layers, B, S, kv heads, head_dim).
      segments: (B, S), 1 where a real token stands, 0 elsewhere.
      length: tokens written so far, the same for every row.
    """

    k: Float[Array, "L B S K D"]
    v: Float[Array, "L B S K D"]
    segments: Int[Array, "B S"]
    length: Int[Array, ""]


def empty_cache(architecture: Architecture, batch: int, length: int, dtype: Any) -> Cache:
    """Return a cache for `batch` rows of at most `length` tokens."""
    shape = (architecture.num_layers, batch, length, architecture.num_kv_heads, architecture.head_dim)
    segments = jnp.zeros((batch, length), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), segments, jnp.int32(0))


class Branch(nnx.Module):
    """A module without mathematics of its own: children, and leaves named `weight` and `bias`."""

    def __init__(self, leaves: Params):
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


class Decoder(nnx.Module):
    """A decoder-only language model over `params`.

    Args:
      architecture: the family's facts.
      params: path -> leaf, layers stacked on axis 0 (see `Architecture.leaf_shapes`).
      execution: dtype, attention, remat and sharding hooks.
    """

    def __init__(self, architecture: Architecture, params: Params, execution: Execution | None = None):
        self.architecture = architecture
        self.execution = execution or Execution()
        inside = architecture.names.layers + "."
        self.layers = nnx.Param({path[len(inside) :]: leaf for path, leaf in params.items() if path.startswith(inside)})
        self.outside = Branch({path: leaf for path, leaf in params.items() if not path.startswith(inside)})

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Return float32 logits of the next token at every place."""
        return self.logits(self.hidden(input_ids, positions, segment_ids)[0]).astype(jnp.float32)

    def hidden(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Return the normed last hidden states, and the cache with this call's keys and values in it.

        Args:
          input_ids: token ids.
          positions: for the rotary embedding; by default the place in the row.
          segment_ids: document of each token, 0 for padding; by default one document a row.
          cache: what came before; the T new tokens follow it.
        """
        arch, run = self.architecture, self.execution
        batch, length = input_ids.shape
        start = 0 if cache is None else cache.length
        index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32) + start, (batch, length))
        positions = index if positions is None else positions
        segment_ids = jnp.ones_like(input_ids) if segment_ids is None else segment_ids
        if cache is None:
            places = Places(index, index, segment_ids, segment_ids)
        else:
            segments = jax.lax.dynamic_update_slice_in_dim(cache.segments, segment_ids, cache.length, axis=1)
            key_index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
            places = Places(index, key_index, segment_ids, segments)

        pattern = arch.pattern()
        ropes = {kind.rope: rotary.tables(kind.rope, positions) for kind in pattern if kind.rope is not None}
        embedding = self.outside.at(arch.names.embed).leaf("weight")
        x = run.constrain(embed(input_ids, embedding, run.dtype))

        def repeat(x: Array, scanned: tuple) -> tuple[Array, tuple]:
            """Run the layers of one repetition of the pattern."""
            leaves, cached = scanned
            written = []
            for place, kind in enumerate(pattern):
                one, entries = (_one_of_pattern(part, place, len(pattern)) for part in (leaves, cached))
                past = None if cached is None else (*entries, cache.length)
                x, entry = _layer(arch, kind, run, Branch(run.gather(one)), x, places, ropes.get(kind.rope), past)
                x = run.constrain(x)
                written.append(entry)
            if cached is None or len(pattern) == 1:
                return x, written[0]
            return x, jax.tree.map(lambda *parts: jnp.stack(parts), *written)

        if run.remat != "none":
            repeat = jax.checkpoint(repeat, policy=REMAT_POLICIES[run.remat], prevent_cse=False)
        stacked = _fold_pattern(self.layers.get_value(), len(pattern))
        cached = None if cache is None else _fold_pattern((cache.k, cache.v), len(pattern))
        x, written = jax.lax.scan(repeat, x, (stacked, cached))
        if cache is not None:
            k, v = (part.reshape(old.shape) for part, old in zip(written, (cache.k, cache.v), strict=True))
            cache = Cache(k, v, segments, cache.length + length)
        return _norm(arch, self.outside.at(arch.names.final_norm), x), cache

    def head_leaves(self) -> dict[str, Any]:
        """Return the leaves that turn hidden states into logits, for `apply_head`."""
        arch = self.architecture
        path = arch.names.head.split(".")[0]
        if hasattr(self.outside, path):
            head = self.outside.at(arch.names.head)
            return {name: head.leaf(name) for name in ("weight", "bias") if head.leaf(name) is not None}
        return {"embedding": self.outside.at(arch.names.embed).leaf("weight")}

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Return the logits of hidden states, in their dtype."""
        return apply_head(self.head_leaves(), hidden)


def apply_head(leaves: Mapping[str, Any], hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Apply `Decoder.head_leaves`, as a pure function for the chunked cross-entropy."""
    if "embedding" in leaves:
        return unembed(hidden, leaves["embedding"])
    logits = matmul(hidden, leaves["weight"])
    return logits + leaves["bias"].astype(logits.dtype) if "bias" in leaves else logits


def _fold_pattern(stacked: Any, length: int) -> Any:
    """Give each leaf (layers, ...) the shape (repetitions of the pattern, length of the pattern, ...).

    A pattern of one layer keeps its shape: `scan` then sees that what the backward pass needs of a leaf is the leaf, and
    keeps no second stack of it.
    """
    if length == 1:
        return stacked
    return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] // length, length, *leaf.shape[1:]), stacked)


def _one_of_pattern(leaves: Any, place: int, length: int) -> Any:
    return leaves if length == 1 else jax.tree.map(lambda leaf: leaf[place], leaves)


def _layer(
    arch: Architecture,
    kind: LayerKind,
    run: Execution,
    layer: Branch,
    x: Array,
    places: Places,
    angles: tuple[Array, Array] | None,
    past: tuple[Array, Array, Array] | None,
) -> tuple[Array, tuple[Array, Array] | None]:
    names = arch.names
    attended, entry = _attention(
        arch, kind, run, layer, _norm(arch, layer.at(names.attention_norm), x), places, angles, past
    )
    if arch.residual == "parallel":
        return x + attended + _mlp(arch, layer, _norm(arch, layer.at(names.mlp_norm), x)), entry
    x = x + attended
    return x + _mlp(arch, layer, _norm(arch, layer.at(names.mlp_norm), x)), entry


def _attention(
    arch: Architecture,
    kind: LayerKind,
    run: Execution,
    layer: Branch,
    x: Array,
    places: Places,
    angles: tuple[Array, Array] | None,
    past: tuple[Array, Array, Array] | None,
) -> tuple[Array, tuple[Array, Array] | None]:
    names, heads, groups, size = arch.names, arch.num_heads, arch.num_kv_heads, arch.head_dim
    batch, length, _ = x.shape
    if names.qkv:
        fused = _linear(layer.at(names.qkv), x).reshape(batch, length, heads, 3, size)
        q, k, v = (fused[:, :, :, part] for part in range(3))
    else:
        q = _linear(layer.at(names.q), x).reshape(batch, length, heads, size)
        k = _linear(layer.at(names.k), x).reshape(batch, length, groups, size)
        v = _linear(layer.at(names.v), x).reshape(batch, length, groups, size)
    if names.q_norm:
        q, k = _norm(arch, layer.at(names.q_norm), q), _norm(arch, layer.at(names.k_norm), k)
    if angles is not None:
        q, k = (rotary.rotate(part, kind.rope, *angles) for part in (q, k))
    entry = None
    if past is not None:
        old_k, old_v, start = past
        k = jax.lax.dynamic_update_slice_in_dim(old_k, k.astype(old_k.dtype), start, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(old_v, v.astype(old_v.dtype), start, axis=1)
        entry = (k, v)
    out = attention(q, k, v, places, window=kind.window, implementation=run.attention)
    return _linear(layer.at(names.o), out.reshape(batch, length, heads * size)), entry


def _mlp(arch: Architecture, layer: Branch, x: Array) -> Array:
    activation = ACTIVATIONS[arch.activation]
    up = _linear(layer.at(arch.names.up), x)
    inner = activation(_linear(layer.at(arch.names.gate), x)) * up if arch.names.gate else activation(up)
    return _linear(layer.at(arch.names.down), inner)


def _linear(module: Branch, x: Array) -> Array:
    y = checkpoint_name(matmul(x, module.leaf("weight")), "projection")
    bias = module.leaf("bias")
    return y if bias is None else y + _plain(bias).astype(y.dtype)


def _norm(arch: Architecture, module: Branch, x: Array) -> Array:
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) in float32, cast back before the weight as HF does."""
    wide = x.astype(jnp.float32)
    if arch.norm == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + arch.norm_eps)
    weight, bias = _plain(module.leaf("weight")), module.leaf("bias")
    if bias is None:
        return weight.astype(x.dtype) * normed.astype(x.dtype)
    return (weight.astype(jnp.float32) * normed + _plain(bias).astype(jnp.float32)).astype(x.dtype)


def _plain(leaf: Any) -> Array:
    """Return a norm's weight or a bias; a trained copy (modules_to_save) counts as itself."""
    return getattr(leaf, "value", leaf)


def check_activation(name: str) -> str:
    """Return a Hugging Face activation's name here.

    Raises:
      UserError: it is not known.
    """
    known = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}
    known |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh")
    if name not in known:
        raise UserError(f"activation '{name}' is not known; the known ones are {', '.join(sorted(known))}")
    return known[name]
