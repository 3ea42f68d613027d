"use strict";
// The charts: each is drawn anew from the cells that the filters leave.

const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "star", "cross", "x", "hexagon"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const GLYPHS = ["●", "■", "◆", "▲", "▼", "⬟", "★", "✚", "✖", "⬢"];
const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

// Plotly reads a little HTML in its texts; names are to be shown as they are.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

const sizeName = (bytes) => {
  for (const [unit, scale] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
    if (bytes >= scale) return `${Number((bytes / scale).toPrecision(3))} ${unit}`;
  return `${Math.round(bytes)} B`;
};
const widthName = (cell) => `${cell.searched ? "≤ " : ""}${cell.width} bits`;
const meanStd = (mean, std) => (mean === null ? "–" : mean.toFixed(2) + (std === null ? "" : ` ± ${std.toFixed(2)}`));

function grouped(items, key) {
  const groups = new Map();
  for (const item of items) {
    const name = key(item);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(item);
  }
  return groups;
}

const byModel = (cells) => [...grouped(cells, (c) => JSON.stringify([c.method, c.arch, c.quantizer])).values()];

// Points that no other beats in both; x within one percent is the same.
function paretoFront(points) {
  const [sorted, front] = [[...points].sort((a, b) => a.x - b.x || b.y - a.y), []];
  let [best, ahead] = [-Infinity, 0];
  for (const point of sorted) {
    for (; ahead < sorted.length && sorted[ahead].x <= point.x * 1.01; ahead++) best = Math.max(best, sorted[ahead].y);
    if (point.y >= best && (!front.length || point.y > front[front.length - 1].y)) front.push(point);
  }
  return front;
}

function layout(x, y, extra = {}) {
  const axis = { gridcolor: "rgba(128, 128, 128, .22)", zeroline: false, automargin: true };
  return {
    margin: { l: 54, r: 12, t: 30, b: 44 }, showlegend: false, hovermode: "closest", font: { size: 12, color: ink() },
    modebar: { bgcolor: "rgba(0, 0, 0, 0)", color: "#999" }, paper_bgcolor: "rgba(0, 0, 0, 0)", plot_bgcolor: "rgba(0, 0, 0, 0)",
    xaxis: { ...axis, title: { text: x }, ...extra.xaxis }, yaxis: { ...axis, title: { text: y }, ...extra.yaxis },
    annotations: extra.annotations || [], shapes: extra.shapes || [],
  };
}

const hover = (cell) =>
  `<b>${plain(cell.method)}</b> (${plain(cell.arch)}), ${plain(cell.quantizer)}, ${widthName(cell)}<br>` +
  `top-1 ${meanStd(cell.top1, cell.top1_std)}, drop ${meanStd(cell.drop, cell.drop_std)}<br>` +
  `${sizeName(cell.size_bytes)}, n = ${cell.n}<extra></extra>`;

// One line for every model and quantizer.
function lines(cells, look, x, y, mode = "lines+markers") {
  return byModel(cells).map((found) => {
    const first = found[0];
    found.sort((a, b) => a[x] - b[x]);
    return {
      x: found.map((c) => c[x]), y: found.map((c) => c[y]), mode, type: "scatter",
      error_y: { type: "data", array: found.map((c) => c[`${y}_std`] || 0), thickness: 1, width: 3 },
      line: { color: look.color(first.method), width: 1.6, dash: look.dash(first.method, first.arch) },
      marker: { color: look.color(first.method), size: 7, symbol: look.symbol(first.quantizer) },
      hovertemplate: found.map(hover),
    };
  });
}

function rings(cells, x, y = "top1") {
  const front = paretoFront(cells.map((c) => ({ x: c[x], y: c[y] })).filter((p) => p.x !== null && p.y !== null));
  return {
    x: front.map((p) => p.x), y: front.map((p) => p.y), mode: "markers", type: "scatter", hoverinfo: "skip", name: "Pareto front",
    marker: { size: 15, symbol: "circle-open", color: "#888", line: { width: 1.4 } },
  };
}

// The cell of a model that tells its float network's accuracy from most seeds.
const floatModel = (found) => found.reduce((a, b) => (b.n > a.n ? b : a));

// The float model of each line, hollow, behind its end: at `whole`, or at the size of its file. That of a tuned network is
// another's.
function floats(cells, look, x, whole) {
  return byModel(cells).filter((found) => !found[0].tune).map((found) => {
    const [last, float] = [found.reduce((a, b) => (b[x] > a[x] ? b : a)), floatModel(found)];
    const color = look.color(last.method);
    return {
      x: [last[x], whole || last.float_bytes], y: [last.top1, float.top1_float], mode: "lines+markers", type: "scatter",
      line: { color, width: 1, dash: "dot" }, marker: { color, size: [0, 7], symbol: "circle-open" },
      hovertemplate: `<b>${plain(last.method)}</b> (${plain(last.arch)}), float<br>top-1 ${meanStd(float.top1_float, float.top1_float_std)}, ${sizeName(last.float_bytes)}<extra></extra>`,
    };
  });
}

// One point for each model: the median of its measurements and their range.
function timedPoints(timed, look) {
  return timed.map((t) => ({
    x: [t.ms], y: [t.top1], mode: "markers", type: "scatter",
    error_x: { type: "data", symmetric: false, array: [t.ms_high - t.ms], arrayminus: [t.ms - t.ms_low], thickness: 1, width: 3 },
    error_y: { type: "data", array: [t.top1_std || 0], thickness: 1, width: 3 },
    marker: { color: look.color(t.method), size: 8, symbol: look.symbol(t.quantizer) },
    hovertemplate: `<b>${plain(t.method)}</b> (${plain(t.arch)}), ${plain(t.quantizer)}<br>${t.ms} ms (${t.ms_low} to ${t.ms_high}, ${t.count} measurements)<br>top-1 ${meanStd(t.top1, t.top1_std)}<extra></extra>`,
  }));
}

// Ticks of a logarithmic axis at the given values, thinned so that their labels do not touch.
function ticks(values, name) {
  const kept = [];
  for (const value of [...new Set(values)].sort((a, b) => a - b))
    if (!kept.length || value >= kept[kept.length - 1] * 1.12) kept.push(value);
  return { type: "log", tickvals: kept, ticktext: kept.map(name) };
}
function decades(values, name) {
  const found = [];
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const digits = high / low > 300 ? [1] : high / low > 5 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high) + 1; power++)
    for (const digit of digits) found.push(digit * 10 ** power);
  return { type: "log", tickvals: found, ticktext: found.map(name) };
}
const shortSize = (bytes) => {
  for (const [unit, scale] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3], ["B", 1]])
    if (bytes >= scale * 0.999) return `${Number((bytes / scale).toPrecision(2))} ${unit}`;
  return String(bytes);
};

const nothing = { text: "nothing measured here", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 };

function draw(id, traces, shape) {
  if (!traces.some((trace) => trace.x.length)) shape.annotations = [nothing];
  Plotly.react(id, traces, shape, CONFIG);
}

function drawAccuracy(every, timed, published, latency, look) {
  const cells = every.filter((c) => c.told);
  // The same published number stands beside every quantizer.
  const once = [...new Map(published.map((p) => [JSON.stringify([p.method, p.arch, p.width]), p])).values()];
  const known = [...grouped(once, (p) => JSON.stringify([p.method, p.arch])).values()].map((found) => ({
    x: found.map((p) => Math.log2(p.levels)), y: found.map((p) => p.published), mode: "lines+markers", type: "scatter",
    line: { color: look.color(found[0].method), width: 1, dash: "dash" }, marker: { symbol: "x-thin-open", size: 8, color: look.color(found[0].method) },
    hovertemplate: found.map((p) => `published: <b>${plain(p.method)}</b>, ${p.levels} levels, ${plain(p.study_data)}<br>top-1 ${p.published}<extra></extra>`),
  }));
  const whole = 1.35 * Math.max(...cells.map((c) => c.avg_bits));
  const bits = ticks(cells.map((c) => Math.ceil(c.avg_bits)), String);
  const withFloat = { ...bits, tickvals: [...bits.tickvals, whole], ticktext: [...bits.ticktext, "float"] };
  draw("bits", [...lines(cells, look, "avg_bits", "top1"), ...floats(cells, look, "avg_bits", whole), ...known], layout("bits per weight", "top-1 (%)", { xaxis: withFloat }));
  const sizes = cells.length ? decades(cells.flatMap((c) => [c.size_bytes, c.float_bytes]), shortSize) : {};
  draw("bytes", [...lines(cells, look, "size_bytes", "top1"), ...floats(cells, look, "size_bytes"), rings(cells, "size_bytes")], layout("packed size", "top-1 (%)", { xaxis: sizes }));
  draw("drop", lines(cells, look, "avg_bits", "drop"), layout("bits per weight", "points", { xaxis: bits, yaxis: { zeroline: true, zerolinecolor: "#999" } }));
  draw("latency", [...timedPoints(timed, look), rings(timed, "ms")], layout(latency.label, "top-1 (%)", { xaxis: { rangemode: "tozero" } }));
}

function drawSearch(found, look) {
  const color = look.color(found.method);
  const layers = (found.layers || []).map((name) => plain(name));
  const bars = { type: "bar", x: layers.map((_, i) => i), y: found.bits || [], marker: { color },
    hovertemplate: layers.map((name, i) => `${name}<br>${found.bits[i]} bits, ${found.weights[i].toLocaleString("en")} weights<extra></extra>`) };
  draw("layers", [bars], layout("", "bits", { xaxis: { tickvals: layers.map((_, i) => i), ticktext: layers, tickangle: -90, tickfont: { size: 9 } } }));
  const points = (found.size_bytes || []).map((size, i) => ({ size, loss: found.loss[i], bits: found.avg_bits[i], top1: found.top1[i] }))
    .filter((p) => p.loss !== null && p.loss > 0);
  const way = { type: "scatter", mode: "lines+markers", x: points.map((p) => p.size), y: points.map((p) => p.loss), line: { color, width: 1.4 }, marker: { size: 6 },
    hovertemplate: points.map((p) => `${sizeName(p.size)}, ${p.bits.toFixed(2)} bits on average<br>loss ${p.loss.toPrecision(3)}, validation top-1 ${p.top1.toFixed(2)}<extra></extra>`) };
  const chosen = found.chosen === undefined ? [] : [{ type: "line", yref: "paper", y0: 0, y1: 1, x0: found.size_bytes[found.chosen], x1: found.size_bytes[found.chosen], line: { color: "#888", dash: "dash", width: 1 } }];
  const label = chosen.map((line) => ({ text: "chosen", showarrow: false, x: Math.log10(line.x0), xref: "x", y: 1, yref: "paper", yanchor: "bottom", font: { size: 11 } }));
  draw("frontier", [way], layout("packed size", "loss", { xaxis: points.length ? decades(points.map((p) => p.size), shortSize) : {}, yaxis: points.length ? decades(points.map((p) => p.loss), (v) => v.toExponential(0).replace("-", "−")) : {}, shapes: chosen, annotations: label }));
}
