"""`Architecture`: everything in which one family differs from another, as plain data.

A family's file turns a Hugging Face config into an Architecture; `decoder.py` is the one decoder that reads it. A
field says a fact about the mathematics ("norm weights are stored minus one"), never a family's name, so that a new
family is new values and, rarely, a new fact. An encoder-decoder is a decoder that attends to an `encoder`, itself an
Architecture that is not causal.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from tpu_tune.models.rope import Rope
from tpu_tune.tensors import Module


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may alternate from layer to layer.

    Attributes:
      window: tokens each query sees, itself included (sliding window); None sees all before it.
      rope: rotary embedding of queries and keys; None where positions enter otherwise.
    """

    window: int | None = None
    rope: Rope | None = None


@dataclasses.dataclass(frozen=True)
class Names:
    """Hugging Face module paths by role; those of what every layer has are relative to one layer.

    An empty path means that the family has no such module. Fused projections stand under `qkv` and `gate_up` instead of
    `q`, `k`, `v` and `gate`, `up`.

    Attributes:
      positions: learned embedding of absolute positions.
      project_in, project_out: between the embedding's width and the hidden one.
      relative_bias: learned embedding of relative positions, added to the scores of every layer.
      mlp_norm: "" where the MLP reads what the attention reads (one norm for both).
      attention_out_norm, mlp_out_norm: applied to what attention and MLP give, before it is added.
      cross_norm, cross_q, cross_k, cross_v, cross_o: attention to an encoder.
    """

    embed: str
    layers: str
    final_norm: str
    head: str
    attention_norm: str
    mlp_norm: str
    o: str
    down: str
    up: str = ""
    q: str = ""
    k: str = ""
    v: str = ""
    qkv: str = ""
    gate: str = ""
    gate_up: str = ""
    q_norm: str = ""
    k_norm: str = ""
    attention_out_norm: str = ""
    mlp_out_norm: str = ""
    cross_norm: str = ""
    cross_q: str = ""
    cross_k: str = ""
    cross_v: str = ""
    cross_o: str = ""
    positions: str = ""
    project_in: str = ""
    project_out: str = ""
    relative_bias: str = ""


@dataclasses.dataclass(frozen=True)
class RelativePositions:
    """Buckets of distances, for a learned bias on the scores (T5, arXiv:1910.10683, section 2.1).

    Attributes:
      buckets: rows of the table.
      max_distance: from here on all distances share a bucket.
    """

    buckets: int
    max_distance: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One language model, complete enough to build its parameter tree and run it.

    Attributes:
      family: the `model_type` of the Hugging Face config.
      names: which Hugging Face module plays which role.
      layer_kinds: one entry a layer.
      norm: rms (no mean, no bias) or layer (both).
      norm_offset: added to the stored weights of norms.
      norm_first: attention and MLP read normed states (else the sums are normed).
      activation: name of the MLP's nonlinearity, see `check_activation`.
      fused_heads: the file's fused q, k, v are ordered head by head, [q k v] of each in turn (GPT-NeoX), not q|k|v.
      fan_in_fan_out: the file holds the layers' matrices as (in, out) (GPT-2's Conv1D).
      residual: sequential (attention, then MLP on its result) or parallel (both read the layer's input).
      tied: the head uses the embedding's weight.
      embed_size: width of the embedding where `project_in` and `project_out` stand between; 0: the hidden size.
      embed_scale: factor on the embedding's rows.
      head_scale: factor on the hidden states that the head reads.
      attention_scale: factor on the scores; None: head_dim ** -0.5.
      attention_soft_cap, logit_soft_cap: c in c * tanh(x / c), on scores and logits; None for none.
      max_positions: positions it was made for; with learned ones (`names.positions`) there are no more.
      position_offset: rows of the table of positions before the first position's.
      relative: of the bias under `names.relative_bias`.
      causal: a token sees only those before it.
      encoder: what `names.cross_q` attends to; it shares the embedding.
      start_token: id before the first token of an answer, of an encoder-decoder.
      default_targets: module names that PEFT targets when none are given.
    """

    family: str
    names: Names
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_kinds: tuple[LayerKind, ...]
    norm_eps: float
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    norm_first: bool = True
    activation: str = "silu"
    fused_heads: bool = False
    fan_in_fan_out: bool = False
    residual: Literal["sequential", "parallel"] = "sequential"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tied: bool = False
    embed_size: int = 0
    embed_scale: float = 1.0
    head_scale: float = 1.0
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    max_positions: int = 0
    position_offset: int = 0
    relative: RelativePositions | None = None
    causal: bool = True
    encoder: Architecture | None = None
    start_token: int = 0
    default_targets: tuple[str, ...] = ("q_proj", "v_proj")

    @property
    def num_layers(self) -> int:
        """Number of layers; of an encoder-decoder, the decoder's."""
        return len(self.layer_kinds)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The different kinds of layers, in order of appearance."""
        return tuple(dict.fromkeys(self.layer_kinds))

    def modules(self) -> list[Module]:
        """List the modules of the parameter tree in the order of the forward pass."""
        names, width = self.names, self.hidden_size
        norm_bias = self.norm == "layer"
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        inner = self.intermediate_size
        embed_size = self.embed_size or width
        found = self.encoder.modules() if self.encoder else []

        def single(name: str, kind: str, shape: tuple[int, ...], bias: bool = False) -> None:
            if name and name not in [module.path for module in found]:
                found.append(Module(name, kind, shape, bias))

        def layered(name: str, kind: str, shape: tuple[int, ...], bias: bool = False, **facts: object) -> None:
            if name:
                path = f"{names.layers}.{name}"
                turned = self.fan_in_fan_out and kind == "linear"
                found.append(
                    Module(path, kind, shape, bias, self.num_layers, names.layers, fan_in_fan_out=turned, **facts)
                )

        single(names.embed, "embedding", (self.vocab_size, embed_size))
        if self.encoder:
            found[0] = dataclasses.replace(
                found[0], no_adapter="encoder and decoder share it, and what PEFT puts on it reaches neither"
            )
        single(names.positions, "embedding", (self.max_positions + self.position_offset, width))
        single(names.project_in, "linear", (embed_size, width))
        if self.relative:
            single(names.relative_bias, "embedding", (self.relative.buckets, self.num_heads))
        layered(names.attention_norm, "norm", (width,), norm_bias)
        layered(
            names.qkv,
            "linear",
            (width, q_width + 2 * kv_width),
            self.qkv_bias,
            segments=() if self.fused_heads else (q_width, kv_width, kv_width),
            unit=(q_width + 2 * kv_width) // self.num_kv_heads,
        )
        layered(names.q, "linear", (width, q_width), self.qkv_bias)
        layered(names.k, "linear", (width, kv_width), self.qkv_bias)
        layered(names.v, "linear", (width, kv_width), self.qkv_bias)
        layered(names.q_norm, "norm", (self.head_dim,), norm_bias)
        layered(names.k_norm, "norm", (self.head_dim,), norm_bias)
        layered(names.o, "linear", (q_width, width), self.o_bias)
        layered(names.attention_out_norm, "norm", (width,), norm_bias)
        layered(names.cross_norm, "norm", (width,), norm_bias)
        layered(names.cross_q, "linear", (width, q_width), self.qkv_bias)
        layered(names.cross_k, "linear", (width, kv_width), self.qkv_bias)
        layered(names.cross_v, "linear", (width, kv_width), self.qkv_bias)
        layered(names.cross_o, "linear", (q_width, width), self.o_bias)
        layered(names.mlp_norm, "norm", (width,), norm_bias)
        layered(
            names.gate_up, "linear", (width, 2 * inner), self.mlp_bias, segments=(inner, inner), unit=self.gate_unit
        )
        layered(names.gate, "linear", (width, inner), self.mlp_bias)
        layered(names.up, "linear", (width, inner), self.mlp_bias)
        layered(names.down, "linear", (inner, width), self.mlp_bias)
        layered(names.mlp_out_norm, "norm", (width,), norm_bias)
        single(names.final_norm, "norm", (width,), norm_bias)
        single(names.project_out, "linear", (width, embed_size))
        if names.head:
            head = Module(names.head, "linear", (embed_size, self.vocab_size), self.head_bias, is_head=True)
            found.append(dataclasses.replace(head, tied_to=names.embed if self.tied else ""))
        return found

    @property
    def gate_unit(self) -> int:
        """Columns of a fused gate and up projection that a mesh keeps together: a 64th of both where 64 divides."""
        return 2 * self.intermediate_size // math.gcd(self.intermediate_size, 64)

    def leaf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return path -> shape of every leaf, layers stacked on axis 0."""
        shapes: dict[str, tuple[int, ...]] = {}
        for module in self.modules():
            if module.tied_to:
                continue
            stack = (module.layers,) if module.layers else ()
            shapes[module.weight] = stack + module.shape
            if module.bias:
                shapes[f"{module.path}.bias"] = stack + module.shape[-1:]
        return shapes

    def stacked(self) -> frozenset[str]:
        """Return the paths of the leaves whose axis 0 is the layers."""
        layered = [module for module in self.modules() if module.layers]
        return frozenset(f"{module.path}.{part}" for module in layered for part in ("weight", "bias"))
