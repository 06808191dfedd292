"""The catalogue of devices that a plan can be made for, with the properties that the compilers need.

TPU slices are named as in Google Cloud (v2, v3, v4, v5p and tpu7x count TensorCores, v5e and v6e chips), GPUs by card,
or by generation and memory (`ampere-12g`; `cards`). Capacity is the memory that a program may use. For a TPU it is the
size that its compiler names when a program is too large. For a GPU it is the card's memory as CUDA reports it, times
the share that `launch/common.sh` sets, minus a reserve.

Sources: cloud.google.com/tpu/docs (system architecture of each version) for peaks (dense, bfloat16 with float32 sums)
and bandwidths, libtpu 0.0.42 for a TPU's capacity.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re

from tpu_tune.errors import UserError
from tpu_tune.planning.cards import CARDS, GENERATIONS, GIB, find_card, target_config

GPU_FRACTION = 0.92  # share of a GPU's memory, set by launch/common.sh; jax's own default is 0.75
GPU_RESERVE = 256 * 2**20  # cuBLAS workspace, the next batch and fragmentation; an estimate, not measured
MOST_DEVICES = 1024  # bytes are counted over as many CPU devices


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of machine to plan for.

    Attributes:
      name: name in the catalogue, with `x4` added for four GPUs.
      kind: tpu | gpu.
      count: number of devices as JAX counts them (a v2, v3 or tpu7x chip is two).
      capacity: bytes that a program may use on each device.
      capacity_note: source of the capacity, for the reader of a plan.
      flops: peak of one device, FLOP/s.
      bandwidth: memory bandwidth of one device, bytes/s.
      topology: arguments of `jax.experimental.topologies.get_topology_desc`.
      device_kind: JAX's name of the device; of a GPU, the card's name.
      bfloat16: whether it multiplies bfloat16 natively; older GPUs convert it to float32.
    """

    name: str
    kind: str
    count: int
    capacity: int
    capacity_note: str
    flops: float
    bandwidth: float
    topology: dict[str, object]
    device_kind: str
    bfloat16: bool = True


@dataclasses.dataclass(frozen=True)
class _Tpu:
    device_kind: str
    capacity_gib: float  # per device
    tflops: float  # per device
    bandwidth_gb: float  # per device
    per_chip: int  # devices per chip
    unit: int  # what the number in a slice's name counts, per chip
    shapes: dict[int, str]  # the number in a slice's name -> topology
    chip_config: str = ""


_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_OLD = {8: "2x2", 32: "4x4", 128: "8x8", 256: "8x16", 512: "16x16"}
_CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"}
_TPUS = {
    "v2": _Tpu("TPU v2", 7.48, 22.5, 350, 2, 2, _OLD),
    "v3": _Tpu("TPU v3", 15.48, 61.5, 450, 2, 2, _OLD),
    "v4": _Tpu("TPU v4", 30.75, 275, 1228, 1, 2, _CUBES, "megacore"),  # two cores of a chip are one device
    "v5e": _Tpu("TPU v5 lite", 15.75, 197, 819, 1, 1, _FLAT),
    "v5p": _Tpu("TPU v5", 95.74, 459, 2765, 1, 2, _CUBES),
    "v6e": _Tpu("TPU v6 lite", 31.25, 918, 1640, 1, 1, _FLAT),
    "tpu7x": _Tpu("TPU7x", 94.75, 1153.5, 3690, 2, 2, _CUBES),
}


# Devices that `plan` lists and `--suggest` tries, from small to large; other slices of the same TPUs are accepted too.
NAMES = (
    "v2-8", "v3-8", "v4-8", "v5e-1", "v5e-4", "v5e-8", "v5e-64", "v6e-1", "v6e-8", "v5p-8", "tpu7x-8",
    *CARDS,
)  # fmt: skip
_TPU_NAME = re.compile(r"(v\d[ep]?|tpu7x)-(\d{1,9})")


def find_device(text: str) -> Device:
    """Return the device with a name, `NAME` or for several GPUs `NAME xN` (also `NAMExN`).

    Raises:
      UserError: no such device (the message lists the nearest names), a TPU slice of a size that does not exist, or
        more than `MOST_DEVICES`.
    """
    name, number = " ".join(text.lower().split()), "1"
    several = re.fullmatch(r"(.+?) ?[x*] ?(\d+)", name)
    if several and find_card(name) is None and (find_card(several[1]) or _TPU_NAME.fullmatch(several[1])):
        name, number = several[1], several[2].lstrip("0") or "0"
    if len(number) > 9 or not 1 <= int(number) <= MOST_DEVICES:
        raise UserError(f"device '{text[:60]}': there must be at least one, and {MOST_DEVICES} at most")
    count = int(number)
    if find_card(name):
        return _gpu(name, count)
    tpu = _TPU_NAME.fullmatch(name)
    if tpu is None or tpu[1] not in _TPUS:
        raise _unknown(name)
    if count != 1:
        raise UserError(f"device '{text}': TPUs come in slices; name a larger slice, such as {_larger(tpu[1])}")
    return _slice(tpu[1], int(tpu[2]))


def device_of(kind: str, count: int) -> Device | None:
    """Return the catalogue's entry for `count` devices that JAX names `kind`, or None."""
    for version, tpu in _TPUS.items():
        number = count // tpu.per_chip * tpu.unit
        if tpu.device_kind == kind and number in tpu.shapes:
            return _slice(version, number)
    cards = [name for name, card in CARDS.items() if card.device_kind == kind]
    return _gpu(cards[0], count) if cards and count <= MOST_DEVICES else None


def split_names(words: list[str]) -> list[str]:
    """Return the names in a command line's words: `t4 rtx4090 x2 v5e-8` and `t4,rtx4090 x2,v5e-8` are three devices."""
    names: list[str] = []
    for word in " ".join(words).replace(",", " , ").split():
        if names and names[-1] and re.fullmatch(r"[x*]\d*", word):
            names[-1] += f" {word}"
        elif names and names[-1].endswith((" x", " *")) and word.isdigit():
            names[-1] += word
        elif word != ",":
            names.append(word)
    return names


def _slice(version: str, number: int) -> Device:
    tpu = _TPUS[version]
    if number not in tpu.shapes:
        sizes = ", ".join(f"{version}-{size}" for size in tpu.shapes)
        raise UserError(f"device '{version}-{number}': there is no such slice; choose {sizes}")
    topology: dict[str, object] = {"platform": "tpu", "topology_name": f"{version}:{tpu.shapes[number]}"}
    if tpu.shapes[number] == "1x1":
        topology["chips_per_host_bounds"] = [1, 1, 1]
    if tpu.chip_config:
        topology["chip_config_name"] = tpu.chip_config
    return Device(
        name=f"{version}-{number}",
        kind="tpu",
        count=number // tpu.unit * tpu.per_chip,
        capacity=int(tpu.capacity_gib * GIB),
        capacity_note="the compiler's limit",
        flops=tpu.tflops * 1e12,
        bandwidth=tpu.bandwidth_gb * 1e9,
        topology=topology,
        device_kind=tpu.device_kind,
    )


def _gpu(name: str, count: int) -> Device:
    card, taken_for = find_card(name)
    share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
    try:
        fraction = float(share) if share else GPU_FRACTION
    except ValueError:
        raise UserError(f"XLA_PYTHON_CLIENT_MEM_FRACTION is '{share}'; it must be a number") from None
    source = "set in the environment" if share else "as launch/common.sh sets it"
    return Device(
        name=name if count == 1 else f"{name} x{count}",
        kind="gpu",
        count=count,
        capacity=int(card.memory_gib * GIB * fraction) - GPU_RESERVE,
        capacity_note=(
            f"{fraction:.0%} of {card.memory_gib * GIB / 1e9:.1f} GB, {source}, minus {GPU_RESERVE / 1e9:.2f} GB"
            + (f"; {taken_for}" if taken_for else "")
        ),
        flops=card.tflops * 1e12,
        bandwidth=card.bandwidth_gb * 1e9,
        topology={
            "platform": "cuda",
            "topology_name": name,
            "target_config": target_config(card),
            "topology": f"1x1x{count}",
        },
        device_kind=card.device_kind,
        bfloat16=card.capability >= (8, 0),
    )


def _larger(version: str) -> str:
    return ", ".join(f"{version}-{size}" for size in list(_TPUS[version].shapes)[1:3])


def _unknown(name: str) -> UserError:
    near = difflib.get_close_matches(name, NAMES, 3, 0.4)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return UserError(
        f"unknown device '{name[:40]}'; {hint}the devices are {', '.join(NAMES)}, and other cards by generation and "
        f"memory, such as ampere-12g ({', '.join(GENERATIONS)})"
    )
