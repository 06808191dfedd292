"""What a cleaning did: every rule's hits, with examples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tpu_tune.data.clean.rules import Hit
from tpu_tune.data.streams import Skipped
from tpu_tune.errors import counted

EXAMPLES = 3  # of each rule
BAD_ROW = "bad row"
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # what a terminal obeys, and what is no UTF-8


class CleanReport:
    """Counts rows and rules; `figures` is the report."""

    def __init__(self) -> None:
        self._rules: dict[str, dict[str, Any]] = {}
        self._counts = {"rows_in": 0, "rows_out": 0, "rows_dropped": 0, "rows_cut": 0, "rows_changed": 0}

    def add(self, where: str, kept: bool, hits: Sequence[Hit]) -> None:
        """Count a row: whether it is in the output, and the rules that it met."""
        self._counts["rows_in"] += 1
        self._counts["rows_out" if kept else "rows_dropped"] += 1
        if kept:
            for effect in ("cut", "changed"):
                self._counts[f"rows_{effect}"] += any(hit.effect == effect for hit in hits)
        else:
            # The first rule that drops a row has dropped it; others that it met are counted as met.
            dropping = next(hit for hit in hits if hit.effect == "dropped")
            self._rule(dropping.rule)["dropped"] += 1
        met = set()
        for hit in hits:
            rule = self._rule(hit.rule)
            if hit.rule not in met:
                met.add(hit.rule)
                rule["rows"] += 1
                if len(rule["examples"]) < EXAMPLES:
                    rule["examples"].append(_example(where, hit.effect, hit.snippet))

    def _rule(self, name: str) -> dict[str, Any]:
        return self._rules.setdefault(name, {"rule": name, "rows": 0, "dropped": 0, "examples": []})

    def figures(self, skipped: Skipped) -> dict[str, Any]:
        """The report so far; rows that could not be read count as dropped by a rule of their own.

        Returns:
          `rows_in` = `rows_out` + `rows_dropped`; of the rows out, `rows_cut` and `rows_changed`; `rules`, each with
          `rule`, `rows` that met it, `dropped` by it (each dropped row counts for one rule), and `examples` with
          `where`, `effect` and `snippet`, ordered by rows.
        """
        counts = dict(self._counts)
        rules = sorted(self._rules.values(), key=lambda rule: -rule["rows"])
        if skipped.count:
            counts["rows_in"] += skipped.count
            counts["rows_dropped"] += skipped.count
            examples = [_example(bad.where, "dropped", bad.reason) for bad in skipped.examples]
            bad = {"rule": BAD_ROW, "rows": skipped.count, "dropped": skipped.count, "examples": examples[:EXAMPLES]}
            rules = [*rules, bad]
        return {**counts, "rules": rules}


def _example(where: str, effect: str, snippet: str) -> dict[str, str]:
    return {"where": where, "effect": effect, "snippet": _UNPRINTABLE.sub("\ufffd", snippet)}


def table(figures: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    lines = [
        f"{counted(figures['rows_in'], 'row')} in = {figures['rows_out']:,} out + {figures['rows_dropped']:,} dropped"
    ]
    changes = [
        f"{figures[key]:,} {what}"
        for key, what in (
            ("rows_cut", "cut short at a phrase or pattern"),
            ("rows_changed", "with text repaired, masked or taken out"),
        )
        if figures[key]
    ]
    if changes:
        lines.append(f"of the rows out: {', '.join(changes)}")
    if figures["rules"]:
        width = max(len("rule"), *(len(rule["rule"]) for rule in figures["rules"]))
        lines.append(f"  {'rule':<{width}}  {'rows':>9}  {'dropped':>9}")
        for rule in figures["rules"]:
            lines.append(f"  {rule['rule']:<{width}}  {rule['rows']:>9,}  {rule['dropped']:>9,}")
            lines += [f"      {example['where']}  {example['snippet']}" for example in rule["examples"]]
    return "\n".join(lines)
