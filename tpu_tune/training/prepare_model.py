"""From a configuration to the model on its devices: opened, loaded, quantized, adapted, split and sharded.

`load_params` reads one tensor after the other straight to where it will live. `abstract_model` gives the same tree as
shapes only, for a plan of devices that are not there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.checkpoints import peft
from tpu_tune.checkpoints.params import load_params, open_architecture
from tpu_tune.checkpoints.source import WeightSource
from tpu_tune.checkpoints.vocabulary import open_configured
from tpu_tune.errors import UserError
from tpu_tune.models import Architecture, architecture
from tpu_tune.training.execution import compute_dtype
from tpu_tune.transforms import (
    LoraConfig,
    QuantizeConfig,
    Targets,
    find_targets,
    lora,
    quantize_weight,
    quantized_paths,
    sharding,
    split,
    token_rows,
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PreparedModel:
    """A model on its mesh, split into what is trained and what is not.

    Attributes:
      source: where the weights came from; None for `abstract_model`'s.
      architecture: the model's facts.
      mesh: the devices.
      targets: what LoRA adapts; None under method=full.
      trainable: the trained leaves by path, float32, sharded.
      frozen: the other leaves by path, sharded.
      shardings: the sharding of every leaf of the base tree, by path.
    """

    source: WeightSource | None
    architecture: Architecture
    mesh: Mesh
    targets: Targets | None
    trainable: dict[str, Any]
    frozen: dict[str, Any]
    shardings: dict[str, Any]

    @property
    def num_trainable(self) -> int:
        """Trained parameters; the zero padding of uneven ranks is not counted."""
        total = sum(leaf.size for leaf in self.trainable.values())
        padding = sum(
            (target.rank - rank) * sum(target.module.shape)
            for target in (self.targets.adapted if self.targets else ())
            for rank in target.ranks
        )
        return total - padding

    @property
    def num_parameters(self) -> int:
        """All parameters: the base's and the adapters', whatever they are stored as."""
        base = sum(math.prod(shape) for shape in self.architecture.leaf_shapes().values())
        return base + (self.num_trainable if self.targets is not None else 0)

    def fingerprint(self, config: ConfigDict) -> str:
        """Return a hash of the base weights and of how they are stored, which a checkpoint's adapters belong to."""
        stored = [self.source.fingerprint, configuration.to_dict(config.quantize), config.model.param_dtype]
        return hashlib.sha256(json.dumps(stored).encode()).hexdigest()


def storage_dtype(config: ConfigDict) -> Any:
    """Return the dtype of base weights that stay arrays."""
    if config.method == "full":
        if config.model.param_dtype not in ("auto", "float32"):
            raise UserError(
                f"model.param_dtype={config.model.param_dtype} under method=full would lose small updates "
                "(bfloat16(0.02) - 1e-5 == 0.02); leave it at auto"
            )
        return jnp.dtype("float32")
    return compute_dtype(config) if config.model.param_dtype == "auto" else jnp.dtype(config.model.param_dtype)


def prepare_model(config: ConfigDict, mesh: Mesh, progress: Callable[[int, int], None] | None = None) -> PreparedModel:
    """Open, check and load the model, quantize it on the way, and split it by the method.

    Raises:
      UserError: anything about the model, the adapter or the LoRA settings that does not fit.
    """
    source = open_configured(config.model)
    arch = open_architecture(source)
    targets, adapters, quantization = _methods(config, arch, source.added_tokens.values())
    stacked, units = arch.stacked(), sharding_units(arch)
    shardings: dict[str, Any] = {}

    def shard(path: str, leaf: Any) -> Any:
        shardings[path] = sharding.leaf_sharding(path, leaf, mesh, path in stacked, units=units)
        return jax.tree.map(put, leaf, shardings[path])

    params = load_params(source, arch, storage_dtype(config), quantization, shard, progress)
    if targets is not None and adapters is None:
        adapters = lora.init(targets, params, jax.random.key(config.seed))
    trainable, frozen = split(params, targets, adapters)
    del params
    trained = sharding.shardings(trainable, mesh, stacked_trainable(targets, stacked), units=units)
    trainable = {path: put(leaf, trained[path]) for path, leaf in trainable.items()}
    return PreparedModel(source, arch, mesh, targets, trainable, frozen, shardings)


def abstract_model(config: ConfigDict, model_config: Mapping[str, Any], mesh: Mesh) -> PreparedModel:
    """Return what `prepare_model` would, as shapes, dtypes and shardings: to compile for devices that are not there.

    Args:
      config: the whole configuration; `model.path` is not read.
      model_config: the model's Hugging Face config.json, with `model.add_special_tokens` counted in its vocabulary.
      mesh: real devices, or those that a topology describes.
    """
    arch = architecture(model_config)
    # Which tokens are new changes no shape; the last ones stand for them.
    added = range(arch.vocab_size - len(config.model.add_special_tokens), arch.vocab_size)
    targets, adapters, quantization = _methods(config, arch, added)
    dtype, quantized = storage_dtype(config), quantized_paths(arch.modules(), quantization)
    stacked, units = arch.stacked(), sharding_units(arch)
    base = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in arch.leaf_shapes().items()}
    quantize = functools.partial(quantize_weight, config=quantization)
    base = {path: jax.eval_shape(quantize, leaf) if path in quantized else leaf for path, leaf in base.items()}

    def split_params(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        fresh = adapters
        if targets is not None and fresh is None:
            fresh = lora.init(targets, params, jax.random.key(config.seed))
        return split(params, targets, fresh)

    trainable, frozen = jax.eval_shape(split_params, base)
    shardings = sharding.shardings(base, mesh, stacked, units=units)
    trained = sharding.shardings(trainable, mesh, stacked_trainable(targets, stacked), units=units)
    trainable = {path: abstract_leaf(leaf, trained[path]) for path, leaf in trainable.items()}
    frozen = {path: jax.tree.map(abstract_leaf, leaf, shardings[path]) for path, leaf in frozen.items()}
    return PreparedModel(None, arch, mesh, targets, trainable, frozen, shardings)


def abstract_leaf(leaf: Any, leaf_sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """Return a leaf's shape and dtype, with a sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf_sharding)


def lora_settings(
    config: ConfigDict, arch: Architecture, added_tokens: Iterable[int]
) -> tuple[LoraConfig, dict[str, Any] | None]:
    """Return the LoRA settings and the adapter to start from, None for a fresh one.

    Under `model.train_added_tokens` the added tokens are among the trained ones.

    Raises:
      UserError: the adapter trains other tokens.
    """
    spec, adapters = LoraConfig(**config.lora), None
    if config.model.adapter:
        spec, adapters = peft.read_adapter(config.model.adapter, arch)
        spec = dataclasses.replace(spec, dropout=config.lora.dropout)
    if not config.model.train_added_tokens:
        return spec, adapters
    candidates = [module for module in arch.modules() if module.path == arch.names.embed or module.is_head]
    trained = {rows.module.path: list(rows.ids) for rows in token_rows(candidates, spec.trainable_token_indices)}
    before = {path: list(ids) for path, ids in trained.items()}
    for module in candidates:
        if module.tied_to or any(module.path.endswith(name) for name in spec.modules_to_save):
            continue  # its rows are trained already, or with the embedding's
        ids = trained.setdefault(module.path, [])
        ids += [number for number in added_tokens if number not in ids]
    if adapters and before and trained != before:
        raise UserError(
            f"model.train_added_tokens: {config.model.adapter} trains other tokens than model.add_special_tokens; "
            "leave it false to go on with the adapter's"
        )
    return dataclasses.replace(spec, trainable_token_indices=trained), adapters


def _methods(
    config: ConfigDict, arch: Architecture, added_tokens: Iterable[int]
) -> tuple[Targets | None, dict[str, Any] | None, QuantizeConfig]:
    """Return what is trained, the adapter to start from, and what is quantized."""
    modules = arch.modules()
    spec, adapters = lora_settings(config, arch, added_tokens)
    if config.model.adapter:
        log.info(
            "starting from %s: its rank, alpha and targets replace lora.*; only lora.dropout is taken from the config",
            config.model.adapter,
        )
    targets = find_targets(modules, spec, arch.default_targets) if config.method == "lora" else None
    quantization = QuantizeConfig(**config.quantize)
    if targets is not None and not isinstance(quantization.exclude, str):
        # Modules that are trained in full cannot be quantized.
        saved = [module.path.rsplit(".")[-1] for module in targets.saved]
        quantization = dataclasses.replace(quantization, exclude=[*quantization.exclude, *saved])
    return targets, adapters, quantization


def stacked_trainable(targets: Targets | None, stacked: frozenset[str]) -> frozenset[str]:
    """Return the paths of trainable leaves whose axis 0 is the layers."""
    if targets is None:
        return stacked
    adapters = ("lora_A", "lora_B", "lora_magnitude_vector")
    return stacked | {
        f"{target.module.path}.{name}" for target in targets.adapted if target.layers for name in adapters
    }


def sharding_units(arch: Architecture) -> dict[str, int]:
    """Return path -> smallest piece of `out` that may be cut: a fused projection is cut between its units only."""
    fused = [module for module in arch.modules() if module.unit > 1]
    return {f"{module.path}.{part}": module.unit for module in fused for part in ("weight", "bias", "lora_B")}


def put(array: Any, leaf_sharding: NamedSharding) -> jax.Array:
    """Put an array that every process holds in full onto the mesh."""
    if jax.process_count() == 1:
        return jax.device_put(array, leaf_sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, leaf_sharding, lambda index: host[index])
