"use strict";
// The page of `scalegmn report`: a table that sorts, figures that open large, curves that zoom.
const table = document.getElementById("results"), body = table.tBodies[0];
table.querySelectorAll("thead th").forEach((header, column) => header.onclick = () => {
  const rising = header.getAttribute("aria-sort") !== "ascending";
  table.querySelectorAll("thead th").forEach(other => other.removeAttribute("aria-sort"));
  header.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const order = (a, b) => header.classList.contains("number") ? a - b : a.localeCompare(b);
  const empty = row => key(row) === "";
  [...body.rows].sort((a, b) => empty(a) - empty(b) || (rising ? 1 : -1) * order(key(a), key(b)))
    .forEach(row => body.append(row));
});

const dialog = document.getElementById("figure");
document.querySelectorAll("button.large").forEach(button => button.onclick = () => {
  const [small, large] = [button.querySelector("img"), dialog.querySelector("img")];
  large.src = small.src;
  large.alt = dialog.querySelector("p").textContent = small.alt;
  dialog.showModal();
});

const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999933", "#8a8a8a"];
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
const drawing = (tag, attributes, text = "") => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
};
const shown = value => String(Number(value.toPrecision(4)));

/** A chart of one column over epochs, a line per run; what it shows can be narrowed to a part of the epochs. */
function chart(column, runs) {
  const lines = Object.entries(runs).map(([name, rows]) => [name, rows.filter(row => Number.isFinite(row[column])).map(row => [row.epoch, row[column]])]).filter(([, points]) => points.length);
  const epochs = lines.flatMap(([, points]) => points.map(point => point[0])), all = [Math.min(...epochs), Math.max(...epochs)];
  const svg = drawing("svg", { viewBox: "0 0 440 230", tabindex: 0, role: "img", "aria-label": `${column} over epochs, ${lines.length} runs` });
  let range = all, start = null;
  const left = 48, right = 430, top = 14, bottom = 200, place = x => left + (x - range[0]) / (range[1] - range[0] || 1) * (right - left);
  function draw(mark = null) {
    const visible = lines.map(([name, points]) => [name, points.filter(([x]) => x >= range[0] && x <= range[1])]), values = visible.flatMap(([, points]) => points.map(point => point[1]));
    const low = Math.min(...values), high = Math.max(...values), up = y => bottom - (y - low) / (high - low || 1) * (bottom - top);
    svg.replaceChildren();
    if (mark !== null) svg.append(drawing("rect", { x: Math.min(start, mark), y: top, width: Math.abs(mark - start), height: bottom - top, fill: "#8a8a8a", opacity: .3 }));
    visible.forEach(([name, points], number) => {
      const line = drawing("polyline", { points: points.map(([x, y]) => `${place(x).toFixed(1)},${up(y).toFixed(1)}`).join(" "), stroke: COLOURS[number % 8], "stroke-dasharray": DASHES[Math.floor(number / 8) % 4] });
      line.append(drawing("title", {}, name));
      svg.append(line);
      for (const [x, y] of points.length < 40 ? points : []) { const dot = drawing("circle", { cx: place(x), cy: up(y), r: 2.5, fill: COLOURS[number % 8] }); dot.append(drawing("title", {}, `${name}: ${shown(y)}, epoch ${x}`)); svg.append(dot); }
    });
    if (values.length) for (const [x, y, text] of [[4, top + 6, shown(high)], [4, bottom, shown(low)], [left, 218, `epoch ${shown(range[0])}`], [right - 30, 218, shown(range[1])]]) svg.append(drawing("text", { x, y }, text));
    svg.dataset.range = range.join();
  }
  const epoch = x => range[0] + (x - left) / (right - left) * (range[1] - range[0]);
  const show = (low, high) => { range = [Math.max(all[0], low), Math.min(all[1], high)]; draw(); };
  const inside = event => { const box = svg.getBoundingClientRect(); return Math.max(left, Math.min(right, (event.clientX - box.left) / box.width * 440)); };
  svg.onpointerdown = event => { start = inside(event); svg.setPointerCapture(event.pointerId); };
  svg.onpointermove = event => { if (start !== null) draw(inside(event)); };
  svg.onpointerup = event => { const end = inside(event), from = start; start = null; if (Math.abs(end - from) > 8) show(Math.min(epoch(from), epoch(end)), Math.max(epoch(from), epoch(end))); else draw(); };
  svg.ondblclick = () => show(...all);
  svg.onkeydown = event => {
    const size = range[1] - range[0], step = { ArrowLeft: -size / 4, ArrowRight: size / 4 }[event.key];
    if (event.key === "Escape") show(...all);
    else if (event.key === "+") show(range[0] + size / 4, range[1] - size / 4);
    else if (event.key === "-") show(range[0] - size / 2, range[1] + size / 2);
    else if (step && range[0] + step >= all[0] && range[1] + step <= all[1]) { event.preventDefault(); show(range[0] + step, range[1] + step); }
  };
  draw();
  const figure = document.createElement("figure"), caption = document.createElement("figcaption");
  caption.textContent = column;
  figure.append(caption, svg);
  return figure;
}
const charts = document.getElementById("charts");
if (charts) {
  const runs = JSON.parse(charts.dataset.rows), names = new Set(Object.values(runs).flat().flatMap(Object.keys));
  const columns = [...names].filter(name => name === "train_loss" || name.startsWith("val_"));
  const legend = document.createElement("p");
  legend.className = "note";
  Object.keys(runs).forEach((name, number) => {
    const mark = drawing("svg", { width: 26, height: 8, "aria-hidden": "true" }), word = document.createElement("span");
    mark.append(drawing("line", { x1: 0, x2: 24, y1: 4, y2: 4, stroke: COLOURS[number % 8], "stroke-width": 3, "stroke-dasharray": DASHES[Math.floor(number / 8) % 4] }));
    word.textContent = ` ${name}  `;
    legend.append(mark, word);
  });
  charts.before(legend);
  charts.replaceChildren(...columns.map(column => chart(column, runs)));
  document.getElementById("charts-help").hidden = false;
}
