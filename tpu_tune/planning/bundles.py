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
from collections.abc import Iterable

from tpu_tune.planning.bundle_text import Bundle, Condition, Dma, Reader, Scalar, Values, read_bundles
from tpu_tune.planning.devices import Device

BANDWIDTH_SHARE = 0.9  # of HBM's bandwidth that a program gets; XLA's own cost analysis takes the same
_LATENCY = 700  # cycles from a DMA's start to its first byte
_MAX_BUNDLES = 20_000_000  # a loop whose end was not understood


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


class _ScalarUnit:
    """Scalar registers by their physical names, and SMEM."""

    def __init__(self) -> None:
        self.registers: Values = {}
        self.memory: Values = {}

    def holds(self, condition: Condition) -> bool | None:
        """Whether a condition holds; None where that is not known."""
        if condition.register is None:
            return not condition.negated
        value = self.registers.get(condition.register)
        return None if value is None else bool(value) != condition.negated

    def run(self, scalars: Iterable[Scalar], stores: Iterable[tuple[str, Reader]]) -> None:
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

    def _copy(self, copy: Dma) -> None:
        if not self.scalars.holds(copy.condition):
            return
        registers = self.scalars.registers
        size = (copy.size(registers) or 0) * self.core.granule if copy.of_hbm else 0
        self.moved += size
        self.channel = max(self.channel, self.now) + size * self.cycles_per_byte
        self.arrives[copy.flag(registers)] = self.channel + _LATENCY

    def _taken(self, condition: Condition) -> bool:
        taken = self.scalars.holds(condition)
        if taken is not None:
            return taken
        self.guessed += 1
        self.owed += 1 - self.share
        if self.owed < 1:
            return False
        self.owed -= 1
        return True
