"""How long a TPU's kernel takes, by its bundles: the instructions that libtpu's compiler writes, executed here.

A TensorCore issues one bundle (a very long instruction word) a cycle. libtpu writes them as text where `dump_flags` are
in LIBTPU_INIT_ARGS when it is loaded; `dumped` finds them and `run_bundles` executes them. Scalar registers are
computed, so that loops and predicated regions take as many turns as on the chip; of everything else only the time
counts: one cycle a bundle, a wait where a matrix unit is still busy or a DMA has not arrived.

Checked on a v5e, without one: products against the MXU's peak, elementwise operations against the bandwidth, within 5%
where the operation is large. Not modelled: fetching instructions, register banks, strided DMAs, other chips.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable

from tpu_tune.planning.devices import Device

BANDWIDTH_SHARE = 0.9  # of HBM's bandwidth that a program gets; XLA's own cost analysis takes the same
_LATENCY = 700  # cycles from a DMA's start to its first byte
_MAX_BUNDLES = 20_000_000  # a loop whose end was not understood
_MASK = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class Core:
    """What a TensorCore does in a cycle.

    Attributes:
      hertz: cycles a second.
      bandwidth: HBM's, bytes a second.
      granule: bytes that a DMA's size counts.
      row_cycles: cycles that a matrix unit takes for eight rows of a product.
      delay: bundles behind a branch that are still issued.
    """

    hertz: float
    bandwidth: float
    granule: int = 32
    row_cycles: float = 8.0
    delay: int = 4


# By JAX's name of the device. Those of the v5e and v3 were checked; of the others clocks are published and the rest is
# taken to be the v5e's, with a v6e's matrix units four times as large.
_CORES = {
    "TPU v2": (0.70e9, {"granule": 1024, "delay": 1}),
    "TPU v3": (0.94e9, {"granule": 1024, "delay": 1}),
    "TPU v4": (1.05e9, {}),
    "TPU v5 lite": (1.5e9, {}),
    "TPU v5": (1.75e9, {}),
    "TPU v6 lite": (1.75e9, {"row_cycles": 4.0}),
}


def core_of(device: Device) -> Core:
    """Return the core of a TPU of the catalogue."""
    hertz, other = _CORES[device.device_kind]
    return Core(hertz, device.bandwidth, **other)


def dump_flags(directory: str | os.PathLike) -> str:
    """Return flags for LIBTPU_INIT_ARGS that write every kernel's bundles into a directory; compiling takes longer."""
    return (
        f"--xla_jf_dump_to={os.fspath(directory)} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=final_bundles"
    )


def dumped(directory: str | os.PathLike) -> dict[str, str]:
    """Return the path of each HLO instruction's bundles; the last, where the compiler has tried several."""
    found = {}
    for name in sorted(os.listdir(directory)):
        match = re.match(r"\d+-(.*)-\d+-final_bundles\.txt$", name)
        if match:
            found[match[1]] = os.path.join(directory, name)
    return found


@dataclasses.dataclass(frozen=True)
class Timing:
    """What executing a kernel's bundles gave.

    Attributes:
      seconds: from its first bundle to its last, or to its last DMA's end.
      bundles: bundles issued.
      mxu_seconds: how long a matrix unit was busy, the mean over those used.
      mxu_wait, dma_wait: seconds of waiting for either.
      hbm_bytes: moved from and to HBM.
      guessed: branches on conditions that could not be computed.
    """

    seconds: float
    bundles: int
    mxu_seconds: float
    mxu_wait: float
    dma_wait: float
    hbm_bytes: float
    guessed: int


@functools.cache
def run_bundles(path: str, core: Core, share: float = 1.0) -> Timing:
    """Execute a kernel's bundles.

    Args:
      path: a file that `dumped` found.
      core: what executes them.
      share: of the regions whose condition is data (of attention: whether a block of keys is unmasked), how many run.

    Raises:
      OSError: it cannot be read.
      ValueError: it holds no bundles, or they have no end.
    """
    bundles, regions = read_bundles(path)
    if not bundles:
        raise ValueError(f"{path}: no bundles")
    machine = _Machine(core, share)
    position, target, left = 0, 0, 0  # `left` bundles are still issued before a branch's target
    while position < len(bundles):
        bundle, taken = bundles[position], False
        if bundle.is_plain:
            machine.issued += 1
            machine.now += 1
        else:
            taken = machine.issue(bundle)
        position += 1
        if left:
            left -= 1
            if not left:
                position = target
                continue
        if taken and bundle.branch.region in regions:
            target, left = regions[bundle.branch.region], core.delay
            if machine.issued >= _MAX_BUNDLES:
                raise ValueError(f"{path}: its bundles have no end")
    return machine.timing()


Values = dict[str, int | None]  # of registers, or of places in SMEM; None is a value that is not known
Reader = Callable[[Values], int | None]  # reads an operand: a register, or a number


@dataclasses.dataclass(frozen=True)
class _Condition:
    """A predicate; `register` None always holds, and `negated` is where it must be false."""

    register: str | None = None
    negated: bool = False


@dataclasses.dataclass(frozen=True)
class _Scalar:
    """A scalar instruction: `compute` (of registers and memory) into `target`, or `otherwise` under its condition."""

    target: str
    compute: Callable[[Values, Values], int | None]
    condition: _Condition | None = None
    otherwise: Reader | None = None


@dataclasses.dataclass(frozen=True)
class _Dma:
    """A copy of `size` granules; `flag` is set when it has arrived."""

    of_hbm: bool
    condition: _Condition
    size: Reader
    flag: Reader


@dataclasses.dataclass(frozen=True)
class _Branch:
    condition: _Condition
    region: int


@dataclasses.dataclass
class Bundle:
    """What of a bundle takes time or decides: scalars, matrix units (unit -> rows), DMAs, waits, a branch."""

    scalars: list[_Scalar] = dataclasses.field(default_factory=list)
    stores: list[tuple[str, Reader]] = dataclasses.field(default_factory=list)
    rows: dict[str, int] = dataclasses.field(default_factory=dict)
    copies: list[_Dma] = dataclasses.field(default_factory=list)
    waits: list[tuple[_Condition, Reader]] = dataclasses.field(default_factory=list)
    branch: _Branch | None = None
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
        bundle.branch = _Branch(_condition(found[2], found[1]), int(found[3]))
    elif found := _DMA.match(part):
        operands = [operand.strip() for operand in found[4].split(",")]
        size, flag = _reader(operands[1]), _reader(operands[3] if len(operands) > 3 else "")
        bundle.copies.append(_Dma("hbm" in found[1], _condition(found[3], found[2]), size, flag))
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
        bundle.scalars.append(_Scalar(_register(target) or target, _computation(name, operands), condition, otherwise))


def _register(token: str | None) -> str | None:
    """Return the physical register of a name such as %s9333_s20."""
    found = _REGISTER.match(token) if token else None
    return found[1] if found else None


def _condition(token: str | None, negation: str | None) -> _Condition:
    return _Condition(_register(token), negation == "!")


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
        return operation(*values) & _MASK if known and None not in values else None

    return compute


class _ScalarUnit:
    """Scalar registers by their physical names, and SMEM."""

    def __init__(self) -> None:
        self.registers: Values = {}
        self.memory: Values = {}

    def holds(self, condition: _Condition) -> bool | None:
        """Whether a condition holds; None where that is not known."""
        if condition.register is None:
            return not condition.negated
        value = self.registers.get(condition.register)
        return None if value is None else bool(value) != condition.negated

    def run(self, scalars: Iterable[_Scalar], stores: Iterable[tuple[str, Reader]]) -> None:
        """Run a bundle's scalar instructions: all read what was there before any of them writes."""
        new: Values = {}
        for one in scalars:
            holds = one.condition is None or self.holds(one.condition)
            if holds:
                new[one.target] = one.compute(self.registers, self.memory)
            elif holds is None:
                new[one.target] = None
            elif one.otherwise is not None:
                new[one.target] = one.otherwise(self.registers)
        for place, read in stores:
            self.memory[place] = read(self.registers)
        self.registers.update(new)


@functools.cache
def _literal(token: str) -> int | None:
    """Return a number's value, and of an allocation a number that no other has."""
    if re.fullmatch(r"-?\d+|0x[0-9a-f]+", token):
        return int(token, 0)
    found = re.fullmatch(r"\[?#allocation(\d+)(?:_spill)?(?: \+ \$(0x[0-9a-f]+))?\]?", token)
    return int(found[1]) * 1_000_000 + int(found[2] or "0", 16) if found else None


def _signed(value: int) -> int:
    value &= _MASK
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
    "sand": lambda a, b: a & b, "sor": lambda a, b: a | b, "sxor": lambda a, b: a ^ b,
    "sshll": lambda a, b: a << min(b, 32), "sshrl": lambda a, b: (a & _MASK) >> min(b, 32),
    "sshra": lambda a, b: _signed(a) >> min(b, 32),
}  # fmt: skip


class _Machine:
    """A core's clock, and until when its matrix units and its DMAs are busy."""

    def __init__(self, core: Core, share: float):
        self.core, self.share = core, share
        self.scalars = _ScalarUnit()
        self.now = self.mxu = self.mxu_wait = self.dma_wait = self.moved = 0.0
        self.issued = self.guessed = 0
        self.owed = 0.0  # regions under unknown conditions that have yet to be left out
        self.busy: dict[str, float] = collections.defaultdict(float)  # matrix unit -> until when
        self.channel = 0.0  # until when HBM is busy
        self.arrives: dict[int | None, float] = {}  # flag -> when
        self.cycles_per_byte = core.hertz / (core.bandwidth * BANDWIDTH_SHARE)

    def issue(self, bundle: Bundle) -> bool:
        """Issue a bundle; return whether its branch is taken."""
        self.issued += 1
        if bundle.rows:
            self._multiply(bundle.rows)
        for condition, read in bundle.waits:
            arrival = self.arrives.get(read(self.scalars.registers), 0.0)
            if arrival > self.now and self.scalars.holds(condition):
                self.dma_wait += arrival - self.now
                self.now = arrival
        for copy in bundle.copies:
            self._copy(copy)
        taken = bundle.branch is not None and self._taken(bundle.branch.condition)
        if bundle.scalars or bundle.stores:
            self.scalars.run(bundle.scalars, bundle.stores)
        self.now += 1
        return taken

    def timing(self) -> Timing:
        """Return what was counted."""
        hertz = self.core.hertz
        return Timing(
            seconds=max([self.now, *self.arrives.values()]) / hertz,
            bundles=self.issued,
            mxu_seconds=self.mxu / max(len(self.busy), 1) / hertz,
            mxu_wait=self.mxu_wait / hertz,
            dma_wait=self.dma_wait / hertz,
            hbm_bytes=self.moved,
            guessed=self.guessed,
        )

    def _multiply(self, rows: dict[str, int]) -> None:
        free = max(self.busy[unit] for unit in rows)
        if free > self.now:
            self.mxu_wait += free - self.now
            self.now = free
        for unit, count in rows.items():
            cycles = count / 8 * self.core.row_cycles
            self.busy[unit] = self.now + cycles
            self.mxu += cycles

    def _copy(self, copy: _Dma) -> None:
        if not self.scalars.holds(copy.condition):
            return
        registers = self.scalars.registers
        size = (copy.size(registers) or 0) * self.core.granule if copy.of_hbm else 0
        self.moved += size
        self.channel = max(self.channel, self.now) + size * self.cycles_per_byte
        self.arrives[copy.flag(registers)] = self.channel + _LATENCY

    def _taken(self, condition: _Condition) -> bool:
        taken = self.scalars.holds(condition)
        if taken is not None:
            return taken
        self.guessed += 1
        self.owed += 1 - self.share
        if self.owed < 1:
            return False
        self.owed -= 1
        return True
