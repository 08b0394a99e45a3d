"use strict";
// The page of `scalegmn explore`: data, drawing, evaluation of networks, then one part per section. No libraries.

// --- data ------------------------------------------------------------------------------------------------------------
const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);

function bytes(text) {
  const binary = atob(text), result = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) result[i] = binary.charCodeAt(i);
  return result;
}
const floats = text => new Float32Array(bytes(text).buffer);

/** An element with attributes and children; strings become text, never markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
function makeSvg(tag, attributes = {}, text = null) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  return element;
}
const shown = value => value === null || value === undefined ? "" : typeof value !== "number" ? String(value)
  : Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
/** The least and the largest of any number of values. */
function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
  return [low, high];
}
const valueOf = (column, row) => {
  const value = column.values[row];
  return value === null || column.kind === "number" ? value : column.names[value];
};

// --- colours: Okabe-Ito and Tol's muted scheme, cividis for numbers; shapes tell categories apart without colour -------
const CATEGORIES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999933", "#882255", "#44aa99", "#8a8a8a"];
const SHAPES = ["circle", "square", "triangle", "diamond"];
const CIVIDIS = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]];
function sequential(share) {
  const place = Math.max(0, Math.min(1, share)) * (CIVIDIS.length - 1), low = Math.min(Math.floor(place), CIVIDIS.length - 2);
  return `rgb(${CIVIDIS[low].map((value, i) => Math.round(value + (place - low) * (CIVIDIS[low + 1][i] - value))).join()})`;
}
/** Blue above, orange below, from the background at 0; share in [-1, 1]. */
function diverging(share) {
  const [r, g, b] = share >= 0 ? [0, 114, 178] : [213, 94, 0], strength = Math.min(1, Math.abs(share));
  const dark = matchMedia("(prefers-color-scheme: dark)").matches, base = dark ? 29 : 255;
  return [r, g, b].map(value => Math.round(base + strength * (value - base)));
}
const cssColour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function marker(context, shape, x, y, size) {
  context.beginPath();
  if (shape === "circle") context.arc(x, y, size, 0, 7);
  else if (shape === "square") context.rect(x - size * .9, y - size * .9, 1.8 * size, 1.8 * size);
  else if (shape === "triangle") { context.moveTo(x, y - 1.2 * size); context.lineTo(x + 1.1 * size, y + .8 * size); context.lineTo(x - 1.1 * size, y + .8 * size); context.closePath(); }
  else { context.moveTo(x, y - 1.3 * size); context.lineTo(x + 1.3 * size, y); context.lineTo(x, y + 1.3 * size); context.lineTo(x - 1.3 * size, y); context.closePath(); }
  context.fill();
}
/** The context of a canvas with as many pixels as the screen has, in CSS units. */
function crisp(canvas) {
  const width = canvas.clientWidth, height = canvas.clientHeight, ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return { context, width, height };
}
/** Pixel values in [0, 1], row by row, channels last, as an image of its own size. */
function picture(canvas, pixels, height, width, channels) {
  canvas.width = width; canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let p = 0; p < width * height; p++) for (let c = 0; c < 4; c++)
    image.data[4 * p + c] = c === 3 ? 255 : 255 * Math.max(0, Math.min(1, pixels[p * channels + (channels === 3 ? c : 0)]));
  context.putImageData(image, 0, 0);
}

// --- networks: parameters, group elements, evaluation ------------------------------------------------------------------
const product = shape => shape.reduce((a, b) => a * b, 1);

/** Weights and biases of a flat row, in double precision. */
function unflatten(architecture, flat) {
  const weights = [], biases = [];
  let start = 0;
  for (const layer of architecture.layers) {
    const size = product(layer.weights);
    weights.push(Float64Array.from(flat.subarray(start, start + size)));
    biases.push(Float64Array.from(flat.subarray(start + size, start + size + layer.outputs)));
    start += size + layer.outputs;
  }
  return { weights, biases };
}
const copied = params => ({ weights: params.weights.map(w => w.slice()), biases: params.biases.map(b => b.slice()) });
const combined = (first, second, fn) => ({
  weights: first.weights.map((w, l) => w.map((value, k) => fn(value, second.weights[l][k]))),
  biases: first.biases.map((b, l) => b.map((value, k) => fn(value, second.biases[l][k]))) });

/** Numbers of the weights that read a neuron of a layer, in the next layer. */
function* outgoing(architecture, layer, neuron) {
  const next = architecture.layers[layer + 1], [outputs, inputs, ...kernel] = next.weights, size = product(kernel);
  for (let o = 0; o < outputs; o++) for (let k = 0; k < size; k++) yield (o * inputs + neuron) * size + k;
}
/** Moves in place, as `featured.Move` of the Python package: swap, flip, scale, phase. */
function act(architecture, params, move) {
  const [kind, l, i, x] = move, layer = architecture.layers[l], weight = params.weights[l], bias = params.biases[l];
  const row = weight.length / layer.outputs, next = params.weights[l + 1];
  if (kind === "swap") {
    for (let k = 0; k < row; k++) [weight[i * row + k], weight[x * row + k]] = [weight[x * row + k], weight[i * row + k]];
    [bias[i], bias[x]] = [bias[x], bias[i]];
    const own = [...outgoing(architecture, l, i)], other = [...outgoing(architecture, l, x)];
    own.forEach((place, n) => { [next[place], next[other[n]]] = [next[other[n]], next[place]]; });
    return;
  }
  let factor = kind === "flip" ? -1 : x;
  if (kind === "phase") { bias[i] += x * Math.PI / layer.w0; factor = Math.abs(x) % 2 ? -1 : 1; }
  else { for (let k = 0; k < row; k++) weight[i * row + k] *= factor; bias[i] *= factor; }
  for (const place of outgoing(architecture, l, i)) next[place] /= factor;
}
const parseMove = key => { const [kind, ...rest] = key.split(":"); return [kind, ...rest.map(Number)]; };

const ACTIVATIONS = { sine: (z, w0) => Math.sin(w0 * z), tanh: Math.tanh, relu: z => Math.max(z, 0), identity: z => z,
  leaky_relu: z => z > 0 ? z : .01 * z, sigmoid: z => 1 / (1 + Math.exp(-z)) };
/** Outputs of a chain of linear layers at points (arrays of coordinates), point after point. */
function evaluate(architecture, params, points) {
  const outputs = architecture.layers[architecture.layers.length - 1].outputs, result = new Float64Array(points.length * outputs);
  points.forEach((point, p) => {
    let x = point;
    architecture.layers.forEach((layer, l) => {
      const z = new Float64Array(layer.outputs), weight = params.weights[l], fn = ACTIVATIONS[layer.activation];
      for (let i = 0; i < layer.outputs; i++) {
        let sum = params.biases[l][i];
        for (let j = 0; j < layer.inputs; j++) sum += weight[i * layer.inputs + j] * x[j];
        z[i] = fn(sum, layer.w0);
      }
      x = z;
    });
    result.set(x, p * outputs);
  });
  return result;
}
/** The positions of pixels: (x, y) in [-1, 1]^2, x the fastest axis. */
function grid(height, width) {
  const points = [];
  for (let i = 0; i < height; i++) for (let j = 0; j < width; j++) points.push([width > 1 ? 2 * j / (width - 1) - 1 : 0, height > 1 ? 2 * i / (height - 1) - 1 : 0]);
  return points;
}
const rendered = (params, height, width) => evaluate(state.architecture, params, grid(height, width)).map(v => v + state.collection.output_offset);

// --- the state of the page ---------------------------------------------------------------------------------------------
const state = { collection: null, selected: null, row: null, hover: null, sort: [null, 1], limit: 100, moves: [], params: null, moved: null, featured: null };
const columnNamed = name => state.collection.columns.find(column => column.name === name);

function parametersOf(collection, row) {
  if (row >= collection.parameters.count) return null;
  if (!collection.flat) {
    collection.flat = floats(collection.parameters.values);
    collection.starts = [0];
    for (let r = 0; r < collection.parameters.count; r++) collection.starts.push(collection.starts[r] + collection.architectures[collection.architecture[r]].parameters);
  }
  return unflatten(collection.architectures[collection.architecture[row]], collection.flat.subarray(collection.starts[row], collection.starts[row + 1]));
}
function thumbnail(collection, row) {
  const { height, width, channels, pixels } = collection.images;
  if (!collection.pixels) collection.pixels = bytes(pixels);
  const size = height * width * channels, canvas = make("canvas", { role: "img", "aria-label": `what network ${collection.names[row]} draws` });
  picture(canvas, Array.from(collection.pixels.subarray(row * size, (row + 1) * size), v => v / 255), height, width, channels);
  canvas.style.width = "7rem";
  return canvas;
}

function showCollection(collection) {
  Object.assign(state, { collection, selected: null, hover: null, sort: [null, 1], limit: 100 });
  byId("note").textContent = [collection.name, collection.note, ...collection.facts].join(" \u00b7 ");
  [...byId("collections").children].forEach((button, i) => button.setAttribute("aria-pressed", DATA.collections[i] === collection));
  byId("map-note").textContent = `${collection.map.kind === "UMAP" ? "UMAP" : "Principal components"} of ${collection.map.of}, ${collection.names.length.toLocaleString("en")} networks.`;
  const colour = byId("colour");
  colour.replaceChildren(...collection.columns.map(column => make("option", { value: column.name }, column.name)));
  const first = ["label", "prediction", "test_accuracy", "activation"].map(columnNamed).find(column => column);
  if (first) colour.value = first.name;
  byId("filter").value = "";
  const featured = new Set(collection.featured.map(entry => entry.row));
  const rows = [...featured, ...collection.names.keys()].filter((row, i) => i < featured.size || !featured.has(row));
  byId("pick").replaceChildren(...rows.map(row => make("option", { value: row }, collection.names[row] + (featured.has(row) ? " \u2605" : ""))));
  layoutMap(); refresh(); drawArchitectures(); openNetwork(rows[0]);
}
function refresh() { drawMap(); drawLegend(); drawHistograms(); drawTable(); drawCard(); }

// --- map ---------------------------------------------------------------------------------------------------------------
const map = byId("map");
let places = [], lasso = null;

function layoutMap() {
  const { x, y } = state.collection.map, width = map.clientWidth, height = map.clientHeight;
  const bounds = values => { const [low, high] = extent(values); return [low, high > low ? high - low : 1]; };
  const [x0, dx] = bounds(x), [y0, dy] = bounds(y);
  places = x.map((value, row) => [14 + (value - x0) / dx * (width - 28), height - 14 - (y[row] - y0) / dy * (height - 28)]);
}
function colourOf(column) {
  if (column.kind === "category") return row => column.values[row] === null ? "#8a8a8a" : CATEGORIES[column.values[row] % CATEGORIES.length];
  const [low, high] = extent(column.values.filter(value => value !== null));
  return row => column.values[row] === null ? "#8a8a8a" : sequential((column.values[row] - low) / (high - low || 1));
}
const shapeOf = column => row => column.kind === "category" && column.values[row] !== null ? SHAPES[Math.floor(column.values[row] % 10 / 3) % SHAPES.length] : "circle";
function drawMap() {
  const { context, width, height } = crisp(map), column = columnNamed(byId("colour").value);
  const colour = column ? colourOf(column) : () => cssColour("--blue"), shape = column ? shapeOf(column) : () => "circle";
  const size = places.length > 800 ? 3 : places.length > 100 ? 4 : 6;
  places.forEach(([x, y], row) => {
    context.globalAlpha = state.selected && !state.selected.has(row) ? .12 : .85;
    context.fillStyle = colour(row);
    marker(context, shape(row), x, y, size);
  });
  context.globalAlpha = 1;
  for (const [row, style] of [[state.row, cssColour("--text")], [state.hover, cssColour("--mark")]]) if (row !== null && places[row]) {
    context.beginPath(); context.arc(...places[row], size + 4, 0, 7); context.lineWidth = 2.5; context.strokeStyle = style; context.stroke();
  }
  if (lasso && lasso.length > 1) {
    context.beginPath(); lasso.forEach(([x, y], i) => i ? context.lineTo(x, y) : context.moveTo(x, y)); context.closePath();
    context.fillStyle = "rgba(128,128,128,.15)"; context.fill(); context.strokeStyle = cssColour("--text"); context.setLineDash([4, 3]); context.stroke();
  }
  map.setAttribute("aria-label", `Map of ${places.length} networks, coloured by ${column ? column.name : "nothing"}`);
}
function drawLegend() {
  const column = columnNamed(byId("colour").value), legend = byId("legend");
  if (!column) return legend.replaceChildren();
  if (column.kind === "number") {
    const values = column.values.filter(value => value !== null), bar = make("canvas", { width: 120, height: 12, "aria-hidden": "true" }), context = bar.getContext("2d");
    for (let x = 0; x < 120; x++) { context.fillStyle = sequential(x / 119); context.fillRect(x, 0, 1, 12); }
    const [low, high] = extent(values);
    return legend.replaceChildren(make("span", {}, shown(low), bar, shown(high)));
  }
  legend.replaceChildren(...column.names.slice(0, 30).map((name, number) => {
    const mark = make("canvas", { width: 14, height: 14, "aria-hidden": "true" }), context = mark.getContext("2d");
    context.fillStyle = CATEGORIES[number % CATEGORIES.length];
    marker(context, SHAPES[Math.floor(number % 10 / 3) % SHAPES.length], 7, 7, 5);
    return make("span", {}, mark, name);
  }));
}
function nearest(x, y, reach) {
  let best = null, least = reach * reach;
  places.forEach(([px, py], row) => { const d = (px - x) ** 2 + (py - y) ** 2; if (d < least) { least = d; best = row; } });
  return best;
}
function inside(polygon, [x, y]) {
  let result = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [xi, yi] = polygon[i], [xj, yj] = polygon[j];
    if (yi > y !== yj > y && x < (xj - xi) * (y - yi) / (yj - yi) + xi) result = !result;
  }
  return result;
}
const position = event => { const box = map.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
map.addEventListener("pointerdown", event => { lasso = [position(event)]; map.setPointerCapture(event.pointerId); });
map.addEventListener("pointermove", event => {
  const place = position(event);
  if (lasso) lasso.push(place);
  else { const row = nearest(...place, 14); if (row === state.hover) return; state.hover = row; drawCard(); }
  drawMap();
});
map.addEventListener("pointerleave", () => { if (!lasso && state.hover !== null) { state.hover = null; drawMap(); drawCard(); } });
map.addEventListener("pointerup", event => {
  const polygon = lasso;
  lasso = null;
  const far = polygon && polygon.some(([x, y]) => Math.hypot(x - polygon[0][0], y - polygon[0][1]) > 6);
  if (far) { const rows = places.flatMap((place, row) => inside(polygon, place) ? [row] : []); select(rows.length ? rows : null); }
  else { const row = nearest(...position(event), 14); if (row !== null) openNetwork(row); drawMap(); }
});
map.addEventListener("pointercancel", () => { lasso = null; drawMap(); });
map.addEventListener("keydown", event => {
  const axis = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  const current = state.hover ?? state.row ?? 0;
  if (event.key === "Enter") return openNetwork(current);
  if (event.key === "Escape") return select(null);
  if (!axis) return;
  event.preventDefault();
  let best = current, least = Infinity;
  places.forEach(([x, y], row) => {
    const dx = x - places[current][0], dy = y - places[current][1], along = dx * axis[0] + dy * axis[1], across = Math.abs(dx * axis[1]) + Math.abs(dy * axis[0]);
    if (along > 0 && along + 2 * across < least) { least = along + 2 * across; best = row; }
  });
  state.hover = best; drawMap(); drawCard();
});
function select(rows) {
  state.selected = rows && new Set(rows);
  byId("clear").disabled = !rows;
  byId("selection").textContent = rows ? `${rows.length.toLocaleString("en")} selected` : "";
  state.limit = 100;
  drawMap(); drawHistograms(); drawTable();
}
function drawCard() {
  const row = state.hover ?? state.row ?? 0, { collection } = state, list = make("dl"), card = byId("card");
  for (const column of collection.columns) list.append(make("dt", {}, column.name), make("dd", {}, shown(valueOf(column, row))));
  card.replaceChildren(make("strong", {}, `network ${collection.names[row]}`), ...(collection.images ? [thumbnail(collection, row)] : []), ...(collection.architectures.length > 1 ? [diagram(collection.architectures[collection.architecture[row]])] : []), list);
}

// --- histograms --------------------------------------------------------------------------------------------------------
function drawHistograms() {
  const { collection, selected } = state;
  byId("histograms").replaceChildren(...collection.columns.map(column => make("figure", {}, make("h3", {}, column.name),
    make("canvas", { role: "img", "aria-label": `histogram of ${column.name}` }), make("figcaption"))));
  collection.columns.forEach((column, number) => {
    const figure = byId("histograms").children[number], canvas = figure.querySelector("canvas"), { context, width, height } = crisp(canvas);
    const values = column.values.filter(value => value !== null);
    const [low, high] = column.kind === "category" ? [0, column.names.length - 1] : extent(values);
    const count = column.kind === "category" ? Math.min(column.names.length, 40) : 24, all = new Array(count).fill(0), part = new Array(count).fill(0);
    column.values.forEach((value, row) => {
      if (value === null) return;
      const bin = Math.min(count - 1, Math.floor((value - low) / (high - low || 1) * (column.kind === "category" ? count - 1 : count) + 1e-9));
      all[bin]++; if (!selected || selected.has(row)) part[bin]++;
    });
    const top = Math.max(...all, 1), step = width / count;
    for (const [counts, colour] of [[all, cssColour("--line")], [part, cssColour("--blue")]]) { context.fillStyle = colour; counts.forEach((n, b) => context.fillRect(b * step, height - n / top * height, Math.max(1, step - 1), n / top * height)); }
    const ends = column.kind === "category" ? [column.names[0], column.names[column.names.length - 1]] : [shown(low), shown(high)];
    figure.querySelector("figcaption").replaceChildren(...ends.map(text => make("span", {}, String(text ?? ""))));
  });
}

// --- architectures -----------------------------------------------------------------------------------------------------
const MOST_ARCHITECTURES = 12;
/** The most frequent architectures as buttons that select their networks; none where all networks have the same. */
function drawArchitectures() {
  const { collection } = state, members = collection.architectures.map(() => []);
  collection.architecture.forEach((number, row) => members[number].push(row));
  byId("architectures-section").hidden = members.length < 2;
  if (members.length < 2) return;
  const order = [...members.keys()].sort((a, b) => members[b].length - members[a].length);
  byId("architectures-note").textContent = `${members.length.toLocaleString("en")} architectures${order.length > MOST_ARCHITECTURES ? `, the ${MOST_ARCHITECTURES} with the most networks` : ""}. Bars are layers, as high as they are wide (logarithmic); arcs are residual connections.`;
  byId("architectures").replaceChildren(...order.slice(0, MOST_ARCHITECTURES).map(number => {
    const button = make("button", { type: "button" }, diagram(collection.architectures[number]), make("span", {}, `${collection.architectures[number].text}: ${members[number].length.toLocaleString("en")}`));
    button.onclick = () => select(members[number]);
    return button;
  }));
}

// --- table -------------------------------------------------------------------------------------------------------------
/** Words to find anywhere in a row, or `column > number`. */
function matcher(text) {
  const match = text.match(/^\s*(.+?)\s*(<=|>=|<|>|=)\s*(.+?)\s*$/), column = match && columnNamed(match[1]);
  if (column) {
    const [, , sign, word] = match, number = Number(word);
    if (column.kind === "category" || Number.isNaN(number)) return row => sign === "=" && String(valueOf(column, row)) === word;
    const compare = { "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b }[sign];
    return row => column.values[row] !== null && compare(column.values[row], number);
  }
  const words = text.toLowerCase().split(/\s+/).filter(word => word);
  return row => { if (!words.length) return true; const line = [state.collection.names[row], ...state.collection.columns.map(column => valueOf(column, row))].join(" ").toLowerCase(); return words.every(word => line.includes(word)); };
}
function drawTable() {
  const { collection, selected, sort: [sorted, direction] } = state, matches = matcher(byId("filter").value);
  let rows = [...collection.names.keys()].filter(row => (!selected || selected.has(row)) && matches(row));
  const key = sorted === null ? null : sorted === "network" ? row => row : row => columnNamed(sorted).values[row];
  if (key) rows.sort((a, b) => (key(a) === null) - (key(b) === null) || direction * (key(a) - key(b)));
  const heads = ["network", ...collection.columns.map(column => column.name)];
  byId("table").tHead.replaceChildren(make("tr", {}, ...heads.map((name, i) => {
    const button = make("button", { type: "button" }, name);
    button.onclick = () => { state.sort = [name, state.sort[0] === name ? -state.sort[1] : 1]; drawTable(); [...byId("table").tHead.querySelectorAll("button")][i].focus(); };
    const head = make("th", { scope: "col" }, button);
    if (i && collection.columns[i - 1].kind === "number") head.className = "number";
    if (sorted === name) head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    return head;
  })));
  byId("table").tBodies[0].replaceChildren(...rows.slice(0, state.limit).map(row => {
    const link = make("tr", { tabindex: 0, "aria-selected": row === state.row }, make("td", {}, collection.names[row]),
      ...collection.columns.map(column => make("td", column.kind === "number" ? { class: "number" } : {}, shown(valueOf(column, row)))));
    link.onclick = () => openNetwork(row);
    link.onkeydown = event => { if (event.key === "Enter") openNetwork(row); };
    return link;
  }));
  byId("count").textContent = `${rows.length.toLocaleString("en")} networks`;
  byId("more").hidden = rows.length <= state.limit;
}

// --- one network -------------------------------------------------------------------------------------------------------
const LARGEST_GRAPH = 300, MOST_EDGES = 4000, BINS = 20;

function openNetwork(row) {
  const { collection } = state, architecture = collection.architectures[collection.architecture[row]];
  const params = parametersOf(collection, row);
  Object.assign(state, { row, architecture, params, moves: [], featured: collection.featured.find(entry => entry.row === row) ?? null });
  byId("pick").value = row;
  byId("architecture").textContent = `${architecture.text}, ${architecture.parameters.toLocaleString("en")} parameters` + (params ? "" : " (the parameters of this network are not on the page; name its file to see them)");
  byId("layers").replaceChildren(...architecture.layers.map((layer, l) => {
    const kernel = layer.kernel ? ` ${layer.kernel.join("\u00d7")}` : "", symmetry = [layer.signs && "signs", layer.scales && "scales", layer.phases && "phases"].filter(x => x).join(", ");
    return make("span", { class: layer.neurons.split(" ")[0] }, `${l}: ${layer.inputs} \u2192 ${layer.outputs}${kernel} ${layer.activation}${layer.activation === "sine" ? ` (${layer.w0})` : ""}, ${layer.neurons}${symmetry ? `, ${symmetry}` : ""}`);
  }));
  byId("layers").prepend(diagram(architecture));
  byId("walk").value = 0;
  byId("paint").parentElement.hidden = !(state.featured && state.featured.explanation);
  if (byId("paint").parentElement.hidden) byId("paint").value = "weights";
  byId("answers").replaceChildren(...answersOf(collection, row));
  prepareMoves(); drawExplanation(); drawEdit(); moveNetwork(); drawCard(); drawMap();
  document.querySelectorAll("#table tbody tr[aria-selected=true]").forEach(line => line.setAttribute("aria-selected", false));
}
/** What the graph and the heat maps show: the moved weights and biases, or their contributions, in the moved order. */
function painted() {
  const { architecture, moved, featured } = state, explanation = featured && featured.explanation;
  if (byId("paint").value !== "contributions" || !explanation) return moved;
  const shares = unflatten(architecture, floats(explanation.values));
  for (const move of currentMoves()) if (move.startsWith("swap")) act(architecture, shares, parseMove(move)); // scalars change no contribution
  return shares;
}
function drawNetwork() {
  const { architecture, moved } = state, graph = byId("graph"), heat = byId("heat");
  graph.replaceChildren(); heat.replaceChildren();
  if (!moved) return;
  const values = painted(), sizes = [architecture.inputs, ...architecture.layers.map(layer => layer.outputs)];
  const edges = architecture.layers.reduce((sum, layer) => sum + layer.outputs * layer.weights[1], 0);
  const most = sizes.reduce((a, b) => a + b) <= LARGEST_GRAPH && edges <= MOST_EDGES ? Infinity : BINS;
  graph.append(graphOf(sizes, values, most));
  const kinds = new Set(architecture.layers.flatMap(layer => layer.kinds.map(segment => segment[2])));
  byId("graph-key").replaceChildren(...[["free", "neurons in any order"], ["tied", "order shared with another layer"], ["pinned", "keep their places"]].filter(([kind]) => kinds.has(kind)).map(([kind, text]) => {
    const key = makeSvg("svg", { width: 16, height: 16, "aria-hidden": "true" });
    key.append(neuronMark(8, 8, 5, kind));
    return make("span", {}, key, `${kind}: ${text}`);
  }), make("span", {}, most === Infinity ? "blue, solid: positive; orange, dashed: negative" : `summarised: up to ${BINS} groups of neurons a layer, edges are root mean squares; blue, solid: positive sum, orange, dashed: negative`));
  architecture.layers.forEach((layer, l) => heat.append(heatMap(layer, l, values)));
}
/** Free neurons are circles, tied ones squares, pinned ones diamonds, inputs and outputs small circles. */
function neuronMark(x, y, r, kind) {
  if (kind === "tied") return makeSvg("rect", { x: x - r * .9, y: y - r * .9, width: 1.8 * r, height: 1.8 * r, class: "neuron tied" });
  if (kind === "pinned") return makeSvg("path", { d: `M${x} ${y - 1.25 * r}L${x + 1.25 * r} ${y}L${x} ${y + 1.25 * r}L${x - 1.25 * r} ${y}Z`, class: "neuron pinned" });
  return makeSvg("circle", { cx: x, cy: y, r, class: "neuron" });
}
/** Neurons in columns, a line per weight (of kernels: their root mean square with the sign of their sum); of large layers at most `most` groups of neurons. */
function graphOf(sizes, values, most) {
  const { architecture, moved } = state, bins = sizes.map(size => { const step = Math.ceil(size / Math.min(size, most)); return { step, count: Math.ceil(size / step) }; });
  const width = Math.max(640, 90 * sizes.length), tallest = Math.max(...bins.map(bin => bin.count)), height = Math.max(180, Math.min(520, 26 * tallest + 40));
  const svg = makeSvg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `parameter graph of ${byId("paint").value}: ${sizes.join(", ")} neurons by layer` });
  svg.style.minWidth = `${Math.min(width, 64 * sizes.length)}px`;
  const place = (column, i) => [30 + column * (width - 60) / (sizes.length - 1), 26 + (i + .5) * (height - 34) / bins[column].count];
  architecture.layers.forEach((layer, l) => {
    const from = layer.reads + 1, [outputs, inputs] = layer.weights, kernel = product(layer.weights.slice(2)), weight = values.weights[l], columns = bins[from].count;
    if (layer.residual !== null) {
      const [x1, y1] = place(layer.residual + 1, 0), [x2] = place(l + 1, 0);
      svg.append(makeSvg("path", { d: `M${x1} ${y1 - 9}Q${(x1 + x2) / 2} ${y1 - 26} ${x2} ${y1 - 9}`, class: "skip" }));
    }
    if (layer.constant || !weight.length) return;
    const squares = new Float64Array(bins[l + 1].count * columns), sums = new Float64Array(squares.length), counts = new Float64Array(squares.length);
    for (let i = 0, e = 0; i < outputs; i++) {
      const row = Math.floor(i / bins[l + 1].step) * columns, first = Math.floor(i / (outputs / layer.groups)) * inputs;
      for (let j = 0; j < inputs; j++) {
        const cell = row + Math.floor((first + j) / bins[from].step);
        for (let k = 0; k < kernel; k++, e++) { squares[cell] += weight[e] ** 2; sums[cell] += weight[e]; }
        counts[cell] += kernel;
      }
    }
    const shares = squares.map((square, cell) => counts[cell] ? Math.sign(sums[cell]) * Math.sqrt(square / counts[cell]) : 0), top = Math.max(...shares.map(Math.abs), 1e-12);
    shares.forEach((value, cell) => {
      const share = Math.abs(value) / top;
      if (share <= .02) return;
      const [x1, y1] = place(from, cell % columns), [x2, y2] = place(l + 1, Math.floor(cell / columns));
      svg.append(makeSvg("line", { x1, y1, x2, y2, class: value > 0 ? "positive" : "negative", "stroke-width": (.3 + 3.2 * share).toFixed(2), opacity: (.25 + .6 * share).toFixed(2) }));
    });
  });
  sizes.forEach((size, column) => {
    svg.append(makeSvg("text", { x: place(column, 0)[0], y: 12, "text-anchor": "middle" }, column === 0 ? "input" : column === sizes.length - 1 ? "output" : `layer ${column - 1}`));
    const layer = column - 1, { step, count } = bins[column], exact = step === 1, movable = column > 0 && exact && architecture.layers[layer].movable;
    for (let i = 0; i < count; i++) {
      const [x, y] = place(column, i), segment = column > 0 && architecture.layers[layer].kinds.find(([start, stop]) => start <= i * step && i * step < stop);
      const kind = segment ? segment[2] : "input", mark = neuronMark(x, y, count > 40 ? 3 : 7, kind);
      const bias = column > 0 && exact && moved ? `, bias ${shown(moved.biases[layer][i])}` : "", name = exact ? `neuron ${i}` : `neurons ${i * step} to ${Math.min(size, (i + 1) * step) - 1}`;
      mark.append(makeSvg("title", {}, `${name}, ${kind}${bias}`));
      if (movable) {
        mark.setAttribute("tabindex", 0); mark.setAttribute("role", "button"); mark.setAttribute("aria-label", `layer ${layer}, neuron ${i}${bias}`);
        if (+byId("move-layer").value === layer && +byId("move-neuron").value === i) mark.classList.add("chosen");
        mark.onclick = () => chooseNeuron(layer, i);
        mark.onkeydown = event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); chooseNeuron(layer, i); } };
      } else mark.classList.add("fixed");
      svg.append(mark);
    }
  });
  return svg;
}
/** A layer's weights, a row per neuron, a column per neuron that it reads, each cell as large as the kernel; the biases are the last column. Large layers are averaged. */
function heatMap(layer, l, values) {
  const weight = values.weights[l], bias = values.biases[l], [outputs, inputs, tall = 1, wide = 1] = layer.weights, rows = outputs * tall, columns = inputs * wide + 1;
  const shrinkX = Math.ceil(columns / 300), shrinkY = Math.ceil(rows / 200), width = Math.ceil(columns / shrinkX), height = Math.ceil(rows / shrinkY);
  const canvas = make("canvas", { width, height, role: "img", "aria-label": `${byId("paint").value}: weights and biases of layer ${l}` }), context = canvas.getContext("2d"), image = context.createImageData(width, height);
  const at = (y, x) => { const i = Math.floor(y / tall); return x === columns - 1 ? bias[i] : weight[((i * inputs + Math.floor(x / wide)) * tall + y % tall) * wide + x % wide]; };
  let top = 1e-12;
  for (const value of weight) top = Math.max(top, Math.abs(value));
  for (const value of bias) top = Math.max(top, Math.abs(value));
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    let sum = 0, count = 0;
    for (let v = y * shrinkY; v < Math.min(rows, (y + 1) * shrinkY); v++) for (let u = x * shrinkX; u < Math.min(columns, (x + 1) * shrinkX); u++) { sum += at(v, u); count++; }
    image.data.set([...diverging(sum / count / top), 255], 4 * (y * width + x));
  }
  context.putImageData(image, 0, 0);
  const scale = Math.max(1, Math.min(14, Math.floor(260 / Math.max(width, height))));
  canvas.style.width = `${width * scale}px`; canvas.style.height = "auto";
  return make("figure", {}, make("figcaption", { class: "note" }, `layer ${l}: up to \u00b1${shown(top)}`), canvas);
}
/** An architecture as bars, as high as its layers are wide (logarithmic), with arcs for residual connections; striped bars are convolutions. */
function diagram(architecture) {
  const sizes = [architecture.inputs, ...architecture.layers.map(layer => layer.outputs)], shownSizes = sizes.slice(0, 24), step = Math.min(16, 170 / shownSizes.length);
  const top = Math.log2(1 + Math.max(...shownSizes)), svg = makeSvg("svg", { viewBox: `0 0 ${Math.ceil(step * shownSizes.length) + 4} 54`, width: Math.ceil(step * shownSizes.length) + 4, height: 54, role: "img", "aria-label": `architecture: ${architecture.text}`, class: "diagram" });
  shownSizes.forEach((size, column) => {
    const height = 4 + 32 * Math.log2(1 + size) / (top || 1), layer = architecture.layers[column - 1], x = 2 + column * step;
    const bar = makeSvg("rect", { x, y: 33 - height / 2, width: step * .6, height, class: !layer ? "outside" : layer.kernel ? "kernel" : layer.neurons === "output" ? "outside" : "linear" });
    bar.append(makeSvg("title", {}, layer ? `layer ${column - 1}: ${size}, ${layer.activation}` : `${size} inputs`));
    svg.append(bar);
    if (layer && layer.residual !== null) { const x1 = 2 + (layer.residual + 1) * step + step * .3; svg.append(makeSvg("path", { d: `M${x1} 14Q${(x1 + x + step * .3) / 2} 1 ${x + step * .3} 14`, class: "skip" })); }
  });
  return svg;
}
/** softmax of K outputs. */
function softmax(z) { const top = Math.max(...z), e = Array.from(z, v => Math.exp(v - top)), sum = e.reduce((a, b) => a + b); return e.map(v => v / sum); }
const REACH = 3, CELLS = 72;
/** The colours of the first classes. */
const classKey = count => make("span", { class: "legend" }, ...CATEGORIES.slice(0, count).map((colour, c) => { const mark = make("span", { class: "swatch" }); mark.style.background = colour; return make("span", {}, mark, String(c)); }));
/** Of a chain with one or two inputs: outputs along the axis, or which class has the largest share where, with the decision curves in between. */
function decisions(architecture, params) {
  const outputs = architecture.layers[architecture.layers.length - 1].outputs, ticks = Array.from({ length: CELLS }, (_, i) => REACH * (2 * i / (CELLS - 1) - 1));
  if (architecture.inputs === 1) {
    const values = evaluate(architecture, params, ticks.map(x => [x])), rows = ticks.map((_, p) => outputs > 1 ? softmax(values.subarray(p * outputs, (p + 1) * outputs)) : [values[p]]);
    const [low, high] = outputs > 1 ? [0, 1] : extent(rows.flat()), svg = makeSvg("svg", { viewBox: "0 0 240 160", role: "img", "aria-label": outputs > 1 ? `shares of ${outputs} classes for inputs from ${-REACH} to ${REACH}` : `output for inputs from ${-REACH} to ${REACH}` });
    for (let c = 0; c < rows[0].length; c++) svg.append(makeSvg("path", { d: rows.map((row, p) => `${p ? "L" : "M"}${(26 + p * 208 / (CELLS - 1)).toFixed(1)} ${(138 - (row[c] - low) / (high - low || 1) * 124).toFixed(1)}`).join(""), style: `stroke:${CATEGORIES[c % CATEGORIES.length]}`, "stroke-dasharray": ["", "6 3", "2 2"][c % 3] }));
    for (const [x, y, text] of [[2, 18, shown(high)], [2, 140, shown(low)], [24, 155, shown(-REACH)], [222, 155, shown(REACH)]]) svg.append(makeSvg("text", { x, y }, text));
    return make("figure", { class: "curves" }, svg, make("figcaption", {}, outputs > 1 ? "shares of the classes along the input" : "output along the input", ...(outputs > 1 ? [classKey(outputs)] : [])));
  }
  const points = []; // rows from the top
  for (let i = CELLS - 1; i >= 0; i--) for (const x of ticks) points.push([x, ticks[i]]);
  const values = evaluate(architecture, params, points), best = new Int32Array(points.length), share = new Float64Array(points.length);
  points.forEach((_, p) => {
    const z = outputs > 1 ? values.subarray(p * outputs, (p + 1) * outputs) : [0, values[p]], s = softmax(z);
    best[p] = s.indexOf(Math.max(...s)); share[p] = s[best[p]];
  });
  const canvas = make("canvas", { role: "img", "aria-label": `classes of inputs from ${-REACH} to ${REACH}: ${new Set(best).size} of ${Math.max(2, outputs)} appear` }), pixels = new Float64Array(3 * points.length);
  points.forEach((_, p) => {
    const x = p % CELLS, y = Math.floor(p / CELLS), edge = x + 1 < CELLS && best[p] !== best[p + 1] || y + 1 < CELLS && best[p] !== best[p + CELLS];
    const colour = CATEGORIES[best[p] % CATEGORIES.length].match(/[0-9a-f]{2}/g).map(v => parseInt(v, 16) / 255), strength = edge ? 0 : .25 + .75 * share[p];
    for (let c = 0; c < 3; c++) pixels[3 * p + c] = edge ? 0 : 1 - strength * (1 - colour[c]);
  });
  picture(canvas, pixels, CELLS, CELLS, 3);
  return make("figure", {}, canvas, make("figcaption", {}, `class with the largest share, inputs from ${-REACH} to ${REACH}; black: decision curves`, classKey(Math.max(2, outputs))));
}
/** Whether decision curves are drawn: one input, or two and no image. */
const hasDecisions = architecture => architecture.inputs === 1 || architecture.inputs === 2 && !state.collection.images;
/** What a classifier answered about some inputs when the page was written: a figure per input. */
function answersOf(collection, row) {
  const { answers, group } = collection, own = answers && answers.values[group[row]];
  if (!own) return [];
  if (!own.bytes) { own.bytes = bytes(own.shares); own.first = group.indexOf(group[row]); }
  const size = answers.count * own.classes, start = (row - own.first) * size, name = c => answers.classes ? answers.classes[c] : String(c);
  const figures = Array.from({ length: answers.count }, (_, n) => {
    const share = Array.from(own.bytes.subarray(start + n * own.classes, start + (n + 1) * own.classes), v => v / 255), best = share.indexOf(Math.max(...share)), right = answers.labels && answers.labels[n];
    const title = answers.labels ? `class ${name(right)}` : `input ${n}`, text = `${name(best)}: ${(100 * share[best]).toFixed(0)} %`;
    const bars = makeSvg("svg", { viewBox: "0 0 100 40", role: "img", "aria-label": `${title}: answer ${text}` });
    share.forEach((value, c) => bars.append(makeSvg("rect", { x: c * 100 / own.classes, y: 40 - 38 * value - 1, width: Math.max(.5, 90 / own.classes), height: 38 * value + 1, class: c === right ? "right" : "other" })));
    const parts = [bars, make("figcaption", {}, title, make("br"), text)];
    if (answers.pictures) {
      const { height, width, channels, pixels } = answers.pictures, canvas = make("canvas", { role: "img", "aria-label": `the image, ${title}` });
      picture(canvas, Array.from(bytes(pixels).subarray(n * height * width * channels, (n + 1) * height * width * channels), v => v / 255), height, width, channels);
      parts.unshift(canvas);
    }
    return make("figure", {}, ...parts);
  });
  return [make("p", { class: "note" }, `Shares of the classes (softmax of the outputs) for ${answers.of}, evaluated when the page was written.${answers.labels ? " Blue: the image's class." : ""}`), make("div", { class: "asked" }, ...figures)];
}
function labelled(text, pixels, height, width, channels) {
  const canvas = make("canvas", { role: "img", "aria-label": text });
  picture(canvas, pixels, height, width, channels);
  return make("figure", {}, canvas, make("figcaption", {}, text));
}
const imageSize = () => { const { height, width } = state.collection.images; return Math.max(height, width) < 24 ? [24, 24] : [height, width]; };

// --- symmetry playground -----------------------------------------------------------------------------------------------
function prepareMoves() {
  const { architecture, params, featured } = state, movable = architecture.layers.flatMap((layer, l) => layer.movable ? [l] : []);
  byId("playground").hidden = !params || !movable.length;
  byId("move-layer").replaceChildren(...movable.map(l => make("option", { value: l }, l)));
  byId("walk").parentElement.hidden = !(featured && featured.walk && featured.walk.length);
  if (featured && featured.walk) byId("walk").max = featured.walk.length;
  prepareNeurons();
}
function prepareNeurons() {
  const layer = state.architecture.layers[+byId("move-layer").value], count = layer && byId("move-layer").value !== "" ? layer.outputs : 0;
  for (const id of ["move-neuron", "move-other"]) byId(id).replaceChildren(...Array.from({ length: count }, (_, i) => make("option", { value: i }, i)));
  if (count > 1) byId("move-other").value = 1;
  prepareSliders();
}
function prepareSliders() {
  const layer = state.architecture.layers[+byId("move-layer").value];
  byId("flip").hidden = !layer || !layer.signs;
  byId("scale").parentElement.hidden = !layer || !layer.scales;
  byId("phase").parentElement.hidden = !layer || !layer.phases;
  byId("scale").value = 0; byId("phase").value = 0;
  byId("scale-value").textContent = "1"; byId("phase-value").textContent = "0";
}
function chooseNeuron(layer, neuron) {
  byId("move-layer").value = layer; prepareNeurons(); byId("move-neuron").value = neuron;
  settle(); drawNetwork();
  const chosen = document.querySelector(".neuron.chosen");
  if (chosen) chosen.focus();
}
/** Moves that sliders still hold become part of the list; the sliders are at their start again. */
function settle() { state.moves = currentMoves(); byId("walk").value = 0; byId("walk-value").textContent = "0"; prepareSliders(); }
/** The moves so far, and those of the sliders. */
function currentMoves() {
  const layer = +byId("move-layer").value, neuron = +byId("move-neuron").value, moves = [...state.moves], walk = +byId("walk").value;
  if (walk) moves.push(...state.featured.walk.slice(0, walk));
  if (+byId("scale").value) moves.push(`scale:${layer}:${neuron}:${Number((10 ** (byId("scale").value / 10)).toPrecision(3))}`);
  if (+byId("phase").value) moves.push(`phase:${layer}:${neuron}:${byId("phase").value}`);
  return moves;
}
function moveNetwork() {
  const { architecture, params, collection } = state;
  state.moved = params && copied(params);
  const moves = currentMoves();
  if (params) for (const move of moves) act(architecture, state.moved, parseMove(move));
  byId("walk-value").textContent = byId("walk").value;
  drawNetwork();
  const pictures = byId("pictures"), moved = byId("moved"), lines = [];
  pictures.replaceChildren(); moved.replaceChildren();
  document.querySelector(".network").classList.toggle("plain", !collection.images && !(params && architecture.drawable && hasDecisions(architecture)));
  if (!params) return;
  const changes = (own, other) => extent(own.map((values, l) => values.reduce((top, value, k) => Math.max(top, Math.abs(value - other[l][k])), 0)))[1];
  const change = Math.max(changes(params.weights, state.moved.weights), changes(params.biases, state.moved.biases));
  lines.push(["largest change of a weight or bias", shown(change), ""]);
  if (architecture.drawable) {
    if (collection.images) {
      const [height, width] = imageSize(), channels = collection.images.channels, before = rendered(params, height, width), after = rendered(state.moved, height, width);
      pictures.append(labelled(moves.length ? "what the moved network draws" : "what the network draws", after, height, width, channels));
      const error = before.reduce((top, value, p) => Math.max(top, Math.abs(value - after[p])), 0);
      lines.push(["largest change of a pixel", error.toExponential(1), error < 1e-5 ? "same" : "changed"]);
    }
    if (hasDecisions(architecture)) {
      pictures.append(decisions(architecture, state.moved));
      if (!collection.images) {
        const points = Array.from({ length: 49 }, (_, p) => [p % 7 - 3, Math.floor(p / 7) - 3].slice(0, architecture.inputs)), before = evaluate(architecture, params, points), after = evaluate(architecture, state.moved, points);
        const error = before.reduce((top, value, p) => Math.max(top, Math.abs(value - after[p])), 0);
        lines.push(["largest change of an output", error.toExponential(1), error < 1e-5 ? "same" : "changed"]);
      }
    }
  }
  lines.push(...predictions(moves));
  moved.append(...lines.map(([name, value, kind]) => make("div", {}, name, make("strong", { class: kind }, value))));
}
/** What the model and the MLP answered about this network when the page was written. */
function predictions(moves) {
  const { featured } = state;
  if (!featured || !featured.moves) return [];
  const key = moves.length === 1 ? moves[0] : "", walk = +byId("walk").value;
  const start = featured.moves[""], fromWalk = walk && moves.length === walk && !state.moves.length;
  const answer = fromWalk ? featured.walk_answers[walk] : moves.length > 1 ? null : featured.moves[key] ?? null;
  const classes = (columnNamed("label") ?? columnNamed("prediction") ?? {}).names;
  const text = (number, value) => number < 0 ? shown(value) : `${classes && classes[number] !== undefined ? classes[number] : number} (${(100 * value).toFixed(1)} %)`;
  return ["trained model", "MLP of all weights"].slice(0, start.length / 2).map((name, n) => {
    if (!answer) return [name, "computed for single moves and the walk", ""];
    const same = answer[2 * n] === start[2 * n] && Math.abs(answer[2 * n + 1] - start[2 * n + 1]) < 1e-3;
    return [name, text(answer[2 * n], answer[2 * n + 1]), same ? "same" : "changed"];
  });
}

// --- explanation -------------------------------------------------------------------------------------------------------
function drawExplanation() {
  const { featured, architecture } = state, explanation = featured && featured.explanation;
  byId("explanation").hidden = !explanation;
  if (!explanation) return;
  const method = explanation.method === "integrated" ? "integrated gradients from the mean canonical network" : "gradient \u00d7 weight";
  byId("explanation-note").textContent = `Contribution of each hidden neuron (its bias and weights) to the ${explanation.meaning}, ${shown(explanation.score)}: ${method}. Moved networks have the moved contributions.`;
  const hidden = explanation.neurons.slice(0, -1), total = hidden.reduce((sum, layer) => sum + layer.length + 1, 0), top = Math.max(...hidden.flat().map(Math.abs), 1e-12);
  const bars = makeSvg("svg", { viewBox: "0 0 600 200", role: "img", "aria-label": `contributions of ${hidden.flat().length} neurons to the ${explanation.meaning}` });
  let slot = 0;
  hidden.forEach((layer, l) => {
    bars.append(makeSvg("text", { x: (slot + .2) * 600 / total, y: 12 }, `layer ${l}`));
    layer.forEach((value, i) => {
      const height = Math.abs(value) / top * 85, bar = makeSvg("rect", { x: slot * 600 / total, y: value > 0 ? 104 - height : 104, width: Math.max(1, 600 / total - 2), height, class: value > 0 ? "positive" : "negative" });
      bar.append(makeSvg("title", {}, `layer ${l}, neuron ${i}: ${shown(value)}`));
      bars.append(bar); slot++;
    });
    slot++;
  });
  byId("attribution").replaceChildren(bars);
  const curves = makeSvg("svg", { viewBox: "0 0 400 200", role: "img", "aria-label": "score while neurons are removed, largest contributions first and at random" });
  const all = [...explanation.curve, ...explanation.random], low = Math.min(...all), high = Math.max(...all), count = explanation.curve.length - 1;
  const path = values => values.map((value, i) => `${i ? "L" : "M"}${(34 + i * 356 / count).toFixed(1)} ${(170 - (value - low) / (high - low || 1) * 145).toFixed(1)}`).join("");
  curves.append(makeSvg("path", { d: path(explanation.random), class: "random" }), makeSvg("path", { d: path(explanation.curve), class: "ranked" }));
  for (const [x, y, text] of [[2, 28, shown(high)], [2, 172, shown(low)], [34, 192, "0 neurons removed"], [370, 192, String(count)], [190, 14, "solid: largest first, dashed: random"]]) curves.append(makeSvg("text", { x, y }, text));
  byId("deletion").replaceChildren(curves);
}

// --- edits -------------------------------------------------------------------------------------------------------------
function drawEdit() {
  const { featured, architecture, params, collection } = state, edit = featured && featured.edit;
  byId("edit").hidden = !edit || !params || !collection.images;
  if (byId("edit").hidden) return;
  const strength = byId("strength").value / 100, changes = unflatten(architecture, floats(edit.changes));
  byId("strength-value").textContent = shown(strength);
  byId("edit-note").textContent = `${edit.name}: the model changes the weights by delta; drawn is theta + t delta.`;
  const [height, width] = edit.target ? edit.target.shape : imageSize(), channels = collection.images.channels;
  const before = rendered(params, height, width), after = rendered(combined(params, changes, (w, d) => w + strength * d), height, width);
  const figures = [labelled("before", before, height, width, channels)];
  if (edit.target) {
    const target = floats(edit.target.values);
    const error = after.reduce((sum, value, p) => sum + (value - target[p]) ** 2, 0) / after.length;
    figures.push(labelled("target", target, height, width, channels), labelled(`after, t = ${shown(strength)}, squared error ${shown(error)}`, after, height, width, channels),
      labelled("difference from the target", after.map((value, p) => Math.abs(value - target[p])), height, width, channels));
  } else figures.push(labelled(`after, t = ${shown(strength)}`, after, height, width, channels), labelled("change", after.map((value, p) => Math.abs(value - before[p])), height, width, channels));
  byId("edits").replaceChildren(...figures);
}

// --- events ------------------------------------------------------------------------------------------------------------
const move = key => { settle(); state.moves.push(key); moveNetwork(); };
byId("colour").onchange = () => { drawMap(); drawLegend(); };
byId("clear").onclick = () => select(null);
byId("filter").oninput = () => { state.limit = 100; drawTable(); };
byId("more").onclick = () => { state.limit += 400; drawTable(); };
byId("pick").onchange = () => openNetwork(+byId("pick").value);
byId("move-layer").onchange = () => { settle(); prepareNeurons(); moveNetwork(); };
byId("move-neuron").onfocus = settle;
byId("move-neuron").onchange = () => { prepareSliders(); moveNetwork(); };
byId("swap").onclick = () => { const [a, b] = [+byId("move-neuron").value, +byId("move-other").value].sort((x, y) => x - y); if (a !== b) move(`swap:${byId("move-layer").value}:${a}:${b}`); };
byId("flip").onclick = () => move(`flip:${byId("move-layer").value}:${byId("move-neuron").value}`);
byId("reset").onclick = () => { prepareSliders(); byId("walk").value = 0; state.moves = []; moveNetwork(); };
byId("scale").oninput = () => { byId("scale-value").textContent = shown(Number((10 ** (byId("scale").value / 10)).toPrecision(3))); moveNetwork(); };
byId("phase").oninput = () => { byId("phase-value").textContent = `${byId("phase").value}\u03c0`; moveNetwork(); };
byId("walk").oninput = () => { const walk = byId("walk").value; prepareSliders(); state.moves = []; byId("walk").value = walk; moveNetwork(); };
byId("paint").onchange = drawNetwork;
byId("strength").oninput = drawEdit;
let pending = null;
addEventListener("resize", () => { clearTimeout(pending); pending = setTimeout(() => { layoutMap(); refresh(); }, 80); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { refresh(); moveNetwork(); });

byId("collections").replaceChildren(...(DATA.collections.length > 1 ? DATA.collections : []).map(collection => {
  const button = make("button", { type: "button" }, collection.name);
  button.onclick = () => showCollection(collection);
  return button;
}));
showCollection(DATA.collections[0]);
document.documentElement.dataset.ready = "yes";
