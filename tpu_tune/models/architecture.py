"""`Architecture`: everything in which one family differs from another, as plain data.

A family's file turns a Hugging Face config into an Architecture; `decoder.py` is the one decoder that reads it. A
field says a fact about the mathematics ("norm weights are stored minus one"), never a family's name, so that a new
family is new values and, rarely, a new fact. An encoder-decoder is a decoder that attends to an `encoder`, itself an
Architecture that is not causal.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

from tpu_tune.models.delta_modules import DeltaNet, delta_modules
from tpu_tune.models.groups import LayerGroup, layer_groups
from tpu_tune.models.names import LayerNames, Names
from tpu_tune.models.rope import Rope
from tpu_tune.tensors import LeafSpec, Module


@dataclasses.dataclass(frozen=True)
class Experts:
    """An MLP of many experts, a few of which work for each token.

    Attributes:
      count: number of experts.
      per_token: to how many of them each token goes.
      width: width of each one's MLP.
      path: the part of their names after which the files have an expert's index; "" where a file holds all experts of a
        layer in one tensor (see `Module.experts_path`).
      in_parameters: whether such tensors have no `.weight` behind their names.
      rule: how the router's scores become a choice and weights, see `experts.RULES`.
      renormalize: whether the weights of the chosen are divided by their sum.
      scale: factor on the weights.
      groups, top_groups: number of groups of consecutive experts, and how many of them a token may choose from.
      balance: weight that the config gives the load-balancing loss in training; 0 where it leaves it out.
      shared_width: width of the MLP beside them that all tokens go through; 0 where there is none.
      bias: whether router and experts have biases.
      alternating: whether the file's fused gate and up alternate column by column, and its matrices are (in, out).
      clamp: gate is at most this, up at most this and at least its negative; None for no limit.
      gain: a in gate * sigmoid(a * gate) * (up + 1), which then stands for the activation; None: activation(gate) * up.
    """

    count: int
    per_token: int
    width: int
    path: str = ""
    in_parameters: bool = False
    rule: str = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    balance: float = 0.0
    shared_width: int = 0
    bias: bool = False
    alternating: bool = False
    clamp: float | None = None
    gain: float | None = None

    @property
    def has_balance(self) -> bool:
        """Whether the load-balancing loss is defined for it: it is made of softmax probabilities."""
        return self.rule != "sigmoid"


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer.

    Attributes:
      names: its modules' paths; layers of other names or sizes have leaves of their own (see `groups.py`).
      window: number of keys that each query sees, its own included (sliding window); None: all before it.
      rope: rotary embedding of queries and keys; None where positions enter otherwise.
      intermediate_size: width of the MLP; 0: the architecture's.
      num_kv_heads, head_dim: of its attention; 0: the architecture's.
      keys_from: index of the earlier layer whose keys and values, normed and rotated, it attends to; None: its own.
      delta: sizes of the gated DeltaNet that stands where attention does; None for attention.
      experts: the experts of a sparse layer; None in a dense one.
    """

    names: LayerNames
    window: int | None = None
    rope: Rope | None = None
    intermediate_size: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    keys_from: int | None = None
    delta: DeltaNet | None = None
    experts: Experts | None = None

    @property
    def of_leaves(self) -> LayerKind:
        """The kind without what leaves and their shapes do not show: equal where layers can be stacked."""
        return dataclasses.replace(self, window=None, rope=None, keys_from=None)


@dataclasses.dataclass(frozen=True)
class RelativePositions:
    """Buckets of distances, for a learned bias on the scores (T5, arXiv:1910.10683, section 2.1).

    Attributes:
      buckets: number of buckets, which are the rows of the table.
      max_distance: distance from which on all share a bucket.
    """

    buckets: int
    max_distance: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One language model, complete enough to build its parameter tree and run it.

    Attributes:
      family: the `model_type` of the Hugging Face config.
      names: which Hugging Face module plays which role, outside the layers.
      layer_kinds: one entry a layer, with the names inside it.
      norm: rms (no mean, no bias) or layer (both).
      norm_bias: whether LayerNorms have a bias.
      norm_weights: whether norms have weights at all.
      norm_offset: number added to the stored weights of norms.
      qk_norm: whether the norms of q and k are over each head or over the whole projection.
      qk_norm_last: whether they come after the rotary embedding.
      qkv_clip: largest absolute value of queries, keys and values, before the rotary embedding; None for no limit.
      value_norm: whether the values of each head are normed, without weights.
      norm_first: whether attention and MLP read normed states (else the sums are normed).
      activation: name of the MLP's nonlinearity, see `check_activation`.
      fused_heads: whether the file's fused q, k, v are ordered head by head, [q k v] of each in turn (GPT-NeoX), not
        q|k|v.
      fan_in_fan_out: whether the file holds the layers' matrices as (in, out) (GPT-2's Conv1D).
      residual: sequential (attention, then MLP on its result) or parallel (both read the layer's input).
      residual_scale: factor on what attention and MLP add.
      tied: whether the head uses the embedding's weight.
      embed_size: width of the embedding where `project_in` and `project_out` stand between; 0: the hidden size.
      embed_scale: factor on the embedding's rows.
      input_scale: factor on what the first layer reads, after noise on the embedding's rows (NEFTune).
      layer_input_size: width of what each layer gets beside the hidden states, from the token and from what the first
        layer reads; 0: nothing.
      layer_input_vocab: rows of the embedding of it.
      head_scale: factor on the hidden states that the head reads.
      attention_scale: factor on the scores; None: head_dim ** -0.5.
      attention_gate: whether q has a gate behind each head's query, whose sigmoid multiplies what the head attends to.
      attention_soft_cap, logit_soft_cap: c in c * tanh(x / c), on scores and logits; None for none.
      max_positions: number of positions it was made for; with learned ones (`names.positions`) there are no more.
      position_offset: number of rows of the table of positions before the first position's.
      relative: buckets of the bias under `names.relative_bias`; None without one.
      causal: whether a token sees only those before it.
      encoder: the model that `names.cross_q` attends to; it shares the embedding. None without one.
      start_token: id that comes before the first token of an encoder-decoder's answer.
      num_labels: outputs of a head that reads a text at its last token, in place of the language model's; 0: none.
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
    norm_bias: bool = True
    norm_weights: bool = True
    norm_offset: float = 0.0
    qk_norm: Literal["head", "projection"] = "head"
    qk_norm_last: bool = False
    qkv_clip: float | None = None
    value_norm: bool = False
    norm_first: bool = True
    activation: str = "silu"
    fused_heads: bool = False
    fan_in_fan_out: bool = False
    residual: Literal["sequential", "parallel"] = "sequential"
    residual_scale: float = 1.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tied: bool = False
    embed_size: int = 0
    embed_scale: float = 1.0
    input_scale: float = 1.0
    layer_input_size: int = 0
    layer_input_vocab: int = 0
    head_scale: float = 1.0
    attention_scale: float | None = None
    attention_gate: bool = False
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    max_positions: int = 0
    position_offset: int = 0
    relative: RelativePositions | None = None
    causal: bool = True
    encoder: Architecture | None = None
    start_token: int = 0
    num_labels: int = 0
    default_targets: tuple[str, ...] = ("q_proj", "v_proj")

    @property
    def num_layers(self) -> int:
        """Number of layers; in an encoder-decoder, the decoder's."""
        return len(self.layer_kinds)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The different kinds of layers, in order of appearance."""
        return tuple(dict.fromkeys(self.layer_kinds))

    @functools.cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The runs of layers that one scan walks; a model whose layers have the same leaves is one group."""
        return layer_groups([kind.of_leaves for kind in self.layer_kinds])

    def heads(self, kind: LayerKind) -> tuple[int, int]:
        """Return (number of key and value heads, elements of a head) of a kind of layers."""
        return kind.num_kv_heads or self.num_kv_heads, kind.head_dim or self.head_dim

    @property
    def experts(self) -> Experts | None:
        """The experts of its sparse layers, which are the same in all of them; None where every layer is dense."""
        return next((kind.experts for kind in self.kinds if kind.experts), None)

    @property
    def has_norm_bias(self) -> bool:
        """Whether its norms have a bias."""
        return self.norm == "layer" and self.norm_bias and self.norm_weights

    @property
    def has_cross_attention(self) -> bool:
        """Whether its layers attend to an encoder."""
        return any(kind.names.cross_q for kind in self.kinds)

    def modules(self) -> list[Module]:
        """List the modules of the parameter tree in the order of the forward pass."""
        names, width, vocabulary = self.names, self.hidden_size, self.vocab_size
        embed_size = self.embed_size or width
        modules = self.encoder.modules() if self.encoder else []

        def single(name: str, *facts: Any, **more: Any) -> None:
            if name and name not in [module.path for module in modules]:
                modules.append(Module(name, *facts, **more))

        single(names.embed, "embedding", (vocabulary, embed_size), ("vocab", "embed"))
        if self.encoder:
            modules[0] = dataclasses.replace(
                modules[0], no_adapter="encoder and decoder share it, and what PEFT puts on it reaches neither"
            )
        single(names.positions, "embedding", (self.max_positions + self.position_offset, width), ("vocab", "embed"))
        width_of_all, inputs_axes = self.num_layers * self.layer_input_size, ("embed", None)
        single(names.inputs_embed, "embedding", (self.layer_input_vocab, width_of_all), ("vocab", "embed"))
        single(names.inputs_projection, "linear", (width, width_of_all), inputs_axes)
        single(names.inputs_norm, "norm", (self.layer_input_size,), (None,))
        single(names.project_in, "linear", (embed_size, width), ("embed", "mlp"))
        if self.relative:
            # "bias" in its name keeps weight decay from it, as in Hugging Face's Trainer.
            shape = (self.relative.buckets, self.num_heads)
            single(names.relative_bias, "embedding", shape, (None, None), decay=False)
        modules += self._layered_modules()
        if self.norm_weights:
            single(names.final_norm, "norm", (width,), (None,), self.has_norm_bias)
        single(names.project_out, "linear", (width, embed_size), ("embed", "mlp"))
        tied = names.embed if self.tied else ""
        outputs, axis = (self.num_labels, None) if self.num_labels else (vocabulary, "vocab")
        facts = {"is_head": True, "tied_to": tied}
        single(names.head, "linear", (embed_size, outputs), ("embed", axis), self.head_bias, **facts)
        return modules

    def _layered_modules(self) -> list[Module]:
        """Stack the modules of all layers: those of one name and the same facts are one `Module`."""
        layers_of: dict[Module, list[int]] = {}
        modules_of = {kind: layer_modules(self, kind) for kind in self.kinds}
        for layer, kind in enumerate(self.layer_kinds):
            for module in modules_of[kind]:
                layers_of.setdefault(module, []).append(layer)
        modules, paths = [], set()
        for module, layers in layers_of.items():
            path = f"{self.names.layers}.{module.path}"
            if path in paths:
                path = f"{self.names.layers}[{layers[0]}].{module.path}"
            paths.add(path)
            modules.append(dataclasses.replace(module, path=path, layers=tuple(layers), layers_path=self.names.layers))
        return modules

    def leaf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return path -> shape of every leaf, layers stacked on axis 0."""
        return {path: shape for module in self.modules() for path, shape in module.leaf_shapes().items()}

    def leaves(self) -> dict[str, LeafSpec]:
        """Return path -> facts of every leaf."""
        return {path: spec for module in self.modules() if not module.tied_to for path, spec in module.leaves().items()}

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(math.prod(shape) for shape in self.leaf_shapes().values())


def layer_modules(arch: Architecture, kind: LayerKind) -> list[Module]:
    """List the modules of one layer, their paths relative to it, in the order of the forward pass."""
    names, width = kind.names, arch.hidden_size
    inner = kind.intermediate_size or arch.intermediate_size
    kv_heads, head_dim = arch.heads(kind)
    q_width, kv_width = arch.num_heads * head_dim, kv_heads * head_dim
    qkv_width = q_width + 2 * kv_width
    o_width, o_bias = (q_width, arch.o_bias) if kind.delta is None else (kind.delta.value_width, False)
    modules = []

    def norm(name: str, size: int = width) -> None:
        if name and arch.norm_weights:
            modules.append(Module(name, "norm", (size,), (None,), arch.has_norm_bias))

    def linear(name: str, shape: tuple[int, int], axes: tuple[str, str], bias: bool, **facts: Any) -> None:
        if name:
            modules.append(Module(name, "linear", shape, axes, bias, fan_in_fan_out=arch.fan_in_fan_out, **facts))

    def attention(q: str, k: str, v: str) -> None:
        both, unit = (2 * q_width, 2 * head_dim) if arch.attention_gate else (q_width, 1)
        linear(q, (width, both), ("embed", "heads"), arch.qkv_bias, unit=unit)
        for name in (k, v):
            linear(name, (width, kv_width), ("embed", "heads"), arch.qkv_bias)

    norm(names.attention_norm)
    segments = () if arch.fused_heads else (q_width, kv_width, kv_width)
    unit = qkv_width // kv_heads
    linear(names.qkv, (width, qkv_width), ("embed", "heads"), arch.qkv_bias, segments=segments, unit=unit)
    attention(names.q, names.k, names.v)
    whole = arch.qk_norm == "projection"
    norm(names.q_norm, q_width if whole else head_dim)
    norm(names.k_norm, kv_width if whole else head_dim)
    if kind.delta is not None:
        modules += delta_modules(names, kind.delta, width)
    if names.sinks:
        parameter = {"is_parameter": True, "no_adapter": "it is a parameter of the attention, and no module"}
        modules.append(Module(names.sinks, "norm", (arch.num_heads,), (None,), **parameter))
    linear(names.o, (o_width, width), ("heads", "embed"), o_bias)
    norm(names.attention_out_norm)
    norm(names.cross_norm)
    attention(names.cross_q, names.cross_k, names.cross_v)
    linear(names.cross_o, (q_width, width), ("heads", "embed"), arch.o_bias)
    norm(names.mlp_norm)
    segments, unit = (inner, inner), gate_unit(inner)
    linear(names.gate_up, (width, 2 * inner), ("embed", "mlp"), arch.mlp_bias, segments=segments, unit=unit)
    linear(names.gate, (width, inner), ("embed", "mlp"), arch.mlp_bias)
    linear(names.up, (width, inner), ("embed", "mlp"), arch.mlp_bias)
    linear(names.down, (inner, width), ("mlp", "embed"), arch.mlp_bias)
    modules += _sparse_modules(arch, names, kind.experts) if kind.experts else []
    norm(names.mlp_out_norm)
    linear(names.input_gate, (width, arch.layer_input_size), ("embed", "mlp"), False)
    linear(names.input_projection, (arch.layer_input_size, width), ("mlp", "embed"), False)
    norm(names.input_norm)
    if names.scalar:
        modules.append(Module(names.scalar, "norm", (1,), (None,), is_parameter=True, decay=False))
    return modules


def _sparse_modules(arch: Architecture, names: LayerNames, experts: Experts) -> list[Module]:
    """List the modules of a sparse MLP: the router, the experts, and what stands beside them."""
    width, inner, shared = arch.hidden_size, experts.width, experts.shared_width
    modules = [Module(names.router, "linear", (width, experts.count), ("embed", None), experts.bias, is_router=True)]
    for name, size in (
        (names.choice_bias, experts.count),
        (names.router_scale, width),
        (names.expert_scale, experts.count),
    ):
        if name:
            modules.append(Module(name, "norm", (size,), (None,), is_parameter=True))
    for name in (names.experts_norm, names.experts_out_norm, names.dense_out_norm):
        if name:
            modules.append(Module(name, "norm", (width,), (None,), arch.has_norm_bias))
    of_experts = {
        "experts": experts.count,
        "experts_per_token": experts.per_token,
        "experts_path": experts.path,
        "bias": experts.bias,
        "is_parameter": experts.in_parameters or experts.alternating,
        "fan_in_fan_out": experts.alternating,
        # of gpt-oss, as PEFT has it: one chip takes the model with adapters on its attention, not on its experts
        "by_name": experts.alternating,
    }

    def linear(name: str, shape: tuple[int, int], axes: tuple[str, str | None], **facts: Any) -> None:
        if name:
            modules.append(Module(name, "linear", shape, axes, **facts))

    def mlp(gate: str, up: str, gate_up: str, down: str, inner: int, **facts: Any) -> None:
        both = {"segments": (inner, inner), "unit": gate_unit(inner), **facts}
        linear(gate_up, (width, 2 * inner), ("embed", "mlp"), alternating=bool(facts) and experts.alternating, **both)
        linear(gate, (width, inner), ("embed", "mlp"), **facts)
        linear(up, (width, inner), ("embed", "mlp"), **facts)
        linear(down, (inner, width), ("mlp", "embed"), **facts)

    mlp(names.expert_gate, names.expert_up, names.expert_gate_up, names.expert_down, inner, **of_experts)
    mlp(names.shared_gate, names.shared_up, names.shared_gate_up, names.shared_down, shared)
    linear(names.shared_switch, (width, 1), ("embed", None))
    return modules


def gate_unit(inner: int) -> int:
    """Columns of a fused gate and up projection that a mesh keeps together: a 64th of both where 64 divides."""
    return 2 * inner // math.gcd(inner, 64)
