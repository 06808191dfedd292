"""`plan --suggest`: the largest batch that fits, and the config overrides that say so; or the device that would do.

The search goes from what costs nothing to what costs most: the configuration's own mesh and quantization, other
meshes, fewer bits, at last fewer tokens at one time. Whatever the bytes alone rule out is not compiled. At the first that fits with one row a device,
two measured batches give a line whose end is tried, then remat that repeats less. A compile of a large model takes
minutes, so their number is bounded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.config import default
from tpu_tune.errors import UserError
from tpu_tune.planning.devices import NAMES, Device, find_device
from tpu_tune.planning.figures import plan

MAX_COMPILES = 8
_BITS = ("none", "int8", "nf4")  # each about half of the one before
_MOST_ROWS = 1024
_MARGIN = 0.97
_CHUNK = 512  # tokens: what is held of them in a layer is small beside its weights
_CONFIRMED = 2  # devices that are asked whether they would do

Overrides = dict[str, Any]
Say = Callable[[str], None]


@dataclasses.dataclass
class _Search:
    """Plans of one configuration on one device, with overrides; counts what was compiled."""

    config: ConfigDict
    device: Device
    rows: int | None
    compile: bool
    budget: int
    say: Say

    def try_out(self, overrides: Overrides, compile: bool | None = None) -> dict[str, Any] | None:
        """Return a plan's figures; None where the overrides do not fit the model or the mesh, or nothing may be compiled."""
        compile = self.compile if compile is None else compile
        if compile and self.budget <= 0:
            return None
        try:
            # Evaluation with as many rows needs less than training, so that it need not be compiled.
            figures = plan(with_overrides(self.config, overrides), self.device, None, compile, evaluate=False)
        except UserError as error:
            self.say(f"  {words(overrides)}: {error}")
            return None
        if compile:
            self.budget -= 1
            peak = figures["peak_bytes_per_device"]
            self.say(
                f"  {words(overrides)}: {'fits' if figures['fits'] else 'does not fit'}"
                + (f", {peak / 1e9:.2f} GB" if peak else "")
            )
        return figures


def suggest(
    config: ConfigDict,
    device: str | Device,
    rows: int | None = None,
    compile: bool = True,
    max_compiles: int = MAX_COMPILES,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Search for the largest batch that fits.

    Args:
      config: the whole configuration.
      device: of the catalogue.
      rows: training rows, where they are known.
      compile: False goes by the byte count.
      max_compiles: how often the compiler may run.
      say: receives a line for each try.

    Returns:
      `overrides` (config key -> value; None where nothing fits), `figures` (of that configuration, or None),
      `alternatives` (the same with remat that repeats less: `overrides` and `figures`), `devices` (where nothing fits:
      names of those that would do by an estimate, the smallest first), `compiled_device` (the first of them that the
      compiler confirms, or ""), `compiles` (how many were used).
    """
    device = find_device(device) if isinstance(device, str) else device
    search = _Search(config, device, rows, compile, max_compiles, say)
    smallest: tuple[Overrides, dict[str, Any]] | None = None
    for choice in _choices(config, device):
        remat = config.model.remat if config.model.remat == "offload" else "full"
        one = {**choice, "model.remat": remat, **_rows(config, 1)}
        counted = search.try_out(one, compile=False)
        if counted is None:
            continue
        smallest = _smaller(smallest, (one, counted))
        if _held(counted) > counted["capacity_bytes_per_device"]:
            continue
        figures = search.try_out(one)
        if figures is None:
            continue
        smallest = _smaller(smallest, (one, figures))
        if figures["fits"]:
            found = _grow(search, one, figures)
            return {**found, "devices": [], "compiled_device": "", "compiles": max_compiles - search.budget}
    devices = _enough(smallest[1], device) if smallest else []
    confirmed = _confirm(search, smallest[0], devices) if smallest else ""
    return {
        "overrides": None,
        "figures": None,
        "alternatives": [],
        "devices": devices,
        "compiled_device": confirmed,
        "compiles": max_compiles - search.budget,
    }


def with_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """Return a copy of a configuration with single keys changed."""
    changed = configuration.from_dict(configuration.to_dict(config))
    for key, value in overrides.items():
        configuration.assign(changed, key, value)
    return configuration.check(changed)


def words(overrides: Mapping[str, Any]) -> str:
    """Return overrides as the command line takes them."""
    return " ".join(f"--config.{key}={value}" for key, value in overrides.items())


def _choices(config: ConfigDict, device: Device) -> Iterator[Overrides]:
    """Yield quantization and mesh, in the order of preference; last the smallest with a layer's work cut into chunks."""
    formats = [config.quantize.format]
    if config.method == "lora":
        place = _BITS.index("nf4" if config.quantize.format == "int4" else config.quantize.format)
        formats += _BITS[place + 1 :]
    for name in formats:
        bits = {} if name == config.quantize.format else {"quantize.format": name}
        for mesh in _meshes(config, device.count):
            yield {**bits, **mesh}
    if not config.model.token_chunk_size and config.data.max_length > _CHUNK:
        for mesh in _meshes(config, device.count):
            yield {**bits, **mesh, "model.token_chunk_size": _CHUNK}


def _meshes(config: ConfigDict, count: int) -> Iterator[Overrides]:
    """Yield meshes: the configuration's, weights over all devices, then a row's tokens over two, four, ... of them."""
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


def _grow(search: _Search, one: Overrides, figures: dict[str, Any]) -> dict[str, Any]:
    """Raise the rows a device as far as they fit, then look for remat that repeats less."""
    tried = {1: figures}
    best, limit = 1, _MOST_ROWS
    if search.rows:
        shards = figures["mesh"]["data"] * figures["mesh"]["fsdp"]
        limit = max(1, search.rows // shards)
    guess = 2
    while best < guess <= limit and guess not in tried:
        found = search.try_out({**one, **_rows(search.config, guess)})
        if found is None:
            break
        tried[guess] = found
        best = max(number for number, each in tried.items() if each["fits"])
        guess = _next_guess(tried, limit)
    chosen = {**one, **_rows(search.config, best)}
    return {
        "overrides": _final(search.config, chosen),
        "figures": _with_run(search, chosen, tried[best]),
        "alternatives": _less_remat(search, one, tried, best),
    }


def _less_remat(search: _Search, one: Overrides, tried: Mapping[int, Any], best: int) -> list[dict[str, Any]]:
    """Return overrides with remat that repeats less, at as many rows as the byte counts let expect; at most one."""
    numbers = sorted(number for number, found in tried.items() if found["fits"])[-2:]
    peaks = [tried[number]["peak_bytes_per_device"] for number in numbers]
    slope = max(1.0, (peaks[-1] - peaks[0]) / max(1, numbers[-1] - numbers[0]))
    capacity = tried[best]["capacity_bytes_per_device"]
    full = search.try_out(one, compile=False)
    for remat in ("none", "dots"):
        freer = {**one, "model.remat": remat}
        counted = search.try_out(freer, compile=False)
        if full is None or counted is None:
            continue
        factor = max(1.0, counted["breakdown"]["scratch"] / max(1, full["breakdown"]["scratch"]))
        fixed = peaks[-1] - slope * numbers[-1]
        rows = min(best, int((capacity - fixed) / (slope * factor)))
        while rows >= 1:
            chosen = {**freer, **_rows(search.config, rows)}
            found = search.try_out(chosen)
            if found is None:
                return []
            if found["fits"]:
                return [{"overrides": _final(search.config, chosen), "figures": _with_run(search, chosen, found)}]
            rows //= 2
    return []


def _next_guess(tried: Mapping[int, Mapping[str, Any]], limit: int) -> int:
    """Return the next number of rows to try: where a line through two that were measured meets the capacity.

    The two are the largest that fits and the smallest that does not, or the two largest that fit.
    """
    fitting = sorted(number for number, found in tried.items() if found["fits"])
    failing = sorted(number for number, found in tried.items() if not found["fits"])
    best, ceiling = fitting[-1], min([limit, *[number - 1 for number in failing]])
    if failing and tried[failing[0]]["peak_bytes_per_device"]:
        other = failing[0]
    elif failing:  # the compiler did not say how much it lacks
        return (best + ceiling + 1) // 2
    elif len(fitting) > 1:
        other = fitting[-2]
    else:
        return min(2 * best, ceiling)
    a, b = (tried[number]["peak_bytes_per_device"] for number in (best, other))
    slope = max(1.0, (b - a) / (other - best))
    # Once a guess was too hopeful the next keeps clear of the edge: a compile costs more than a row.
    aim = tried[best]["capacity_bytes_per_device"] * (_MARGIN if failing else 1.0)
    return min(best + max(0, int((aim - a) // slope)), ceiling)


def _rows(config: ConfigDict, number: int) -> Overrides:
    """Return overrides for so many rows a device, and the accumulation that keeps the rows of a step as far as it can."""
    before = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    return {
        "train.per_device_train_batch_size": number,
        "train.gradient_accumulation_steps": max(1, before // number),
    }


def _final(config: ConfigDict, overrides: Overrides) -> Overrides:
    """Return overrides without what the config says already, and with evaluation at no more rows than training."""
    number = overrides["train.per_device_train_batch_size"]
    changed = {**overrides, "train.per_device_eval_batch_size": min(config.train.per_device_eval_batch_size, number)}
    return {key: value for key, value in changed.items() if configuration.config_get(config, key) != value}


def _with_run(search: _Search, overrides: Overrides, figures: dict[str, Any]) -> dict[str, Any]:
    """Return figures with the run's length for the rows that there are; the tries know of none."""
    try:
        config = with_overrides(search.config, overrides)
        counted = plan(config, search.device, search.rows, compile=False, evaluate=False)
    except UserError as error:  # more rows a step than there are
        return {**figures, "notes": [*figures["notes"], str(error)]}
    return {**figures, "run": counted["run"]}


def _held(figures: Mapping[str, Any]) -> int:
    return sum(size for name, size in figures["breakdown"].items() if name not in ("scratch", "gradients"))


def _smaller(
    one: tuple[Overrides, dict[str, Any]] | None, other: tuple[Overrides, dict[str, Any]]
) -> tuple[Overrides, dict[str, Any]]:
    """Return the plan with the least need; one with a known peak goes before one without."""
    if one is None or one[1]["peak_bytes_per_device"] is None:
        return other
    peak = other[1]["peak_bytes_per_device"]
    return other if peak is not None and peak < one[1]["peak_bytes_per_device"] else one


def _confirm(search: _Search, overrides: Overrides, devices: list[str]) -> str:
    """Return the first device for which the compiler says that the smallest plan fits; "" where it is not asked."""
    for name in devices[:_CONFIRMED]:
        mesh = {f"mesh.{axis}": size for axis, size in default().mesh.items()}
        other = dataclasses.replace(search, device=find_device(name))
        search.say(f"on {name}:")
        found = other.try_out({**overrides, **mesh})
        search.budget = other.budget
        if found is not None and found["fits"] and not found["compiler"].startswith("none"):
            return name
    return ""


def _enough(figures: Mapping[str, Any], device: Device) -> list[str]:
    """Return the devices that would hold the smallest plan found, the smallest machines first; an estimate."""
    parts = figures["breakdown"]
    count = device.count
    shared = count * sum(parts[name] for name in ("frozen", "trainable", "gradients", "optimizer", "padding"))
    apart = parts["batch"] + parts["scratch"]
    fitting = []
    for name in NAMES:
        other = find_device(name)
        if shared / other.count + apart <= other.capacity:
            fitting.append((other.capacity * other.count, name))
    return [name for _, name in sorted(fitting)]
