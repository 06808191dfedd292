"""The adapters that a run started from, where they start from their weights (PiSSA, OLoRA, LoftQ), and what follows.

`<run>/initial_adapter/` holds them, as a PEFT adapter. What they took out of the base is computed from there, so that a
resumed run, `generate` and `export` have the base that was trained over; and what a run has trained is written as a
LoRA of twice the rank over the original weights, the start being its second half.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tpu_tune.checkpoints import peft, storage
from tpu_tune.checkpoints.params import check_names
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError
from tpu_tune.models import Architecture
from tpu_tune.tensors import QuantizedTensor
from tpu_tune.transforms import LoraConfig, QuantizeConfig, Targets, find_targets, quantize_weight, quantized_paths
from tpu_tune.transforms.methods import Tree
from tpu_tune.transforms.starts import RESIDUAL, STARTS, as_plain_lora, start_pair, starts_from_weight, without_start

FOLDER = "initial_adapter"


def has_start(config: ConfigDict) -> bool:
    """Whether a run's adapters start from their weights."""
    return config.method == "lora" and config.lora.init_lora_weights in STARTS and not config.model.adapter


def make_start(
    source: WeightSource,
    stored: WeightSource,
    architecture: Architecture,
    targets: Targets,
    quantization: QuantizeConfig,
    seed: int,
) -> Tree:
    """Return the A and B that adapters start from.

    Args:
      source: the model, its weights unquantized.
      stored: the same, with the matrices that are rounded already.
      architecture: its facts.
      targets: the method, which names the way in `spec.init_lora_weights`.
      quantization: how the run stores its base, which loftq asks.
      seed: the run's; for adapters that cannot start from a weight.

    Raises:
      UserError: a weight is quantized in the files, or has fewer rows or columns than the rank.
    """
    names, how = check_names(source, architecture), targets.spec.init_lora_weights
    start, quantized = targets.init({}, jax.random.key(seed)), quantized_paths(architecture.modules(), quantization)
    for target in filter(starts_from_weight, targets.adapted):
        a, b = (np.array(start[path]) for path in (target.a_path, target.b_path))
        for number, (name, index, rank) in enumerate(target.places):
            file = names[f"{name}.weight"]
            value = source.read(file)
            if isinstance(value, QuantizedTensor):
                raise UserError(
                    f"lora.init_lora_weights={how} starts from weights in full precision, and {source.path} has "
                    f"'{file}' quantized; give the unquantized model, or set it to true"
                )
            if rank > min(target.module.shape):
                raise UserError(
                    f"lora.init_lora_weights={how}: rank {rank} is more than '{name}' has rows or columns "
                    f"({' x '.join(map(str, target.module.shape))}); lower lora.rank"
                )
            weight = jnp.asarray(target.module.from_torch(value), jnp.float32)
            if how == "loftq":
                if target.module.weight not in quantized:  # nothing is lost
                    continue
                kept = target.module.from_torch(stored.read(file))
                kept = jax.tree.map(jnp.asarray, kept) if isinstance(kept, QuantizedTensor) else weight
                weight = weight - quantize_weight(kept, quantization).dequantize()
            found = start_pair(weight, how, rank, target.scales[number])
            a[index][..., :rank], b[index][..., :rank, :] = found
        start |= {target.a_path: jnp.asarray(a), target.b_path: jnp.asarray(b)}
    return start


def write_start(run: str, start: Tree, targets: Targets, architecture: Architecture, base_name: str) -> None:
    """Write what `make_start` has made into a run directory.

    Raises:
      UserError: it cannot be written.
    """
    peft.write_adapter(os.path.join(run, FOLDER), start, _alone(targets), architecture, base_name)


def read_start(run: str, architecture: Architecture) -> tuple[Targets, Tree] | None:
    """Return the adapters that a run has started from, and the method of them alone; None where it has none.

    Raises:
      UserError: they cannot be read.
    """
    folder = os.path.join(run, FOLDER)
    if not storage.is_complete(folder):
        return None
    spec, start = peft.read_adapter(folder, architecture)
    return find_targets(architecture.modules(), spec, architecture.default_targets), start


def with_residual(source: WeightSource, architecture: Architecture, targets: Targets, start: Tree) -> WeightSource:
    """Return the source less what the start takes out of each adapted weight (PiSSA, OLoRA)."""
    names, taken = check_names(source, architecture), {}
    for target in filter(starts_from_weight, targets.adapted):
        a, b = (np.asarray(start[path]) for path in (target.a_path, target.b_path))
        for number, (name, index, _) in enumerate(target.places):
            taken[names[f"{name}.weight"]] = (target.module, a[index], b[index], np.float32(target.scales[number]))

    def read(name: str) -> np.ndarray | QuantizedTensor:
        value = source.read(name)
        if name not in taken:
            return value
        module, a, b, scale = taken[name]
        return np.asarray(value, np.float32) - module.to_torch(scale * (a @ b))

    return dataclasses.replace(source, read=read)


def over_start(source: WeightSource, architecture: Architecture, run: str, config: ConfigDict) -> WeightSource:
    """Return the source of the base that a run's adapters are trained over, given its model as it stands.

    Raises:
      UserError: the adapters that it started from are not there.
    """
    if not has_start(config) or config.lora.init_lora_weights not in RESIDUAL:
        return source
    found = read_start(run, architecture)
    if found is None:
        raise UserError(f"{os.path.join(run, FOLDER)}: the adapter that this run started from is not there")
    return with_residual(source, architecture, *found)


def as_others_read(
    run: str, config: ConfigDict, targets: Targets, trainable: Mapping[str, Any], architecture: Architecture
) -> tuple[Targets, Mapping[str, Any]]:
    """Return what a run has trained as an adapter over the original weights."""
    found = read_start(run, architecture) if has_start(config) else None
    return as_plain_lora(targets, trainable, found[1]) if found else (targets, trainable)


def as_trained(
    run: str, config: ConfigDict, adapter: tuple[LoraConfig, Tree], architecture: Architecture
) -> tuple[LoraConfig, Tree]:
    """Return an adapter that a run has written as the run trained it, over its own base; others as they are."""
    spec, trainable = adapter
    found = read_start(run, architecture) if config.lora.init_lora_weights in STARTS else None
    if found is None or spec.rank != 2 * found[0].spec.rank:
        return spec, trainable
    own = found[0].spec
    spec = dataclasses.replace(
        spec, rank=own.rank, alpha=own.alpha, rank_pattern=own.rank_pattern, alpha_pattern=own.alpha_pattern
    )
    return spec, without_start(found[0], trainable)


def _alone(targets: Targets) -> Targets:
    """Return the method without what it trains beside A and B."""
    spec = dataclasses.replace(
        targets.spec, modules_to_save=[], bias="none", trainable_token_indices=[], init_lora_weights="true"
    )
    return dataclasses.replace(targets, saved=(), biases=(), tokens=(), spec=spec)
