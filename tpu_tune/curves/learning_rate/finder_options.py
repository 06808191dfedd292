"""How to look for a learning rate; what makes no sense is refused before JAX is imported or a model loaded."""

from __future__ import annotations

import dataclasses

from tpu_tune.curves.learning_rate.bracket import MIN_STEPS, check_bracket
from tpu_tune.curves.learning_rate.range_test import ramp

PROBE_STEPS = 15  # of each short run after a range test of 60 or more
_ROUNDS = (5, 3, 2)  # rates of a bracket's rounds


@dataclasses.dataclass(frozen=True)
class FinderOptions:
    """How to look for a learning rate.

    Attributes:
      low: lowest rate of the range test.
      high: highest rate of the range test.
      steps: length of the range test, and of the bracket's longest runs; short runs have a quarter of it, 15 at most.
      bracket: rates (lowest, highest) to search with a bracket, without a range test.
      narrow: after the range test, search around its suggestion with a bracket instead of three short runs.
    """

    low: float = 1e-7
    high: float = 1.0
    steps: int = 60
    bracket: tuple[float, float] | None = None
    narrow: bool = False

    @property
    def short_runs(self) -> tuple[int, tuple[int, ...]]:
        """Updates of the longest of the short runs, and the number of runs in each round."""
        if self.bracket or self.narrow:
            return self.steps, _ROUNDS
        return max(MIN_STEPS, min(PROBE_STEPS, self.steps // 4)), (3,)

    def check(self) -> None:
        """Raise a UserError for ranges or lengths that make no sense, before anything is loaded."""
        ramp(self.low, self.high, self.steps)
        if self.bracket or self.narrow:
            check_bracket(*(self.bracket or (self.low, self.high)), self.steps, _ROUNDS)
