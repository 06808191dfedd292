"""What would fit a device that nothing fits as it is: other methods and optimizers, each asked of the compiler.

Each way changes one thing of the smallest settings that `suggest` has tried: 8-bit Adam, the optimizer's state in host
memory, LoRA, QLoRA, shorter rows; QLoRA with shorter rows comes last. They stand in the order in which they are
recommended: first what trains the same weights on the same rows.
"""

from __future__ import annotations

from typing import Any

from tpu_tune.planning.tries import Overrides, Tries, changes, persistent_bytes
from tpu_tune.training.optimizers import canonical_name

_SHORTEST = 128  # tokens; rows are not made shorter than that
_LORA = {"method": "lora", "model.param_dtype": "auto"}
_QLORA = {**_LORA, "quantize.format": "nf4", "quantize.double_quant": True}


def find_ways(search: Tries, smallest: Overrides) -> list[dict[str, Any]]:
    """Return what would fit, or not, in the order of preference.

    Args:
      search: the plans of the configuration.
      smallest: the overrides that take the least memory and still do not fit.

    Returns:
      For each way `way` (its name), `overrides` (that differ from the configuration), `settings` (all of them),
      `figures` (None where the compiler was not asked), `fits` (None: not asked, no compilation was left).
    """
    ways = [_try(search, name, {**smallest, **changed}) for name, changed in _single_changes(search)]
    ways.append(_shorter(search, "shorter rows", smallest))
    if search.config.method == "full" and not any(way and way["fits"] for way in ways):
        ways.append(_shorter(search, "QLoRA with shorter rows", {**smallest, **_QLORA}))
    return [way for way in ways if way is not None]


def _single_changes(search: Tries) -> list[tuple[str, Overrides]]:
    """Return the ways that change one thing, by name, as far as the configuration does not have it yet."""
    config = search.config
    if config.method != "full":
        return []
    ways: list[tuple[str, Overrides]] = []
    if canonical_name(config.train.optim) == "adamw":
        ways.append(("8-bit Adam", {"train.optim": "adamw_8bit"}))
    if not config.train.optim_offload:
        ways.append(("the optimizer's state in host memory (slower)", {"train.optim_offload": True}))
    return [*ways, ("LoRA", _LORA), ("QLoRA", _QLORA)]


def _try(search: Tries, name: str, settings: Overrides) -> dict[str, Any] | None:
    """Return whether settings fit; None where they do not go with the model or the mesh."""
    counted = search.try_out(settings, compile=False)
    if counted is None:
        return None
    found: dict[str, Any] = {"way": name, "overrides": changes(search.config, settings), "settings": settings}
    if persistent_bytes(counted) > counted["capacity_bytes_per_device"]:
        return {**found, "figures": counted, "fits": False}
    if search.compile and search.budget <= 0:
        return {**found, "figures": None, "fits": None}
    figures = search.try_out(settings)
    return None if figures is None else {**found, "figures": figures, "fits": figures["fits"]}


def _shorter(search: Tries, name: str, settings: Overrides) -> dict[str, Any] | None:
    """Return the longest rows that fit, of half the tokens each time; None where shorter ones do not help.

    By counted bytes the first length is chosen that may fit; the compiler is asked for it, and for half of it.
    """
    length, found = search.config.data.max_length // 2, None
    while length >= _SHORTEST:
        shorter = {**settings, "data.max_length": length}
        counted = search.try_out(shorter, compile=False)
        if counted is None or persistent_bytes(counted) > counted["capacity_bytes_per_device"]:
            return found
        if counted["fits"]:
            before, found = found, _try(search, f"{name}: {length:,} tokens", shorter)
            if found is None or found["fits"] is not False or before:
                return found
        length //= 2
    return found
