"""A layer's leaves as modules: `Branch` hangs leaves at their paths; `linear` and `norm` run the plainest modules."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from tpu_tune.models.architecture import Architecture
from tpu_tune.tensors import dense, matmul

PROJECTION = "projection"  # name of the outputs of linear layers, which model.remat=dots keeps


class Branch(nnx.Module):
    """A module without mathematics of its own: children, and leaves named `weight` and `bias`."""

    def __init__(self, leaves: Mapping[str, Any]):
        """Hang each leaf at its dotted path below this module."""
        children: dict[str, dict[str, Any]] = {}
        for path, leaf in leaves.items():
            name, _, rest = path.partition(".")
            if rest:
                children.setdefault(name, {})[rest] = leaf
            else:
                setattr(self, name, nnx.Param(leaf))
        for name, below in children.items():
            setattr(self, name, Branch(below))

    def at(self, path: str) -> Branch:
        """Return the module at a dotted path."""
        return functools.reduce(getattr, path.split("."), self)

    def leaves(self) -> dict[str, Any]:
        """Return the leaves here by name: `weight`, and `bias` where there is one."""
        return {name: self.leaf(name) for name in ("weight", "bias") if hasattr(self, name)}

    def leaf(self, name: str) -> Any:
        """Return the leaf of that name here, or None."""
        return getattr(self, name).get_value() if hasattr(self, name) else None


def linear(module: Branch, x: Array) -> Array:
    """Return x @ weight + bias in x's dtype."""
    y = checkpoint_name(matmul(x, module.leaf("weight")), PROJECTION)
    bias = module.leaf("bias")
    return y if bias is None else y + dense(bias).astype(y.dtype)


def norm(arch: Architecture, weights: Branch, name: str, x: Array) -> Array:
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) in float32; x itself where `name` is "".

    RMSNorm casts to the dtype of x, then scales; LayerNorm, and RMSNorm with an offset (Gemma), scale first: as
    Hugging Face does.
    """
    if not name:
        return x
    normed = unweighted_norm(arch, x)
    if not arch.norm_weights:
        return normed.astype(x.dtype)
    module = weights.at(name)
    weight, bias = dense(module.leaf("weight")), module.leaf("bias")
    if arch.norm == "rms" and not arch.norm_offset:
        return weight.astype(x.dtype) * normed.astype(x.dtype)
    scaled = (weight + arch.norm_offset) * normed
    return (scaled if bias is None else scaled + dense(bias)).astype(x.dtype)


def unweighted_norm(arch: Architecture, x: Array) -> Array:
    """Return x, float32, over its root mean square; in a LayerNorm, less its mean first."""
    wide = x.astype(jnp.float32)
    if arch.norm == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + arch.norm_eps)
