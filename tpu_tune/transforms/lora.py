"""LoRA as a transform of the parameter tree: fresh adapters, what is trained and what frozen, the tree the model sees.

An adapter is a few entries of a flat tree: `PATH.lora_A` (layers, in, rank), `PATH.lora_B` (layers, rank, out) and,
under DoRA, `PATH.lora_magnitude_vector` (layers, out). Only the selected layers are stored; where ranks differ between
layers, the shorter ones are padded with zeros, which stay zero in training because each side's gradient is a product
with the other. Sources: LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA arXiv:2402.09353, peft 0.21.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tpu_tune.config import LoraConfig
from tpu_tune.tensors import (
    LeafSpec,
    LoraTensor,
    Module,
    SavedTensor,
    TokensTensor,
    Transposed,
    dense,
    embed,
)
from tpu_tune.tensors.product import ARRAYS
from tpu_tune.transforms.methods import Tree


@dataclasses.dataclass(frozen=True)
class Target:
    """One module that carries an adapter.

    Attributes:
      module: the module, all layers of it.
      layers: the layers that carry one, ascending; empty for a module that is there once.
      ranks, alphas, scales: LoRA's settings for each stored layer (one in all for a module that is there once).
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
        return self._count(self.ranks)

    @property
    def padding(self) -> int:
        """Zeros in the stored A and B where ranks differ between layers."""
        return self._count(self.rank - rank for rank in self.ranks)

    def _count(self, ranks: Iterable[int]) -> int:
        return sum(ranks) * sum(self.module.shape) * max(self.module.experts, 1)

    @property
    def names(self) -> list[str]:
        """Hugging Face names of the adapted layers, each of their experts by itself."""
        return [name for layer in self.layers or (None,) for name in self.module.names_of(layer)]

    @property
    def places(self) -> list[tuple[str, tuple[int, ...], int]]:
        """Of each matrix that Hugging Face has: its name, its index in A and B, its rank."""
        if not self.layers:
            return [(self.module.path, (), self.ranks[0])]
        return [
            (name, (index, expert) if self.module.experts_path else (index,), rank)
            for index, (layer, rank) in enumerate(zip(self.layers, self.ranks, strict=True))
            for expert, name in enumerate(self.module.names_of(layer))
        ]

    @property
    def a_path(self) -> str:
        """Path of the leaf A, (layers, in, rank)."""
        return f"{self.module.path}.lora_A"

    @property
    def b_path(self) -> str:
        """Path of the leaf B, (layers, rank, out)."""
        return f"{self.module.path}.lora_B"

    @property
    def magnitude_path(self) -> str:
        """Path of DoRA's leaf, (layers, out)."""
        return f"{self.module.path}.lora_magnitude_vector"

    def leaves(self, use_dora: bool) -> dict[str, LeafSpec]:
        """Return path -> facts of its leaves; the axes are those of the weight, the rank is never cut."""
        module, (inner, outer) = self.module, self.module.axes
        of_embedding = module.kind == "embedding"
        facts = LeafSpec((inner, None), bool(self.layers), decay=module.decay, experts=bool(module.experts))
        a = dataclasses.replace(facts, lora_plus="embedding" if of_embedding else "")
        b = dataclasses.replace(
            facts, axes=(None, outer), unit=module.unit, lora_plus="embedding" if of_embedding else "ratio"
        )
        magnitude = {self.magnitude_path: dataclasses.replace(facts, axes=(None,))} if use_dora else {}
        return {self.a_path: a, self.b_path: b, **magnitude}


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
    """All that a LoRA method trains, resolved against one model's modules: a `methods.Method`.

    Attributes:
      adapted: modules with an adapter.
      saved: modules trained in full beside the adapters (`modules_to_save`).
      biases: paths of the bias leaves that are trained.
      spec: the settings they were resolved from.
      tokens: rows of embedding and head that are trained.
    """

    adapted: tuple[Target, ...]
    saved: tuple[Module, ...]
    biases: tuple[str, ...]
    spec: LoraConfig
    tokens: tuple[TokenRows, ...] = ()

    @property
    def is_random(self) -> bool:
        """Whether a training step draws random numbers: dropout."""
        return self.spec.dropout > 0

    def num_parameters(self, trainable: Mapping[str, Any]) -> int:
        """Trained parameters; the zero padding of uneven ranks is not counted."""
        return sum(leaf.size for leaf in trainable.values()) - sum(target.padding for target in self.adapted)

    def leaves(self, base: Mapping[str, LeafSpec]) -> dict[str, LeafSpec]:
        """Return path -> facts of every leaf of the trainable tree, given the facts of the base's leaves."""
        specs: dict[str, LeafSpec] = {}
        for target in self.adapted:
            specs |= target.leaves(self.spec.use_dora)
        specs |= {rows.path: LeafSpec((None, None)) for rows in self.tokens}
        specs |= {path: spec for module in self.saved for path, spec in module.leaves().items()}
        return specs | {path: base[path] for path in self.biases}

    def init(self, params: Mapping[str, Any], key: Array) -> Tree:
        """Return fresh adapters: see `init`."""
        return init(self, params, key)

    def split(self, params: Mapping[str, Any], adapters: Mapping[str, Array]) -> tuple[Tree, Tree]:
        """Return (trainable, frozen): adapters, saved modules and biases, in float32, and the frozen base."""
        frozen = dict(params)
        trainable = dict(adapters)
        for module in self.saved:
            for path in module.leaves():
                if path not in trainable:
                    trainable[path] = dense(frozen[path])
                if module.kind != "embedding":  # a tied head goes on using the frozen embedding
                    del frozen[path]
        for rows in self.tokens:
            if rows.path not in trainable:
                trainable[rows.path] = _original_rows(rows, frozen)
        for path in self.biases:
            trainable.setdefault(path, jnp.asarray(frozen.pop(path), jnp.float32))
        return trainable, frozen

    def combine(
        self, trainable: Mapping[str, Any], frozen: Mapping[str, Any], dropout_key: Array | None = None
    ) -> Tree:
        """Wrap frozen leaves and what is trained in leaves that compute both; nothing is copied."""
        params = dict(frozen)
        for module in self.saved:
            for path in module.leaves():
                base = frozen.get(path)
                params[path] = trainable[path] if base is None else SavedTensor(base, trainable[path])
        params |= {path: trainable[path] for path in self.biases}
        for rows in self.tokens:
            module, ids = rows.module, jnp.asarray(rows.ids, jnp.int32)
            base = Transposed(frozen[f"{module.tied_to}.weight"]) if module.tied_to else params[module.weight]
            params[module.weight] = TokensTensor(base, ids, trainable[rows.path], int(module.is_head))
        for target in self.adapted:
            module = target.module
            base = Transposed(frozen[f"{module.tied_to}.weight"]) if module.tied_to else params[module.weight]
            params[module.weight] = self._lora_tensor(target, base, trainable, dropout_key)
        return params

    def _lora_tensor(
        self, target: Target, base: Any, trainable: Mapping[str, Any], dropout_key: Array | None
    ) -> LoraTensor:
        module, dropout = target.module, self.spec.dropout
        a, b, magnitude = trainable[target.a_path], trainable[target.b_path], trainable.get(target.magnitude_path)
        scales = np.asarray(target.scales, np.float32)
        key = None
        if dropout_key is not None and dropout > 0 and module.kind == "linear":
            key = path_key(dropout_key, module.path)
            if module.layers:
                key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(module.layers))
        active = None
        if module.experts:
            scales = np.repeat(scales[:, None], module.experts, axis=1)
        if not module.layers:
            scale = jnp.asarray(scales[0])
        elif target.layers == module.layers:
            scale = jnp.asarray(scales)
        else:
            count = len(module.layers)
            chosen = np.searchsorted(module.layers, target.layers)
            scale = jnp.zeros((count, *scales.shape[1:]), jnp.float32).at[chosen].set(scales)
            a, b = (jnp.zeros((count, *part.shape[1:]), part.dtype).at[chosen].set(part) for part in (a, b))
            if magnitude is not None:
                # Unused where a layer has no adapter: `active` is False there.
                magnitude = jnp.ones((count, *magnitude.shape[1:]), magnitude.dtype).at[chosen].set(magnitude)
                active = jnp.zeros(count, bool).at[chosen].set(True)
        return LoraTensor(base, a, b, scale, key, magnitude, active, dropout if key is not None else 0.0)


def init(targets: Targets, params: Mapping[str, Any], key: Array) -> dict[str, Array]:
    """Return fresh adapters as PEFT makes them: an adapter that changes nothing yet.

    A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0; `gaussian`: A ~ N(0, 1/rank^2); for an embedding A = 0 and B ~ N(0, 1).
    The values depend on (key, module path, layer) alone, not on what else is targeted.

    Args:
      targets: the modules that get an adapter, and the settings.
      params: the base tree; read only for DoRA's magnitudes.
      key: PRNG key.
    """
    adapters: dict[str, Array] = {}
    for target in targets.adapted:
        module = target.module
        pairs = []
        for layer, rank in zip(target.layers or (0,), target.ranks, strict=True):
            layer_key = jax.random.fold_in(path_key(key, module.path), layer)
            a, b = _initial_pair(layer_key, module, rank, targets.spec.init_lora_weights)
            lead = [(0, 0)] * (a.ndim - 2)
            short = (0, target.rank - rank)
            pairs.append((jnp.pad(a, [*lead, (0, 0), short]), jnp.pad(b, [*lead, short, (0, 0)])))
        a, b = (jnp.stack(parts) if target.layers else parts[0] for parts in zip(*pairs, strict=True))
        adapters |= {target.a_path: a, target.b_path: b}
        if targets.spec.use_dora:
            adapters[target.magnitude_path] = _column_norms(target, params)
    return adapters


def path_key(key: Array, path: str) -> Array:
    """Return a key of its own for a path, the same on every machine and Python run."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _initial_pair(key: Array, module: Module, rank: int, how: str) -> tuple[Array, Array]:
    """Return A and B of one layer; of experts, one pair each on a leading axis."""
    inner, outer = module.shape
    if module.experts:
        one = dataclasses.replace(module, experts=0)
        return jax.vmap(lambda key: _initial_pair(key, one, rank, how))(jax.random.split(key, module.experts))
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
    norms = jax.jit(lambda stacked, layer: jnp.linalg.norm(dense(jax.tree.map(lambda x: x[layer], stacked)), axis=-2))
    return jnp.stack([norms(leaf, module.layers.index(layer)) for layer in target.layers])


def _original_rows(rows: TokenRows, frozen: Mapping[str, Any]) -> Array:
    module, ids = rows.module, np.asarray(rows.ids)
    if module.kind == "embedding" or module.tied_to:
        return embed(ids, frozen[f"{module.tied_to or module.path}.weight"], jnp.float32)
    leaf = frozen[module.weight]
    return (jnp.asarray(leaf) if isinstance(leaf, ARRAYS) else dense(leaf))[:, ids].T.astype(jnp.float32)
