"""`Architecture`: everything in which one decoder-only family differs from another, as plain data.

A family's file turns a Hugging Face config into an Architecture; `decoder.py` is the one decoder that reads it. A
field says a fact about the mathematics ("norm weights are stored minus one"), never a family's name, so that a new
family is new values and, rarely, a new fact.
"""

from __future__ import annotations

import dataclasses
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
    """Hugging Face module paths by role; those below `layers` are relative to one layer.

    An empty path means that the family has no such module. A fused projection stands under `qkv` instead of
    `q`, `k`, `v`.
    """

    embed: str
    layers: str
    final_norm: str
    head: str
    attention_norm: str
    mlp_norm: str
    o: str
    up: str
    down: str
    q: str = ""
    k: str = ""
    v: str = ""
    qkv: str = ""
    gate: str = ""
    q_norm: str = ""
    k_norm: str = ""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One decoder-only language model, complete enough to build its parameter tree and run it.

    Attributes:
      family: the `model_type` of the Hugging Face config.
      names: which Hugging Face module plays which role.
      layer_kinds: one entry a layer.
      norm: rms (no mean, no bias) or layer (both).
      activation: name of the MLP's nonlinearity: silu, gelu (exact), gelu_tanh, relu.
      qkv_layout: how a fused projection's output is ordered; `heads` is [q k v] for every head in turn (GPT-NeoX).
      residual: sequential (attention, then MLP on its result) or parallel (both read the layer's input).
      tied: the head uses the embedding's weight.
      default_targets: module names that PEFT targets when none are given.
      gguf_permuted: GGUF files hold q and k with rotary halves interleaved.
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
    activation: str = "silu"
    qkv_layout: Literal["heads"] = "heads"
    residual: Literal["sequential", "parallel"] = "sequential"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tied: bool = False
    max_positions: int = 0
    default_targets: tuple[str, ...] = ("q_proj", "v_proj")

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layer_kinds)

    def modules(self) -> list[Module]:
        """List the modules of the parameter tree in the order of the forward pass."""
        names, width = self.names, self.hidden_size
        norm_bias = self.norm == "layer"
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        found = [Module(names.embed, "embedding", (self.vocab_size, width))]

        def layered(name: str, kind: str, shape: tuple[int, ...], bias: bool = False) -> None:
            if name:
                path = f"{names.layers}.{name}"
                found.append(Module(path, kind, shape, bias, layers=self.num_layers, layers_path=names.layers))

        layered(names.attention_norm, "norm", (width,), norm_bias)
        layered(names.qkv, "linear", (width, q_width + 2 * kv_width), self.qkv_bias)
        layered(names.q, "linear", (width, q_width), self.qkv_bias)
        layered(names.k, "linear", (width, kv_width), self.qkv_bias)
        layered(names.v, "linear", (width, kv_width), self.qkv_bias)
        layered(names.q_norm, "norm", (self.head_dim,))
        layered(names.k_norm, "norm", (self.head_dim,))
        layered(names.o, "linear", (q_width, width), self.o_bias)
        layered(names.mlp_norm, "norm", (width,), norm_bias)
        layered(names.gate, "linear", (width, self.intermediate_size), self.mlp_bias)
        layered(names.up, "linear", (width, self.intermediate_size), self.mlp_bias)
        layered(names.down, "linear", (self.intermediate_size, width), self.mlp_bias)
        found.append(Module(names.final_norm, "norm", (width,), norm_bias))
        head = Module(names.head, "linear", (width, self.vocab_size), self.head_bias, is_head=True)
        found.append(dataclasses.replace(head, tied_to=names.embed if self.tied else ""))
        return found

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

    def pattern(self) -> tuple[LayerKind, ...]:
        """Return the shortest sequence of layer kinds whose repetition is the whole stack."""
        kinds = self.layer_kinds
        for length in range(1, len(kinds) + 1):
            if len(kinds) % length == 0 and kinds == kinds[:length] * (len(kinds) // length):
                return kinds[:length]
        return kinds
