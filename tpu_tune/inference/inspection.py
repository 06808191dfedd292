"""What is in a model, and what a LoRA configuration would train of it; no weight is read."""

from __future__ import annotations

import math
from typing import Any

from tpu_tune.checkpoints.params import open_architecture
from tpu_tune.checkpoints.source import open_source
from tpu_tune.checkpoints.towers import parts_left_aside
from tpu_tune.models import Architecture
from tpu_tune.tensors import Module
from tpu_tune.transforms import LoraConfig, experts_words, find_targets

ROLES = {
    "embed": "turns token ids into vectors",
    "q": "attention: queries",
    "k": "attention: keys",
    "v": "attention: values",
    "qkv": "attention: queries, keys and values in one",
    "o": "attention: output",
    "sinks": "attention: a logit of each head that no value belongs to",
    "gate": "MLP: gate",
    "up": "MLP: up",
    "gate_up": "MLP: gate and up in one",
    "down": "MLP: down",
    "cross_q": "attention to the encoder: queries",
    "cross_k": "attention to the encoder: keys",
    "cross_v": "attention to the encoder: values",
    "cross_o": "attention to the encoder: output",
    "delta_qkv": "DeltaNet: queries, keys and values in one",
    "delta_qkvz": "DeltaNet: queries, keys, values and gate in one",
    "delta_z": "DeltaNet: gate of the output",
    "delta_b": "DeltaNet: how far the state is corrected",
    "delta_a": "DeltaNet: how far the state decays",
    "delta_ba": "DeltaNet: how far the state is corrected and decays",
    "delta_conv": "DeltaNet: convolution along the tokens",
    "delta_rate": "DeltaNet: rate of decay, its logarithm",
    "delta_shift": "DeltaNet: shift of the decay",
    "router": "sends each token to some experts",
    "router_scale": "factors on the router's input",
    "expert_scale": "factors on the experts' weights",
    "choice_bias": "added to the router's scores for the choice",
    "expert_gate": "experts: gate",
    "expert_up": "experts: up",
    "expert_gate_up": "experts: gate and up in one",
    "expert_down": "experts: down",
    "shared_gate": "MLP of all tokens: gate",
    "shared_up": "MLP of all tokens: up",
    "shared_gate_up": "MLP of all tokens: gate and up in one",
    "shared_down": "MLP of all tokens: down",
    "shared_switch": "MLP of all tokens: weight of its result",
    "positions": "turns positions into vectors",
    "relative_bias": "turns distances into a bias on the scores",
    "inputs_embed": "turns token ids into the layers' own inputs",
    "inputs_projection": "the layers' own inputs: from what the first layer reads",
    "input_gate": "the layer's own input: gate",
    "input_projection": "the layer's own input: output",
    "scalar": "multiplies what leaves the layer",
    "project_in": "widens the embedding's vectors",
    "project_out": "narrows vectors for the head",
    "head": "turns vectors into logits",
}


def inspect_model(path: str, spec: LoraConfig) -> dict[str, Any]:
    """Return the facts that `tpu-tune inspect` prints.

    Returns:
      `family`, `hidden_size`, `num_layers` (of an encoder-decoder the decoder's, beside `num_encoder_layers`),
      `num_heads`, `num_kv_heads`, `vocab_size`, `parameters`, `modules` (a list of `name`, `shape` (in, out), `layers`,
      `experts`, `kind`, `role`, `tied_to`, `bias`), `left_aside` (part -> `tensors` and `parameters` of what lies
      beside the text model), and `lora`: `targets`, `experts` (a line on those with and without, or ""),
      `trainable`, `all`.
    """
    source = open_source(path)
    arch = open_architecture(source)
    targets = find_targets(arch.modules(), spec, arch.default_targets)
    total = arch.num_parameters
    saved = sum(math.prod(shape) for module in targets.saved for shape in module.leaf_shapes().values())
    biases = sum(math.prod(arch.leaf_shapes()[path]) for path in targets.biases)
    magnitudes = sum(len(t.ranks) * t.module.shape[-1] for t in targets.adapted) if spec.use_dora else 0
    rows = sum(len(tokens.ids) * arch.hidden_size for tokens in targets.tokens)
    added = sum(target.num_parameters for target in targets.adapted) + magnitudes + rows
    encoder = {"num_encoder_layers": arch.encoder.num_layers} if arch.encoder else {}
    return {
        "family": arch.family,
        "hidden_size": arch.hidden_size,
        "num_layers": arch.num_layers,
        **encoder,
        "num_heads": arch.num_heads,
        "num_kv_heads": arch.num_kv_heads,
        "vocab_size": arch.vocab_size,
        "parameters": total,
        "modules": [_describe(arch, module) for module in arch.modules()],
        "left_aside": parts_left_aside(source, arch),
        "lora": {
            "targets": [
                {"name": t.module.path, "layers": len(t.layers) or 1, "rank": t.rank, "trainable": t.num_parameters}
                for t in targets.adapted
            ],
            "experts": experts_words(arch.modules(), targets),
            "trainable": added + saved + biases,
            # PEFT counts a saved module twice: the frozen original stays beside the trained copy.
            "all": total + added + saved,
        },
    }


def _describe(arch: Architecture, module: Module) -> dict[str, Any]:
    path = module.path.replace(f"{module.layers_path}[{module.layers[0]}]", module.layers_path) if module.layers else ""
    return {
        "name": module.name("N", "E"),
        "shape": list(module.shape),
        "layers": len(module.layers),
        "experts": module.experts,
        "kind": module.kind,
        "role": _roles(arch).get(path or module.path, "norm" if module.kind == "norm" else ""),
        "tied_to": module.tied_to,
        "bias": module.bias,
    }


def _roles(arch: Architecture) -> dict[str, str]:
    """Return module path -> what it does, of the decoder and of its encoder, if there is one."""
    roles = _roles(arch.encoder) if arch.encoder else {}
    for names in (arch.names, *(kind.names for kind in arch.kinds)):
        prefix = "" if names is arch.names else f"{arch.names.layers}."
        roles |= {prefix + getattr(names, role): meaning for role, meaning in ROLES.items() if hasattr(names, role)}
    return roles
