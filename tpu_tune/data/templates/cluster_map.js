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
