"""How the decoder runs under a configuration on a mesh: kernels, remat, chunks, and what is gathered where."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from tpu_tune.errors import UserError
from tpu_tune.kernels import quantized_matmul
from tpu_tune.kernels.attention import for_device
from tpu_tune.models import Architecture, Execution
from tpu_tune.tensors import map_base, stack_of_one
from tpu_tune.transforms import sharding

LOGITS_BYTES = 256 * 2**20  # float32 logits that exist at one time, where train.loss_chunk_size is left to us
TOKEN_CHUNK = 4096  # tokens of a device that a layer works on, where model.token_chunk_size is left to us
_WIDTH = 11008  # LLaMA-7B's intermediate_size: on GPUs the layers of narrower models take so many more tokens
REMAT = "full"  # what model.remat=auto is where nobody has chosen for the device: what fits most often


def compute_dtype(config: ConfigDict) -> Any:
    """Return the dtype of the activations."""
    return jnp.dtype(config.model.dtype)


def remat(config: ConfigDict) -> str:
    """Return what the backward pass computes again, `auto` resolved."""
    return REMAT if config.model.remat == "auto" else config.model.remat


def loss_chunk(config: ConfigDict, vocabulary: int, rows: int) -> int:
    """Return the tokens of each of a device's `rows` whose logits exist at one time."""
    # Logits are float32, for a power of two of tokens: the fewer tokens, the more often the head's weights are read.
    most = 1 << max(LOGITS_BYTES // (4 * vocabulary), 1).bit_length() - 1
    return max(1, (config.train.loss_chunk_size or min(most, 1024)) // rows)


def token_chunk(config: ConfigDict, rows: int, shards: int, most: int = TOKEN_CHUNK) -> int:
    """Return the tokens of each of a device's `rows` that a layer works on at one time, attention apart; 0 for all.

    Args:
      config: the whole configuration.
      rows: number of rows of a micro-batch on one device.
      shards: number of devices that share a row.
      most: tokens of a device in a chunk, where model.token_chunk_size is left to us; twice as many are no chunks yet.
    """
    if config.model.token_chunk_size:
        return max(1, config.model.token_chunk_size // rows)
    recomputed = remat(config) in ("full", "offload")
    return max(1, most // rows) if recomputed and rows * config.data.max_length > 2 * most * shards else 0


def check_mesh(architecture: Architecture, mesh: Mesh) -> None:
    """Refuse a mesh that cuts rows where layers go through a row token after token.

    Raises:
      UserError: it does.
    """
    if mesh.shape["sequence"] > 1 and any(kind.delta for kind in architecture.kinds):
        raise UserError(
            f"mesh.sequence={mesh.shape['sequence']} cuts rows, and this {architecture.family} model's DeltaNet layers "
            "need them whole; set mesh.sequence=1 and use mesh.fsdp or mesh.tensor"
        )


def execution(
    config: ConfigDict, architecture: Architecture, mesh: Mesh, shardings: Mapping[str, Any], rows: int
) -> Execution:
    """Return how the decoder runs: dtype, attention, remat, chunks, and on more than one device its sharding hooks.

    Args:
      config: the whole configuration.
      architecture: the model's facts.
      mesh: the devices.
      shardings: path -> sharding of every leaf of the base tree.
      rows: number of rows of a micro-batch on one device.
    """
    dtype, packed, several = compute_dtype(config), config.data.packing, mesh if mesh.size > 1 else None
    attention = for_device(config.model.attention, mesh.devices.flat[0], dtype, packed)
    on_gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
    most = TOKEN_CHUNK * max(1, _WIDTH // architecture.intermediate_size) if on_gpu else TOKEN_CHUNK
    chunk = token_chunk(config, rows, mesh.shape["sequence"], most)
    plan = quantized_matmul.for_device(config.model.quantized_matmul, mesh)
    if on_gpu and plan.implementation == "pieces":  # chunks save memory; where there are none, large pieces are faster
        saves = chunk or config.model.quantized_matmul == "pieces"
        plan = dataclasses.replace(plan, implementation="gpu_pieces" if saves else "gpu_large_pieces")
    plain = Execution(dtype, attention, several, remat(config), chunk, plan, packed=packed)
    if several is None:
        return plain
    specs = architecture.leaves()
    gathered = {path: sharding.gathered(shardings[path]) for path, spec in specs.items() if spec.stacked}
    hidden = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence", None))

    routers = {module.weight for module in architecture.modules() if module.is_router}  # used in float32

    def gather_stored(path: str, leaf: Any) -> Any:
        is_matrix = getattr(leaf, "ndim", 0) == 2 + specs[path].experts
        if is_matrix and path not in routers and jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = leaf.astype(plain.dtype)  # gather what is used, not float32 storage
        leaf = jax.tree.map(jax.lax.with_sharding_constraint, leaf, gathered[path])
        if hasattr(leaf, "layer_view") and plan.implementation != "xla":
            return stack_of_one(leaf, dataclasses.replace(plan, cut=tuple(gathered[path].codes.spec[-2:])))
        return leaf

    def gather(leaves: dict[str, Any]) -> dict[str, Any]:
        return {path: map_base(functools.partial(gather_stored, path), leaf) for path, leaf in leaves.items()}

    return dataclasses.replace(plain, gather=gather, constrain=lambda x: jax.lax.with_sharding_constraint(x, hidden))
