"""The map as one HTML page that needs nothing else: an inline SVG, a table, and a few lines of script for the pointer.

Whatever comes from the data is escaped, in the page and in the script's JSON; a content policy forbids the page to load
anything. Without scripts it shows all but the text under the pointer.
"""

from __future__ import annotations

import html
import json
from typing import Any

import numpy as np

from tpu_tune.data.cluster.cluster_map import Map, color

_SIDE, _MARGIN = 1000.0, 24.0  # of the picture, in its own units


def page(drawn: Map) -> str:
    """Return the page."""
    places = _places(np.concatenate([drawn.points, np.array([c["center"] for c in drawn.clusters]).reshape(-1, 2)]))
    points, centers = places[: len(drawn.points)], places[len(drawn.points) :]
    radius = float(np.clip(260 / max(1, len(points)) ** 0.5, 2.6, 7))
    circles = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" class="p c{label}{" out" if outlier else ""}"/>'
        for (x, y), label, outlier in zip(points, drawn.labels.tolist(), drawn.outliers.tolist(), strict=True)
    ]
    numbers = [
        f'<g class="n c{cluster["cluster"]}"><circle cx="{x:.1f}" cy="{y:.1f}" r="15"/>'
        f'<text x="{x:.1f}" y="{y:.1f}">{cluster["cluster"]}</text></g>'
        for (x, y), cluster in zip(centers, drawn.clusters, strict=True)
    ]
    colors = "".join(f".c{c['cluster']}{{--c:{color(c['cluster'])}}}" for c in drawn.clusters)
    most = max((cluster["rows"] for cluster in drawn.clusters), default=1)
    return _PAGE.format(
        title=html.escape(drawn.title),
        summary=html.escape(drawn.summary),
        share=f"{drawn.share:.0%}",
        count=f"{len(points):,}",
        colors=colors,
        side=int(_SIDE),
        circles="\n".join(circles),
        numbers="\n".join(numbers),
        rows="\n".join(_table_row(cluster, most) for cluster in drawn.clusters),
        data=_json({"texts": list(drawn.texts), "labels": drawn.labels.tolist()}),
        script=_SCRIPT,
    )


def _places(points: np.ndarray) -> np.ndarray:
    """Fit points into the picture, the same scale both ways, y upwards."""
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (_SIDE - 2 * _MARGIN) / max(float((high - low).max()), 1e-12)
    placed = _SIDE / 2 + (points - (low + high) / 2) * scale
    return np.stack([placed[:, 0], _SIDE - placed[:, 1]], axis=1)


def _table_row(cluster: dict[str, Any], most: int) -> str:
    number = cluster["cluster"]
    examples = "".join(f"<li>{html.escape(text)}</li>" for text in cluster["examples"])
    words = html.escape(", ".join(cluster["words"])) or "&ndash;"
    return (
        f'<tr class="c{number}" data-cluster="{number}"><td><b>{number}</b></td>'
        f'<td class="size">{cluster["rows"]:,}<i style="width:{100 * cluster["rows"] / most:.1f}%"></i></td>'
        f"<td>{cluster['kept']:,}</td><td>{cluster['outliers']:,}</td>"
        f"<td><div>{words}</div><ul>{examples}</ul></td></tr>"
    )


def _json(value: Any) -> str:
    """Return JSON that cannot end the script element that it stands in."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const svg = document.querySelector("svg"), tip = document.getElementById("tip");
const points = [...svg.querySelectorAll(".p")];
points.forEach((point, number) => { point.dataset.number = number; });
svg.addEventListener("pointermove", event => {
  const number = event.target.dataset ? event.target.dataset.number : undefined;
  tip.hidden = number === undefined;
  if (tip.hidden) return;
  tip.textContent = "cluster " + data.labels[number] + ": " + data.texts[number];
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
});
svg.addEventListener("pointerleave", () => { tip.hidden = true; });
let alone = null;
document.querySelectorAll("tr[data-cluster]").forEach(row => row.addEventListener("click", () => {
  alone = alone === row.dataset.cluster ? null : row.dataset.cluster;
  document.querySelectorAll("tr[data-cluster]").forEach(
    other => other.classList.toggle("chosen", other.dataset.cluster === alone));
  svg.querySelectorAll(".p, .n").forEach(
    mark => mark.classList.toggle("dim", alone !== null && !mark.classList.contains("c" + alone)));
}));
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body{{margin:0;padding:20px 24px;font:14px/1.45 system-ui,sans-serif;color:#1f2937;background:#fff}}
h1{{font-size:19px;margin:0 0 2px}} p{{color:#6b7280;margin:0 0 14px}}
main{{display:grid;grid-template-columns:minmax(320px,1fr) minmax(340px,1fr);gap:24px;align-items:start}}
@media(max-width:900px){{main{{grid-template-columns:1fr}}}}
svg{{width:100%;height:auto;border:1px solid #e5e7eb;border-radius:8px;position:sticky;top:12px}}
.p{{fill:var(--c);fill-opacity:.62}} .p:hover{{fill-opacity:1;stroke:#111827;stroke-width:1.5}}
.p.out{{fill:#fff;fill-opacity:1;stroke:var(--c);stroke-width:1.8}}
.n circle{{fill:#fff;stroke:var(--c);stroke-width:2.5;pointer-events:none}}
.n text{{font:600 15px system-ui,sans-serif;text-anchor:middle;dominant-baseline:central;fill:#1f2937;pointer-events:none}}
.dim{{opacity:.06}}
table{{border-collapse:collapse;width:100%}}
th{{text-align:left;font-weight:600;color:#6b7280;border-bottom:1px solid #e5e7eb;padding:4px 8px}}
td{{vertical-align:top;border-bottom:1px solid #f3f4f6;padding:6px 8px}}
td:nth-child(-n+4){{white-space:nowrap;font-variant-numeric:tabular-nums}}
td b{{display:inline-block;min-width:22px;padding:1px 4px;border-radius:5px;background:var(--c);color:#fff;text-align:center}}
.size{{min-width:92px}} .size i{{display:block;height:4px;margin-top:2px;border-radius:2px;background:var(--c);opacity:.75}}
td div{{font-weight:600}} ul{{margin:3px 0 0;padding-left:16px;color:#4b5563;font-size:12.5px}} li{{overflow-wrap:anywhere}}
tr[data-cluster]{{cursor:pointer}} tr.chosen{{background:#f9fafb}}
#tip{{position:fixed;max-width:380px;background:#111827;color:#f9fafb;padding:7px 10px;border-radius:6px;font-size:12.5px;pointer-events:none;overflow-wrap:anywhere}}
{colors}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary} The map shows {count} rows by their two principal components ({share} of the variance); rings are outliers. Choose a cluster in the table to see it alone.</p>
<main>
<svg viewBox="0 0 {side} {side}" role="img" aria-label="map of the clusters">
<g>
{circles}
</g>
<g>
{numbers}
</g>
</svg>
<table>
<thead><tr><th></th><th>rows</th><th>kept</th><th>outliers</th><th>words and rows near the centre</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</main>
<div id="tip" hidden></div>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""
