"""How long a TPU takes for a compiled program, by what libtpu's compiler says of it, with no TPU at hand.

Five kinds of evidence, each where it agrees with known facts (checked on a v5e's programs):

- whatever was dumped: its bundles (`bundles`);
- products that XLA fuses: the compiler's own `estimated_cycles`, and the bytes they move;
- Pallas kernels: a share of the peak that is stored here;
- other operations: their bytes at 90% of the bandwidth, or their vector instructions;
- collectives: their bytes by the links' bandwidth. Asynchronous ones are hidden by the compute beside them.
"""

from __future__ import annotations

import hashlib
import math
import os
import re

from tpu_tune.kernels.splash import gradient_keys
from tpu_tune.planning import bundles
from tpu_tune.planning.devices import Device
from tpu_tune.planning.hlo import Computation, Module, Operation, Shape, phase
from tpu_tune.planning.program_time import (
    BY_COMPILER,
    BY_KERNELS,
    Cost,
    Price,
    collectives,
    costs,
    is_attention,
    is_copy,
    is_dropout,
    link_seconds,
)

LINK = {  # bytes a second of one link in one direction, as published less a tenth
    "TPU v2": 56e9, "TPU v3": 74e9, "TPU v4": 45e9, "TPU v5 lite": 45e9, "TPU v5": 90e9, "TPU v6 lite": 90e9,
    "TPU7x": 90e9,
}  # fmt: skip
# Shares of the MXU's peak that Pallas kernels reach where their bundles were not dumped, from the bundles of others: of
# the quantized product by tokens at a time, and of splash attention's causal work on whole columns.
PRODUCT_SHARE = {2048: 0.89, 512: 0.85}  # a v5e's and a v5p's
ATTENTION_SHARE = {"forward": 0.42, "backward": 0.56}
_OLD = {2048: 0.33, 512: 0.33}
_WIDE = {2048: 0.78, 512: 0.35}  # four times the matrix units beside the same vector unit, which decodes
_PRODUCT_SHARES = {
    "TPU v2": _OLD, "TPU v3": _OLD, "TPU v4": {2048: 0.75, 512: 0.46}, "TPU v6 lite": _WIDE, "TPU7x": _WIDE,
}  # fmt: skip
_WIDE_ATTENTION = {"forward": 0.14, "backward": 0.2}
_ATTENTION_SHARES = {"TPU v6 lite": _WIDE_ATTENTION, "TPU7x": _WIDE_ATTENTION}
# Columns of a matrix unit: narrower products take as long, and estimated_cycles says up to three times that.
_NARROW = 128
_KEYS = 512  # of a block of attention's kernels
_SLOW = {
    "exponential": 8, "log": 8, "tanh": 8, "divide": 6, "rsqrt": 4, "sqrt": 4, "power": 16, "logistic": 10, "sine": 20,
    "cosine": 20, "erf": 10,
}  # fmt: skip
_NO_INSTRUCTIONS = {
    "parameter", "constant", "bitcast", "fusion", "broadcast", "tuple", "get-tuple-element", "reshape", "slice",
    "dynamic-slice", "iota", "dynamic-update-slice",
}  # fmt: skip
_FLAGS = 2  # the memory of what says that a copy has arrived
_DONE = "async-collective-done"  # a fusion that ends what others have begun
_ASYNC = {"copy-start", "slice-start", "dynamic-slice-start"}
_LANES = 4096  # numbers that a core's vector unit works on a cycle: four instructions on 1,024 each


def estimate(text: str, device: Device, dump: str = "") -> tuple[list[Cost], str]:
    """Return what each operation takes, and how that is known.

    Args:
      text: `compiled.as_text()`.
      device: the TPU it was compiled for.
      dump: a directory with the bundles of its kernels, or "".
    """
    module = Module(text)
    dumped = bundles.dumped(dump) if dump and os.path.isdir(dump) else {}
    pricing = _Pricing(module, device, dumped)
    found = costs(module, pricing.price, pricing.bandwidth)
    if dumped:
        return found, BY_KERNELS
    return found, BY_COMPILER + (", kernels at a stored share of the peak" if pricing.by_share else "")


class _Pricing:
    """Prices of a module's operations; `by_share` says whether a kernel's share of the peak was taken for one."""

    def __init__(self, module: Module, device: Device, dumped: dict[str, str]):
        self.module, self.device, self.dumped = module, device, dumped
        self.core = bundles.core_of(device)
        self.bandwidth = device.bandwidth * bundles.BANDWIDTH_SHARE
        self.by_share = False
        self._alike: dict[str, bundles.Timing | None] = {}  # what a dump holds, without names -> its time

    def price(self, one: Operation, around: Computation) -> Price | None:
        """Return what one run of an operation takes."""
        if one.opcode in _ASYNC:
            sizes = [shape.bytes for shape in one.shapes if shape.dims]
            return Price(0.0, "copies", "bytes", min(sizes, default=0.0))
        if one.opcode.endswith(("-done", "-update")) or one.name.startswith(_DONE):
            return None
        links = 2 * LINK[self.device.device_kind]  # a ring uses both directions
        sent = sum(link_seconds(i, links, self.device.count) for i in collectives(one, self.module.fused(one)))
        hidden = "-start" in one.opcode or "-start" in one.name
        goes_on = sent and _goes_on(one) and not hidden
        sent = 0.0 if goes_on else sent
        if sent and (hidden or not self.module.products(one, around)):
            return Price(0.0 if hidden else sent, "collectives", "link", behind=sent if hidden else 0.0)
        sources = self.module.sources(one)
        is_kernel = "tpu_custom_call" in one.text
        kind, products = self._kind(one, around, sources)
        if is_kernel and kind != "attention":
            kind = "products"
        name = self._twin(one, around) if is_kernel and one.name not in self.dumped else one.name
        timing = self._run(name, _unmasked(one) if is_kernel and kind == "attention" else 1.0)
        if timing:
            return Price(timing.seconds, kind, "bundles", timing.hbm_bytes)
        if is_kernel:
            return self._kernel(one, around, kind)
        moved = self.module.traffic(one, around)
        memory = moved / self.bandwidth
        if products:
            cycles = one.number("estimated_cycles") / self.core.hertz
            least = sum(_padded(*sizes) for sizes in products) / self.device.flops
            if goes_on:  # its cycles, results and operands are the collective's too
                return Price(least, kind, "FLOPs")
            if cycles and min(min(sizes[1:]) for sizes in products) >= _NARROW:
                least = cycles
            return Price(max(least, memory), kind, "estimate" if cycles else "FLOPs", moved, behind=sent)
        return Price(max(memory, self._vector_seconds(one)), kind, "bytes", moved)

    def _kind(self, one: Operation, around: Computation, sources: str) -> tuple[str, list[tuple[int, int, int, int]]]:
        products = self.module.products(one, around)
        if is_attention(one, sources):
            return "attention", products
        if products:
            return "products", products
        if is_dropout(one, sources):
            return "dropout", products
        return ("copies" if is_copy(one, self.module.fused(one)) else "elementwise"), products

    def _vector_seconds(self, one: Operation) -> float:
        numbers = sum(
            _SLOW.get(inner.opcode, 1) * max((shape.size for shape in inner.shapes), default=0)
            for inner in (one, *self.module.fused(one).values())
            if inner.opcode not in _NO_INSTRUCTIONS
        )
        return numbers / _LANES / self.core.hertz

    def _kernel(self, one: Operation, around: Computation, kind: str) -> Price:
        """Return the price of a Pallas kernel by its work at a share of the peak, which its memory is hidden behind."""
        self.by_share = True
        attention = kind == "attention"
        device = self.device.device_kind
        work, part = _attention_work(one, device) if attention else _product_work(one, around, device)
        seconds = max(work / (self.device.flops * part), sum(s.moved for s in one.shapes) / self.bandwidth)
        return Price(seconds, kind, "share")

    def _twin(self, one: Operation, around: Computation) -> str:
        """Return a dumped kernel of the same shapes: of kernels that are the same the compiler may dump one."""
        own = _signature(one, around)
        for computation in self.module.computations.values():
            for other in computation.values():
                if "tpu_custom_call" in other.text and other.name in self.dumped:
                    if _signature(other, computation) == own:
                        return other.name
        return one.name

    def _run(self, name: str, share: float) -> bundles.Timing | None:
        """Return an operation's time by its bundles; None where none were dumped, or they could not be followed."""
        if name not in self.dumped:
            return None
        path = self.dumped[name]
        with open(path, errors="replace") as file:
            content = re.sub(r"/\*.*?\*/", "", file.read(), flags=re.S)
        key = f"{hashlib.sha256(content.encode()).hexdigest()} {share}"
        if key not in self._alike:
            try:
                self._alike[key] = bundles.run_bundles(path, self.core, share)
            except ValueError:
                self._alike[key] = None
        return self._alike[key]


def _goes_on(one: Operation) -> bool:
    """Whether a fusion carries on a collective that has begun in another: the text of each has it whole."""
    return one.opcode == "fusion" and any(shape.space == _FLAGS and not shape.dims for shape in one.shapes)


def _signature(one: Operation, around: Computation) -> tuple[object, ...]:
    """Return what a kernel returns and what it reads, as dtypes and sizes."""
    given = [around[name].shapes for name in one.operands if name in around]
    return tuple((shape.dtype, shape.dims) for shapes in (one.shapes, *given) for shape in (*shapes, Shape("pred", ())))


def _padded(batch: int, m: int, n: int, k: int) -> float:
    """Return the operations of a product whose sides fill whole columns of a matrix unit."""
    columns = [max(size, _NARROW) for size in (n, k)]
    return 2.0 * batch * m * math.prod(columns)


def _product_work(one: Operation, around: Computation, device_kind: str) -> tuple[float, float]:
    """Return the operations of a quantized product's kernel, and its share of the peak."""
    sides = [around[name].shapes[0] for name in one.operands if name in around and around[name].shapes]
    floats = [side for side in sides if side.dtype in ("bf16", "f32", "f16") and len(side.dims) >= 2]
    left, result = max(floats, key=lambda side: side.size, default=one.shapes[0]), one.shapes[0]
    tokens = result.size // max(result.dims[-1], 1)
    work = 2.0 * result.size * (left.dims[-1] if left.dims else 1)
    shares = _PRODUCT_SHARES.get(device_kind, PRODUCT_SHARE)
    return work, shares[min(shares, key=lambda size: abs(math.log(size / max(tokens, 1))))]


def _attention_work(one: Operation, device_kind: str) -> tuple[float, float]:
    """Return the causal operations of a splash attention kernel on (rows, heads, tokens, width), and its share."""
    sizes = max((shape.dims for shape in one.shapes), key=math.prod, default=(1, 1, 1))
    width, tokens = sizes[-1], sizes[-2] if len(sizes) > 1 else 1
    heads, forward = math.prod(sizes[:-2]), _is_forward(one)
    products = 2 if forward else 4 if "dkv" in one.name else 3
    if _gives_all(one):  # the queries' gradient once for each block of keys
        products, heads = 5, heads // _key_blocks(one, tokens)
    work = products * 2.0 * heads * max(width, _NARROW) * tokens * (tokens + 1) / 2
    return work, _ATTENTION_SHARES.get(device_kind, ATTENTION_SHARE)["forward" if forward else "backward"]


def _gives_all(one: Operation) -> bool:
    """Whether a kernel of attention returns the gradients of queries, keys and values at once."""
    return "dkv" in one.name and sum(len(shape.dims) > 2 for shape in one.shapes) > 2


def _key_blocks(one: Operation, tokens: int) -> int:
    """Return in how many blocks a kernel takes the keys."""
    sizes = max((shape.dims for shape in one.shapes), key=math.prod, default=(1, 1))
    keys = gradient_keys(tokens, sizes[-1]) if _gives_all(one) and tokens % _NARROW == 0 else 0
    return max(tokens // (keys or _KEYS), 1)


def _is_forward(one: Operation) -> bool:
    return "fwd" in one.name or (phase(one.op_name) != "backward" and not re.search("d(kv|q)", one.name))


def _unmasked(one: Operation) -> float:
    """Return the share of a kernel's blocks of keys that causal attention does not mask."""
    tokens = max((shape.dims[-2] for shape in one.shapes if len(shape.dims) > 1), default=_KEYS)
    count = _key_blocks(one, tokens)
    return (count + 1) / (2 * count)
