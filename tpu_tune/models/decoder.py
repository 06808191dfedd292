"""The one decoder: an nnx module over a parameter tree, for every family; an encoder is one that is not causal.

`Decoder(architecture, params)` hangs the leaves of a flat parameter tree at their Hugging Face paths and is cheap
enough to be built inside a jitted function: the tree is the model's state, the module a view of it. Leaves may be
arrays or any of `tensors`' kinds. `scan.py` walks the stacked layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tpu_tune.errors import UserError
from tpu_tune.kernels.layout import TokenLayout, soft_cap
from tpu_tune.models import rope as rotary
from tpu_tune.models.architecture import Architecture
from tpu_tune.models.branch import Branch, linear, norm
from tpu_tune.models.layers import LayerContext
from tpu_tune.models.relative import relative_bias
from tpu_tune.models.scan import Execution, Pasts, empty_pasts, run_layers
from tpu_tune.tensors import embed, map_base, matmul, stack_of_one, unembed

Params = Mapping[str, Any]  # path -> leaf


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["past", "segments", "length", "encoder_segments"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, for generation.

    Attributes:
      past: what each layer keeps, keys and values (B, S, kv heads, head_dim) and the like; an encoder's come with the
        first call.
      segments: (B, S), 1 where a real token stands, 0 elsewhere.
      length: number of tokens written so far, the same for every row.
      encoder_segments: (B, M), segments of the encoder's tokens; None without an encoder.
    """

    past: Pasts
    segments: Int[Array, "B S"]
    length: Int[Array, ""]
    encoder_segments: Int[Array, "B M"] | None = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["hidden", "segments"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class EncoderOutput:
    """What a decoder attends to: the encoder's last hidden states and the segment of each token (0 is padding)."""

    hidden: Float[Array, "B M D"]
    segments: Int[Array, "B M"]


def empty_cache(architecture: Architecture, batch: int, length: int, dtype: Any) -> Cache:
    """Return a cache for `batch` rows of at most `length` tokens."""
    return Cache(empty_pasts(architecture, batch, length, dtype), jnp.zeros((batch, length), jnp.int32), jnp.int32(0))


def encode(
    architecture: Architecture,
    params: Params,
    execution: Execution,
    input_ids: Int[Array, "B M"],
    segment_ids: Int[Array, "B M"],
    on_embeddings: Callable[[Array], Array] | None = None,
) -> EncoderOutput:
    """Run the encoder of an encoder-decoder; `on_embeddings` as in `Decoder.hidden`."""
    encoder = Decoder(architecture.encoder, params, execution)
    hidden, _ = encoder.hidden(input_ids, None, segment_ids, on_embeddings=on_embeddings)
    return EncoderOutput(hidden, segment_ids)


def check_length(architecture: Architecture, length: int) -> None:
    """Refuse more positions than a family with learned ones has.

    Raises:
      UserError: `length` tokens have no positions.
    """
    if architecture.names.positions and length > architecture.max_positions:
        raise UserError(
            f"{length} tokens are more than this {architecture.family} model has positions for "
            f"({architecture.max_positions}); shorten the text, or lower data.max_length"
        )


class Decoder(nnx.Module):
    """A language model over `params`.

    Args:
      architecture: the family's facts.
      params: path -> leaf, layers stacked on axis 0 (see `Architecture.leaf_shapes`).
      execution: dtype, attention, remat and sharding hooks.
    """

    def __init__(self, architecture: Architecture, params: Params, execution: Execution | None = None):
        self.architecture = architecture
        self.execution = execution or Execution()
        modules = architecture.modules()
        own = architecture.names.layers
        stacked = [module.path for module in modules if module.layers and module.layers_path == own]
        single = [module.path for module in modules if not module.layers]
        linears = {module.weight for module in modules if module.kind == "linear" and not module.layers}
        self.layers = nnx.Param({path: leaf for path, leaf in params.items() if path.rpartition(".")[0] in stacked})
        outside = {path: leaf for path, leaf in params.items() if path.rpartition(".")[0] in single}
        if self.execution.mesh is None:
            view = functools.partial(stack_of_one, plan=self.execution.plan)
            outside = {path: map_base(view, leaf) if path in linears else leaf for path, leaf in outside.items()}
        self.outside = Branch(outside)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        encoder_output: EncoderOutput | None = None,
    ) -> Float[Array, "B T V"]:
        """Return float32 logits of the next token at every position."""
        return self.logits(self.hidden(input_ids, positions, segment_ids, encoder_output=encoder_output)[0]).astype(
            jnp.float32
        )

    def hidden(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        encoder_output: EncoderOutput | None = None,
        on_embeddings: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Return the hidden states that the head reads, and the cache with this call's keys and values in it.

        The arguments are `hidden_and_load`'s.
        """
        x, cache, _ = self.hidden_and_load(input_ids, positions, segment_ids, cache, encoder_output, on_embeddings)
        return x, cache

    def hidden_and_load(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        encoder_output: EncoderOutput | None = None,
        on_embeddings: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None, Float[Array, "2 E"] | None]:
        """Return what `hidden` does, and the experts' load over all layers (`experts.load`); None without experts.

        Args:
          input_ids: token ids.
          positions: position of each token in its document; by default its index in the row.
          segment_ids: document of each token, 0 for padding; by default one document a row.
          cache: keys and values of the tokens so far, which the T new ones follow; None without a cache.
          encoder_output: output of an encoder-decoder's encoder; with a cache only in the first call.
          on_embeddings: changes the rows (B, T, D) that the embedding module gives (scaled, in Gemma), e.g. by noise.
        """
        arch, run, names = self.architecture, self.execution, self.architecture.names
        batch, length = input_ids.shape
        start = None if cache is None else cache.length
        index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32) + (0 if start is None else start), (batch, length))
        positions = index if positions is None else positions
        packed = run.packed and segment_ids is not None
        segment_ids = jnp.ones_like(input_ids) if segment_ids is None else segment_ids
        key_segments, key_index = segment_ids, index
        if cache is not None:
            key_segments = jax.lax.dynamic_update_slice_in_dim(cache.segments, segment_ids, cache.length, axis=1)
            key_index = jnp.broadcast_to(jnp.arange(key_segments.shape[1], dtype=jnp.int32), key_segments.shape)
        context = LayerContext(
            layout=TokenLayout(index, key_index, segment_ids, key_segments, arch.causal, packed),
            angles={kind.rope: rotary.tables(kind.rope, positions) for kind in arch.kinds if kind.rope is not None},
            implementation=run.attention,
            mesh=run.mesh,
            bias=relative_bias(arch, self.outside.at(names.relative_bias).leaf("weight")) if arch.relative else None,
            start=start,
            chunk=run.chunk if cache is None else 0,
        )
        encoder_segments = None
        if arch.has_cross_attention:
            encoder_segments = cache.encoder_segments if encoder_output is None else encoder_output.segments
            layout = TokenLayout(index, jnp.zeros_like(encoder_segments), segment_ids, encoder_segments, causal=False)
            hidden = None if encoder_output is None else encoder_output.hidden
            context = dataclasses.replace(context, encoder=(hidden, layout))
        x, inputs = self.before_layers(input_ids, positions, on_embeddings)
        past = None if cache is None else cache.past
        x, past, load = run_layers(arch, run, self.layers.get_value(), x, context, past, inputs)
        x = norm(arch, self.outside, names.final_norm, x)
        if names.project_out:
            x = linear(self.outside.at(names.project_out), x)
        if cache is None:
            return x, None, load
        return x, Cache(past, key_segments, cache.length + length, encoder_segments), None

    def before_layers(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        on_embeddings: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B T P"] | None]:
        """Return the hidden states before the first layer, and what each layer gets beside them; None: nothing."""
        x = self.execution.constrain(self._embedded(input_ids, positions, on_embeddings))
        return x, self._layer_inputs(input_ids, x) if self.architecture.layer_input_size else None

    def _embedded(self, input_ids: Array, positions: Array, on_embeddings: Callable[[Array], Array] | None) -> Array:
        arch, names, dtype = self.architecture, self.architecture.names, self.execution.dtype
        x = embed(input_ids, self.outside.at(names.embed).leaf("weight"), dtype)
        if arch.embed_scale != 1.0:
            x = x * jnp.asarray(arch.embed_scale, dtype)
        if on_embeddings is not None:
            x = on_embeddings(x)
        if arch.input_scale != 1.0:
            x = x * jnp.asarray(arch.input_scale, dtype)
        x = norm(arch, self.outside, names.embed_norm, x)
        if names.project_in:
            x = linear(self.outside.at(names.project_in), x)
        if names.positions:
            x = x + embed(positions + arch.position_offset, self.outside.at(names.positions).leaf("weight"), dtype)
        return x

    def _layer_inputs(self, input_ids: Int[Array, "B T"], x: Float[Array, "B T D"]) -> Float[Array, "L B T P"]:
        """Return what each layer gets beside the hidden states: the mean of two, times the root of two."""
        arch, names, run = self.architecture, self.architecture.names, self.execution
        size = arch.layer_input_size

        def by_layer(flat: Array) -> Array:
            return jnp.moveaxis(run.constrain(flat).reshape(*x.shape[:2], arch.num_layers, size), 2, 0)

        rows = embed(input_ids, self.outside.at(names.inputs_embed).leaf("weight"), run.dtype)
        rows = rows * jnp.asarray(math.sqrt(size), run.dtype)
        projected = linear(self.outside.at(names.inputs_projection), x) * jnp.asarray(arch.hidden_size**-0.5, run.dtype)
        projected = norm(arch, self.outside, names.inputs_norm, by_layer(projected))
        return (projected + by_layer(rows)) * jnp.asarray(math.sqrt(0.5), run.dtype)

    def head_leaves(self) -> dict[str, Any]:
        """Return the leaves that turn hidden states into logits, for `apply_head`."""
        names = self.architecture.names
        if hasattr(self.outside, names.head.split(".")[0]):
            head = self.outside.at(names.head)
            return {name: head.leaf(name) for name in ("weight", "bias") if head.leaf(name) is not None}
        return {"embedding": self.outside.at(names.embed).leaf("weight")}

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Return the logits of hidden states, in their dtype."""
        return apply_head(self.architecture, self.head_leaves(), hidden)


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
