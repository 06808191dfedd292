"""Which of the ways to run a step is taken where the configuration leaves it open: the fastest that fits.

What `model.remat=auto` and `model.token_chunk_size=0` leave open changes no result, only time and memory.
Each way is a set of config overrides; what a device needs for it is estimated (`scratch`), and asked of the compiler
where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.training.execution import REMAT, TOKEN_CHUNK, remat

KEYS = ("model.remat", "model.token_chunk_size")
MARGIN = 4 / 3  # of estimated scratch, where no compiler confirms the estimate
_CHUNK = 512  # tokens, whose activations in one layer are small compared with its weights
_FASTEST_FIRST = ("none", "dots", REMAT)  # by what they compute again


def ways(config: ConfigDict) -> list[dict[str, Any]]:
    """Return the ways to run a step, as overrides of `KEYS`, from the fastest and largest to the slowest and smallest.

    What the configuration sets stays as it is; with both keys set it is the only one. Tokens are left open by 0 where
    all of a layer is computed again: with less there is nothing to win by cutting them.
    """
    tokens = config.train.per_device_train_batch_size * config.data.max_length
    found = []
    for kept in _FASTEST_FIRST if config.model.remat == "auto" else (config.model.remat,):
        chunks = [config.model.token_chunk_size]
        if not chunks[0] and kept == REMAT:
            # Where there are so many that 0 stands for chunks, the number of all of them says that they are not cut.
            whole = tokens if tokens > 2 * TOKEN_CHUNK else 0
            chunks = [whole, *[size for size in (TOKEN_CHUNK, _CHUNK) if size < tokens]]
        found += [dict(zip(KEYS, (kept, chunk), strict=True)) for chunk in chunks]
    return found


def usual(config: ConfigDict) -> dict[str, Any]:
    """Return the way that is taken where nobody chooses."""
    return {KEYS[0]: remat(config), KEYS[1]: config.model.token_chunk_size}


def with_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """Return a copy of a configuration with single keys changed."""
    changed = configuration.from_dict(configuration.to_dict(config))
    for key, value in overrides.items():
        configuration.assign(changed, key, value)
    return configuration.check(changed)


def chosen(
    config: ConfigDict, way: Mapping[str, Any], tried: Sequence[Mapping[str, Any]], by: str
) -> dict[str, Any] | None:
    """Return what was chosen as a plan has it: the keys that were left open, and `why`; None where none was.

    Args:
      config: the configuration as it was given.
      way: the overrides taken.
      tried: the ways that do not fit, each with `way` and `bytes` (0 where they are not known).
      by: whose word that it fits is.
    """
    open_keys = [key for key in KEYS if configuration.config_get(config, key) != way[key]]
    if not open_keys:
        return None
    why = f"the fastest that fits, {by}" if not _is_last(config, way) else f"what takes the least memory, {by}"
    larger = [f"{_short(one['way'])} {_needs(one['bytes'])}" for one in tried]
    return {**{key: way[key] for key in open_keys}, "why": why + (f"; {', '.join(larger)}" if larger else "")}


def way_of(config: ConfigDict, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides of `KEYS` that a choice means."""
    return {key: found.get(key, configuration.config_get(config, key)) for key in KEYS}


def words(found: Mapping[str, Any]) -> str:
    """Return a choice as a line: `model.remat=dots: the fastest that fits, by the compiler; none needs 18.1 GB`."""
    keys = ", ".join(f"{key}={value}" for key, value in found.items() if key != "why")
    return f"{keys}: {found['why']}"


def _is_last(config: ConfigDict, way: Mapping[str, Any]) -> bool:
    return way == ways(config)[-1] and len(ways(config)) > 1


def _short(way: Mapping[str, Any]) -> str:
    chunk = way[KEYS[1]]
    return way[KEYS[0]] + (f" with {chunk} tokens at a time" if chunk else "")


def _needs(size: float) -> str:
    return f"needs {size / 1e9:.1f} GB" if size else "needs more"
