"""The catalogue of devices that a plan can be made for, with the properties that the compilers need.

TPU slices are named as in Google Cloud (v2, v3, v4 and v5p count TensorCores, v5e and v6e chips), GPUs by card.
Capacity is the memory that a program may use. For a TPU it is the size that its compiler names when a program is too
large. For a GPU it is the card's memory as CUDA reports it, times the share that `launch/common.sh` sets, minus a
reserve.

Sources: cloud.google.com/tpu/docs (system architecture of each version) and NVIDIA's data sheets for peaks (dense,
bfloat16 with float32 sums; float16 on a T4) and bandwidths; libtpu 0.0.42 for a TPU's capacity; for a GPU's capacity
the smallest total that torch reports.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re

from tpu_tune.errors import UserError

GIB = 2**30
GPU_FRACTION = 0.92  # share of a GPU's memory, set by launch/common.sh; jax's own default is 0.75
GPU_RESERVE = 256 * 2**20  # cuBLAS workspace, the next batch and fragmentation; an estimate, not measured


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of machine to plan for.

    Attributes:
      name: name in the catalogue, with `x4` added for four GPUs.
      kind: tpu | gpu.
      count: number of devices as JAX counts them (a v2 or v3 chip is two).
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
}


@dataclasses.dataclass(frozen=True)
class _Gpu:
    device_kind: str
    memory_gib: float
    tflops: float
    bandwidth_gb: float
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    clock_ghz: float
    l2_mib: int


_GPUS = {
    "t4": _Gpu("Tesla T4", 14.56, 65, 320, (7, 5), 40, 1.59, 4),
    "l4": _Gpu("NVIDIA L4", 22.03, 121, 300, (8, 9), 58, 2.04, 48),
    "rtx3090": _Gpu("NVIDIA GeForce RTX 3090", 23.58, 71, 936, (8, 6), 82, 1.70, 6),
    "rtx4080": _Gpu("NVIDIA GeForce RTX 4080", 15.57, 97.5, 717, (8, 9), 76, 2.51, 64),
    "rtx4090": _Gpu("NVIDIA GeForce RTX 4090", 23.53, 165, 1008, (8, 9), 128, 2.52, 72),
    "a100-40g": _Gpu("NVIDIA A100-SXM4-40GB", 39.39, 312, 1555, (8, 0), 108, 1.41, 40),
    "a100-80g": _Gpu("NVIDIA A100-SXM4-80GB", 79.14, 312, 2039, (8, 0), 108, 1.41, 40),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", 79.10, 989, 3352, (9, 0), 132, 1.98, 50),
    "h200": _Gpu("NVIDIA H200", 139.72, 989, 4800, (9, 0), 132, 1.98, 50),
    "rtx6000ada-48g": _Gpu("NVIDIA RTX 6000 Ada Generation", 47.38, 364, 960, (8, 9), 142, 2.51, 96),
}

# Devices that `plan` lists and `--suggest` tries, from small to large; other slices of the same TPUs are accepted too.
NAMES = (
    "v2-8", "v3-8", "v4-8", "v5e-1", "v5e-4", "v5e-8", "v5e-64", "v6e-1", "v6e-8", "v5p-8", "t4", "l4", "rtx3090",
    "rtx4080", "rtx4090", "a100-40g", "a100-80g", "h100", "h200", "rtx6000ada-48g",
)  # fmt: skip
_MOST_GPUS = 1024  # the plan makes a device of each
_TPU_NAME = re.compile(r"(v\d[ep]?)-(\d{1,9})")
# By compute capability, of one streaming multiprocessor: float32 units, threads, shared memory, and the shared memory
# that one block may use (CUDA C Programming Guide, table of technical specifications).
_SM = {
    (7, 5): (64, 1024, 65536, 65536),
    (8, 0): (64, 2048, 167936, 166912),
    (8, 6): (128, 1536, 102400, 101376),
    (8, 9): (128, 1536, 102400, 101376),
    (9, 0): (128, 2048, 233472, 232448),
}


def find_device(text: str) -> Device:
    """Return the device with a name, `NAME` or for several GPUs `NAME xN` (also `NAMExN`).

    Raises:
      UserError: no such device (the message lists the nearest names), or a TPU slice of a size that does not exist.
    """
    name, count = " ".join(text.lower().split()), 1
    several = re.fullmatch(r"(.+?) ?[x*] ?(\d{1,9})", name)
    if name not in _GPUS and several and (several[1] in _GPUS or _TPU_NAME.fullmatch(several[1])):
        name, count = several[1], int(several[2])
    if not 1 <= count <= _MOST_GPUS:
        raise UserError(f"device '{text[:60]}': there must be at least one, and {_MOST_GPUS} at most")
    if name in _GPUS:
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
    cards = [name for name, card in _GPUS.items() if card.device_kind == kind]
    return _gpu(cards[0], count) if cards else None


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
    card = _GPUS[name]
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
        ),
        flops=card.tflops * 1e12,
        bandwidth=card.bandwidth_gb * 1e9,
        topology={
            "platform": "cuda",
            "topology_name": name,
            "target_config": _target(card),
            "topology": f"1x1x{count}",
        },
        device_kind=card.device_kind,
        bfloat16=card.capability >= (8, 0),
    )


def _target(card: _Gpu) -> str:
    """Return XLA's GpuTargetConfigProto of a GPU, as text."""
    units, threads, shared, per_block = _SM[card.capability]
    return f"""gpu_device_info {{
  cuda_compute_capability {{ major: {card.capability[0]} minor: {card.capability[1]} }}
  core_count: {card.cores} fpus_per_core: {units} threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: {threads}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {per_block} shared_memory_per_core: {shared}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  l2_cache_size: {card.l2_mib * 2**20} clock_rate_ghz: {card.clock_ghz}
  memory_bandwidth: {int(card.bandwidth_gb * 1e9)} device_memory_size: {int(card.memory_gib * GIB)}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 13 }}
device_description_str: "{card.device_kind}"
"""


def _larger(version: str) -> str:
    return ", ".join(f"{version}-{size}" for size in list(_TPUS[version].shapes)[1:3])


def _unknown(name: str) -> UserError:
    near = difflib.get_close_matches(name, NAMES, 3, 0.4)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return UserError(f"unknown device '{name[:60]}'; {hint}the devices are {', '.join(NAMES)}")
