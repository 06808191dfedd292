"""What a device has computed, read while it computes the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax


def read_late(results: Iterable[Any]) -> Iterator[Any]:
    """Yield trees of arrays as NumPy's, each once the next one has been asked for: the device goes on meanwhile."""
    before: list[Any] = []
    for result in results:
        yield from map(jax.device_get, before)
        before = [result]
    yield from map(jax.device_get, before)
