"use strict";
// Draws the charts described in the page's JSON. The controls apply to all charts.

const { axes, settings, charts } = JSON.parse(document.getElementById("data").textContent);
const state = { x: "epoch", y: "auto", hidden: new Set() };
const boxes = [...document.querySelectorAll("input[data-setting]")];
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colourOf = (i) => css(`--c${settings[i].colour}`);
const shown = (items) => items.filter((item) => !state.hidden.has(item.setting));
const scaleOf = (chart) => (state.y === "auto" ? (chart.log ? "log" : "linear") : state.y);

function number(value, percent) {
  if (value === null) return "?";
  return percent ? `${(100 * value).toFixed(2)}%` : String(Number(value.toPrecision(4)));
}

// A quantity of one setting: its mean over seeds, and a band from the 10% to the 90% quantile.
function lineTraces(chart, line) {
  const { name, dash } = settings[line.setting];
  const x = line[state.x];
  const text = line.mean.map((mean, k) => {
    const seeds = `${line.seeds[k]} seed${line.seeds[k] === 1 ? "" : "s"}`;
    const spread = line.low
      ? `10–90%: ${number(line.low[k], chart.percent)} to ${number(line.high[k], chart.percent)}<br>` : "";
    return `<b>${name}</b><br>${axes[state.x].title}: ${number(x[k])}<br>`
      + `mean: ${number(mean, chart.percent)}<br>${spread}${seeds}`;
  });
  const colour = colourOf(line.setting);
  const mean = {
    x, y: line.mean, text, name, hovertemplate: "%{text}<extra></extra>",
    mode: x.length > 40 ? "lines" : "lines+markers", line: { color: colour, dash, width: 2 }, marker: { size: 5 },
  };
  return line.low ? [bandTrace(line, colour), mean] : [mean];
}

// Standstill of a loss at the end of a run: a broad, pale bar at its level.
function stillTrace(still) {
  const { name } = settings[still.setting];
  const text = `<b>${name}</b>, seed ${still.seed}<br>the loss has stood still since step ${still.since}<br>`
    + `${number(still.level)}: a plateau or a minimum`;
  return {
    x: still[state.x], y: [still.level, still.level], text: [text, text], hovertemplate: "%{text}<extra></extra>",
    mode: "lines", line: { color: colourOf(still.setting), width: 9 }, opacity: 0.3, showlegend: false,
  };
}

function bandTrace(line, colour) {
  const known = line.mean.map((_, k) => k).filter((k) => line.low[k] !== null && line.high[k] !== null);
  const back = [...known].reverse();
  return {
    x: [...known, ...back].map((k) => line[state.x][k]),
    y: [...known.map((k) => line.high[k]), ...back.map((k) => line.low[k])],
    fill: "toself", fillcolor: colour, opacity: 0.2, line: { width: 0 }, mode: "lines",
    hoverinfo: "skip", showlegend: false,
  };
}

// Certificates: a bar from the lower to the upper bound, a symbol for the verdict, and the threshold of a saddle.
const SYMBOLS = {
  "saddle": "triangle-down", "second-order stationary": "circle", "gradient too large": "x", "undecided": "diamond-open",
};

function pointTraces(chart, setting, points) {
  const { name, dash } = settings[setting];
  const colour = colourOf(setting);
  const place = heightOf(chart);
  const text = points.map((p) => `<b>${name}</b>, seed ${p.seed}<br>${axes[state.x].title}: ${number(p[state.x])}<br>`
    + `${p.verdict}<br>` + (p.upper === null ? "" : `between ${number(p.lower)} and ${number(p.upper)}<br>`)
    + `threshold ${number(p.threshold)}`);
  const bars = points.map((p) => (p.upper === null ? 0 : place(p.upper) - place(p.lower)));
  const marks = {
    x: points.map((p) => p[state.x]), y: points.map((p) => place(p.upper ?? p.threshold)), text, name,
    hovertemplate: "%{text}<extra></extra>", mode: "markers",
    marker: { color: colour, size: 8, symbol: points.map((p) => SYMBOLS[p.verdict]) },
    error_y: { type: "data", symmetric: false, array: bars.map(() => 0), arrayminus: bars, color: colour, width: 0 },
  };
  const sorted = [...points].sort((a, b) => a[state.x] - b[state.x]);
  const threshold = {
    x: sorted.map((p) => p[state.x]), y: sorted.map((p) => place(p.threshold)), mode: "lines",
    line: { color: colour, width: 1, dash: "dot" }, hoverinfo: "skip", showlegend: false,
  };
  return [threshold, marks];
}

// Curvature has both signs and many magnitudes: by default it is drawn as asinh(y / scale).
const heightOf = (chart) => (y) => (y === null ? null : state.y === "linear" ? y : Math.asinh(y / chart.scale));

function curvatureAxis(chart) {
  if (state.y === "linear") return { type: "linear" };
  const extremes = chart.points.flatMap((p) => [p.lower, p.upper, p.threshold]).filter((y) => y !== null).map(Math.abs);
  const powers = [];
  for (let k = Math.round(Math.log10(chart.scale)); k <= Math.ceil(Math.log10(Math.max(...extremes))); k++) powers.push(k);
  const ticks = [0, ...powers.flatMap((k) => [10 ** k, -(10 ** k)])];
  return { type: "linear", tickvals: ticks.map(heightOf(chart)), ticktext: ticks.map((y) => (y ? y.toExponential(0) : "0")) };
}

function traces(chart) {
  if (chart.lines) {
    const stood = shown(chart.still).map(stillTrace);
    return [...stood, ...shown(chart.lines).flatMap((line) => lineTraces(chart, line))];
  }
  const found = new Map();
  for (const p of shown(chart.points)) found.set(p.setting, [...(found.get(p.setting) ?? []), p]);
  return [...found].flatMap(([setting, points]) => pointTraces(chart, setting, points));
}

function layout(chart) {
  const [ink, grid, paper] = ["--ink", "--grid", "--paper"].map(css);
  const axis = { gridcolor: grid, linecolor: grid, zerolinecolor: grid, automargin: true };
  const y = chart.lines ? { type: scaleOf(chart), tickformat: chart.percent ? ".0%" : "" } : curvatureAxis(chart);
  const level = (y0) => ({
    type: "line", xref: "paper", x0: 0, x1: 1, y0, y1: y0, line: { color: ink, width: 1, dash: "dot" }, opacity: 0.5,
  });
  return {
    font: { color: ink, family: "system-ui, sans-serif", size: 13 }, paper_bgcolor: paper, plot_bgcolor: paper,
    margin: { l: 10, r: 12, t: 10, b: 10 }, showlegend: false, hovermode: "closest", dragmode: touch ? false : "zoom",
    hoverlabel: { bgcolor: paper, font: { color: ink, size: 13 }, align: "left" },
    xaxis: { ...axis, type: axes[state.x].log ? "log" : "linear", title: { text: axes[state.x].title } },
    yaxis: { ...axis, nticks: 6, exponentformat: "power", ...y },
    shapes: (chart.levels ?? []).map(level),
    uirevision: `${state.x} ${state.y}`, // zoom survives a toggled setting, not another axis
  };
}

const plotOf = (chart) => document.getElementById(`chart-${chart.id}`);

function draw() {
  for (const chart of charts) {
    Plotly.react(plotOf(chart), traces(chart), layout(chart), { displayModeBar: false, responsive: true });
  }
}

// Saved images have a title and a legend, and keep the chart's zoom.
function savePicture(chart, format) {
  const now = plotOf(chart).layout;
  const page = layout(chart);
  for (const axis of ["xaxis", "yaxis"]) page[axis].range = now[axis].autorange ? undefined : now[axis].range;
  const own = { title: { text: chart.title }, showlegend: true, margin: { t: 50 }, legend: { orientation: "h", y: -0.18 } };
  const drawn = [...new Set(shown(chart.lines ?? chart.points).map((item) => item.setting))];
  const widest = Math.max(1, ...drawn.map((i) => settings[i].label.length));
  const columns = Math.max(1, Math.floor(820 / (60 + 7 * widest))); // columns of plotly's legend
  const height = 520 + 20 * Math.ceil(drawn.length / columns);
  Plotly.downloadImage(
    { data: traces(chart), layout: { ...page, ...own } },
    { format, width: 900, height, scale: format === "png" ? 2 : 1, filename: fileName(chart) },
  );
}

function saveNumbers(chart) {
  const lines = (line) => line.mean.map((mean, k) => [
    line[state.x][k], mean, line.low ? line.low[k] : mean, line.high ? line.high[k] : mean, line.seeds[k],
  ]);
  const rows = chart.lines
    ? [["setting", "x", "mean", "low", "high", "seeds"]].concat(
      shown(chart.lines).flatMap((line) => lines(line).map((row) => [settings[line.setting].label, ...row])))
    : [["setting", "x", "low", "high", "threshold", "verdict", "seed"]].concat(shown(chart.points).map((p) =>
      [settings[p.setting].label, p[state.x], p.lower, p.upper, p.threshold, p.verdict, p.seed]));
  // Prefix texts that a spreadsheet would run as formulas with an apostrophe, as in the CSV files of commands.
  const plain = (cell) => (/^['=+\-@\t\r\n]/.test(cell) ? `'${cell}` : cell);
  const quoted = (cell) => `"${plain(String(cell ?? "")).replaceAll('"', '""')}"`;
  const text = rows.map((row) => row.map((c) => (typeof c === "number" ? c : quoted(c))).join(",")).join("\r\n");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text + "\r\n"], { type: "text/csv" }));
  link.download = `${fileName(chart)}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const fileName = (chart) => `${chart.id}-by-${state.x}`;

function hide(hidden) {
  state.hidden = new Set(hidden);
  for (const box of boxes) box.checked = !state.hidden.has(Number(box.dataset.setting));
  draw();
}

const all = settings.map((_, i) => i);
const isolate = (i) => hide(all.filter((j) => j !== i));

for (const box of boxes) {
  const i = Number(box.dataset.setting);
  box.addEventListener("change", () => hide(all.filter((j) => !boxes[j].checked)));
  // The two single clicks of a double click cancel out.
  box.closest("label").addEventListener("dblclick", () => isolate(i));
  box.closest("li").querySelector("button").addEventListener("click", () => isolate(i));
}
document.getElementById("show-all").addEventListener("click", () => hide([]));
for (const name of ["x", "y"]) {
  for (const radio of document.querySelectorAll(`input[name=${name}]`)) {
    radio.addEventListener("change", () => { state[name] = radio.value; draw(); });
    if (radio.checked) state[name] = radio.value; // browsers may restore it after a reload
  }
}
for (const chart of charts) {
  const button = (what) => plotOf(chart).closest("figure").querySelector(`button[data-save=${what}]`);
  for (const format of ["png", "svg"]) button(format).addEventListener("click", () => savePicture(chart, format));
  button("csv").addEventListener("click", () => saveNumbers(chart));
}
dark.addEventListener("change", draw);
hide(all.filter((j) => !boxes[j].checked));
