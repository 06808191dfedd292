"""LoRA as a transform of the parameter tree: `find_targets`, `init`; `LoraConfig`, the config's `lora` section, says which.

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

from tpu_tune.config import LoraConfig, TokenIndices
from tpu_tune.errors import UserError
from tpu_tune.tensors import Module, dense
from tpu_tune.transforms.select import by_pattern, choose, targeted


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
class TokenRows:
    """Tokens of one module whose rows are trained (`trainable_token_indices`): an embedding, or a head.

    The leaf `PATH.trainable_tokens_delta` (tokens, dim) holds the rows themselves, as PEFT's tensor of that name does.
    A tied head without an entry of its own uses its embedding's.
    """

    module: Module
    ids: tuple[int, ...]

    @property
    def path(self) -> str:
        """Path of the trained leaf."""
        return f"{self.module.path}.trainable_tokens_delta"


@dataclasses.dataclass(frozen=True)
class Targets:
    """All that a LoRA method trains, resolved against one model's modules.

    Attributes:
      adapted: modules with an adapter.
      saved: modules trained in full beside it (`modules_to_save`).
      biases: paths of the bias leaves that are trained.
      spec: what they were resolved from.
      tokens: rows of embedding and head that are trained.
    """

    adapted: tuple[Target, ...]
    saved: tuple[Module, ...]
    biases: tuple[str, ...]
    spec: LoraConfig
    tokens: tuple[TokenRows, ...] = ()


def find_targets(modules: Sequence[Module], spec: LoraConfig, default_targets: Sequence[str] = ()) -> Targets:
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
    tokens = token_rows(modules, spec.trainable_token_indices)
    for rows in tokens:
        for module in modules:
            reached = module.path in (rows.module.path, *_tied(modules, rows.module))
            if reached and (module in saved or module.path in chosen):
                which = "modules_to_save" if module in saved else "target_modules"
                raise UserError(
                    f"lora.trainable_token_indices (model.train_added_tokens sets it) trains tokens of '{module.path}', which lora.{which} takes too; "
                    "PEFT can do only one of them: exclude it from one"
                )
    return Targets(adapted, tuple(saved), biases, spec, tokens)


def token_rows(modules: Sequence[Module], indices: TokenIndices) -> tuple[TokenRows, ...]:
    """Resolve `trainable_token_indices` as PEFT does: a list is the input embedding's, and a tied head follows it.

    Args:
      modules: the model's modules.
      indices: token ids, or module name (or the end of one) -> token ids.

    Raises:
      UserError: a name that is neither embedding nor head, or an id that is twice or not in the vocabulary.
    """
    key = "lora.trainable_token_indices"
    able = [module for module in modules if module.kind == "embedding" or module.is_head]
    named = indices if isinstance(indices, Mapping) else {able[0].path: indices}
    found: dict[str, TokenRows] = {}
    for name, ids in named.items():
        matched = [module for module in able if module.path.endswith(name)]
        if not matched:
            choices = ", ".join(module.path.rsplit(".")[-1] for module in able)
            raise UserError(f"{key}: '{name}' is neither embedding nor head; choose among {choices}")
        for module in matched if ids else []:
            found[module.path] = TokenRows(module, tuple(ids))
    for rows in found.values():
        module, size = rows.module, rows.module.shape[1 if rows.module.is_head else 0]
        wrong = next((number for number in rows.ids if not 0 <= number < size or rows.ids.count(number) > 1), None)
        if wrong is not None:
            what = "stands there twice" if 0 <= wrong < size else f"is not one of the {size} tokens of '{module.path}'"
            raise UserError(f"{key}: {wrong} {what}")
        if module.no_adapter:
            raise UserError(f"{key}: '{module.path}' cannot carry trained tokens: {module.no_adapter}")
        heads = [head for head in able if head.is_head and head.path in (module.path, *_tied(able, module))]
        if any(head.bias for head in heads):
            raise UserError(
                f"{key}: PEFT's trained tokens leave out the bias of the head '{heads[0].path}'; train it in full "
                "with lora.modules_to_save"
            )
    # A tied head with the same tokens follows its embedding; with others it has rows of its own.
    return tuple(
        rows
        for rows in found.values()
        if not (rows.module.tied_to in found and found[rows.module.tied_to].ids == rows.ids)
    )


def _tied(modules: Sequence[Module], embedding: Module) -> list[str]:
    return [module.path for module in modules if module.tied_to == embedding.path]


def _target(module: Module, layers: tuple[int | None, ...], spec: LoraConfig) -> Target:
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
