"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and the ways to stretch them.

Frequencies follow transformers' `modeling_rope_utils`: linear (positions divided), dynamic NTK (base grows with the
sequence beyond the trained length), llama3 (low frequencies divided, a smooth band between) and longrope (a factor of
its own for each frequency, one set up to the trained length and one beyond; arXiv:2402.13753).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tpu_tune.errors import UserError

KINDS = ("default", "linear", "dynamic", "llama3", "longrope")


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary embedding.

    Attributes:
      dim: number of rotated elements of each head, the first ones; the rest pass unchanged.
      theta: base of the frequencies.
      kind: default | linear | dynamic | llama3 | longrope.
      factor: factor by which the context is stretched (linear, dynamic, llama3).
      original_length: number of positions the model was trained on (dynamic, llama3, longrope).
      low_freq_factor, high_freq_factor: bounds of llama3's smooth band, in wavelengths per `original_length`.
      short_factors, long_factors: longrope's divisors of each frequency, up to `original_length` and beyond.
      magnitude: factor on cosines and sines (longrope).
      interleaved: whether pairs are neighbours (GPT-J) instead of the two halves.
    """

    dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    magnitude: float = 1.0
    interleaved: bool = False


def from_config(config: Mapping[str, Any], dim: int, default_theta: float = 10000.0, layer_type: str = "") -> Rope:
    """Read a config's rotary settings, in transformers 4's keys or in transformers 5's `rope_parameters`.

    Args:
      config: content of config.json.
      dim: number of rotated elements of each head.
      default_theta: the family's base where the config names none.
      layer_type: the entry to read of a `rope_parameters` that has one per layer type.

    Raises:
      UserError: a rope type that is not implemented; it is named.
    """
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if layer_type and layer_type in settings:
        settings = dict(settings[layer_type])
    theta = settings.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base", default_theta)))
    kind = settings.get("rope_type", settings.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # Phi-3's first name for it
    if kind not in KINDS:
        raise UserError(f"rope type '{kind}' is not implemented; the known ones are {', '.join(KINDS)}")
    if kind == "longrope":
        return _longrope(config, settings, dim, float(theta))
    return Rope(
        dim=dim,
        theta=float(theta),
        kind=kind,
        factor=float(settings.get("factor") or 1.0),
        original_length=int(
            settings.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 0
        ),
        low_freq_factor=float(settings.get("low_freq_factor", 1.0)),
        high_freq_factor=float(settings.get("high_freq_factor", 4.0)),
    )


def _longrope(config: Mapping[str, Any], settings: Mapping[str, Any], dim: int, theta: float) -> Rope:
    longest = int(config["max_position_embeddings"])
    original = int(
        config.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings") or longest
    )
    for key in ("short_factor", "long_factor"):
        if len(settings.get(key) or ()) != dim // 2:
            raise UserError(f"rope type 'longrope' needs {dim // 2} numbers as {key}, one for each frequency")
    factor = settings.get("factor") or longest / original
    magnitude = settings.get("attention_factor")
    if magnitude is None:
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (tuple(map(float, settings[key])) for key in ("short_factor", "long_factor"))
    return Rope(
        dim,
        theta,
        "longrope",
        original_length=original,
        short_factors=short,
        long_factors=long,
        magnitude=float(magnitude),
    )


def tables(rope: Rope, positions: Int[Array, "B T"]) -> tuple[Float[Array, "B T half"], ...]:
    """Return cosines and sines (B, T, dim/2), float32, for each token's position.

    The dynamic and longrope kinds go by the largest position of each row: not by how long the row or the cache is, and
    not, as transformers does, by the longest row of the batch.
    """
    frequencies = jnp.asarray(_frequencies(rope))
    if rope.kind == "dynamic":
        longest = jnp.max(positions, axis=1)[:, None, None] + 1
        stretch = jnp.maximum(rope.factor * longest / rope.original_length - (rope.factor - 1), 1.0)
        frequencies = frequencies * stretch ** -jnp.asarray(np.arange(0, rope.dim, 2) / (rope.dim - 2), jnp.float32)
    elif rope.kind == "longrope":
        longest = jnp.max(positions, axis=1)[:, None, None] + 1
        factors = (jnp.asarray(part, jnp.float32) for part in (rope.long_factors, rope.short_factors))
        frequencies = frequencies / jnp.where(longest > rope.original_length, *factors)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * rope.magnitude, jnp.sin(angles) * rope.magnitude


def rotate(x: Float[Array, "B T H D"], rope: Rope, cos: Array, sin: Array) -> Float[Array, "B T H D"]:
    """Rotate the first `rope.dim` elements of each head, in float32; the result has x's dtype."""
    turned, passed = x[..., : rope.dim].astype(jnp.float32), x[..., rope.dim :]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    if rope.interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    pair = [first * cos - second * sin, second * cos + first * sin]
    turned = jnp.stack(pair, axis=-1).reshape(turned.shape) if rope.interleaved else jnp.concatenate(pair, axis=-1)
    return (
        jnp.concatenate([turned.astype(x.dtype), passed], axis=-1) if rope.dim < x.shape[-1] else turned.astype(x.dtype)
    )


def _frequencies(rope: Rope) -> np.ndarray:
    frequencies = 1.0 / rope.theta ** (np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    if rope.kind == "linear":
        frequencies /= rope.factor
    elif rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low, high = rope.low_freq_factor, rope.high_freq_factor
        smooth = np.clip((rope.original_length / wavelengths - low) / (high - low), 0.0, 1.0)
        frequencies = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    return frequencies.astype(np.float32)
