"""The text of a TPU kernel's bundles, as libtpu dumps it: what of each bundle takes time, or decides what runs.

Scalar instructions become functions of the registers and of SMEM; of vector instructions only that their bundle is
there counts, and of products how many rows they push through which matrix unit.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

MASK = 0xFFFFFFFF  # of a scalar register

Values = dict[str, int | None]  # of registers, or of places in SMEM; None is a value that is not known
Reader = Callable[[Values], int | None]  # reads an operand: a register, or a number


@dataclasses.dataclass(frozen=True)
class Condition:
    """A predicate; `register` None always holds, and `negated` is where it must be false."""

    register: str | None = None
    negated: bool = False


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A scalar instruction: `compute` (of registers and memory) into `target`, or `otherwise` under its condition."""

    target: str
    compute: Callable[[Values, Values], int | None]
    condition: Condition | None = None
    otherwise: Reader | None = None


@dataclasses.dataclass(frozen=True)
class Dma:
    """A copy of `size` granules; `flag` is set when it has arrived."""

    of_hbm: bool
    condition: Condition
    size: Reader
    flag: Reader


@dataclasses.dataclass(frozen=True)
class Branch:
    condition: Condition
    region: int


@dataclasses.dataclass
class Bundle:
    """What of a bundle takes time or decides: scalars, matrix units (unit -> rows), DMAs, waits, a branch."""

    scalars: list[Scalar] = dataclasses.field(default_factory=list)
    stores: list[tuple[str, Reader]] = dataclasses.field(default_factory=list)
    rows: dict[str, int] = dataclasses.field(default_factory=dict)
    copies: list[Dma] = dataclasses.field(default_factory=list)
    waits: list[tuple[Condition, Reader]] = dataclasses.field(default_factory=list)
    branch: Branch | None = None
    is_plain: bool = False  # nothing of this


_START = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:")
_REGISTER = re.compile(r"!?%?[sp]\d+_([sp]\d+)$")
_PREDICATED = re.compile(r"\(\s*(!?)(%p\d+_p\d+)(?:, (%[sp]\d+_[sp]\d+|[-\d]+))?\)\s*,\s*(.*)")
_BRANCH = re.compile(r"(?:%\S+ = )?sbr\.rel(?: \((!?)(%\S+?)\))? target = \$region(\d+)")
_DMA = re.compile(r"(?:%\S+ = )?(dma\.\w+) \[thread:\$\d+\]\s+(?:\((!?)(%\S+?)\), )?(.*)")
_WAIT = re.compile(r"(?:%\S+ = )?dma\.done\.wait(?: \((!?)(%\S+?)\),)? (.*)")
_STORE = re.compile(r"%\d+ = sst \[smem:(.*?)\] (.*)")
_SCALAR = re.compile(r"(%[sp]\d+_[sp]\d+) = (\S+)\s+(.*)")


def read_bundles(path: str) -> tuple[list[Bundle], dict[int, int]]:
    """Return a dump's bundles, and the number of the first one of each region."""
    texts: list[str] = []
    with open(path, errors="replace") as file:
        for line in file:
            if _START.match(line):
                texts.append(line)
            elif texts and not line.startswith("="):
                texts[-1] += line
    regions: dict[int, int] = {}
    for number, text in enumerate(texts):
        for found in re.finditer(r"Start(?:/End empty)? region (\d+)", text):
            regions.setdefault(int(found[1]), number)
    return [_bundle(text) for text in texts], regions


def _bundle(text: str) -> Bundle:
    body = re.sub(r"/\*.*?\*/", "", text[text.index("{") + 1 :], flags=re.S)
    body = body[: body.rindex("}")] if "}" in body else body
    result = Bundle()
    for part in body.split(";;"):
        _read_part(result, " ".join(part.split()))
    result.is_plain = result == Bundle()
    return result


def _read_part(bundle: Bundle, part: str) -> None:
    if not part or "vmatpush" in part:
        return
    if "vmatmul" in part:
        kind, unit = re.search(r"vmatmul\.([a-z0-9]+)", part), re.search(r"mxu(\d)", part)
        bundle.rows[unit[1] if unit else "0"] = 8 if kind and kind[1] in ("f32", "msra", "gmra") else 16
    elif found := _BRANCH.match(part):
        bundle.branch = Branch(_condition(found[2], found[1]), int(found[3]))
    elif found := _DMA.match(part):
        operands = [operand.strip() for operand in found[4].split(",")]
        size, flag = _reader(operands[1]), _reader(operands[3] if len(operands) > 3 else "")
        bundle.copies.append(Dma("hbm" in found[1], _condition(found[3], found[2]), size, flag))
    elif found := _WAIT.match(part):
        bundle.waits.append((_condition(found[2], found[1]), _reader(found[3].split(",")[0].strip())))
    elif found := _STORE.match(part):
        bundle.stores.append((found[1], _reader(found[2])))
    elif (found := _SCALAR.match(part)) and found[2] != "sphi":  # phis are copies between names of one register
        target, name, rest = found[1], found[2], found[3]
        condition = otherwise = None
        if under := _PREDICATED.match(rest):
            condition, rest = _condition(under[2], under[1]), under[4]
            otherwise = _reader(under[3]) if under[3] else None
        operands = [operand.strip() for operand in re.split(r",\s*(?![^\[]*\])", rest)]
        bundle.scalars.append(Scalar(_register(target) or target, _computation(name, operands), condition, otherwise))


def _register(token: str | None) -> str | None:
    """Return the physical register of a name such as %s9333_s20."""
    found = _REGISTER.match(token) if token else None
    return found[1] if found else None


def _condition(token: str | None, negation: str | None) -> Condition:
    return Condition(_register(token), negation == "!")


def _reader(token: str) -> Reader:
    name = _register(token)
    if name is None:
        number = _literal(token)
        return lambda registers: number
    if not token.startswith("!"):
        return lambda registers: registers.get(name)

    def negated(registers: Values) -> int | None:
        value = registers.get(name)
        return None if value is None else int(not value)

    return negated


def _computation(name: str, operands: list[str]) -> Callable[[Values, Values], int | None]:
    """Return a scalar instruction as a function of registers and memory."""
    base, readers = name.split(".")[0], [_reader(operand) for operand in operands]
    if base == "sld":
        place = re.match(r"\[smem:(.*)\]$", operands[0])
        return lambda registers, memory: memory.get(place[1]) if place else None
    if base == "scalar_select":
        condition, yes, no = readers[:3]

        def select(registers: Values, memory: Values) -> int | None:
            chosen = condition(registers)
            return None if chosen is None else (yes if chosen else no)(registers)

        return select
    if base == "scalar_lea":
        operation: Callable[..., int] = lambda *values: sum(values)  # noqa: E731 - beside those of the table
    elif base == "scmp":
        compare, is_signed = _COMPARISONS[name.split(".")[1]], ".s32" in name
        operation = lambda a, b: compare(_signed(a), _signed(b)) if is_signed else compare(a, b)  # noqa: E731
    else:
        operation, readers = _OPERATIONS.get(base, lambda *values: 0), readers[:2]
    settled = {"pand": 0, "pnand": 0, "por": 1, "pnor": 1}.get(base)  # one such operand decides, whatever the other is
    known = base in _OPERATIONS or base in ("scalar_lea", "scmp")

    def compute(registers: Values, memory: Values) -> int | None:
        values = [read(registers) for read in readers]
        if settled is not None and settled in values:
            return int(base in ("pnand", "por"))
        return operation(*values) & MASK if known and None not in values else None

    return compute


@functools.cache
def _literal(token: str) -> int | None:
    """Return a number's value, and of an allocation a number that no other has."""
    if re.fullmatch(r"-?\d+|0x[0-9a-f]+", token):
        return int(token, 0)
    found = re.fullmatch(r"\[?#allocation(\d+)(?:_spill)?(?: \+ \$(0x[0-9a-f]+))?\]?", token)
    return int(found[1]) * 1_000_000 + int(found[2] or "0", 16) if found else None


def _signed(value: int) -> int:
    value &= MASK
    return value - (1 << 32) if value >> 31 else value


_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "ge": lambda a, b: a >= b, "lt": lambda a, b: a < b, "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b, "gt": lambda a, b: a > b, "le": lambda a, b: a <= b,
}  # fmt: skip
_OPERATIONS: dict[str, Callable[..., int]] = {
    "smov": lambda a: a, "int_to_ptr": lambda a: a, "pmov": lambda a: a,
    "pneg": lambda a: not a, "pand": lambda a, b: a & b, "pnand": lambda a, b: not a & b,
    "por": lambda a, b: a | b, "pnor": lambda a, b: not a | b, "pxor": lambda a, b: a ^ b,
    "sadd": lambda a, b: a + b, "ssub": lambda a, b: a - b, "smul": lambda a, b: a * b,
    "smulhi": lambda a, b: (a & MASK) * (b & MASK) >> 32,
    "sand": lambda a, b: a & b, "sor": lambda a, b: a | b, "sxor": lambda a, b: a ^ b,
    "sshll": lambda a, b: a << min(b, 32), "sshrl": lambda a, b: (a & MASK) >> min(b, 32),
    "sshra": lambda a, b: _signed(a) >> min(b, 32),
}  # fmt: skip
