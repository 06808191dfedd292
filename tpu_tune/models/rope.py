"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and the ways to stretch them.

Frequencies follow transformers' `modeling_rope_utils`: linear (positions divided), dynamic NTK (base grows with the
sequence beyond the trained length), llama3 (low frequencies divided, a smooth band between), yarn (the same by a ramp
over the frequencies, and larger cosines and sines; arXiv:2309.00071), longrope (a factor of its own for each frequency,
one set up to the trained length and one beyond; arXiv:2402.13753) and proportional (only the highest frequencies turn).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tpu_tune.errors import UserError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary embedding.

    Attributes:
      dim: number of rotated elements of each head, the first ones; the rest pass unchanged.
      theta: base of the frequencies.
      kind: default | linear | dynamic | llama3 | yarn | longrope | proportional.
      factor: factor by which the context is stretched (linear, dynamic, llama3, yarn, proportional).
      original_length: number of positions the model was trained on (dynamic, llama3, yarn, longrope, `query_growth`).
      low_freq_factor, high_freq_factor: bounds of llama3's smooth band, in wavelengths per `original_length`.
      beta_fast, beta_slow: bounds of yarn's ramp, in turns over `original_length`.
      truncate: whether yarn's ramp begins and ends at whole frequencies.
      short_factors, long_factors: longrope's divisors of each frequency, up to `original_length` and beyond.
      turning: number of frequencies that turn at all (proportional).
      magnitude: factor on cosines and sines (yarn, longrope).
      interleaved: whether pairs are neighbours (GPT-J) instead of the two halves.
      clockwise: whether the angles are negative.
      query_growth: b in 1 + b ln(1 + floor(position / original_length)), a factor on rotated queries (Llama 4).
    """

    dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    turning: int = 0
    magnitude: float = 1.0
    interleaved: bool = False
    clockwise: bool = False
    query_growth: float = 0.0


class Angles(NamedTuple):
    """What each token is turned by: cosines and sines (B, T, dim/2), and a factor (B, T) on its queries or None."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    queries: Float[Array, "B T"] | None = None


def from_config(config: Mapping[str, Any], dim: int, default_theta: float = 10000.0, layer_type: str = "") -> Rope:
    """Read a config's rotary settings, in transformers 4's keys or in transformers 5's `rope_parameters`.

    Args:
      config: content of config.json.
      dim: number of rotated elements of each head; all of them under `proportional`.
      default_theta: the family's base where the config names none.
      layer_type: the entry to read of a `rope_parameters` that has one per layer type.

    Raises:
      UserError: a rope type that is not implemented; it is named.
    """
    settings = _settings(config, layer_type)
    theta = settings.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base", default_theta)))
    kind = settings.get("rope_type", settings.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # Phi-3's first name for it
    if kind not in KINDS:
        raise UserError(f"rope type '{kind}' is not implemented; the known ones are {', '.join(KINDS)}")
    longest = config.get("max_position_embeddings") or 0
    trained = config.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
    rope = Rope(
        dim=dim,
        theta=float(theta),
        kind=kind,
        factor=float(settings.get("factor") or 1.0),
        # transformers' dynamic kind knows no other length than the config's.
        original_length=int(longest if kind == "dynamic" else trained or longest),
        query_growth=float(settings.get("llama_4_scaling_beta") or 0.0),
    )
    return _WITH_SETTINGS[kind](rope, settings, int(longest)) if kind in _WITH_SETTINGS else rope


def partial_factor(config: Mapping[str, Any], default: float = 1.0, layer_type: str = "") -> float:
    """Return the share of each head that is rotated, from where a config of any age has it."""
    return _settings(config, layer_type).get("partial_rotary_factor", default)


def _settings(config: Mapping[str, Any], layer_type: str) -> dict[str, Any]:
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    outside = {key: config[key] for key in ("partial_rotary_factor",) if config.get(key) is not None}
    return outside | dict((layer_type and settings.get(layer_type)) or settings)


def _llama3(rope: Rope, settings: Mapping[str, Any], longest: int) -> Rope:
    low, high = (float(settings.get(f"{side}_freq_factor", default)) for side, default in (("low", 1), ("high", 4)))
    return dataclasses.replace(rope, low_freq_factor=low, high_freq_factor=high)


def _yarn(rope: Rope, settings: Mapping[str, Any], longest: int) -> Rope:
    factor = float(settings.get("factor") or longest / rope.original_length)
    magnitude, scales = settings.get("attention_factor"), [settings.get(key) for key in ("mscale", "mscale_all_dim")]
    if magnitude is None:
        one, all_dims = scales if all(scales) else (1.0, 0.0)
        magnitude = yarn_magnitude(factor, one) / yarn_magnitude(factor, all_dims)
    return dataclasses.replace(
        rope,
        factor=factor,
        beta_fast=float(settings.get("beta_fast") or 32.0),
        beta_slow=float(settings.get("beta_slow") or 1.0),
        truncate=bool(settings.get("truncate", True)),
        magnitude=float(magnitude),
    )


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """Return yarn's factor on cosines and sines where the context is stretched by `factor`."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rope: Rope, settings: Mapping[str, Any], longest: int) -> Rope:
    for key in ("short_factor", "long_factor"):
        if len(settings.get(key) or ()) != rope.dim // 2:
            raise UserError(f"rope type 'longrope' needs {rope.dim // 2} numbers as {key}, one for each frequency")
    factor = settings.get("factor") or longest / rope.original_length
    magnitude = settings.get("attention_factor")
    if magnitude is None:
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(rope.original_length))
    short, long = (tuple(map(float, settings[key])) for key in ("short_factor", "long_factor"))
    return dataclasses.replace(rope, factor=1.0, short_factors=short, long_factors=long, magnitude=float(magnitude))


def _proportional(rope: Rope, settings: Mapping[str, Any], longest: int) -> Rope:
    return dataclasses.replace(rope, turning=int(settings.get("partial_rotary_factor", 1.0) * rope.dim // 2))


_WITH_SETTINGS = {"llama3": _llama3, "yarn": _yarn, "longrope": _longrope, "proportional": _proportional}


def tables(rope: Rope, positions: Int[Array, "B T"]) -> Angles:
    """Return cosines and sines (B, T, dim/2), float32, for each token's position, and what its queries are scaled by.

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
    sin = jnp.sin(-angles if rope.clockwise else angles) * rope.magnitude
    queries = None
    if rope.query_growth:
        stretches = (positions // rope.original_length).astype(jnp.float32)
        queries = 1 + rope.query_growth * jnp.log1p(stretches)
    return Angles(jnp.cos(angles) * rope.magnitude, sin, queries)


def rotate(x: Float[Array, "B T H D"], rope: Rope, angles: Angles) -> Float[Array, "B T H D"]:
    """Rotate the first `rope.dim` elements of each head, in float32; the result has x's dtype."""
    turned, passed = x[..., : rope.dim].astype(jnp.float32), x[..., rope.dim :]
    cos, sin = angles.cos[:, :, None, :], angles.sin[:, :, None, :]
    if rope.interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    pair = [first * cos - second * sin, second * cos + first * sin]
    turned = jnp.stack(pair, axis=-1).reshape(turned.shape) if rope.interleaved else jnp.concatenate(pair, axis=-1)
    return (
        jnp.concatenate([turned.astype(x.dtype), passed], axis=-1) if rope.dim < x.shape[-1] else turned.astype(x.dtype)
    )


def scale_queries(q: Float[Array, "B T H D"], angles: Angles) -> Float[Array, "B T H D"]:
    """Multiply rotated queries by their position's factor, where there is one."""
    return q if angles.queries is None else q * angles.queries[:, :, None, None].astype(q.dtype)


def _frequencies(rope: Rope) -> np.ndarray:
    frequencies = 1.0 / rope.theta ** (np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    if rope.kind == "linear":
        frequencies /= rope.factor
    elif rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low, high = rope.low_freq_factor, rope.high_freq_factor
        smooth = np.clip((rope.original_length / wavelengths - low) / (high - low), 0.0, 1.0)
        frequencies = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    elif rope.kind == "yarn":
        first, last = (_frequency_of_turns(rope, turns) for turns in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rope.dim - 1)
        ramp = np.clip((np.arange(rope.dim // 2) - first) / ((last - first) or 0.001), 0.0, 1.0)
        frequencies = ramp * frequencies / rope.factor + (1 - ramp) * frequencies
    elif rope.kind == "proportional":
        frequencies = np.where(np.arange(rope.dim // 2) < rope.turning, frequencies / rope.factor, 0.0)
    return frequencies.astype(np.float32)


def _frequency_of_turns(rope: Rope, turns: float) -> float:
    """Return the index, with a fraction, of the frequency that turns so often over the trained length."""
    return rope.dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
