"""How long a GPU takes for a compiled program: the roofline of each kernel that XLA has written, with no GPU at hand.

    time of a kernel = max(its products on the tensor cores, its bytes) + its start

Products take whole waves of output tiles at the share of the peak that cuBLAS sustains; the tiles in the program are
not used, since without a card nothing is tuned. Bytes pass at a share of the bandwidth; what lies in a cache between
two kernels is not credited. The shares are of public measurements, none of ours: trust ratios, not milliseconds.
"""

from __future__ import annotations

import math
import re

from tpu_tune.planning.cards import CARDS, Card, find_card
from tpu_tune.planning.devices import Device
from tpu_tune.planning.hlo import Computation, Module, Operation
from tpu_tune.planning.program_time import (
    BY_COMPILER,
    Cost,
    Price,
    collectives,
    costs,
    is_attention,
    is_copy,
    is_dropout,
    link_seconds,
)

START = 1.5e-6  # seconds between two kernels
# By compute capability: shares of the tensor cores' peak and of the bandwidth that good kernels reach.
_SUSTAINED = {(7, 5): 0.45, (8, 0): 0.85, (8, 6): 0.90, (8, 9): 0.92, (9, 0): 0.70, (12, 0): 0.85}
_STREAMS = {(7, 5): 0.80}
# Shares of the peak that attention's kernels reach at 2,048 causal tokens, forward and backward.
_ATTENTION = {
    (7, 5): {},
    (8, 0): {"cudnn": (0.58, 0.48), "pallas": (0.50, 0.25)},
    (8, 9): {"cudnn": (0.85, 0.70), "pallas": (0.75, 0.45)},
    (9, 0): {"cudnn": (0.42, 0.36), "pallas": (0.30, 0.21)},  # backward in blocks of 64
}
_TILES = (  # rows, columns, share of the best tile's speed
    (128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.93), (128, 64, 0.80), (64, 128, 0.80), (64, 64, 0.65),
    (128, 32, 0.5), (64, 32, 0.40), (32, 128, 0.5), (64, 16, 0.25),
)  # fmt: skip
_LINK = {"h100": 360e9, "h200": 360e9, "a100-40g": 240e9, "a100-80g": 240e9, "b200": 720e9}  # NVLink; others have PCIe
_PCIE = {(7, 5): 10e9}
_UNPACKED = 1e5  # bytes of packed weights in a kernel that dequantizes


def estimate(text: str, device: Device) -> tuple[list[Cost], str]:
    """Return what each kernel of `compiled.as_text()` takes on a GPU of the catalogue, and how that is known."""
    module, card = Module(text), _card(device)
    bandwidth = device.bandwidth * _STREAMS.get(card.capability, 0.9)

    def price(one: Operation, around: Computation) -> Price | None:
        if one.opcode.endswith(("-done", "-update")):
            return None
        if sending := collectives(one, module.fused(one)):
            seconds = sum(link_seconds(inner, _link(device, card), device.count) for inner in sending) + START
            hidden = one.opcode.endswith("-start")
            return Price(0.0 if hidden else seconds, "collectives", "link", behind=seconds if hidden else 0.0)
        sources = module.sources(one)
        products = module.products(one, around)
        moved = module.traffic(one, around)
        kind = _kind(module, one, sources, bool(products))
        computing = sum(product_seconds(card, *sizes) for sizes in products)
        if kind == "attention" and not products:
            computing = _attention_seconds(one, around, card)
        seconds = max(computing, moved / bandwidth) + START
        return Price(seconds, kind, "products" if computing > moved / bandwidth else "bytes", moved)

    return costs(module, price, bandwidth), f"{BY_COMPILER}, each kernel by the roofline"


def product_seconds(card: Card, batch: int, m: int, n: int, k: int) -> float:
    """Return the time of a product in whole waves of tiles, with the best tile and the best split of k."""
    best, peak = math.inf, card.tflops * 1e12 * _SUSTAINED.get(card.capability, 0.85)
    for rows, columns, good in _TILES:
        tiles = batch * math.ceil(m / rows) * math.ceil(n / columns)
        for split in (1, 2, 4, 8, 16):
            if split > 1 and (k // split < 256 or tiles >= card.cores):
                continue
            waves = math.ceil(tiles * split / card.cores)
            best = min(best, waves * 2.0 * rows * columns * (k / split) / (peak * good / card.cores))
    return best


def _card(device: Device) -> Card:
    named = find_card(device.name.split(" x")[0])
    return named[0] if named else next(card for card in CARDS.values() if card.device_kind == device.device_kind)


def _link(device: Device, card: Card) -> float:
    return _LINK.get(device.name.split(" x")[0], _PCIE.get(card.capability, 20e9))


def _kind(module: Module, one: Operation, sources: str, has_products: bool) -> str:
    if is_attention(one, sources):
        return "attention"
    if has_products:
        return "products"
    fused = module.fused(one)
    packed = [i for i in fused.values() if i.opcode == "parameter" and i.shapes and i.shapes[0].dtype == "u8"]
    if any(inner.bytes > _UNPACKED for inner in packed) and not is_copy(one, fused):
        return "unpacking"
    if is_dropout(one, sources):
        return "dropout"
    return "copies" if is_copy(one, fused) else "elementwise"


def _attention_seconds(one: Operation, around: Computation, card: Card) -> float:
    """Return the time of a whole attention kernel, by its causal products on (rows, tokens, heads, width)."""
    implementation = "cudnn" if "fmha" in one.text else "pallas" if "triton" in one.text else ""
    nearest = max((known for known in _ATTENTION if known <= card.capability), default=(7, 5))
    shares = _ATTENTION[nearest].get(implementation)
    sizes = max(
        (shape.dims for name in one.operands if name in around for shape in around[name].shapes),
        key=math.prod,
        default=(),
    )
    if shares is None or len(sizes) < 4 or re.search("preprocess", one.op_name):
        return 0.0
    backward = "ackward" in one.text
    length, width = max(sizes[:-1]), sizes[-1]
    heads = math.prod(sizes[:-1]) // length  # of all rows
    work = 4.0 * heads * width * length * (length + 1) / 2 * (2.5 if backward else 1.0)
    return work / (card.tflops * 1e12 * shares[backward])
