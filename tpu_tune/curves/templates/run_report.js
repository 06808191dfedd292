// Values under the pointer: a line at the nearest point of any curve, and a box with every curve's value there.
// The pictures are complete without this script.
"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const box = document.getElementById("values");
  const SVG = "http://www.w3.org/2000/svg";

  function nearest(xs, x) {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return x - xs[low] < xs[high] - x ? low : high;
  }

  function number(value) {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(3);
    return String(Number(value.toPrecision(5)));
  }

  function element(name, attributes) {
    const made = document.createElementNS(SVG, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    return made;
  }

  function row(text, color) {
    const line = document.createElement("div");
    if (color) {
      const dot = document.createElement("span");
      dot.className = "dot";
      dot.style.background = color;
      line.append(dot);
    }
    line.append(text);
    return line;
  }

  function hide(svg) {
    box.hidden = true;
    svg.querySelector(".hover").replaceChildren();
  }

  function show(svg, chart, x) {
    const [left, top, width, height] = chart.box;
    const px = (v) => left + (v - chart.xRange[0]) / (chart.xRange[1] - chart.xRange[0]) * width;
    const py = (v) => top + height - (v - chart.yRange[0]) / (chart.yRange[1] - chart.yRange[0]) * height;
    const found = chart.lines.map((line) => nearest(line.x, x));
    let at = Infinity;
    chart.lines.forEach((line, i) => {
      if (Math.abs(line.x[found[i]] - x) < Math.abs(at - x)) at = line.x[found[i]];
    });
    const hover = svg.querySelector(".hover");
    hover.replaceChildren(element("line", {x1: px(at), x2: px(at), y1: top, y2: top + height, class: "cross"}));
    box.replaceChildren(row(`${chart.name} at ${chart.axis} ${number(at)}`));
    chart.lines.forEach((line, i) => {
      const place = found[i], other = line.x[place] === at ? "" : ` (at ${number(line.x[place])})`;
      const smooth = line.smooth ? `, smoothed ${number(line.smooth[place])}` : "";
      box.append(row(`${line.name}: ${number(line.y[place])}${smooth}${other}`, line.color));
      const y = py(line.y[place]);
      if (y >= top) hover.append(element("circle", {cx: px(line.x[place]), cy: y, r: 4, fill: line.color}));
    });
    box.hidden = false;
    const frame = svg.getBoundingClientRect(), shown = box.getBoundingClientRect();
    const middle = frame.left + px(at) / svg.viewBox.baseVal.width * frame.width;
    const side = middle + shown.width + 24 > document.documentElement.clientWidth ? -shown.width - 12 : 12;
    box.style.left = `${window.scrollX + middle + side}px`;
    box.style.top = `${window.scrollY + frame.top + 16}px`;
    svg.dataset.at = at;
  }

  for (const svg of document.querySelectorAll("svg.chart")) {
    const chart = charts[Number(svg.dataset.chart)];
    svg.addEventListener("pointermove", (event) => {
      const frame = svg.getBoundingClientRect();
      const x = (event.clientX - frame.left) / frame.width * svg.viewBox.baseVal.width;
      const share = (x - chart.box[0]) / chart.box[2];
      show(svg, chart, chart.xRange[0] + share * (chart.xRange[1] - chart.xRange[0]));
    });
    svg.addEventListener("pointerleave", () => hide(svg));
    svg.addEventListener("blur", () => hide(svg));
    svg.addEventListener("keydown", (event) => {
      const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (!step) return;
      event.preventDefault();
      const xs = [...new Set(chart.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
      const now = svg.dataset.at === undefined ? (step > 0 ? -1 : xs.length) : nearest(xs, Number(svg.dataset.at));
      show(svg, chart, xs[Math.min(xs.length - 1, Math.max(0, now + step))]);
    });
  }
})();
