"""Adapters that start from their weight instead of from zero; to others they are a plain LoRA of twice the rank.

PiSSA (arXiv:2404.02948) takes the largest singular values out of each adapted weight and trains them, OLoRA
(arXiv:2406.01775) the first terms of its QR decomposition; both leave the base without them. LoftQ (arXiv:2310.08659)
starts from what quantization took from the weight, over the quantized base as it is (one iteration, PEFT's default).
Who has only the original weights W gets W + scale (A B - A0 B0), A0 and B0 being the start: one LoRA with [A A0] and
[B; -B0], as PEFT's `path_initial_model_for_weight_conversion` writes it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tpu_tune.transforms.lora import Target, Targets
from tpu_tune.transforms.methods import Tree

STARTS = ("pissa", "olora", "loftq")  # values of lora.init_lora_weights
RESIDUAL = ("pissa", "olora")  # those whose start is taken out of the base


def starts_from_weight(target: Target) -> bool:
    """Whether an adapter can start from its weight; others (embeddings, experts, a tied head) start as usual."""
    return target.module.kind == "linear" and not target.module.experts and not target.module.tied_to


@functools.partial(jax.jit, static_argnames=("how", "rank"))
def start_pair(
    weight: Float[Array, "in out"], how: str, rank: int, scale: float
) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
    """Return the A and B that an adapter starts from, so that scale * A @ B is what is taken out of, or was lost.

    Args:
      weight: the matrix, float32; of loftq what quantization took from it.
      how: one of `STARTS`.
      rank: the adapter's.
      scale: the adapter's.
    """
    with jax.default_matmul_precision("highest"):
        if how == "olora":  # of the torch weight; the first columns of Q need no others
            q, _ = jnp.linalg.qr(weight.T[:, :rank])
            return (q.T @ weight.T).T, q.T
        # The smaller side's products have the singular vectors, and are quicker to take apart than the weight.
        wide = weight.shape[0] <= weight.shape[1]
        small = weight if wide else weight.T
        _, vectors = jnp.linalg.eigh(small @ small.T)
        left = vectors[:, ::-1][:, :rank]
        right = left.T @ small
        sizes = jnp.linalg.norm(right, axis=1)
        root = jnp.sqrt(jnp.where(sizes > 0, sizes / scale, 1.0))
        a, b = left * root, right / (root * scale)[:, None]
        return (a, b) if wide else (b.T, a.T)


def as_plain_lora(targets: Targets, trainable: Mapping[str, Any], start: Mapping[str, Any]) -> tuple[Targets, Tree]:
    """Return the method and the leaves of the same model as a LoRA of twice the rank over the original weights.

    Args:
      targets: the method that was trained.
      trainable: its leaves; those that are not A or B stay as they are.
      start: the A and B that the adapters started from.
    """
    new = dict(trainable)
    for target in targets.adapted:
        a, b, start_a, start_b = (
            np.asarray(tree[path]) for tree in (trainable, start) for path in (target.a_path, target.b_path)
        )
        new_a = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
        new_b = np.zeros((*b.shape[:-2], 2 * b.shape[-2], b.shape[-1]), b.dtype)
        for index, rank in enumerate(target.ranks):  # the start behind each layer's own rank
            at = (index,) if target.layers else ()
            new_a[at][..., : 2 * rank] = np.concatenate([a[at][..., :rank], start_a[at][..., :rank]], axis=-1)
            new_b[at][..., : 2 * rank, :] = np.concatenate([b[at][..., :rank, :], -start_b[at][..., :rank, :]], axis=-2)
        new[target.a_path], new[target.b_path] = jnp.asarray(new_a), jnp.asarray(new_b)
    spec = targets.spec
    more = math.sqrt(2) if spec.use_rslora else 2
    spec = dataclasses.replace(
        spec,
        rank=2 * spec.rank,
        alpha=more * spec.alpha,
        rank_pattern={key: 2 * rank for key, rank in spec.rank_pattern.items()},
        alpha_pattern={key: more * alpha for key, alpha in spec.alpha_pattern.items()},
        init_lora_weights="true",
    )
    adapted = tuple(
        dataclasses.replace(
            target,
            ranks=tuple(2 * rank for rank in target.ranks),
            alphas=tuple(more * alpha for alpha in target.alphas),
        )
        for target in targets.adapted
    )
    return dataclasses.replace(targets, adapted=adapted, spec=spec), new


def without_start(targets: Targets, trainable: Mapping[str, Any]) -> Tree:
    """Undo `as_plain_lora`: return the leaves that were trained, given the method that they belong to."""
    new = dict(trainable)
    for target in targets.adapted:
        a, b = (np.array(trainable[path]) for path in (target.a_path, target.b_path))
        for index, rank in enumerate(target.ranks):
            at = (index,) if target.layers else ()
            a[at][..., rank:], b[at][..., rank:, :] = 0, 0
        new[target.a_path] = jnp.asarray(a[..., : target.rank])
        new[target.b_path] = jnp.asarray(b[..., : target.rank, :])
    return new
