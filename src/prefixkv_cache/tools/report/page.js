// Charts, answers, tables, and what holds all together. One scope with maps.js, which comes before.
// Charts.

// All caches, by method and falling budget.
const falling = [data.budgets, data.others].flatMap(
  (some) => some.map((each) => ({ ...each, index: caches.indexOf(each) })).reverse());

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
  const text = `Layer ${data.layers[state.layer]} keeps ${percent(ratios[state.layer])} of the prompt; all layers together ${percent(budget.ratio)}`;
  const svg = chart("ratios", text, "layer", [0, 0.25, 0.5, 0.75, 1].map((part) => [part, `${100 * part} %`]));
  const width = (W - LEFT - RIGHT) / nLayers;
  ratios.forEach((ratio, i) => make(svg, "svg:rect", {
    class: `bar${here(i)}`, x: across(i / nLayers) + width * 0.14, y: up(ratio), width: width * 0.72, height: up(0) - up(ratio), rx: 1.5,
  }));
  limit(svg, budget.ratio);
  layerTicks(svg);
  hits(svg, ratios.map((ratio, i) => `layer ${data.layers[i]}: ${pairs(budget.counts[i])} of ${nTokens} pairs a head, ${percent(ratio)}`));
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

/** Heads by layers, where the heads of some layer differ in length. */
function showHeads(budget) {
  const most = Math.max(...budget.heads), longest = Math.max(...budget.lengths.flat());
  find("heads-figure").hidden = budget.lengths.every((heads) => heads.every((length) => length === heads[0]));
  const svg = chart("heads", `Pairs that each of up to ${most} key heads of ${plural(nLayers, "layer")} keeps`, "layer", []);
  budget.lengths.forEach((heads, i) => heads.forEach((length, head) => {
    const height = (H - TOP - BOTTOM) / heads.length;
    const cell = make(svg, "svg:rect", {
      x: across(i / nLayers), y: TOP + head * height, width: (W - LEFT - RIGHT) / nLayers, height, fill: `rgb(${ramp(length / longest).join(", ")})`,
    });
    make(cell, "svg:title", {}, `layer ${data.layers[i]}, head ${head}: ${length} of ${nTokens} pairs`);
    cell.addEventListener("click", () => set("layer", i));
  }));
  layerTicks(svg);
}

function showMemory() {
  const box = find("memory");
  box.replaceChildren();
  const rows = [{ ...data.full, label: "full cache", kind: "whole" }].concat(
    falling.map((each) => ({ ...each, kind: each.index === state.budget || each.index === state.beside ? "here" : "" })));
  const largest = Math.max(...rows.map((row) => row.nbytes[1]));
  for (const { label, nbytes, nTokens: said, kind } of rows) {
    make(box, "div", { class: kind }, label);
    const ends = make(box, "div");
    [`prompt`, `+ ${plural(said, "token")}`].forEach((end, i) => {
      const track = make(ends, "div", { class: `track ${kind} ${i ? "end" : ""}` });
      make(track, "i", { style: `width: calc((100% - 15rem) * ${(nbytes[i] / largest).toFixed(4)})` });
      const share = kind === "whole" ? "" : ` \u00b7 ${percent(nbytes[i] / data.full.nbytes[i])}`;
      make(track, "span", {}, `${size(nbytes[i])}${share} \u00b7 ${end}`);
    });
  }
}

// Answers.

/** How many characters two texts have in common, from their beginning. */
function common(text, other) {
  let place = 0;
  while (place < text.length && text[place] === other[place]) place++;
  return place;
}

/** Fill in a text: the word marked in which it leaves the other one, and behind it the words that the other never says. */
function marked(element, text, other) {
  element.replaceChildren();
  if (text === other) { element.textContent = text || "(nothing)"; return; }
  const agrees = common(text, other), words = new Set(other.split(/\s+/));
  const start = text.slice(0, agrees).search(/\S*$/), word = text.slice(start).match(/^\s*\S*/)[0];
  element.append(text.slice(0, start));
  make(element, "mark", {}, word || " (ends here)");
  for (const part of text.slice(start + word.length).split(/(\s+)/)) {
    const invented = part.trim() && !words.has(part);
    make(element, "span", { class: invented ? "after new" : "after" }, part);
  }
}

function showAnswers(budget) {
  const beside = caches[state.beside] ?? data.full;
  find("full-title").textContent = state.beside < 0 ? "Full cache" : `Budget ${beside.label}`;
  find("pruned-title").textContent = `Budget ${budget.label}`;
  marked(find("full-answer"), beside.text, budget.text);
  marked(find("pruned-answer"), budget.text, beside.text);
  find("full-facts").textContent = plural(beside.nTokens, "token") + (state.beside < 0 ? "" : `; ${beside.verdict}.`);
  find("pruned-facts").textContent = `${plural(budget.nTokens, "token")}; ${budget.verdict}.`;
  [...find("verdicts").querySelectorAll("button")].forEach((button, i) =>
    button.setAttribute("aria-pressed", String([state.budget, state.beside].includes(falling[i].index))));
}

function table(id, head, rows) {
  const element = find(id), top = make(make(element, "thead"), "tr");
  head.forEach((text) => make(top, "th", { scope: "col" }, text));
  const body = make(element, "tbody");
  for (const [first, ...cells] of rows) {
    const line = make(body, "tr");
    make(line, "th", { scope: "row" }, first);
    for (const cell of cells) {
      if (typeof cell === "function") cell(make(line, "td", { class: "text" }));
      else make(line, "td", {}, cell);
    }
  }
}


function addTables() {
  table("answers-table", ["budget", "tokens", ""], [
    ["full cache", data.full.nTokens, (cell) => marked(cell, data.full.text, data.full.text)],
    ...falling.map((each) => [each.label, each.nTokens, (cell) => marked(cell, each.text, data.full.text)]),
  ]);
  table("numbers", ["layer", ...falling.map((each) => each.label)],
    data.layers.map((layer, i) => [String(layer), ...falling.map((each) => pairs(each.counts[i]))]));
}

function addVerdicts() {
  for (const each of falling) {
    const button = make(make(find("verdicts"), "li"), "button", { type: "button" });
    make(button, "b", {}, `${each.label}: `);
    make(button, "span", {}, each.verdict);
    button.addEventListener("click", () => set(each.index < data.budgets.length ? "budget" : "beside", each.index));
  }
}

// All together.

function show() {
  const budget = data.budgets[state.budget], layer = data.layers[state.layer];
  const count = `${pairs(budget.counts[state.layer])} of ${nTokens}`;
  find("budget-value").textContent = `${budget.label} kept`;
  find("layer-value").textContent = `${layer}, keeps ${percent(budget.counts[state.layer] / nTokens)}`;
  find("beside").value = state.beside;
  find("budget").setAttribute("aria-valuetext", `${budget.label} kept`);
  find("layer").setAttribute("aria-valuetext", `layer ${layer}, ${count} tokens kept`);
  find("status").textContent = `Budget ${budget.label}, layer ${layer}: ${count} tokens kept`;
  for (const name of ["budget", "layer"]) find(name).value = state[name];
  for (const draw of maps) draw();
  showTokens(budget);
  showRatios(budget);
  showMass(budget);
  showHeads(budget);
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

function addBeside() {
  const choice = find("beside");
  make(choice, "option", { value: -1 }, "the full cache");
  for (const each of falling) make(choice, "option", { value: each.index }, each.label);
  choice.addEventListener("input", () => set("beside", Number(choice.value)));
}

async function start() {
  find("prompt").textContent = data.prompt;
  find("facts").textContent = data.facts;
  find("footer").textContent = data.footer;
  addSlider("budget", data.budgets.length);
  addSlider("layer", nLayers);
  state.budget = Math.floor((data.budgets.length - 1) / 2);
  addBeside();
  addTokens();
  addTables();
  addVerdicts();
  if (data.pictures.length > 1) find("pictures-title").textContent = "The pictures";
  find("pictures-section").hidden = data.pictures.length === 0;
  const images = data.pictures.map((shown) => Object.assign(new Image(), { src: shown.source }));
  await Promise.all(images.map((image) => image.decode()));
  data.pictures.forEach((shown, number) => addPicture(shown, number, images[number]));
  show();
  document.body.dataset.ready = "true";
}

start();
