"""GPUs by name, or by generation and memory: what XLA's compiler and the estimates need to know of them.

Sources: NVIDIA's data sheets and white papers for peaks (dense, bfloat16 with float32 sums; float16 on Turing),
bandwidths and multiprocessors; the smallest total that torch reports on Linux for the memory.
"""

from __future__ import annotations

import dataclasses
import re

from tpu_tune.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Card:
    """One kind of GPU.

    Attributes:
      device_kind: the name by which CUDA and jax call it.
      size: GB on the box.
      memory_gib: memory as CUDA reports it, in GiB; the driver and ECC keep the rest.
      tflops: peak of dense 16-bit products, 1e12 FLOP/s.
      bandwidth_gb: memory bandwidth, 1e9 bytes/s.
      capability: CUDA's compute capability.
      cores: streaming multiprocessors.
      clock_ghz: boost clock.
      l2_mib: second-level cache, in MiB.
    """

    device_kind: str
    size: float
    memory_gib: float
    tflops: float
    bandwidth_gb: float
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    l2_mib: float


CARDS = {
    # Of two with the same memory in a generation the first stands for it (`find_card`).
    "t4": Card("Tesla T4", 16, 14.56, 65, 320, (7, 5), 40, 1.59, 4),
    "rtx2080ti": Card("NVIDIA GeForce RTX 2080 Ti", 11, 10.75, 53.8, 616, (7, 5), 68, 1.55, 5.5),
    "rtx3060": Card("NVIDIA GeForce RTX 3060", 12, 11.63, 25.5, 360, (8, 6), 28, 1.78, 3),
    "rtx3070": Card("NVIDIA GeForce RTX 3070", 8, 7.66, 40.6, 448, (8, 6), 46, 1.73, 4),
    "rtx3080": Card("NVIDIA GeForce RTX 3080", 10, 9.65, 59.5, 760, (8, 6), 68, 1.71, 5),
    "rtx3090": Card("NVIDIA GeForce RTX 3090", 24, 23.58, 71, 936, (8, 6), 82, 1.70, 6),
    "rtx4060": Card("NVIDIA GeForce RTX 4060", 8, 7.62, 30.2, 272, (8, 9), 24, 2.46, 24),
    "rtx4070": Card("NVIDIA GeForce RTX 4070", 12, 11.60, 58.3, 504, (8, 9), 46, 2.48, 36),
    "rtx4080": Card("NVIDIA GeForce RTX 4080", 16, 15.57, 97.5, 717, (8, 9), 76, 2.51, 64),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", 24, 23.53, 165, 1008, (8, 9), 128, 2.52, 72),
    "rtx5070": Card("NVIDIA GeForce RTX 5070", 12, 11.50, 61.7, 672, (12, 0), 48, 2.51, 48),
    "rtx5090": Card("NVIDIA GeForce RTX 5090", 32, 31.36, 209.5, 1792, (12, 0), 170, 2.41, 96),
    "rtxpro6000": Card(
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 96, 94.97, 503.8, 1792, (12, 0), 188, 2.62, 128
    ),
    "gb10": Card("NVIDIA GB10", 128, 119.6, 125, 273, (12, 1), 48, 2.42, 24),  # shares its memory with the CPU
    "l4": Card("NVIDIA L4", 24, 22.03, 121, 300, (8, 9), 58, 2.04, 48),
    "a100-40g": Card("NVIDIA A100-SXM4-40GB", 40, 39.39, 312, 1555, (8, 0), 108, 1.41, 40),
    "a100-80g": Card("NVIDIA A100-SXM4-80GB", 80, 79.14, 312, 2039, (8, 0), 108, 1.41, 40),
    "h100": Card("NVIDIA H100 80GB HBM3", 80, 79.10, 989, 3352, (9, 0), 132, 1.98, 50),
    "h200": Card("NVIDIA H200", 141, 139.72, 989, 4800, (9, 0), 132, 1.98, 50),
    "b200": Card("NVIDIA B200", 180, 178.35, 2250, 7700, (10, 0), 148, 1.97, 126),
    "rtx6000ada-48g": Card("NVIDIA RTX 6000 Ada Generation", 48, 47.38, 364, 960, (8, 9), 142, 2.51, 96),
}
GENERATIONS = {  # compute capabilities; ampere first, the oldest that computes in bfloat16
    "ampere": ((8, 0), (8, 6)),
    "ada": ((8, 9),),
    "hopper": ((9, 0),),
    "blackwell": ((10, 0), (12, 0), (12, 1)),
    "turing": ((7, 5),),
}
MOST_MEMORY = 1024  # GB
_BY_MEMORY = re.compile(rf"({'|'.join(GENERATIONS)})-(\d{{1,6}}(?:\.\d{{1,6}})?)g")
# By compute capability, of one streaming multiprocessor: float32 units, threads, shared memory, and the shared memory
# that one block may use (CUDA C Programming Guide, table of technical specifications).
_SM = {
    (7, 5): (64, 1024, 65536, 65536),
    (8, 0): (64, 2048, 167936, 166912),
    (8, 6): (128, 1536, 102400, 101376),
    (8, 9): (128, 1536, 102400, 101376),
    (9, 0): (128, 2048, 233472, 232448),
    (10, 0): (128, 2048, 233472, 232448),
    (12, 0): (128, 1536, 102400, 101376),
    (12, 1): (128, 1536, 102400, 101376),
}


def by_memory(gigabytes: float, generation: str = "ampere") -> str:
    """Return the name of a card of a generation with so much memory (as on its box), such as `ampere-12g`.

    Raises:
      UserError: no such generation, or no card has so much memory.
    """
    if generation not in GENERATIONS:
        raise UserError(f"--memory: there is no generation '{generation}'; choose {', '.join(GENERATIONS)}")
    if not 1 <= gigabytes <= MOST_MEMORY:
        raise UserError(f"--memory is {gigabytes:g}; give a card's memory in GB, from 1 to {MOST_MEMORY}")
    return f"{generation}-{gigabytes:.6f}".rstrip("0").rstrip(".") + "g"


def find_card(name: str) -> tuple[Card, str] | None:
    """Return (the card of a name, what it is taken for), or None where no card is called so.

    A card that is given by generation and memory has the speed of that generation's card next to it in memory, and of
    its memory the same share that CUDA may use.
    """
    if name in CARDS:
        return CARDS[name], ""
    given = _BY_MEMORY.fullmatch(name)
    if given is None or not 1 <= float(given[2]) <= MOST_MEMORY:
        return None
    size = float(given[2])
    near = min(
        (known for known, card in CARDS.items() if card.capability in GENERATIONS[given[1]]),
        key=lambda known: abs(CARDS[known].size - size),
    )
    memory = CARDS[near].memory_gib * size / CARDS[near].size
    return dataclasses.replace(CARDS[near], size=size, memory_gib=memory), f"as fast as an {near}"


def target_config(card: Card) -> str:
    """Return XLA's GpuTargetConfigProto of a card, as text."""
    units, threads, shared, per_block = _SM[card.capability]
    return f"""gpu_device_info {{
  cuda_compute_capability {{ major: {card.capability[0]} minor: {card.capability[1]} }}
  core_count: {card.cores} fpus_per_core: {units} threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: {threads}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {per_block} shared_memory_per_core: {shared}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  l2_cache_size: {int(card.l2_mib * 2**20)} clock_rate_ghz: {card.clock_ghz}
  memory_bandwidth: {int(card.bandwidth_gb * 1e9)} device_memory_size: {int(card.memory_gib * GIB)}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 13 }}
device_description_str: "{card.device_kind}"
"""
