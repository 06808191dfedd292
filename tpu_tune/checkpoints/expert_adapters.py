"""Adapters on experts in PEFT's files, which have two forms of them.

transformers 5 keeps all experts of a layer in two parameters, `experts.gate_up_proj` and `experts.down_proj`, and PEFT
adapts these (`target_parameters`): all experts' A below one another, expert by expert, all B beside one another, rank
by rank, and gate and up as one matrix of twice the rank (peft 0.21, `tuners/lora/layer.py`, `ParamWrapper`, and
`utils/transformers_weight_conversion.py`). For some families PEFT also reads an A and a B of every expert under its
name of before, `experts.3.gate_proj`, and makes the first form of them; servers read only these. They are written where
PEFT reads them right, and both are read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tpu_tune.errors import UserError
from tpu_tune.models import Architecture, LayerNames
from tpu_tune.transforms import LoraConfig, Target, Targets
from tpu_tune.transforms.select import by_pattern

# Families whose single experts' tensors PEFT understands.
_BY_EXPERT = ("mixtral", "qwen3_moe", "olmoe", "glm4_moe", "qwen3_next")
# Path of the experts inside a layer, as transformers 5 calls it in memory.
_CONTAINER = {
    "granitemoe": "block_sparse_moe.experts",
    "granitemoeshared": "block_sparse_moe.experts",
    "gemma4_text": "experts",
}
_EXPERTS = "mlp.experts"
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_FUSED = re.compile(r"(.*\.experts)((?:\.base_layer)?)\.lora_([AB])\.weight")


def stacked(targets: Targets, architecture: Architecture) -> tuple[Target, ...]:
    """Return the adapted experts that have to be written in the first form; () where the second one serves."""
    experts = tuple(target for target in targets.adapted if target.module.experts)
    if not experts or architecture.family not in _BY_EXPERT:
        return experts
    spec = targets.spec
    plain = all({*one.ranks} == {spec.rank} and {*one.alphas} == {spec.alpha} for one in experts)
    whole = all(one.layers == one.module.layers for one in experts)
    roles = {_role(one, architecture) for one in experts}
    both = roles.isdisjoint(("expert_gate", "expert_up")) or {"expert_gate", "expert_up"} <= roles
    return () if plain and whole and both else experts


def unread_by_peft(targets: Targets, architecture: Architecture) -> list[str]:
    """Return the adapted modules beside the experts that PEFT leaves out, whichever form the experts have.

    In the families whose single experts it understands it takes every target of an expert's name for one of them, in
    Qwen3-Next without experts too.
    """
    if architecture.family not in _BY_EXPERT:
        return []
    names = {target.module.path.rpartition(".")[2] for target in targets.adapted if target.module.experts}
    if architecture.family == "qwen3_next":
        names |= {"gate_proj", "up_proj", "down_proj"}
    others = [target.module.path for target in targets.adapted if not target.module.experts]
    return [path for path in others if path.rpartition(".")[2] in names]


def stacked_form(
    experts: tuple[Target, ...], trainable: Mapping[str, Any], targets: Targets, architecture: Architecture, prefix: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return PEFT's tensors of adapted experts in the first form, and what they add to its config.

    Args:
      experts: from `stacked`.
      trainable: the trained tree.
      targets: all that is adapted, for the settings.
      architecture: the base model's facts.
      prefix: what stands before the model's names.
    """
    tensors: dict[str, np.ndarray] = {}
    settings: dict[str, dict[str, tuple[int, float]]] = {}  # parameter -> its path in full -> rank and alpha
    layers = sorted({layer for target in experts for layer in target.layers})
    for layer in layers:
        path = _container(architecture, layer)
        parts = {
            _GATE_UP: _gate_up(experts, trainable, architecture, layer),
            _DOWN: _of_layer(experts, trainable, architecture, layer, "expert_down"),
        }
        present = {name: part for name, part in parts.items() if part is not None}
        for name, (a, b, scale) in present.items():
            rank = a.shape[1]  # PEFT's scale is alpha over the rank, or over its root
            alpha = float(scale) * (rank**0.5 if targets.spec.use_rslora else rank)
            settings.setdefault(name, {})[f"{path}.{name}"] = rank, alpha
            inner = ".base_layer" if name == _GATE_UP and len(present) == 2 else ""
            tensors[f"{prefix}{path}{inner}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, a.shape[-1]))
            tensors[f"{prefix}{path}{inner}.lora_B.weight"] = np.ascontiguousarray(
                np.moveaxis(b, 0, 2).reshape(b.shape[1], -1)
            )
    sparse = sum(kind.experts is not None for kind in architecture.layer_kinds)
    named: dict[str, tuple[int, float]] = {}
    for name, by_path in settings.items():
        if len(by_path) == sparse and len({*by_path.values()}) == 1:
            tail = _CONTAINER.get(architecture.family, _EXPERTS)
            by_path = {f"{tail}.{name}": next(iter(by_path.values()))}
        named |= by_path
    return tensors, {
        "target_parameters": sorted(named),
        "rank_pattern": {re.escape(path): rank for path, (rank, _) in named.items()},
        "alpha_pattern": {re.escape(path): alpha for path, (_, alpha) in named.items()},
    }


def _gate_up(
    experts: tuple[Target, ...], trainable: Mapping[str, Any], architecture: Architecture, layer: int
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Return (experts, rank, in), (experts, 2 x width, rank) and the scale of a layer's gate and up as one matrix."""
    one = _of_layer(experts, trainable, architecture, layer, "expert_gate_up")
    if one is not None:
        return one
    gate, up = (_of_layer(experts, trainable, architecture, layer, role) for role in ("expert_gate", "expert_up"))
    if gate is None and up is None:
        return None
    gate, up = (_nothing_like(other) if part is None else part for part, other in ((gate, up), (up, gate)))
    (gate_a, gate_b, scale), (up_a, up_b, up_scale) = gate, up
    up_b = up_b * np.float32(up_scale / scale)
    gate_b = np.pad(gate_b, [(0, 0), (0, 0), (0, up_a.shape[1])])
    up_b = np.pad(up_b, [(0, 0), (0, 0), (gate_a.shape[1], 0)])
    return np.concatenate([gate_a, up_a], 1), np.concatenate([gate_b, up_b], 1), scale


def _nothing_like(part: tuple[np.ndarray, np.ndarray, float]) -> tuple[np.ndarray, np.ndarray, float]:
    a, b, scale = part
    return a[:, :0], b[:, :, :0], scale


def _of_layer(
    experts: tuple[Target, ...], trainable: Mapping[str, Any], architecture: Architecture, layer: int, role: str
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Return (experts, rank, in), (experts, out, rank) in the file's order and the scale of a layer's; None without."""
    for target in experts:
        if layer in target.layers and _role(target, architecture) == role:
            index = target.layers.index(layer)
            rank = target.ranks[index]
            a, b = (np.asarray(trainable[path][index]) for path in (target.a_path, target.b_path))
            b = target.module.deinterleave(b[:, :rank])
            return np.swapaxes(a[..., :rank], 1, 2), np.swapaxes(b, 1, 2), target.scales[index]
    return None


def as_here(
    file: str,
    config: Mapping[str, Any],
    spec: LoraConfig,
    tensors: Mapping[str, np.ndarray],
    architecture: Architecture,
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Return an adapter's settings and tensors with those of `target_parameters` under single experts' names.

    Args:
      file: for messages.
      config: content of adapter_config.json.
      spec: the settings as they were read, without `target_parameters`.
      tensors: the adapter's.
      architecture: the base model's facts.

    Raises:
      UserError: a parameter that is neither an expert's nor a router's, or layers that are chosen otherwise.
    """
    parameters = [entry.removesuffix(".weight") for entry in config.get("target_parameters") or ()]
    if not parameters:
        return spec, dict(tensors)
    if spec.layers_to_transform:
        raise UserError(f"{file}: layers_to_transform beside target_parameters is not implemented here")
    targets, ranks, alphas = [], {}, {}
    for layer, kind in enumerate(architecture.layer_kinds):
        for name, roles in _parameters(kind.names).items() if kind.experts else ():
            inside = f"{_container(architecture, layer)}.{name}"
            path = inside if name else f"{architecture.names.layers}.{layer}.{kind.names.router}"
            if _is_named(path, parameters):
                regex = _regex(architecture, layer, kind.names, roles)
                targets.append(regex)
                ranks[regex] = by_pattern(spec.rank_pattern, path, spec.rank)
                alphas[regex] = by_pattern(spec.alpha_pattern, path, spec.alpha)
    if not targets:
        raise UserError(f"{file}: target_parameters {', '.join(parameters)} names no experts of this model")
    own = spec.target_modules
    if not isinstance(own, str):
        own = "|".join(rf"(.*\.)?{re.escape(name)}" for name in own)
    pattern = "|".join(f"({part})" for part in (own, *targets) if part)
    changed = dataclasses.replace(
        spec, target_modules=pattern, rank_pattern=ranks | spec.rank_pattern, alpha_pattern=alphas | spec.alpha_pattern
    )
    return changed, _by_expert(tensors, parameters, architecture)


def _by_expert(
    tensors: Mapping[str, np.ndarray], parameters: list[str], architecture: Architecture
) -> dict[str, np.ndarray]:
    """Return the tensors, those in the first form cut into one for each expert and matrix."""
    found: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        matched = _FUSED.fullmatch(name)
        if not matched:
            found[name] = value
            continue
        container, wrapped, letter = matched.groups()
        prefix, layer, tail = _split(container, architecture)
        kind = architecture.layer_kinds[layer]
        is_down = not wrapped and _is_named(f"{architecture.names.layers}.{layer}{tail}.{_DOWN}", parameters)
        roles = ["expert_down"] if is_down else _parameters(kind.names)[_GATE_UP]
        count = kind.experts.count
        each = value.reshape(count, -1, value.shape[1]) if letter == "A" else _rank_major(value, count)
        for number, role in enumerate(roles):
            part = each if letter == "A" or len(roles) == 1 else np.split(each, len(roles), axis=1)[number]
            module = f"{architecture.names.layers}.{layer}.{getattr(kind.names, role)}"
            if not kind.experts.path:
                found[f"{prefix}{module}.lora_{letter}.weight"] = part
                continue
            inside = module.rpartition(".")[2]
            for expert in range(count):
                path = f"{architecture.names.layers}.{layer}.{kind.experts.path}.{expert}.{inside}"
                found[f"{prefix}{path}.lora_{letter}.weight"] = part[expert]
    return found


def _rank_major(value: np.ndarray, count: int) -> np.ndarray:
    """Return B of all experts, (out, rank x experts), as (experts, out, rank)."""
    return np.moveaxis(value.reshape(value.shape[0], -1, count), 2, 0)


def _parameters(names: LayerNames) -> dict[str, list[str]]:
    """Return transformers' parameters of a sparse layer -> our roles; "" is the router."""
    gate_up = ["expert_gate_up"] if names.expert_gate_up else ["expert_gate", "expert_up"]
    return {_GATE_UP: gate_up, _DOWN: ["expert_down"], "": ["router"]}


def _is_named(path: str, parameters: list[str]) -> bool:
    return any(path == entry or path.endswith(f".{entry}") for entry in parameters)


def _regex(architecture: Architecture, layer: int, names: LayerNames, roles: list[str]) -> str:
    """Return what matches the modules of these roles in a layer, of all its experts."""
    path = architecture.layer_kinds[layer].experts.path
    parts = []
    for role in roles:
        inside = getattr(names, role)
        if path and role != "router":
            inside = rf"{path}.\d+.{inside.rpartition('.')[2]}"
        parts.append(inside.replace(".", r"\."))
    return rf"{re.escape(architecture.names.layers)}\.{layer}\.({'|'.join(parts)})"


def _container(architecture: Architecture, layer: int) -> str:
    return f"{architecture.names.layers}.{layer}.{_CONTAINER.get(architecture.family, _EXPERTS)}"


def _split(container: str, architecture: Architecture) -> tuple[str, int, str]:
    """Return what stands before the model's names, the layer, and what stands behind it, of a name of experts."""
    prefix, _, rest = container.partition(f"{architecture.names.layers}.")
    layer, _, tail = rest.partition(".")
    return prefix, int(layer), f".{tail}"


def _role(target: Target, architecture: Architecture) -> str:
    """Return which role in `LayerNames` a target's module has."""
    module = target.module
    inside = module.path[len(module.layers_path) :].partition(".")[2]
    names = architecture.layer_kinds[module.layers[0]].names
    return next(
        role for role in ("expert_gate", "expert_up", "expert_gate_up", "expert_down") if getattr(names, role) == inside
    )
