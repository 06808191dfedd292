"""LoRA as a transform of the parameter tree: `find_targets`, `init`, and the spec that both read.

An adapter is a few entries of a flat tree: `PATH.lora_A` (layers, in, rank), `PATH.lora_B` (layers, rank, out) and,
under DoRA, `PATH.lora_magnitude_vector` (layers, out). Only the selected layers are stored; where ranks differ between
layers, the shorter ones are padded with zeros, which stay zero in training because each side's gradient is a product
with the other. Sources: LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA arXiv:2402.09353, peft 0.21.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from tpu_tune.errors import UserError
from tpu_tune.tensors import Module, dense
from tpu_tune.transforms.select import Pattern, by_pattern, choose, targeted


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """What PEFT calls LoraConfig; the fields are the config's `lora.*` keys (see `tpu_tune.config`)."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: Pattern = "all-linear"
    exclude_modules: Pattern = ()
    bias: str = "none"
    modules_to_save: Sequence[str] = ()
    layers_to_transform: Sequence[int] = ()
    layers_pattern: str = ""
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str = "true"

    @classmethod
    def from_config(cls, config: ConfigDict) -> LoraSpec:
        """Build the spec from `config.lora`."""
        return cls(**{key: list(value) if isinstance(value, (list, tuple)) else value for key, value in config.items()})


@dataclasses.dataclass(frozen=True)
class Target:
    """One module that carries an adapter.

    Attributes:
      module: the module, all layers of it.
      layers: the layers that carry one, ascending; empty for a module that is there once.
      ranks, alphas, scales: one a stored layer (one in all for a module that is there once).
    """

    module: Module
    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    scales: tuple[float, ...]

    @property
    def rank(self) -> int:
        """Rank of the stored arrays: the largest of the layers'."""
        return max(self.ranks)

    @property
    def num_parameters(self) -> int:
        """Parameters of A and B, padding not counted."""
        return sum(rank * sum(self.module.shape) for rank in self.ranks)


@dataclasses.dataclass(frozen=True)
class Targets:
    """All that a LoRA method trains, resolved against one model's modules.

    Attributes:
      adapted: modules with an adapter.
      saved: modules trained in full beside it (`modules_to_save`).
      biases: paths of the bias leaves that are trained.
      spec: what they were resolved from.
    """

    adapted: tuple[Target, ...]
    saved: tuple[Module, ...]
    biases: tuple[str, ...]
    spec: LoraSpec


def find_targets(modules: Sequence[Module], spec: LoraSpec, default_targets: Sequence[str] = ()) -> Targets:
    """Resolve a spec against a model's modules by PEFT's rules.

    Args:
      modules: the model's modules.
      spec: the LoRA settings.
      default_targets: what an empty `target_modules` means: PEFT's table for the family.

    Raises:
      UserError: a name that matches nothing (the choices are listed), or a norm as a target.
    """
    pattern = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    chosen = targeted(
        modules,
        pattern or list(default_targets),
        exclude=spec.exclude_modules,
        also_exclude=list(spec.modules_to_save),
        layers=spec.layers_to_transform,
        layers_pattern=spec.layers_pattern,
    )
    by_path = {module.path: module for module in modules}
    adapted = tuple(_target(by_path[path], layers, spec) for path, layers in chosen.items())
    saved = []
    for name in spec.modules_to_save:
        found = choose(modules, lambda module, full, name=name: full.endswith(name))  # peft: no dot needed before it
        if not found:
            names = ", ".join(dict.fromkeys(module.path.rsplit(".")[-1] for module in modules))
            raise UserError(f"lora.modules_to_save: '{name}' matches no module; choose among {names}")
        for path, layers in found.items():
            if len(layers) < by_path[path].layers:
                raise UserError(f"lora.modules_to_save: '{name}' takes only some layers of '{path}'; name all of them")
            if by_path[path].tied_to:
                raise UserError(
                    f"lora.modules_to_save: '{name}' has no weight of its own in this model, it is tied to "
                    f"'{by_path[path].tied_to}'; target it with LoRA, or save that one"
                )
            if by_path[path].no_adapter:
                raise UserError(f"lora.modules_to_save: '{path}' cannot carry an adapter: {by_path[path].no_adapter}")
            if path in chosen:
                raise UserError(
                    f"lora.modules_to_save: '{name}' takes '{path}', which has an adapter too; exclude it from one"
                )
            if by_path[path] not in saved:
                saved.append(by_path[path])
    with_bias = [module for module in modules if module.bias and module not in saved]
    if spec.bias == "lora_only":
        with_bias = [module for module in with_bias if module.path in chosen and module.kind != "norm"]
        for module in with_bias:
            if len(chosen[module.path]) < module.layers:
                raise UserError(
                    "lora.bias=lora_only together with a selection of layers is not implemented; use none or all"
                )
    biases = tuple(f"{module.path}.bias" for module in with_bias) if spec.bias != "none" else ()
    return Targets(adapted, tuple(saved), biases, spec)


def _target(module: Module, layers: tuple[int | None, ...], spec: LoraSpec) -> Target:
    if module.kind == "norm":
        raise UserError(
            f"lora.target_modules matches the norm '{module.path}', which has no matrix to adapt; "
            "put it in lora.modules_to_save to train it in full"
        )
    if module.no_adapter:
        raise UserError(f"lora.target_modules: '{module.path}' cannot carry an adapter: {module.no_adapter}")
    names = [module.name(layer) for layer in layers]
    ranks = tuple(int(by_pattern(spec.rank_pattern, name, spec.rank)) for name in names)
    alphas = tuple(float(by_pattern(spec.alpha_pattern, name, spec.alpha)) for name in names)
    scales = tuple(
        alpha / (math.sqrt(rank) if spec.use_rslora else rank) for alpha, rank in zip(alphas, ranks, strict=True)
    )
    stored = tuple(layer for layer in layers if layer is not None)
    return Target(module, stored, ranks, alphas, scales)


def init(targets: Targets, params: Mapping[str, Any], key: Array) -> dict[str, Array]:
    """Return fresh adapters as PEFT makes them: an adapter that changes nothing yet.

    A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0; `gaussian`: A ~ N(0, 1/rank^2); for an embedding A = 0 and B ~ N(0, 1).
    The values depend on (key, module path, layer) alone, not on what else is targeted.

    Args:
      targets: what carries an adapter.
      params: the base tree; read only for DoRA's magnitudes.
      key: PRNG key.
    """
    adapters: dict[str, Array] = {}
    for target in targets.adapted:
        module = target.module
        inner, outer = module.shape
        pairs = []
        for place, rank in enumerate(target.ranks):
            layer_key = jax.random.fold_in(path_key(key, module.path), target.layers[place] if target.layers else 0)
            a, b = _initial_pair(layer_key, module, rank, targets.spec.init_lora_weights)
            pairs.append((jnp.pad(a, [(0, 0), (0, target.rank - rank)]), jnp.pad(b, [(0, target.rank - rank), (0, 0)])))
        a, b = (jnp.stack(parts) if target.layers else parts[0] for parts in zip(*pairs, strict=True))
        assert a.shape[-2:] == (inner, target.rank) and b.shape[-2:] == (target.rank, outer)
        adapters[f"{module.path}.lora_A"] = a
        adapters[f"{module.path}.lora_B"] = b
        if targets.spec.use_dora:
            adapters[f"{module.path}.lora_magnitude_vector"] = _column_norms(target, params)
    return adapters


def path_key(key: Array, path: str) -> Array:
    """Return a key of its own for a path, the same on every machine and Python run."""
    import zlib

    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _initial_pair(key: Array, module: Module, rank: int, how: str) -> tuple[Array, Array]:
    inner, outer = module.shape
    if module.kind == "embedding":
        return jnp.zeros((inner, rank)), jax.random.normal(key, (rank, outer))
    if how == "gaussian":
        return jax.random.normal(key, (inner, rank)) / rank, jnp.zeros((rank, outer))
    bound = 1 / math.sqrt(inner)
    return jax.random.uniform(key, (inner, rank), minval=-bound, maxval=bound), jnp.zeros((rank, outer))


def _column_norms(target: Target, params: Mapping[str, Any]) -> Array:
    module = target.module
    if module.tied_to:
        return jnp.linalg.norm(dense(params[f"{module.tied_to}.weight"]), axis=-1)
    leaf = params[module.weight]
    if not module.layers:
        return jnp.linalg.norm(dense(leaf), axis=-2)
    one = jax.jit(lambda stacked, layer: jnp.linalg.norm(dense(jax.tree.map(lambda x: x[layer], stacked)), axis=-2))
    return jnp.stack([one(leaf, layer) for layer in target.layers])
