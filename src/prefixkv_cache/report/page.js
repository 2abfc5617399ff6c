"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const nTokens = data.tokens.length, nLayers = data.layers.length;
  const RAMP = ["#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725"].map(
    (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  const VEIL = "rgba(9, 10, 15, 0.84)", EDGE = "#ffb224";
  const state = { budget: 0, layer: 0, curves: 0 };
  const find = (id) => document.getElementById(id);

  // Numbers.

  const bytesOf = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  for (const each of data.budgets) {
    const bits = bytesOf(each.kept);
    each.keeps = (layer, token) => {
      const at = layer * nTokens + token;
      return (bits[at >> 3] >> (7 - (at & 7))) & 1;
    };
    each.share = data.tokens.map((_, token) => {
      let sum = 0;
      for (let layer = 0; layer < nLayers; layer++) sum += each.keeps(layer, token);
      return sum / nLayers;
    });
    each.counts = data.layers.map((_, layer) => data.tokens.reduce((sum, _, token) => sum + each.keeps(layer, token), 0));
  }
  for (const each of data.curves) {
    const bytes = bytesOf(each.heights);
    each.height = (layer, point) => {
      const at = 2 * (layer * each.x.length + point);
      return (bytes[at] + 256 * bytes[at + 1]) / 65535;
    };
  }
  const keptOf = (columns, budget, layer) => columns.reduce((sum, token) => sum + budget.keeps(layer, token), 0);
  const percent = (ratio) => `${+(100 * ratio).toFixed(ratio < 0.01 ? 2 : 1)} %`;
  const size = (bytes) => bytes >= 2 ** 20 ? `${(bytes / 2 ** 20).toFixed(bytes >= 2 ** 27 ? 0 : 1)} MiB` : `${Math.round(bytes / 1024)} KiB`;
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
    const keeps = (row, column) =>
      row >= 0 && column >= 0 && row < view.rows && column < view.columns && budget.keeps(layer, view.tokens[row * view.columns + column]);
    const edges = new Path2D(), pruned = new Path2D();
    eachCell(view, canvas.width, canvas.height, (token, x, y, w, h, row, column) => {
      if (!budget.keeps(layer, token)) {
        pruned.rect(x, y, w, h);
        return;
      }
      const line = (x0, y0, x1, y1) => { edges.moveTo(x0, y0); edges.lineTo(x1, y1); };
      if (!keeps(row - 1, column)) line(x, y, x + w, y);
      if (!keeps(row + 1, column)) line(x, y + h, x + w, y + h);
      if (!keeps(row, column - 1)) line(x, y, x, y + h);
      if (!keeps(row, column + 1)) line(x + w, y, x + w, y + h);
    });
    pen.fillStyle = VEIL;
    pen.fill(pruned);
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
    make(legend, "span", {}, "no layer");
    make(legend, "i", { class: "ramp" });
    make(legend, "span", {}, "every layer");
    kept.at = make(kept.caption, "div", { class: "at" });
    shares.at = make(shares.caption, "div", { class: "at" });
    for (const map of [kept, shares]) {
      map.canvas.addEventListener("pointermove", (event) => {
        const box = map.canvas.getBoundingClientRect();
        const place = (part, n) => Math.min(n - 1, Math.max(0, Math.floor(part * n)));
        const row = place((event.clientY - box.top) / box.height, view.rows);
        const column = place((event.clientX - box.left) / box.width, view.columns);
        const share = data.budgets[state.budget].share[view.tokens[row * view.columns + column]];
        map.at.textContent = `row ${row + 1}, column ${column + 1}: kept by ${Math.round(share * nLayers)} of ${plural(nLayers, "layer")}`;
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
      const cells = view.tokens, count = keptOf(cells, budget, state.layer);
      const never = cells.filter((token) => budget.share[token] === 0).length;
      const always = cells.filter((token) => budget.share[token] === 1).length;
      drawKept(kept.canvas, picture, view, budget, state.layer);
      drawShares(shares.canvas, picture, view, budget);
      kept.text.textContent = `Layer ${layer} keeps ${count} of ${cells.length} image tokens (${percent(count / cells.length)}).`;
      shares.text.textContent = `How many layers kept each token: ${always} are kept by all, ${never} by none.`;
      kept.canvas.setAttribute("aria-label", `${name} as kept at budget ${budget.budget}. ${kept.text.textContent}`);
      shares.canvas.setAttribute("aria-label", `${name}, map of all layers at budget ${budget.budget}. ${shares.text.textContent}`);
      buttons.forEach(({ button, canvas, text }, index) => {
        button.setAttribute("aria-pressed", String(index === state.layer));
        if (drawn && drawn[0] === budget && drawn[1] === view) return;
        const stays = keptOf(cells, budget, index);
        drawKept(canvas, picture, view, budget, index);
        text.textContent = `layer ${data.layers[index]} \u00b7 ${stays}`;
        button.setAttribute("aria-label", `Layer ${data.layers[index]} keeps ${stays} of ${cells.length} image tokens`);
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
      const share = columns.reduce((sum, token) => sum + budget.share[token], 0) / columns.length;
      const kept = keptOf(columns, budget, state.layer);
      element.style.borderColor = `rgb(${ramp(share).join(", ")})`;
      element.classList.toggle("gone", kept === 0);
      if (number === undefined) {
        element.title = `kept by ${Math.round(share * nLayers)} of ${plural(nLayers, "layer")}`;
      } else {
        const name = data.pictures.length > 1 && number >= 0 ? `picture ${number + 1}` : "picture";
        element.textContent = `${name}: ${kept} of ${columns.length}`;
        element.title = `image tokens; on average ${percent(share)} of the layers keep one`;
      }
    }
  }

  // Charts.

  const W = 480, H = 250, LEFT = 58, RIGHT = 8, TOP = 8, BOTTOM = 40;
  const across = (part) => LEFT + part * (W - LEFT - RIGHT), up = (part) => H - BOTTOM - part * (H - TOP - BOTTOM);

  function chart(id, label, xTitle, yTicks) {
    find(id).replaceChildren();
    const svg = make(find(id), "svg:svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label });
    for (const [part, text] of yTicks) {
      make(svg, "svg:path", { class: "axis", d: `M${LEFT} ${up(part)}H${W - RIGHT}` });
      make(svg, "svg:text", { x: LEFT - 8, y: up(part) + 4, "text-anchor": "end" }, text);
    }
    make(svg, "svg:text", { x: across(0.5), y: H - 3, "text-anchor": "middle" }, xTitle);
    return svg;
  }

  function layerTicks(svg) {
    const step = Math.max(1, Math.ceil(nLayers / 16));
    for (let i = 0; i < nLayers; i += step) {
      make(svg, "svg:text", { x: across((i + 0.5) / nLayers), y: H - BOTTOM + 17, "text-anchor": "middle" }, data.layers[i]);
    }
  }

  function hits(svg, titles) {
    titles.forEach((title, i) => {
      const area = make(svg, "svg:rect", { class: "hit", x: across(i / nLayers), y: TOP, width: (W - LEFT - RIGHT) / nLayers, height: H - TOP - BOTTOM });
      make(area, "svg:title", {}, title);
      area.addEventListener("click", () => set("layer", i));
    });
  }

  const limit = (svg, part) => make(svg, "svg:path", { class: "limit", d: `M${LEFT} ${up(part)}H${W - RIGHT}` });
  const here = (i) => i === state.layer ? " here" : "";

  function showRatios(budget) {
    const ratios = budget.counts.map((count) => count / nTokens);
    const text = `Layer ${data.layers[state.layer]} keeps ${percent(ratios[state.layer])} of the prompt; all layers together ${percent(budget.budget)}`;
    const svg = chart("ratios", text, "layer", [0, 0.25, 0.5, 0.75, 1].map((part) => [part, `${100 * part} %`]));
    const width = (W - LEFT - RIGHT) / nLayers;
    ratios.forEach((ratio, i) => make(svg, "svg:rect", {
      class: `bar${here(i)}`, x: across(i / nLayers) + width * 0.14, y: up(ratio), width: width * 0.72, height: up(0) - up(ratio), rx: 1.5,
    }));
    limit(svg, budget.budget);
    layerTicks(svg);
    hits(svg, ratios.map((ratio, i) => `layer ${data.layers[i]}: ${budget.counts[i]} of ${nTokens} pairs, ${percent(ratio)}`));
  }

  // 0 to 99.99 % on a scale on which each further nine takes the same room.
  const nines = (mass) => Math.min(-Math.log10(Math.max(1 - mass, 1e-4)) / 4, 1);

  function showMass(budget) {
    const text = `Layer ${data.layers[state.layer]} keeps ${percent(budget.mass[state.layer])} of its attention`;
    const svg = chart("mass", text, "layer", [0, 0.9, 0.99, 0.999, 0.9999].map((mass) => [nines(mass), `${+(100 * mass).toFixed(2)} %`]));
    budget.mass.forEach((mass, i) => make(svg, "svg:circle", {
      class: `dot${here(i)}`, cx: across((i + 0.5) / nLayers), cy: up(nines(mass)), r: i === state.layer ? 6 : Math.min(4.5, 90 / nLayers + 1.5),
    }));
    layerTicks(svg);
    hits(svg, budget.mass.map((mass, i) => `layer ${data.layers[i]}: ${(100 * mass).toFixed(2)} % of its attention`));
  }

  // What ranked the keys comes first; where that was attention and nothing else, there is no second.
  const STOPS = "A dot: where the layer stops. The dashed line is the threshold of a search on this prompt.";
  const LEADS = data.curves.length === 1
    ? [`Keys by the attention that they receive, the most first, one line a layer. ${STOPS}`]
    : [
      `How much of the score that ranks the keys is left out where only the best stay, one line a layer. ${STOPS}`,
      "Keys by the attention that they receive, the most first, one line a layer. A dot: how many the layer keeps, and how much attention those hold; below the line, as the score is more than attention.",
    ];

  function addCurves() {
    if (data.curves.length === 1) return;
    const choice = make(find("curves-lead").parentElement, "div", { class: "views", role: "radiogroup", "aria-label": "Lines of" });
    data.curves.forEach(({ of }, index) => addChoice(choice, "curves", of, index === 0, () => set("curves", index)));
  }

  const SMALL = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079";
  const power = (n) => n ? `10\u207b${[...String(n)].map((digit) => SMALL[digit]).join("")}` : "all";

  function showCurves(budget) {
    const { of, decades, x, height } = data.curves[state.curves], first = state.curves === 0;
    find("curves-title").textContent = `Where the ${of} goes`;
    find("curves-lead").textContent = LEADS[state.curves];
    const left = first ? budget.missed : budget.mass.map((mass) => 1 - mass);
    const place = (missed) => decades ? Math.max(1 + Math.log10(Math.max(missed, 1e-99)) / decades, 0) : 1 - missed;
    const tell = (missed) => decades ? `leaves out ${missed < 1e-16 ? "less than 1e-16" : missed.toExponential(1)}` : `keeps ${percent(1 - missed)}`;
    const text = `Layer ${data.layers[state.layer]} ${tell(left[state.layer])} of the ${of}` + (first ? `; a search on this prompt ${tell(1 - budget.threshold)}` : "");
    const quarters = [0, 0.25, 0.5, 0.75, 1];
    const svg = chart("curves", text, "share of the prompt\u2019s keys", quarters.map((part) => [part, decades ? power(decades * (1 - part)) : `${100 * part} %`]));
    for (const part of [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]) {
      make(svg, "svg:text", { x: across(Math.sqrt(part)), y: H - BOTTOM + 17, "text-anchor": part === 1 ? "end" : "middle" }, `${100 * part} %`);
    }
    const order = data.layers.map((_, i) => i).filter((i) => i !== state.layer).concat(state.layer);
    for (const i of order) {
      const points = x.map((part, point) => `${across(Math.sqrt(part)).toFixed(1)} ${up(height(i, point)).toFixed(1)}`);
      make(svg, "svg:path", { class: `curve${here(i)}`, d: `M${points.join("L")}` });
    }
    if (first) limit(svg, place(1 - budget.threshold));
    for (const i of order) {
      make(svg, "svg:circle", {
        class: `dot${here(i)}`, cx: across(Math.sqrt(budget.counts[i] / nTokens)), cy: up(place(left[i])), r: i === state.layer ? 6 : 3,
      });
    }
  }

  function showMemory() {
    const box = find("memory");
    box.replaceChildren();
    const rows = [{ name: "full cache", nbytes: data.full.nbytes, kind: "whole" }].concat(
      data.budgets.map((each, i) => ({ name: percent(each.budget), nbytes: each.nbytes, kind: i === state.budget ? "here" : "" })).reverse());
    const largest = Math.max(...rows.map((row) => row.nbytes));
    for (const { name, nbytes, kind } of rows) {
      make(box, "div", { class: kind }, name);
      const track = make(box, "div", { class: `track ${kind}` });
      make(track, "i", { style: `width: calc((100% - 8.5rem) * ${(nbytes / largest).toFixed(4)})` });
      make(track, "span", {}, size(nbytes) + (kind === "whole" ? "" : ` \u00b7 ${percent(nbytes / data.full.nbytes)}`));
    }
  }

  // Answers.

  /** Fill in a text with the word marked in which it leaves the other one. */
  function marked(element, text, agrees) {
    element.replaceChildren();
    if (agrees === null) { element.textContent = text || "(nothing)"; return; }
    const start = text.slice(0, agrees).search(/\S*$/), word = text.slice(start).match(/^\s*\S*/)[0];
    element.append(text.slice(0, start));
    make(element, "mark", {}, word || " (ends here)");
    make(element, "span", { class: "after" }, text.slice(start + word.length));
  }

  function showAnswers(budget) {
    const same = budget.text === data.full.text, agrees = same ? null : budget.agrees;
    find("pruned-title").textContent = `Budget ${percent(budget.budget)}`;
    marked(find("full-answer"), data.full.text, agrees);
    marked(find("pruned-answer"), budget.text, agrees);
    find("full-facts").textContent = plural(data.full.nTokens, "token");
    find("pruned-facts").textContent = `${plural(budget.nTokens, "token")}; ` + (same ? "the same answer." : "marked: the first difference.");
  }

  function table(id, head, rows) {
    const element = find(id), top = make(make(element, "thead"), "tr");
    head.forEach((text) => make(top, "th", { scope: "col" }, text));
    const body = make(element, "tbody");
    for (const [first, ...cells] of rows) {
      const line = make(body, "tr");
      make(line, "th", { scope: "row" }, first);
      cells.forEach((cell) => make(line, "td", typeof cell === "string" ? { class: "text" } : {}, cell));
    }
  }

  function addTables() {
    const falling = data.budgets.slice().reverse();
    table("answers-table", ["budget", "tokens", ""], [
      ["full cache", data.full.nTokens, data.full.text],
      ...falling.map((each) => [percent(each.budget), each.nTokens, each.text]),
    ]);
    table("numbers", ["layer", ...falling.map((each) => percent(each.budget))],
      data.layers.map((layer, i) => [String(layer), ...falling.map((each) => each.counts[i])]));
  }

  // All together.

  function show() {
    const budget = data.budgets[state.budget], layer = data.layers[state.layer];
    const count = `${budget.counts[state.layer]} of ${nTokens}`;
    find("budget-value").textContent = `${percent(budget.budget)} kept`;
    find("layer-value").textContent = `${layer}, keeps ${percent(budget.counts[state.layer] / nTokens)}`;
    find("budget").setAttribute("aria-valuetext", `${percent(budget.budget)} of the pairs kept`);
    find("layer").setAttribute("aria-valuetext", `layer ${layer}, ${count} tokens kept`);
    find("status").textContent = `Budget ${percent(budget.budget)}, layer ${layer}: ${count} tokens kept`;
    for (const name of ["budget", "layer"]) find(name).value = state[name];
    for (const draw of maps) draw();
    showTokens(budget);
    showRatios(budget);
    showMass(budget);
    showCurves(budget);
    showMemory();
    showAnswers(budget);
  }

  function set(name, value) {
    if (state[name] === value) return;
    state[name] = value;
    show();
  }

  function addSlider(name, n) {
    const slider = find(name), ticks = find(`${name}-ticks`);
    slider.max = n - 1;
    if (n <= 40) for (let i = 0; i < n; i++) make(ticks, "option", { value: i });
    slider.disabled = n === 1;
    slider.addEventListener("input", () => set(name, Number(slider.value)));
  }

  async function start() {
    find("prompt").textContent = data.prompt;
    find("facts").textContent = data.facts;
    find("footer").textContent = data.footer;
    addSlider("budget", data.budgets.length);
    addSlider("layer", nLayers);
    state.budget = Math.floor((data.budgets.length - 1) / 2);
    addTokens();
    addTables();
    addCurves();
    if (data.pictures.length > 1) find("pictures-title").textContent = "The pictures";
    find("pictures-section").hidden = data.pictures.length === 0;
    const images = data.pictures.map((shown) => Object.assign(new Image(), { src: shown.source }));
    await Promise.all(images.map((image) => image.decode()));
    data.pictures.forEach((shown, number) => addPicture(shown, number, images[number]));
    show();
    document.body.dataset.ready = "true";
  }

  start();
})();
