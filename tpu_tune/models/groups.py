"""Which layers one `jax.lax.scan` walks: runs of layers in which a pattern repeats.

Layers with the same leaves are stacked, and a scan over the stack compiles one layer for all of them. Not all models
have the same leaves everywhere: three layers of one kind and one of another, again and again, or a few dense layers
before those with experts. Such a model is a few groups, each a pattern of layers that repeats; a scan walks the
repeats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers that one scan walks.

    Attributes:
      first: index of the group's first layer.
      period: number of layers in the pattern.
      repeats: number of times that the pattern comes, the length of the scan.
    """

    first: int
    period: int
    repeats: int

    @property
    def layers(self) -> range:
        """Indices of its layers."""
        return range(self.first, self.first + self.period * self.repeats)


def layer_groups(kinds: Sequence[Hashable]) -> tuple[LayerGroup, ...]:
    """Cut a model's layers into groups: from the front, the pattern that covers most layers, of these the shortest.

    Args:
      kinds: one entry a layer, equal where the layers have the same leaves.
    """
    groups, first = [], 0
    while first < len(kinds):
        periods = range(1, (len(kinds) - first) // 2 + 1)
        candidates = [LayerGroup(first, period, _repeats(kinds[first:], period)) for period in periods]
        # A pattern that does not come twice is no pattern; one layer alone is.
        candidates = [group for group in candidates if group.period == 1 or group.repeats > 1]
        best = max(candidates, key=lambda group: (len(group.layers), -group.period), default=LayerGroup(first, 1, 1))
        groups.append(best)
        first += len(best.layers)
    return tuple(groups)


def _repeats(kinds: Sequence[Hashable], period: int) -> int:
    same = next((i for i in range(period, len(kinds)) if kinds[i] != kinds[i - period]), len(kinds))
    return same // period
