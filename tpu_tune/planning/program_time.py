"""The time of a compiled program, operation by operation; `tpu_time` and `gpu_time` say what each operation takes.

Every figure here is an estimate from what the compiler has written: nothing ran.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

from tpu_tune.planning.hlo import Computation, Module, Operation

KINDS = ("products", "attention", "unpacking", "dropout", "elementwise", "copies", "collectives")
BY_COMPILER = "by the compiler"
BY_KERNELS = "by the compiler with its kernels' bundles"
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "after-all", "partition-id", "replica-id",
    "domain", "opt-barrier", "add-dependency",
}  # fmt: skip
_COLLECTIVE = re.compile(r"all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-")
_COPY = {
    "copy", "transpose", "reshape", "bitcast", "dynamic-slice", "dynamic-update-slice", "slice", "concatenate", "pad",
    "convert", "broadcast",  # casts, and zeros to start from
    "fusion", "parameter", "constant", "tuple", "get-tuple-element", "copy-start", "slice-start",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an operation takes in one run of the program.

    Attributes:
      seconds: of all its runs.
      kind: one of `KINDS`.
      name: of the operation.
      runs: how often it runs.
      evidence: what its time is from, in a word or two.
    """

    seconds: float
    kind: str
    name: str
    runs: float
    evidence: str


@dataclasses.dataclass(frozen=True)
class Price:
    """What one run of an operation takes.

    Attributes:
      seconds: it keeps the device's compute units so long.
      kind: one of `KINDS`.
      evidence: what `seconds` are from.
      bytes: moved from and to the device's memory.
      behind: seconds that pass behind others (an asynchronous collective); what they do not hide is added.
    """

    seconds: float
    kind: str
    evidence: str
    bytes: float = 0.0
    behind: float = 0.0


Pricing = Callable[[Operation, Computation], Price | None]


def costs(module: Module, price: Pricing, bandwidth: float) -> list[Cost]:
    """Return what each operation of a program takes.

    A loop's body counts as often as it runs (where only the data say it, half as often as the loop around, as causal
    blocks do), of a conditional the dearest branch. What a body moves asynchronously takes no time as long as
    its other operations do; the rest is a cost of its own. Collectives also pass behind the loops in a body.

    Args:
      module: the program.
      price: what one run of an operation takes; None for nothing.
      bandwidth: bytes a second of the device's memory.
    """

    def walk(name: str, runs: float, around: int) -> list[Cost]:
        computation = module.computations.get(name, {})
        found: list[Cost] = []
        seconds = moved = behind = inner = 0.0
        for one in computation.values():
            if one.opcode == "while":
                turns = module.turns(one)
                loop = walk(one.called("body"), runs * (turns or (around + 1) / 2), turns or 1)
                found, inner = found + loop, inner + total(loop) / runs
            elif one.opcode == "conditional":
                found += max((walk(branch, runs, around) for branch in module.branches(one)), key=total, default=[])
            elif one.opcode == "call":
                found += walk(one.called("to_apply"), runs, around)
            elif one.opcode == "async-start" and one.called("calls"):
                behind += total(walk(one.called("calls"), 1.0, around))
            elif one.opcode not in FREE and (cost := price(one, computation)) is not None:
                seconds, moved, behind = seconds + cost.seconds, moved + cost.bytes, behind + cost.behind
                if cost.seconds:
                    found.append(Cost(cost.seconds * runs, cost.kind, one.name, runs, cost.evidence))
        for kind, wait in (("copies", moved / bandwidth - seconds), ("collectives", behind - seconds - inner)):
            if wait > 0:
                found.append(Cost(wait * runs, kind, f"{name}: not hidden", runs, "bytes"))
        return found

    return walk(module.entry, 1.0, 1)


def total(found: Iterable[Cost]) -> float:
    """Return the seconds of costs."""
    return sum(cost.seconds for cost in found)


def summary(found: list[Cost], how: str) -> dict[str, Any]:
    """Return costs as a plan has them: `seconds`, `kinds` (name -> seconds, without those of none), `how`."""
    kinds: dict[str, float] = collections.defaultdict(float)
    for cost in found:
        kinds[cost.kind] += cost.seconds
    return {
        "seconds": total(found),
        "kinds": {kind: kinds[kind] for kind in KINDS if kinds[kind] > 0},
        "how": how,
    }


def collectives(one: Operation, fused: Computation) -> list[Operation]:
    """Return the operations that move data between devices: this one (its start, where it has one), or those in it."""
    return [inner for inner in (one, *fused.values()) if _COLLECTIVE.match(inner.opcode)]


def is_attention(one: Operation, sources: str) -> bool:
    """Whether an operation belongs to attention, or to what stands in its place in other layers."""
    target = re.search(r'custom_call_target="([^"]*)"', one.text)
    text = f"{one.name} {one.op_name} {sources} {target[1] if target else ''}".lower()
    return any(name in text for name in ("splash", "mha", "fmha", "kernels/blockwise", "kernels/delta_rule")) or (
        "kernels/attention" in text and "kernels/gpu" not in text
    )


def is_dropout(one: Operation, sources: str) -> bool:
    """Whether an operation draws random numbers."""
    text = f"{one.opcode} {one.op_name} {sources}"
    return any(name in text for name in ("random_bits", "threefry", "bernoulli", "rng"))


def is_copy(one: Operation, fused: Computation) -> bool:
    """Whether an operation only moves, lays out or casts data."""
    return {one.opcode, *(inner.opcode for inner in fused.values())} <= _COPY


def link_seconds(one: Operation, bandwidth: float, devices: int) -> float:
    """Return how long a collective takes on links of `bandwidth` bytes a second.

    Rings are assumed: each device sends (n - 1) / n of the whole, twice where it is reduced and gathered again.
    """
    grouped = re.search(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\})", one.text)
    count = devices
    if grouped:
        count = int(grouped[1]) if grouped[1] else len(grouped[2].split(","))
    if count < 2 and not one.opcode.startswith("collective-permute"):
        return 0.0
    whole = max((shape.bytes for shape in one.shapes), default=0.0)
    if one.opcode.startswith("collective-permute"):
        return whole / bandwidth
    if one.opcode.startswith("reduce-scatter"):
        whole *= count
    return whole * (count - 1) / count * (2 if one.opcode.startswith("all-reduce") else 1) / bandwidth
