"""`plan --suggest`: find what fits and trains most tokens a second, as config overrides; or else what would fit, where.

The search begins with the settings that change least: the configuration's own mesh and quantization, then other meshes,
fewer bits, and at last fewer tokens at one time. Settings whose counted bytes are too large already are not compiled.
From the first settings that fit with one row per device, the number of rows is raised: two measured batches give a
line, and where it meets the capacity is tried next. At last, settings that recompute less are tried, each with as many
rows as fit. Of all that fits, what makes most tokens a second by the estimate of its time is recommended (`step_time`).
Where nothing fits, other methods and optimizers are tried (`ways`), and larger devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from tpu_tune.config import default
from tpu_tune.planning.devices import NAMES, Device, find_device
from tpu_tune.planning.plan_text import tokens_per_second
from tpu_tune.planning.tries import Overrides, Say, Tries, changes, persistent_bytes, rows_per_device
from tpu_tune.planning.ways import find_ways

MAX_COMPILES = 8
_FORMATS = ("none", "int8", "nf4")  # each takes about half the bytes of the one before
_MAX_ROWS = 1024
_MARGIN = 0.97  # share of the capacity to aim for after a batch was too large
_CHUNK = 512  # tokens, whose activations in one layer are small compared with its weights
_FASTER = 1.01  # a smaller batch has to be faster by so much, by the estimate, to be worth a mention
_MAX_CONFIRMED = 2  # larger devices for which the compiler is asked


def suggest(
    config: ConfigDict,
    device: str | Device,
    rows: int | None = None,
    compile: bool = True,
    max_compiles: int = MAX_COMPILES,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Search for what trains most tokens a second, and for the largest batch that fits.

    Args:
      config: the whole configuration.
      device: a name of the catalogue, or its entry.
      rows: number of training rows, if it is known.
      compile: False decides by counted bytes alone.
      max_compiles: most compilations that may be made.
      say: called with a line for each try.

    Returns:
      `overrides` (of the largest batch: config key -> value; None if nothing fits), `figures` (of that one, or None),
      `alternatives` (settings that recompute less, or a faster smaller batch, each with `overrides` and `figures`),
      `recommended` (`overrides`, `figures` and `why` of the fastest; None if there is none), `ways` (if nothing fits:
      what was tried that changes the method, the optimizer or the rows, see `ways.find_ways`), `devices` (likewise:
      names of devices that are large enough by an estimate, the smallest first), `compiled_device` (the first of them
      that the compiler confirms, or ""), `compiles` (compilations made), `device`.
    """
    device = find_device(device) if isinstance(device, str) else device
    search = Tries(config, device, rows, compile, max_compiles, say)
    smallest: tuple[Overrides, dict[str, Any]] | None = None
    for choice in _choices(config, device):
        remat = config.model.remat if config.model.remat == "offload" else "full"
        one_row = {**choice, "model.remat": remat, **rows_per_device(config, 1)}
        counted = search.try_out(one_row, compile=False)
        if counted is None:
            continue
        smallest = _smaller(smallest, (one_row, counted))
        if persistent_bytes(counted) > counted["capacity_bytes_per_device"]:
            continue
        figures = search.try_out(one_row)
        if figures is None:
            continue
        smallest = _smaller(smallest, (one_row, figures))
        if figures["fits"]:
            largest = _raise_rows(search, one_row, figures)
            return _suggestion(search, max_compiles, **largest, recommended=_recommended(largest))
    ways = find_ways(search, smallest[0]) if smallest else []
    best = next((way for way in ways if way["fits"]), None)
    recommended, confirmed = None, ""
    devices = _large_enough(smallest[1], device) if smallest else []
    if best:
        recommended = _recommended(_raise_rows(search, best["settings"], best["figures"]))
        recommended["why"] = f"{best['way']}, {recommended['why']}"
    elif smallest:
        confirmed = _confirm(search, smallest[0], devices)
    ways = [{key: value for key, value in way.items() if key != "settings"} for way in ways]
    return _suggestion(
        search, max_compiles, ways=ways, devices=devices, compiled_device=confirmed, recommended=recommended
    )


def _suggestion(search: Tries, max_compiles: int, **found: Any) -> dict[str, Any]:
    """Return what `suggest` returns, of what was found."""
    empty: dict[str, Any] = {"overrides": None, "figures": None, "alternatives": [], "recommended": None}
    empty |= {"ways": [], "devices": [], "compiled_device": "", "compiles": max_compiles - search.budget}
    return {"device": search.device.name, **empty, **found}


def _recommended(largest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fastest by estimate of the largest batch and what recomputes less; the larger of equals."""
    choices = [largest, *largest["alternatives"]]
    best = max(choices, key=lambda choice: tokens_per_second(choice["figures"]))  # the first of equals
    why = "the largest batch that fits" if len(choices) == 1 else "the fastest by estimate"
    return {"overrides": best["overrides"], "figures": best["figures"], "why": why}


def _choices(config: ConfigDict, device: Device) -> Iterator[Overrides]:
    """Yield overrides of quantization and mesh in order of preference; last, the smallest also in chunks of tokens."""
    formats = [config.quantize.format]
    if config.method == "lora":
        formats += _FORMATS[_FORMATS.index(formats[0]) + 1 :] if formats[0] in _FORMATS else ()  # int4: no smaller one
    for format in formats:
        quantize = {} if format == config.quantize.format else {"quantize.format": format}
        for mesh in _meshes(config, device.count):
            yield {**quantize, **mesh}
    if not config.model.token_chunk_size and config.data.max_length > _CHUNK:
        for mesh in _meshes(config, device.count):
            yield {**quantize, **mesh, "model.token_chunk_size": _CHUNK}


def _meshes(config: ConfigDict, count: int) -> Iterator[Overrides]:
    """Yield overrides of the mesh: none, weights sharded over all devices, then tokens over two, four, ... of them."""
    yield {}
    if count == 1:
        return
    own = {axis: int(size) for axis, size in config.mesh.items()}
    sequence = 1
    while sequence <= count:
        mesh = {"data": 1, "fsdp": count // sequence, "tensor": 1, "sequence": sequence}
        resolved = {axis: mesh[axis] if size == -1 else size for axis, size in own.items()}
        if count % sequence == 0 and resolved != mesh and config.data.max_length % sequence == 0:
            yield {f"mesh.{axis}": size for axis, size in mesh.items()}
        sequence *= 2


def _raise_rows(search: Tries, one_row: Overrides, figures: dict[str, Any]) -> dict[str, Any]:
    """Raise the rows per device as far as they fit, then look for settings that recompute less."""
    tried = {1: figures}  # rows per device -> figures
    best, limit = 1, _MAX_ROWS
    if search.rows:
        shards = figures["mesh"]["data"] * figures["mesh"]["fsdp"]
        limit = max(1, search.rows // shards)
    guess = 2
    while best < guess <= limit and guess not in tried:
        attempt = search.try_out({**one_row, **rows_per_device(search.config, guess)})
        if attempt is None:
            break
        tried[guess] = attempt
        best = max(rows for rows, result in tried.items() if result["fits"])
        guess = _next_guess(tried, limit)
    chosen = {**one_row, **rows_per_device(search.config, best)}
    return {
        "overrides": changes(search.config, chosen),
        "figures": search.with_run(chosen, tried[best]),
        "alternatives": [
            *_less_recomputation(search, one_row, tried, best),
            *_faster_batches(search, one_row, tried, best),
        ],
    }


def _faster_batches(search: Tries, one_row: Overrides, tried: Mapping[int, Any], best: int) -> list[dict[str, Any]]:
    """Return the fastest batch of those tried, if it is faster than the largest one that fits."""
    fitting = {rows: figures for rows, figures in tried.items() if figures["fits"]}
    fastest = max(fitting, key=lambda rows: (tokens_per_second(fitting[rows]), rows))
    if tokens_per_second(fitting[fastest]) <= _FASTER * tokens_per_second(fitting[best]):
        return []
    settings = {**one_row, **rows_per_device(search.config, fastest)}
    overrides = changes(search.config, settings)
    return [{"overrides": overrides, "figures": search.with_run(settings, fitting[fastest])}]


def _less_recomputation(search: Tries, one_row: Overrides, tried: Mapping[int, Any], best: int) -> list[dict[str, Any]]:
    """Return settings that recompute less, each with as many rows as counted bytes make likely to fit."""
    fitting = sorted(rows for rows, result in tried.items() if result["fits"])[-2:]
    peaks = [tried[rows]["peak_bytes_per_device"] for rows in fitting]
    bytes_per_row = max(1.0, (peaks[-1] - peaks[0]) / max(1, fitting[-1] - fitting[0]))
    fixed_bytes = peaks[-1] - bytes_per_row * fitting[-1]
    capacity = tried[best]["capacity_bytes_per_device"]
    full, found = search.try_out(one_row, compile=False), []
    for remat in ("none", "dots"):
        settings = {**one_row, "model.remat": remat}
        counted = search.try_out(settings, compile=False)
        if full is None or counted is None:
            continue
        factor = max(1.0, counted["breakdown"]["scratch"] / max(1, full["breakdown"]["scratch"]))
        rows = min(best, int((capacity - fixed_bytes) / (bytes_per_row * factor)))
        while rows >= 1:
            chosen = {**settings, **rows_per_device(search.config, rows)}
            figures = search.try_out(chosen)
            if figures is None:
                return found
            if figures["fits"]:
                overrides = changes(search.config, chosen)
                found.append({"overrides": overrides, "figures": search.with_run(chosen, figures)})
                break
            rows //= 2
    return found


def _next_guess(tried: Mapping[int, Mapping[str, Any]], limit: int) -> int:
    """Return the next number of rows to try: where a line through two measured batches meets the capacity.

    The two are the largest that fits and the smallest that does not, or the two largest that fit.
    """
    fitting = sorted(rows for rows, figures in tried.items() if figures["fits"])
    failing = sorted(rows for rows, figures in tried.items() if not figures["fits"])
    best, ceiling = fitting[-1], min([limit, *[rows - 1 for rows in failing]])
    if failing and tried[failing[0]]["peak_bytes_per_device"]:
        other = failing[0]
    elif failing:  # the compiler did not report by how much it was too large
        return (best + ceiling + 1) // 2
    elif len(fitting) > 1:
        other = fitting[-2]
    else:
        return min(2 * best, ceiling)
    best_peak, other_peak = (tried[rows]["peak_bytes_per_device"] for rows in (best, other))
    bytes_per_row = max(1.0, (other_peak - best_peak) / (other - best))
    # After a guess was too large, the next keeps a distance from the capacity: a compilation costs more than a row.
    aim = tried[best]["capacity_bytes_per_device"] * (_MARGIN if failing else 1.0)
    return min(best + max(0, int((aim - best_peak) // bytes_per_row)), ceiling)


def _smaller(
    first: tuple[Overrides, dict[str, Any]] | None, second: tuple[Overrides, dict[str, Any]]
) -> tuple[Overrides, dict[str, Any]]:
    """Return the plan that needs less memory, or the one whose peak is known."""
    if first is None or first[1]["peak_bytes_per_device"] is None:
        return second
    peak = second[1]["peak_bytes_per_device"]
    return second if peak is not None and peak < first[1]["peak_bytes_per_device"] else first


def _confirm(search: Tries, overrides: Overrides, devices: list[str]) -> str:
    """Return the first device on which the smallest plan fits according to the compiler, or ""."""
    for name in devices[:_MAX_CONFIRMED]:
        mesh = {f"mesh.{axis}": size for axis, size in default().mesh.items()}
        on_device = dataclasses.replace(search, device=find_device(name))
        search.say(f"on {name}:")
        figures = on_device.try_out({**overrides, **mesh})
        search.budget = on_device.budget
        if figures is not None and figures["fits"] and not figures["compiler"].startswith("none"):
            return name
    return ""


def _large_enough(figures: Mapping[str, Any], device: Device) -> list[str]:
    """Return the devices that hold the smallest plan by an estimate, those with the least total memory first."""
    sizes = figures["breakdown"]
    sharded = device.count * sum(sizes[name] for name in ("frozen", "trainable", "gradients", "optimizer", "padding"))
    on_each = sizes["batch"] + sizes["scratch"]
    fitting = []
    for name in NAMES:
        other = find_device(name)
        if sharded / other.count + on_each <= other.capacity:
            fitting.append((other.capacity * other.count, name))
    return [name for _, name in sorted(fitting)]
