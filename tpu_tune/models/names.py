"""Which module of a Hugging Face model plays which role: the names that an `Architecture` is built with."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class LayerNames:
    """Hugging Face module paths by role, relative to one layer; "" where a layer has no such module.

    Fused projections stand under `qkv` and `gate_up` instead of `q`, `k`, `v` and `gate`, `up`.

    Attributes:
      attention_norm: "" where the attention reads the layer's input as it is.
      mlp_norm: "" where the MLP reads what the attention reads (one norm for both, under `residual="parallel"`), or the
        sum as it is.
      k, v: "" where the layer attends to another one's keys and values (`LayerKind.keys_from`); v alone is "" where
        the keys, before their norm, are the values too.
      attention_out_norm, mlp_out_norm: applied to the output of attention and MLP, before it is added.
      input_gate, input_projection, input_norm: how the layer's own input (`Architecture.layer_input_size`) is added.
      scalar: a number that everything which leaves the layer is multiplied with; no training changes it.
      cross_norm, cross_q, cross_k, cross_v, cross_o: modules of the attention to an encoder.
      delta_qkv, delta_z, delta_b, delta_a: projections of a gated DeltaNet, which stands where attention does; fused
        head by head under `delta_qkvz` and `delta_ba`.
      delta_conv, delta_rate, delta_shift, delta_norm: its convolution, the rate of decay and the shift of a, both by
        head, and the norm of each head's output.
      sinks: one more logit of each head in attention's softmax, which no value belongs to.
      router: gives each token a score for every expert.
      choice_bias: vector that is added to the scores for the choice of experts alone.
      expert_gate, expert_up, expert_gate_up, expert_down: the MLPs of the experts, without an expert's index.
      shared_gate, shared_up, shared_gate_up, shared_down: an MLP beside the experts that all tokens go through.
      shared_switch: gives the number whose sigmoid that MLP's result is multiplied by.
      router_scale: vector that the router's input, normed for it alone, is multiplied with.
      expert_scale: vector of factors on the experts' weights.
      experts_norm, experts_out_norm, dense_out_norm: where a sparse layer has a dense MLP (`down`) too: what the
        experts read, and the norms of both results before they are added.
    """

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
    input_gate: str = ""
    input_projection: str = ""
    input_norm: str = ""
    scalar: str = ""
    cross_norm: str = ""
    cross_q: str = ""
    cross_k: str = ""
    cross_v: str = ""
    cross_o: str = ""
    delta_qkv: str = ""
    delta_z: str = ""
    delta_b: str = ""
    delta_a: str = ""
    delta_qkvz: str = ""
    delta_ba: str = ""
    delta_conv: str = ""
    delta_rate: str = ""
    delta_shift: str = ""
    delta_norm: str = ""
    sinks: str = ""
    router: str = ""
    choice_bias: str = ""
    expert_gate: str = ""
    expert_up: str = ""
    expert_gate_up: str = ""
    expert_down: str = ""
    shared_gate: str = ""
    shared_up: str = ""
    shared_gate_up: str = ""
    shared_down: str = ""
    shared_switch: str = ""
    router_scale: str = ""
    expert_scale: str = ""
    experts_norm: str = ""
    experts_out_norm: str = ""
    dense_out_norm: str = ""


@dataclasses.dataclass(frozen=True)
class Names:
    """Hugging Face module paths by role, for what stands outside the layers; "" where a family has no such module.

    Attributes:
      layers: path of the list of layers, after which the layer index follows.
      positions: learned embedding of absolute positions.
      project_in, project_out: projections between the embedding's width and the hidden one.
      relative_bias: learned embedding of relative positions, added to the scores of every layer.
      embed_norm: norm of the embedding's rows, before the first layer.
      inputs_embed, inputs_projection, inputs_norm: embedding of each layer's own input, and the projection of what the
        first layer reads, with its norm, that is added to it.
      tower: path of the text model in a multimodal model's class (see `wrappers.py`); "" where it is a model by itself.
    """

    embed: str
    layers: str
    final_norm: str
    head: str
    positions: str = ""
    project_in: str = ""
    project_out: str = ""
    relative_bias: str = ""
    embed_norm: str = ""
    inputs_embed: str = ""
    inputs_projection: str = ""
    inputs_norm: str = ""
    tower: str = ""
