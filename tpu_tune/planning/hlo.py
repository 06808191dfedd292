"""A compiled program's text (`compiled.as_text()`): its operations, how often each runs, and what each moves.

The text is XLA's, of a TPU's compiler as of CUDA's. Only what estimates of time need is read: shapes with the memory
they lie in, loops and their turns, products, and where in our sources an operation comes from.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.<>-]+) = ")
_SLICES = ("dynamic-slice", "slice", "gather")
_SAME = ("bitcast", "convert", "reshape", "copy", "transpose")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: its element type, dimensions, and the number of the memory it lies in (0: the device's own).

    A TPU stores tiles: `stored` is how many elements lie there, 0 where that is the array's size.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0
    stored: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return (self.stored or self.size) * _BYTES[self.dtype]

    @property
    def moved(self) -> float:
        """Bytes, if it lies in the device's memory and not in a kernel's own."""
        return 0.0 if self.space else self.bytes


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction.

    Attributes:
      name: its name in the module.
      opcode: e.g. fusion, while, custom-call.
      shapes: of its results.
      operands: names of the instructions that it reads.
      text: all behind the operands, and the operands.
      is_root: whether it is its computation's result.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool = False

    @property
    def op_name(self) -> str:
        """The path of traced functions that it comes from; "" for what the compiler added."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.text)
        return found[1] if found else ""

    @property
    def bytes(self) -> float:
        return sum(shape.bytes for shape in self.shapes)

    def called(self, key: str) -> str:
        """Return the computation that an attribute names, such as `body`; "" where there is none."""
        found = re.search(rf"[ ,]{key}=%?([\w.<>-]+)", self.text)
        return found[1] if found else ""

    def number(self, key: str) -> int:
        """Return a number that the compiler notes in quotes, such as `estimated_cycles`; 0 where there is none."""
        found = re.search(rf'"{key}":"?(\d+)', self.text)
        return int(found[1]) if found else 0


Computation = dict[str, Operation]


class Module:
    """A program.

    Attributes:
      computations: by name, the operations of each by name.
      entry: the name of the one that runs.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        here: Computation | None = None
        for line in text.splitlines():
            if not line.startswith(" ") and line.rstrip().endswith("{") and "(" in line:
                head = re.match(r"(ENTRY )?%?([\w.<>-]+)", line)
                here = self.computations.setdefault(head[2], {}) if head else None
                self.entry = head[2] if head and head[1] else self.entry
            elif here is not None and (one := _operation(line)):
                here[one.name] = one
        self._frames = _frames(text)

    def fused(self, one: Operation) -> Computation:
        """Return the operations inside a fusion, those of fusions in it too."""
        inside = self.computations.get(one.called("calls"), {}) if one.opcode == "fusion" else {}
        nested = [self.fused(inner) for inner in inside.values() if inner.opcode == "fusion"]
        return functools.reduce(lambda a, b: {**a, **b}, nested, dict(inside))

    def sources(self, one: Operation) -> str:
        """Return where in Python an operation, and what is fused in it, was traced: `file function; ...`."""
        numbers = {number for inner in (one, *self.fused(one).values()) for number in _frame_of(inner)}
        return "; ".join(self._frames.get(number, "") for number in sorted(numbers))

    def turns(self, loop: Operation) -> int | None:
        """Return how often a `while` runs its body; None where only the data say it."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text)
        if known:
            return int(known[1])
        bounds = [
            int(found[1])
            for one in self._all(loop.called("condition"))
            if one.opcode == "constant"
            and (found := re.match(r"constant\((\d+)\)", one.text))
            and not one.shapes[0].dims
        ]
        return max((number for number in bounds if number > 0), default=None)

    def branches(self, one: Operation) -> list[str]:
        """Return the computations of a conditional."""
        named = re.search(r"branch_computations=\{([^}]*)\}", one.text)
        names = re.findall(r"%?([\w.<>-]+)", named[1]) if named else []
        return [name for name in names or [one.called("true_computation"), one.called("false_computation")] if name]

    def traffic(self, one: Operation, around: Computation) -> float:
        """Return the bytes that an operation reads and writes in the device's memory.

        Of an operand that is only sliced the slice counts, of a result updated in place the update.
        """
        if one.opcode in _SLICES:
            return 2 * sum(shape.moved for shape in one.shapes)
        if one.opcode == "dynamic-update-slice":
            return (
                2 * sum(shape.moved for shape in around[one.operands[1]].shapes) if one.operands[1] in around else 0.0
            )
        inside = self.computations.get(one.called("calls"), {}) if one.opcode == "fusion" else {}
        written = sum(_written(one, inside))
        users = collections.defaultdict(list)
        for inner in inside.values():
            for name in inner.operands:
                users[name].append(inner)
        parameters = {
            int(found[1]): inner
            for inner in inside.values()
            if inner.opcode == "parameter" and (found := re.match(r"parameter\((\d+)\)", inner.text))
        }
        read = 0.0
        for number, name in enumerate(one.operands):
            source = around.get(name)
            if source is None or len(source.shapes) != 1 or source.shapes[0].space:
                continue
            if number in parameters:
                read += self._needed(parameters[number], users)
            elif name not in one.operands[:number]:
                read += source.shapes[0].bytes
        return written + read

    def _needed(self, value: Operation, users: dict[str, list[Operation]], depth: int = 0) -> float:
        """Return the bytes of a fusion's parameter that are read."""
        whole, total = value.bytes, 0.0
        for user in users[value.name]:
            each = value.bytes / max(value.shapes[0].size, 1)
            if user.opcode in _SLICES and user.operands[0] == value.name:
                total += each * user.shapes[0].size
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
                continue  # in place
            elif user.opcode in _SAME and depth < 6 and users[user.name]:
                total += self._needed(user, users, depth + 1) * each * user.shapes[0].size / max(user.bytes, 1)
            elif user.opcode == "fusion":
                slices = [i for i in self.fused(user).values() if i.opcode == "dynamic-slice"]
                total += each * slices[0].shapes[0].size if slices else whole
            else:
                return whole
        return min(total, whole)

    def products(self, one: Operation, around: Computation) -> list[tuple[int, int, int, int]]:
        """Return (batch, m, n, k) of each product in an operation."""
        inside = self.fused(one)
        found = [_product(inner, inside) for inner in inside.values()]
        return [sizes for sizes in [*found, _product(one, around)] if sizes]

    def _all(self, name: str) -> Iterator[Operation]:
        for one in self.computations.get(name, {}).values():
            yield one
            yield from self._all(one.called("calls")) if one.called("calls") else ()


def phase(op_name: str) -> str:
    """Return the part of a training step that an operation's path says: forward | remat | backward | update."""
    if "rematted_computation" in op_name:
        return "remat"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "update"


def _operation(line: str) -> Operation | None:
    head = _NAME.match(line)
    if not head:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[head.end() :])
    end = _end(rest, 0) if rest.startswith("(") else _end_of_shape(rest)  # the shape may be a tuple with spaces
    call = re.match(r"\s*([\w-]+)\(", rest[end:])
    if not call:
        return None
    start = end + call.end() - 1
    operands = re.findall(r"%([\w.<>-]+)", rest[start : _end(rest, start)])
    text = rest[end:].strip()
    return Operation(head[2], call[1], _shapes(rest[:end]), tuple(operands), text, bool(head[1]))


def _end(text: str, start: int) -> int:
    """Return the place behind the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "({[") - (text[place] in ")}]")
        if depth == 0:
            return place + 1
    return len(text)


def _end_of_shape(text: str) -> int:
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == " " and depth == 0:
            return place
    return len(text)


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        if dtype in _BYTES:
            space = re.search(r"S\((\d+)\)", layout)
            sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
            found.append(Shape(dtype, sizes, int(space[1]) if space else 0, _stored(sizes, layout)))
    return tuple(found)


def _stored(sizes: tuple[int, ...], layout: str) -> int:
    """Return how many elements tiles hold: the last two dimensions of a layout as `2,1,0:T(8,128)` fill whole ones."""
    tile = re.match(r"([\d,]+):T\((\d+),(\d+)\)", layout)
    if not tile or len(sizes) < 2:
        return 0
    padded = list(sizes)
    for dimension, unit in zip(map(int, tile[1].split(",")), (int(tile[3]), int(tile[2])), strict=False):
        padded[dimension] = -(-padded[dimension] // unit) * unit
    return math.prod(padded)


def _written(one: Operation, inside: Computation) -> Iterator[float]:
    root = next((inner for inner in inside.values() if inner.is_root), None)
    roots = [inside.get(name) for name in root.operands] if root and root.opcode == "tuple" else [root]
    if len(roots) != len(one.shapes):
        roots = [None] * len(one.shapes)
    for shape, inner in zip(one.shapes, roots, strict=True):
        while inner is not None and inner.opcode == "bitcast":
            inner = inside.get(inner.operands[0])
        if inner is not None and inner.opcode == "dynamic-update-slice" and not shape.space:
            yield inside[inner.operands[1]].bytes
        else:
            yield shape.moved


def _product(one: Operation, around: Computation) -> tuple[int, int, int, int] | None:
    if one.opcode not in ("dot", "convolution") and '"dot_dimension_numbers"' not in one.text:
        return None
    sides = [around[name].shapes[0].dims for name in one.operands[:2] if name in around and around[name].shapes]
    if len(sides) != 2:
        return None
    left, right = sides
    if one.opcode == "convolution":
        return _convolution(one, left, right)
    if one.opcode == "dot":
        keys = ("lhs_contracting_dims", "lhs_batch_dims")
        named = [re.search(rf"{key}={{([\d,]*)}}", one.text) for key in keys]
        contracting, batch = ([int(i) for i in found[1].split(",") if i] if found else [] for found in named)
    else:  # of cuBLAS
        noted = json.loads(re.search(r'"dot_dimension_numbers":({.*?})', one.text)[1])
        keys = ("lhs_contracting_dimensions", "lhs_batch_dimensions")
        contracting, batch = ([int(i) for i in noted.get(key, [])] for key in keys)
    k, count = math.prod(left[i] for i in contracting), math.prod(left[i] for i in batch)
    return count, math.prod(left) // (k * count), math.prod(right) // (k * count), k


def _convolution(one: Operation, left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """Return the sizes of a product that a TPU writes as a convolution; a batch is a spatial size of all three."""
    labels, count = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.text), 1
    result = one.shapes[0].dims
    for digit in (d for d in (labels[3] if labels else "") if d.isdigit() and d in labels[1] and d in labels[2]):
        sizes = {side[label.index(digit)] for side, label in zip((left, right, result), labels.groups(), strict=True)}
        count *= sizes.pop() if len(sizes) == 1 else 1
    # m k x k n -> m n: the product of any two, over the third, is a square.
    sizes = [max(math.prod(side) // count, 1) for side in (left, right, result)]
    m = math.sqrt(sizes[0] * sizes[2] / sizes[1])
    n = math.sqrt(sizes[1] * sizes[2] / sizes[0])
    return count, round(m), round(n), round(sizes[0] / m) if m else 1


def _frame_of(one: Operation) -> list[int]:
    return [int(number) for number in re.findall(r"stack_frame_id=(\d+)", one.text)]


def _frames(text: str) -> dict[int, str]:
    """Return, of each stack frame, its files and functions from the innermost outwards."""

    def section(name: str) -> dict[int, str]:
        found = re.search(rf"^{name}\n((?:\d+ .*\n?)*)", text, re.MULTILINE)
        return {int(line.split(" ", 1)[0]): line.split(" ", 1)[1] for line in found[1].splitlines()} if found else {}

    files, functions = section("FileNames"), section("FunctionNames")
    places, frames = section("FileLocations"), section("StackFrames")

    def words(place: int) -> str:
        found = re.search(r"file_name_id=(\d+) function_name_id=(\d+)", places.get(place, ""))
        if not found:
            return ""
        return f"{files.get(int(found[1]), '')} {functions.get(int(found[2]), '')}".replace('"', "")

    result = {}
    for number in frames:
        chain, at, seen = [], number, set()
        while at in frames and at not in seen:
            seen.add(at)
            found = re.search(r"file_location_id=(\d+)(?: parent_frame_id=(\d+))?", frames[at])
            if not found:
                break
            chain.append(words(int(found[1])))
            at = int(found[2]) - 1 if found[2] else 0  # ids count from one; one is none
        result[number] = "; ".join(chain)
    return result
