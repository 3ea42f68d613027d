// Filters, words and tables. Names come from rows and are only ever set as text.

const payload = JSON.parse(document.getElementById("payload").textContent);
const records = ({ columns, data }) => data.map((values) => Object.fromEntries(columns.map((name, i) => [name, values[i]])));
const all = records(payload.cells);
const published = records(payload.published);
const timed = records(payload.timed);
const $ = (id) => document.getElementById(id);
const SHOWN_AT_ONCE = 200;

const dark = matchMedia("(prefers-color-scheme: dark)");
const ink = () => getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();

function element(tag, text, options = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  return Object.assign(made, options);
}

const distinct = (name) => [...new Set(all.map((cell) => cell[name]))];
const quantizers = distinct("quantizer");
const archs = new Map([...grouped(all, (c) => c.method)].map(([method, found]) => [method, [...new Set(found.map((c) => c.arch))]]));
const look = {
  color: (method) => (payload.colors[method] === "#000000" ? ink() : payload.colors[method]),
  symbol: (quantizer) => SYMBOLS[quantizers.indexOf(quantizer) % SYMBOLS.length],
  dash: (method, arch) => DASHES[archs.get(method).indexOf(arch) % DASHES.length],
};

function chip(kind, name, mark) {
  const label = element("label", undefined, { className: "chip" });
  const box = element("input", undefined, { type: "checkbox", name: kind, value: name, checked: true });
  label.append(box, mark, element("span", name));
  return label;
}

function swatch(color) {
  const mark = element("i");
  mark.style.background = color;
  return mark;
}

function buildFilters() {
  for (const name of distinct("data")) $("data").append(element("option", name, { value: name }));
  for (const name of distinct("method")) $("methods").append(chip("method", name, swatch(look.color(name))));
  quantizers.forEach((name, i) => $("quantizers").append(chip("quantizer", name, element("b", GLYPHS[i % GLYPHS.length]))));
  $("filters").addEventListener("change", update);
  $("searched").addEventListener("change", () => showSearch());
  $("more").addEventListener("click", () => { shown = Infinity; showCells(); });
}

function chosen() {
  const checked = (name) => new Set([...document.querySelectorAll(`input[name=${name}]:checked`)].map((box) => box.value));
  return { data: $("data").value, methods: checked("method"), quantizers: checked("quantizer") };
}

const passes = (filter) => (item) =>
  item.data === filter.data && filter.quantizers.has(item.quantizer) && (!item.method || filter.methods.has(item.method));

function showAnswers() {
  $("headlines").replaceChildren(...payload.answers.map((answer) => {
    const made = element("section");
    made.append(element("p", answer.headline, { className: "headline" }));
    made.append(...answer.made.map((text) => element("p", text, { className: "small" })));
    return made;
  }));
}

function showComparisons(filter) {
  const answer = payload.answers.find((found) => found.data === filter.data);
  const lines = (answer ? answer.lines : []).filter((line) =>
    filter.quantizers.has(line.quantizer) && line.methods.every((method) => filter.methods.has(method)));
  const [body, places] = [element("tbody"), element("tbody")];
  for (const [kind, found] of grouped(lines, (line) => line.kind)) {
    const head = element("tr");
    head.append(element("th", kind, { className: "text", colSpan: payload.answer_columns.length, scope: "rowgroup" }));
    body.append(head);
    for (const line of found) {
      body.append(row(line.cells, payload.answer_columns.length));
      for (const place of line.places) places.append(row([`${line.cells[0]}, ${kind.split(",")[0]}`, ...place], 1));
    }
  }
  $("comparisons").replaceChildren(headRow(payload.answer_columns, payload.answer_columns.length), body);
  $("places").replaceChildren(headRow(["comparison", ...payload.place_columns], 1), places);
}

function row(cells, texts) {
  const line = element("tr");
  line.append(...cells.map((text, i) => element("td", text, { className: i < texts ? "text" : "" })));
  return line;
}

function headRow(names, texts) {
  const head = element("thead");
  head.append(element("tr"));
  names.forEach((name, i) => head.firstChild.append(element("th", name, { className: i < texts ? "text" : "", scope: "col" })));
  return head;
}

function showGrid(cells) {
  const widths = [...grouped(cells, widthName).entries()].map(([name, found]) => [found[0].width, found[0].searched, name])
    .sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(([, , name]) => name);
  const grid = new Set(cells.map((c) => (c.searched ? "" : JSON.stringify([c.quantizer, widthName(c)]))));
  const body = element("tbody");
  for (const found of byModel(cells)) {
    const [first, byWidth] = [found[0], new Map(found.map((c) => [widthName(c), c]))];
    const line = row([first.method, first.arch, first.quantizer], 3);
    const entry = (mean, std, size) => {
      const cell = element("td", meanStd(mean, std));
      cell.append(element("small", sizeName(size)));
      return cell;
    };
    const float = floatModel(found);
    line.append(entry(float.top1_float, float.top1_float_std, float.float_bytes));
    for (const name of widths) {
      const cell = byWidth.get(name);
      const missing = !first.tune && grid.has(JSON.stringify([first.quantizer, name])) ? "missing" : "";
      line.append(cell ? entry(cell.top1, cell.top1_std, cell.size_bytes) : element("td", missing, { className: missing }));
    }
    body.append(line);
  }
  $("grid").replaceChildren(headRow(["method", "arch", "quantizer", "float", ...widths], 3), body);
}

const number = (digits) => (cell, name) => (cell[name] === null || cell[name] === undefined ? "–" : cell[name].toFixed(digits));
const spread = (cell, name) => meanStd(cell[name], cell[`${name}_std`]);
const COLUMNS = [
  ["method", "method"], ["arch", "arch"], ["quantizer", "quantizer"], ["width", "bits", widthName],
  ["avg_bits", "average bits", number(2)], ["top1", "top-1 (%)", spread], ["top1_float", "float (%)", spread],
  ["drop", "drop", spread], ["size_bytes", "bytes", (cell) => Math.round(cell.size_bytes).toLocaleString("en")],
  ["ece", "ECE (%)", number(2)], ["nll", "NLL", number(3)], ["n", "seeds", number(0)],
];
let visible = [];
let order = { name: "size_bytes", step: 1 };
let shown = SHOWN_AT_ONCE;

function showCells() {
  const [{ name, step }, latency] = [order, payload.latency[$("data").value]];
  const columns = latency ? [...COLUMNS.slice(0, 9), [latency.column, "latency (ms)", number(3)], ...COLUMNS.slice(9)] : COLUMNS;
  const empty = (value) => value === null || value === undefined;
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b) * step;
  visible.sort((a, b) => empty(a[name]) - empty(b[name]) || (empty(a[name]) ? 0 : compare(a[name], b[name])));
  const [head, body] = [element("thead"), element("tbody")];
  head.append(element("tr"));
  columns.forEach(([column, title], i) => {
    const th = element("th", undefined, { className: i < 3 ? "text" : "", scope: "col" });
    if (column === name) th.ariaSort = step > 0 ? "ascending" : "descending";
    const button = element("button", title, { type: "button" });
    button.addEventListener("click", () => { order = { name: column, step: column === name ? -step : 1 }; showCells(); });
    th.append(button);
    head.firstChild.append(th);
  });
  for (const cell of visible.slice(0, shown))
    body.append(row(columns.map(([column, , show]) => (show ? show(cell, column) : cell[column])), 3));
  $("cells").replaceChildren(head, body);
  $("more").hidden = visible.length <= shown;
  $("more").textContent = `Show all ${visible.length} cells`;
}

function showPublished(filter) {
  const found = published.filter(passes(filter));
  $("published").hidden = !found.length;
  const body = element("tbody");
  for (const cell of found) {
    const [width, levels] = cell.levels === null ? ["float", "–"] : [`${cell.width} bits`, String(cell.levels)];
    body.append(row([cell.method, cell.arch, cell.quantizer, width, cell.top1.toFixed(2), cell.published.toFixed(2), levels], 3));
  }
  $("published-table").replaceChildren(headRow(["method", "arch", "quantizer", "bits", "here (%)", "published (%)", "levels there"], 3), body);
  $("published-warnings").replaceChildren(...payload.published_warnings.map((text) => element("li", text)));
  // On other images than the study's its numbers would only press the lines together.
  return found.filter((cell) => cell.levels !== null && cell.data === cell.study_data);
}

let searches = [];
function showSearch(filter) {
  if (filter) {
    const before = $("searched").selectedOptions[0]?.textContent;
    searches = payload.searches.filter(passes(filter));
    $("searched").replaceChildren(...searches.map((s, i) => element("option", s.name, { value: i, selected: s.name === before })));
    $("search").hidden = !searches.length;
  }
  if (searches.length) drawSearch(searches[Number($("searched").value)], look);
}

function update() {
  const filter = chosen();
  visible = all.filter(passes(filter));
  shown = SHOWN_AT_ONCE;
  showComparisons(filter);
  const latency = payload.latency[filter.data] || { column: "", label: "" };
  drawAccuracy(visible, timed.filter(passes(filter)), showPublished(filter), latency, look);
  $("latency-note").textContent = latency.note ? `Latency: ${latency.note}` : "";
  showSearch(filter);
  showGrid(visible);
  showCells();
}

$("summary").textContent = payload.summary;
$("notes").replaceChildren(...payload.notes.map((text) => element("p", text)));
$("warnings").replaceChildren(...payload.warnings.map((text) => element("li", text)));
$("warnings").hidden = !payload.warnings.length;
if (all.length) {
  showAnswers();
  buildFilters();
  update();
} else {
  $("filters").hidden = true;
  document.querySelector("main").replaceChildren(element("p", "No rows yet: run kdq experiment=quickstart."));
}
// Charts have colours of their own, which the style sheet cannot change.
dark.addEventListener("change", () => all.length && update());
document.body.dataset.ready = "yes";
