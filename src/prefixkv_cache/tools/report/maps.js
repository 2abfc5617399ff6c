// Numbers, elements, maps of pictures and tokens. One scope with page.js, which follows.
const data = JSON.parse(document.getElementById("data").textContent);
const nTokens = data.tokens.length, nLayers = data.layers.length;
const RAMP = ["#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725"].map(
  (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const EDGE = "#ffb224";
const caches = [...data.budgets, ...data.others];
const state = { budget: 0, layer: 0, beside: -1 };  // beside: one of the caches; -1: the full one
const find = (id) => document.getElementById(id);

// Numbers.

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const mean = (numbers) => sum(numbers) / numbers.length;
for (const each of caches) {
  const counts = Uint8Array.from(atob(each.kept), (character) => character.charCodeAt(0));
  each.heads = each.lengths.map((heads) => heads.length);
  each.keeps = (layer, token) => counts[layer * nTokens + token] / each.heads[layer];  // the share of the heads
  each.share = data.tokens.map((_, token) => mean(data.layers.map((_, layer) => each.keeps(layer, token))));
  each.counts = each.lengths.map(mean);
  each.joined = each.heads.every((heads) => heads === 1);
}
const keptOf = (columns, budget, layer) => sum(columns.map((token) => budget.keeps(layer, token)));
const percent = (ratio) => `${+(100 * ratio).toFixed(ratio < 0.01 ? 2 : 1)} %`;
const size = (bytes) => bytes >= 2 ** 20 ? `${(bytes / 2 ** 20).toFixed(bytes >= 2 ** 27 ? 0 : 1)} MiB` : `${Math.round(bytes / 1024)} KiB`;
const pairs = (n) => String(+n.toFixed(1));
const whoKept = (budget, share) => budget.joined
  ? `${Math.round(share * nLayers)} of ${plural(nLayers, "layer")}` : `${percent(share)} of the key heads`;
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const ramp = (share) => {
  const at = Math.min(share * (RAMP.length - 1), RAMP.length - 1 - 1e-9), low = Math.floor(at);
  return RAMP[low].map((value, i) => Math.round(value + (at - low) * (RAMP[low + 1][i] - value)));
};

// Elements: all text goes in as text, never as markup.

function make(parent, tag, attributes = {}, text = null) {
  const element = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  return parent.appendChild(element);
}

function addChoice(parent, group, text, checked, choose) {
  const label = make(parent, "label"), radio = make(label, "input", { type: "radio", name: group });
  radio.checked = checked;
  radio.addEventListener("change", choose);
  make(label, "span", {}, text);
}

// Maps.

function eachCell(view, width, height, visit) {
  for (let row = 0; row < view.rows; row++) {
    const top = Math.round(row * height / view.rows), bottom = Math.round((row + 1) * height / view.rows);
    for (let column = 0; column < view.columns; column++) {
      const left = Math.round(column * width / view.columns), right = Math.round((column + 1) * width / view.columns);
      visit(view.tokens[row * view.columns + column], left, top, right - left, bottom - top, row, column);
    }
  }
}

function startDrawing(canvas, picture, filter) {
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.imageSmoothingEnabled = picture.naturalWidth > 200;
  pen.imageSmoothingQuality = "high";
  pen.filter = filter;
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  pen.filter = "none";
  return pen;
}

/** Faint lines, so that pruned and kept differ in a black picture, too. */
function hatching(pen) {
  const tile = document.createElement("canvas"), line = tile.getContext("2d");
  tile.width = tile.height = 12;
  line.strokeStyle = "rgba(160, 172, 205, 0.3)";
  line.lineWidth = 1.2;
  for (const shift of [-12, 0, 12]) { line.moveTo(shift, 12); line.lineTo(shift + 12, 0); }
  line.stroke();
  return pen.createPattern(tile, "repeat");
}

function drawKept(canvas, picture, view, budget, layer) {
  const pen = startDrawing(canvas, picture, "none");
  const share = (row, column) => budget.keeps(layer, view.tokens[row * view.columns + column]);
  const keeps = (row, column) =>
    row >= 0 && column >= 0 && row < view.rows && column < view.columns && share(row, column) >= 0.5;
  const edges = new Path2D(), pruned = new Path2D();
  eachCell(view, canvas.width, canvas.height, (token, x, y, w, h, row, column) => {
    pen.fillStyle = `rgba(9, 10, 15, ${0.84 * (1 - share(row, column))})`;
    pen.fillRect(x, y, w, h);
    if (share(row, column) === 0) pruned.rect(x, y, w, h);
    if (!keeps(row, column)) return;
    const line = (x0, y0, x1, y1) => { edges.moveTo(x0, y0); edges.lineTo(x1, y1); };
    if (!keeps(row - 1, column)) line(x, y, x + w, y);
    if (!keeps(row + 1, column)) line(x, y + h, x + w, y + h);
    if (!keeps(row, column - 1)) line(x, y, x, y + h);
    if (!keeps(row, column + 1)) line(x + w, y, x + w, y + h);
  });
  if (canvas.width > 400) { pen.fillStyle = hatching(pen); pen.fill(pruned); }
  pen.strokeStyle = EDGE;
  pen.lineWidth = Math.max(1, canvas.width / 340);
  pen.lineCap = "square";
  pen.stroke(edges);
}

function drawShares(canvas, picture, view, budget) {
  const pen = startDrawing(canvas, picture, "grayscale(1) contrast(1.15)");
  eachCell(view, canvas.width, canvas.height, (token, x, y, w, h) => {
    pen.fillStyle = `rgba(${ramp(budget.share[token]).join(", ")}, 0.76)`;
    pen.fillRect(x, y, w, h);
  });
}

function newCanvas(parent, picture, edge, attributes) {
  const scale = edge / Math.max(picture.naturalWidth, picture.naturalHeight);
  const [width, height] = [picture.naturalWidth, picture.naturalHeight].map((side) => Math.round(side * scale));
  return make(parent, "canvas", { width, height, ...attributes });
}

const maps = [];  // functions that draw what the state says

function addPicture(shown, number, picture) {
  const article = make(find("pictures"), "article", { class: "picture" });
  const name = data.pictures.length > 1 ? `Picture ${number + 1}` : "The picture";
  if (data.pictures.length > 1) make(article, "h3", {}, `${name}: ${shown.name}`);
  if (!shown.views.length) {
    make(article, "p", { class: "lead" }, "There is no map: how this model lays its image tokens over the picture is not known"
      + (shown.columns.length ? "; how many of them stay is told below." : ", nor which of the prompt\u2019s tokens are this picture\u2019s."));
    make(article, "img", { src: shown.source, alt: name, style: "max-width: 22rem; width: 100%; border-radius: 6px" });
    return;
  }
  let view = shown.views[0];
  if (shown.views.length > 1) {
    const choice = make(article, "div", { class: "views", role: "radiogroup", "aria-label": `${name}: which tokens` });
    shown.views.forEach((each, index) => addChoice(choice, `view-${number}`, each.name, index === 0, () => { view = each; show(); }));
  }
  const pair = make(article, "div", { class: "two" });
  const [kept, shares] = [0, 1].map(() => {
    const figure = make(pair, "figure");
    const canvas = newCanvas(figure, picture, 960, { role: "img" }), caption = make(figure, "figcaption");
    const text = make(caption, "div");
    return { canvas, caption, text, at: null };
  });
  const legend = make(shares.caption, "div", { class: "legend", "aria-hidden": "true" });
  make(legend, "span", {}, "no head");
  make(legend, "i", { class: "ramp" });
  make(legend, "span", {}, "every head");
  kept.at = make(kept.caption, "div", { class: "at" });
  shares.at = make(shares.caption, "div", { class: "at" });
  for (const map of [kept, shares]) {
    map.canvas.addEventListener("pointermove", (event) => {
      const box = map.canvas.getBoundingClientRect();
      const place = (part, n) => Math.min(n - 1, Math.max(0, Math.floor(part * n)));
      const row = place((event.clientY - box.top) / box.height, view.rows);
      const column = place((event.clientX - box.left) / box.width, view.columns);
      const budget = map === shares && state.beside >= 0 ? caches[state.beside] : data.budgets[state.budget];
      const token = view.tokens[row * view.columns + column];
      const heads = budget.heads[state.layer], own = Math.round(budget.keeps(state.layer, token) * heads);
      const here = heads === 1 ? (own ? "kept" : "pruned") : `kept by ${own} of ${heads} heads`;
      map.at.textContent = `row ${row + 1}, column ${column + 1}: ${here} here, by ${whoKept(budget, budget.share[token])} in all`;
    });
    map.canvas.addEventListener("pointerleave", () => { map.at.textContent = ""; });
  }
  const strip = make(article, "div", { class: "strip", role: "group", "aria-label": `${name}, every layer` });
  const buttons = data.layers.map((layer, index) => {
    const button = make(strip, "button", { type: "button" });
    const canvas = newCanvas(button, picture, 208, { "aria-hidden": "true" });
    const text = make(button, "span");
    button.addEventListener("click", () => set("layer", index));
    return { button, canvas, text };
  });
  let drawn = null;  // the strip depends on budget and view only
  maps.push(() => {
    const budget = data.budgets[state.budget], layer = data.layers[state.layer];
    const cells = view.tokens, beside = caches[state.beside];
    const showLayer = (map, cache) => {
      const count = keptOf(cells, cache, state.layer), many = cache.heads[state.layer] > 1 ? " a head" : "";
      drawKept(map.canvas, picture, view, cache, state.layer);
      map.text.textContent = `${beside ? `${cache.label}: layer` : "Layer"} ${layer} keeps ${pairs(count)} of ${cells.length} image tokens${many} (${percent(count / cells.length)}).`;
      map.canvas.setAttribute("aria-label", `${name} as kept at budget ${cache.label}. ${map.text.textContent}`);
    };
    showLayer(kept, budget);
    legend.hidden = Boolean(beside);
    if (beside) {
      showLayer(shares, beside);
    } else {
      const never = cells.filter((token) => budget.share[token] === 0).length;
      const always = cells.filter((token) => budget.share[token] === 1).length;
      drawShares(shares.canvas, picture, view, budget);
      shares.text.textContent = `What share of all key heads kept each token: ${always} are kept by all, ${never} by none.`;
      shares.canvas.setAttribute("aria-label", `${name}, map of all layers at budget ${budget.label}. ${shares.text.textContent}`);
    }
    buttons.forEach(({ button, canvas, text }, index) => {
      button.setAttribute("aria-pressed", String(index === state.layer));
      if (drawn && drawn[0] === budget && drawn[1] === view) return;
      const stays = keptOf(cells, budget, index);
      drawKept(canvas, picture, view, budget, index);
      text.textContent = `layer ${data.layers[index]} \u00b7 ${pairs(stays)}`;
      button.setAttribute("aria-label", `Layer ${data.layers[index]} keeps ${pairs(stays)} of ${cells.length} image tokens`);
    });
    drawn = [budget, view];
  });
}

// The prompt's tokens; image tokens are drawn together.

const pieces = [];
function addTokens() {
  const owner = new Map();
  data.pictures.forEach((picture, number) => picture.columns.forEach((token) => owner.set(token, number)));
  data.imageColumns.forEach((token) => { if (!owner.has(token)) owner.set(token, -1); });
  for (let token = 0; token < nTokens; token++) {
    const number = owner.get(token), last = pieces[pieces.length - 1];
    if (number !== undefined && last && last.number === number && last.columns[last.columns.length - 1] === token - 1) {
      last.columns.push(token);
      continue;
    }
    const text = number === undefined ? data.tokens[token].replace(/\n/g, "\u21b5") || "\u00b7" : "";
    const element = make(find("tokens"), "span", number === undefined ? {} : { class: "image" }, text);
    pieces.push({ columns: [token], number, element });
  }
}

function showTokens(budget) {
  for (const { columns, number, element } of pieces) {
    const share = mean(columns.map((token) => budget.share[token]));
    const kept = keptOf(columns, budget, state.layer);
    element.style.borderColor = `rgb(${ramp(share).join(", ")})`;
    element.classList.toggle("gone", kept === 0);
    if (number === undefined) {
      element.title = `kept by ${whoKept(budget, share)}`;
    } else {
      const name = data.pictures.length > 1 && number >= 0 ? `picture ${number + 1}` : "picture";
      element.textContent = `${name}: ${pairs(kept)} of ${columns.length}`;
      element.title = `image tokens; on average ${percent(share)} of all key heads keep one`;
    }
  }
}
