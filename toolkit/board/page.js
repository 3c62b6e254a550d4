"use strict";
// Draws the board in the browser. The state of the page is in the address; each part of the page has its own function; text from the
// board is never interpreted as HTML.
(() => {
const board = JSON.parse(document.getElementById("board").textContent);
const part = (key, empty) => board[key] ?? empty;
const conditions = part("conditions", {}), paired = part("paired", {}), metrics = part("metrics", {}), curves = Object.fromEntries(Object.entries(part("curves", {})).filter(([, runs]) => runs.length));
const examples = part("examples", []), base = part("base", "base"), names = Object.keys(conditions);
const tasks = part("tasks", ["all"]), difficulties = part("difficulties", ["all"]);
const own = (object, key) => (object && Object.hasOwn(object, key) ? object[key] : undefined);

// --- how things look -------------------------------------------------------------------------------------------

// Okabe and Ito's colours; every family also has its own shape. Shapes are plotly's; SHAPES draws them as SVG for the buttons.
const FAMILIES = {
  base: ["#000000", "star"], edit: ["#D55E00", "square"], steer: ["#E69F00", "diamond"], mask: ["#8C6D31", "cross"],
  decode: ["#CC79A7", "triangle-up"], prompt: ["#56B4E9", "triangle-down"], trained: ["#0072B2", "circle"],
  combined: ["#009E73", "hexagon"], control: ["#777777", "x"],
};
const polygon = (n, turn, inner) => Array.from({length: n}, (_, i) => {
  const angle = turn + 2 * Math.PI * i / n, r = inner && i % 2 ? inner : 6.5;
  return `${(7 + r * Math.sin(angle)).toFixed(2)},${(7 - r * Math.cos(angle)).toFixed(2)}`;
}).join(" ");
const SHAPES = {
  star: polygon(10, 0, 2.8), square: "2,2 12,2 12,12 2,12", diamond: polygon(4, 0), "triangle-up": polygon(3, 0),
  "triangle-down": polygon(3, Math.PI), pentagon: polygon(5, 0), hexagon: polygon(6, 0),
  cross: "5,1 9,1 9,5 13,5 13,9 9,9 9,13 5,13 5,9 1,9 1,5 5,5",
  x: "4.2,1 7,3.8 9.8,1 13,4.2 10.2,7 13,9.8 9.8,13 7,10.2 4.2,13 1,9.8 3.8,7 1,4.2",
};
const look = (family) => own(FAMILIES, family) ?? ["#444444", "pentagon"];
const familyOf = (name) => conditions[name]?.family ?? "other";
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#666666"];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const FONT = {family: "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", size: 13, color: "#1b1f24"};

const $ = (id) => document.getElementById(id);
function h(tag, attributes, ...children) {
  const node = tag === "svg" || tag === "polygon" || tag === "circle" || tag === "line"
    ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
function swatch(family) {
  const [colour, shape] = look(family);
  const drawn = shape === "circle" ? h("circle", {cx: 7, cy: 7, r: 5.5, fill: colour}) : h("polygon", {points: SHAPES[shape], fill: colour});
  return h("svg", {class: "mark", viewBox: "0 0 14 14", "aria-hidden": "true"}, drawn);
}
// plotly interprets some HTML in its texts; text from the board must not be interpreted.
const literal = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

// --- numbers ---------------------------------------------------------------------------------------------------

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const minus = (text) => text.replace("-", "−");
const count = (value) => value.toLocaleString("en-US");
function significant(value) {
  const size = Math.abs(value);
  if (size >= 1e4) return Intl.NumberFormat("en-US", {notation: "compact", maximumSignificantDigits: 3}).format(value);
  return size >= 1000 ? count(Math.round(value)) : size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : value.toFixed(2);
}
const UNITS = {
  share: {show: (v) => (100 * v).toFixed(1), unit: "%"}, tokens: {show: (v) => (Math.abs(v) < 1000 ? v.toFixed(1) : count(Math.round(v))), unit: "tokens"},
  nats: {show: (v) => v.toFixed(3), unit: "nats"}, score: {show: (v) => v.toFixed(3), unit: "score"}, number: {show: significant, unit: ""},
};
const about = (metric) => ({label: metric.replaceAll("_", " "), unit: "number", better: "none", group: "main", ...own(metrics, metric)});
const unitOf = (metric) => own(UNITS, about(metric).unit) ?? UNITS.number;
function show(metric, value, signed) {
  if (!isNumber(value)) return "–";
  const text = minus(unitOf(metric).show(value));
  return signed && value >= 0 ? `+${text}` : text;
}
const interval = (metric, v, signed) => [isNumber(v.low) && isNumber(v.high) && v.low !== v.high ? `[${show(metric, v.low, signed)}, ${show(metric, v.high, signed)}]` : "",
  v.note ?? ""].filter(Boolean).join(", ");
const COSTS = {
  tokens: ["Tokens", "of all responses", significant], seconds: ["Time", "to sample the responses", duration],
  parameters_changed: ["Parameters", "changed", significant], training_steps: ["Training steps", "", significant],
};
function duration(s) {
  return s < 90 ? `${s.toFixed(s < 10 ? 1 : 0)} s` : s < 5400 ? `${(s / 60).toFixed(0)} min` : `${(s / 3600).toFixed(1)} h`;
}
const exact = (value) => (isNumber(value) ? (value === 0 ? "0" : null) : "–");
const cost = (key, value) => exact(value) ?? COSTS[key][2](value);
const percent = (p) => (isNumber(p) ? (100 * p).toFixed(0) : "–");
const pText = (p) => (p < 0.001 ? "p < .001" : `p = ${p.toFixed(3).replace(/^0/, "")}`);

// --- state, kept in the address --------------------------------------------------------------------------------

const families = [...new Set(names.map(familyOf))];
const groups = ["main", "damage", "budget", "mechanism", "cost"].filter((group) => columns(group).length);
const fresh = () => ({
  condition: favourite(), example: examples[0] ? String(examples[0].id) : "", task: "all", difficulty: "all", off: new Set(), query: "",
  bars: true, labels: true, group: groups[0] ?? "main", sort: names.some((n) => isNumber(conditions[n].front)) ? "front" : "accuracy", down: true,
  curves: new Set(Object.keys(curves).slice(0, 4)),
});
let state = {};

/** The condition that is selected first: among those without a significant loss of accuracy, the one most likely on the front. */
function favourite() {
  const loses = (n) => { const d = own(own(paired, n), "accuracy"); return isSure(d) && d.mean < 0; };
  const rated = names.filter((n) => n !== base).sort((a, b) => loses(a) - loses(b) || (conditions[b].front ?? -1) - (conditions[a].front ?? -1));
  return rated.find((n) => examples.some((e) => own(e.responses, n))) ?? rated[0] ?? base;
}
function read() {
  const given = new URLSearchParams(location.hash.slice(1)), next = fresh();
  const set = (key, name, allowed) => { if (given.has(key) && allowed(given.get(key))) next[name] = given.get(key); };
  set("c", "condition", (v) => names.includes(v));
  set("e", "example", (v) => examples.some((e) => String(e.id) === v));
  set("t", "task", (v) => tasks.includes(v));
  set("d", "difficulty", (v) => difficulties.includes(v));
  set("q", "query", () => true);
  set("g", "group", (v) => groups.includes(v));
  const list = (key) => { try { return JSON.parse(given.get(key)); } catch { return null; } };
  const off = given.has("off") && list("off"), chosen = given.has("k") && list("k");
  if (Array.isArray(off)) next.off = new Set(off.filter((f) => families.includes(f)));
  if (Array.isArray(chosen)) next.curves = new Set(chosen.filter((n) => own(curves, n)));
  if (given.has("s")) { next.sort = given.get("s").slice(1); next.down = given.get("s")[0] === "-"; }
  next.bars = given.get("i") !== "0";
  next.labels = given.get("l") !== "0";
  return next;
}
function remember() {
  const start = fresh(), said = new URLSearchParams();
  const say = (key, value, usual) => { if (value !== usual) said.set(key, value); };
  say("c", state.condition, start.condition);
  say("e", state.example, start.example);
  say("t", state.task, "all");
  say("d", state.difficulty, "all");
  say("q", state.query, "");
  say("g", state.group, start.group);
  say("s", (state.down ? "-" : "+") + state.sort, `-${start.sort}`);
  say("off", JSON.stringify([...state.off]), "[]");
  say("k", JSON.stringify([...state.curves]), JSON.stringify([...start.curves]));
  say("i", state.bars ? "1" : "0", "1");
  say("l", state.labels ? "1" : "0", "1");
  const hash = said.toString();
  if (hash !== location.hash.slice(1)) history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}
function set(change) {
  Object.assign(state, change);
  remember();
  draw();
}

// --- what is shown ---------------------------------------------------------------------------------------------

const everything = () => state.task === "all" && state.difficulty === "all";
const cell = (name) => own(own(conditions[name]?.cells, state.task), state.difficulty);
/** A condition's value of a metric under the filters. Only accuracy and length are known for each task and difficulty. */
function value(name, metric) {
  if (!everything() && perCell(metric)) return own(cell(name), metric);
  return own(conditions[name]?.metrics, metric) ?? (everything() ? own(cell(name), metric) : undefined);
}
const perCell = (metric) => metric === "accuracy" || metric === "think_tokens";
/** The paired difference from base. The board has it for all problems together only. */
const difference = (name, metric) => (name === base || (!everything() && perCell(metric)) ? undefined : own(own(paired, name), metric));
const isSure = (d) => isNumber(d?.p_holm) && d.p_holm < 0.05;
/** Whether a condition has fewer than three seeds, too few for a test: its note then says how many. */
const few = (name) => /seed/.test(own(conditions[name]?.metrics, "accuracy")?.note ?? "");
function matches(name) {
  const c = conditions[name], text = `${name} ${familyOf(name)} ${c.note ?? ""} ${c.paper ?? ""}`.toLowerCase();
  return !state.off.has(familyOf(name)) && state.query.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}
const visible = () => names.filter((name) => name === base || matches(name));

/** Columns of one group of the table: key, heading, and how a cell is sorted and shown. */
function columns(group) {
  const found = Object.keys(metrics).filter((m) => (metrics[m].group ?? "main") === group).map((metric) => ({
    key: metric, label: about(metric).label, unit: unitOf(metric).unit, metric, help: about(metric).help,
    best: about(metric).better !== "low", sorted: (name) => value(name, metric)?.mean,
  }));
  if (group === "main" && names.some((n) => isNumber(conditions[n].front))) {
    found.unshift({key: "front", label: "On the front", unit: "% of resamples", best: true, sorted: (name) => conditions[name].front,
      shown: (name) => percent(conditions[name].front), help: "Probability that no other condition is at least as accurate with at most as much thinking, and better in one of the two."});
  }
  if (group === "cost") {
    for (const key of Object.keys(COSTS)) {
      if (!own(metrics, key) && names.some((n) => isNumber(conditions[n].cost?.[key]))) {
        found.push({key, label: COSTS[key][0], unit: COSTS[key][1], best: false, sorted: (name) => conditions[name].cost?.[key],
          shown: (name) => cost(key, conditions[name].cost?.[key])});
      }
    }
  }
  return found;
}

// --- the head of the page and the filters ----------------------------------------------------------------------

function drawHead() {
  const others = names.filter((n) => n !== base), n = own(own(conditions[base]?.cells, "all"), "all")?.n;
  const kinds = tasks.filter((t) => t !== "all");
  $("lead").replaceChildren(names.length
    ? `${names.length} conditions of ${families.length} families, judged on the same ${isNumber(n) ? `${count(n)} ` : ""}problems` +
      `${kinds.length ? ` (${kinds.join(", ")})` : ""} and compared with “${base}”, problem by problem (paired). Intervals are 95 %.` : "");
  const sure = (metric, sign) => others.filter((name) => {
    const d = own(own(paired, name), metric);
    return isSure(d) && Math.sign(d.mean) === sign;
  });
  const shorter = sure("think_tokens", -1), worse = new Set(sure("accuracy", -1));
  const fronts = others.filter((name) => conditions[name].front >= 0.5);
  const facts = Object.keys(paired).length ? [
    [shorter.length, `of ${others.length} think significantly less than base (after Holm's correction)`],
    [shorter.filter((name) => !worse.has(name)).length, "of these have no significant loss of accuracy"],
    [sure("accuracy", 1).length, "are significantly more accurate than base"],
  ] : [];
  if (names.some((name) => isNumber(conditions[name].front))) facts.push([fronts.length, "lie on the front in at least half of the resamples"]);
  $("facts").replaceChildren(...facts.map(([number, text]) => h("li", {}, h("b", {}, String(number)), text)));
  const parts = [...document.querySelectorAll("section[data-name]")].filter((s) => !s.closest("[hidden]"));
  $("nav").replaceChildren(...parts.map((s) => h("button", {type: "button", class: "plain", onclick: () => go(s)}, s.dataset.name)));
}
function go(target) {
  target.scrollIntoView();
  const heading = target.querySelector("h2");
  heading.tabIndex = -1;
  heading.focus({preventScroll: true});
}
function segments(id, name, options, key) {
  $(id).hidden = options.length < 2;
  $(id).replaceChildren(h("span", {class: "name", id: `${id}-name`}, name), h("span", {class: "segments", role: "group", "aria-labelledby": `${id}-name`},
    options.map((option) => h("button", {type: "button", "data-value": option, "aria-pressed": "false", onclick: () => set({[key]: option})}, option))));
}
const press = (id, pressed) => $(id).querySelectorAll("[data-value]").forEach((b) => b.setAttribute("aria-pressed", String(pressed(b.dataset.value))));
const toggled = (from, item) => {
  const next = new Set(from);
  if (!next.delete(item)) next.add(item);
  return next;
};
function buildFilters() {
  segments("tasks", "Task", tasks, "task");
  segments("difficulties", "Difficulty", difficulties, "difficulty");
  segments("groups", "Columns", groups, "group");
  $("families").replaceChildren(h("span", {class: "name"}, "Families"), ...families.map((family) => h("button",
    {type: "button", class: "chip", "data-value": family, "aria-pressed": "true", title: "Click to show or hide; double-click to show only this family",
      onclick: () => set({off: toggled(state.off, family)}),
      ondblclick: () => set({off: new Set(families.filter((f) => f !== family))})},
    swatch(family), family, h("small", {}, String(names.filter((n) => familyOf(n) === family).length)))));
  let waiting;
  $("query").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => set({query: $("query").value.trim()}), 120);
  });
  $("reset").addEventListener("click", () => set({task: "all", difficulty: "all", off: new Set(), query: ""}));
  $("bars").addEventListener("change", () => set({bars: $("bars").checked}));
  $("labels").addEventListener("change", () => set({labels: $("labels").checked}));
}
function drawFilters() {
  press("tasks", (v) => v === state.task);
  press("difficulties", (v) => v === state.difficulty);
  press("groups", (v) => v === state.group);
  press("families", (v) => !state.off.has(v));
  if ($("query").value.trim() !== state.query) $("query").value = state.query;
  $("bars").checked = state.bars;
  $("labels").checked = state.labels;
  $("status").textContent = `${visible().length} of ${names.length} conditions`;
}

// --- accuracy against thinking ---------------------------------------------------------------------------------

const point = (name) => ({name, x: value(name, "think_tokens"), y: value(name, "accuracy")});
const drawable = (p) => isNumber(p.x?.mean) && isNumber(p.y?.mean);
function range(values) {
  const low = Math.min(...values), high = Math.max(...values), room = 0.06 * (high - low || Math.abs(high) || 1);
  return [low - room, high + room];
}
const ends = (v) => [v.mean, ...(state.bars ? [v.low, v.high] : [])].filter(isNumber);
/** The points of the front: no other point is shorter and at least as accurate. */
function front(points) {
  const kept = [];
  for (const p of [...points].sort((a, b) => a.x.mean - b.x.mean || b.y.mean - a.y.mean)) {
    if (!kept.length || p.y.mean > kept[kept.length - 1].y.mean) kept.push(p);
  }
  return kept;
}
function hover(p) {
  const line = (metric) => {
    const v = value(p.name, metric), d = difference(p.name, metric);
    return `${about(metric).label}: ${show(metric, v.mean)}${metric === "accuracy" ? " %" : ""} ${interval(metric, v)}` +
      (d ? `<br>   minus base: ${show(metric, d.mean, true)} ${interval(metric, d, true)}${isSure(d) ? " *" : ""}` : "");
  };
  const c = conditions[p.name], n = cell(p.name)?.n;
  return [`<b>${literal(p.name)}</b>`, literal(familyOf(p.name)) + (isNumber(n) ? `, ${count(n)} problems` : ""), line("accuracy"), line("think_tokens"),
    ...(everything() && isNumber(c.front) ? [`on the front in ${percent(c.front)} % of resamples`] : [])].join("<br>");
}
function errors(points, axis, colour) {
  const reach = (side) => points.map((p) => (isNumber(p[axis][side]) ? Math.abs(p[axis][side] - p[axis].mean) : 0));
  return {type: "data", symmetric: false, visible: state.bars, array: reach("high"), arrayminus: reach("low"), color: colour, thickness: 1, width: 0};
}
const faded = (colour) => `rgba(${[1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16)).join(",")},.4)`;
function trace(family, points) {
  const [colour, symbol] = look(family), mine = points.filter((p) => familyOf(p.name) === family);
  return {
    type: "scatter", mode: "markers", name: literal(family), x: mine.map((p) => p.x.mean), y: mine.map((p) => p.y.mean), customdata: mine.map((p) => p.name),
    text: mine.map(hover), hovertemplate: "%{text}<extra></extra>", error_x: errors(mine, "x", faded(colour)), error_y: errors(mine, "y", faded(colour)),
    // An open symbol means fewer than three seeds, too few for a test.
    marker: {color: colour, symbol: mine.map((p) => (few(p.name) ? `${symbol}-open` : symbol)), size: family === "base" ? 16 : 11, opacity: 1,
      line: {color: mine.map((p) => (few(p.name) ? colour : "#fff")), width: mine.map((p) => (few(p.name) ? 2 : 1))}},
    hoverlabel: {bgcolor: "#fff", bordercolor: colour, font: {...FONT, size: 12}, align: "left"},
  };
}
const pen = document.createElement("canvas").getContext("2d");
/** Names beside points. Each name is put at the first of eight places where it covers neither a point nor another name. */
function placed(wanted, points, plot) {
  pen.font = `12px ${FONT.family}`;
  const at = (p) => [plot.left + (p.x.mean - plot.x[0]) / (plot.x[1] - plot.x[0]) * plot.width, plot.top + (plot.y[1] - p.y.mean) / (plot.y[1] - plot.y[0]) * plot.height];
  const taken = points.map((p) => at(p)).map(([x, y]) => [x - 6, y - 6, x + 6, y + 6]);
  const free = (b) => b[0] > plot.left && b[2] < plot.left + plot.width && b[1] > plot.top && b[3] < plot.top + plot.height &&
    taken.every((t) => b[2] < t[0] || b[0] > t[2] || b[3] < t[1] || b[1] > t[3]);
  const written = [];
  for (const {p, always} of wanted) {
    const text = p.name.length > 30 ? `${p.name.slice(0, 29)}…` : p.name, [x, y] = at(p), width = pen.measureText(text).width + 4;
    const side = width / 2 + (p.name === state.condition ? 16 : 9);
    // Above and left of a point on the front there is no other point, so that place is tried first.
    const places = (always ? [1, 1.5, 2.5, 4, 6] : [1, 1.5]).flatMap((k) => [[-side, -9 * k], [-side - 3 * k, 0], [0, -17 * k], [side, -9 * k], [side + 3 * k, 0], [side, 9 * k], [-side, 9 * k], [0, 17 * k]]);
    const box = ([dx, dy]) => [x + dx - width / 2, y + dy - 8, x + dx + width / 2, y + dy + 8];
    const place = places.find((d) => free(box(d))) ?? (always ? places[0] : null);
    if (!place) continue;
    taken.push(box(place));
    written.push({x: p.x.mean, y: p.y.mean, xshift: place[0], yshift: -place[1], text: literal(text), showarrow: false, font: {...FONT, size: 12},
      bgcolor: "rgba(255,255,255,.8)", borderpad: 1, captureevents: false});
  }
  return written;
}
function drawPareto() {
  const all = names.map(point).filter(drawable), shown = visible().map(point).filter(drawable), target = $("pareto");
  $("front").hidden = !names.map((n) => conditions[n].metrics?.accuracy ?? conditions[n].cells).some(Boolean);
  if ($("front").hidden) return;
  const where = everything() ? "all problems" : [state.task, state.difficulty].filter((v) => v !== "all").join(", ");
  $("front-how").textContent = `Up is better, left is shorter; on ${where}. The dotted lines go through base: a point above and left of both is more accurate and shorter. ` +
    "The grey line is the front of the visible conditions: none of them is shorter and at least as accurate." +
    (shown.some((p) => few(p.name)) ? " Open symbols: fewer than three seeds, too few for a test." : "");
  const x = range(all.length ? all.flatMap((p) => ends(p.x)) : [0, 1]), y = range(all.length ? all.flatMap((p) => ends(p.y)) : [0, 1]);
  const best = front(shown), chosen = shown.find((p) => p.name === state.condition), zero = all.find((p) => p.name === base);
  const margin = {l: 62, r: 12, t: 10, b: 50};
  const plot = {left: margin.l, top: margin.t, width: target.clientWidth - margin.l - margin.r, height: target.clientHeight - margin.t - margin.b, x, y};
  const wanted = [...shown.filter((p) => p.name === base || p === chosen).map((p) => ({p, always: true})),
    ...(state.labels ? best.filter((p) => p.name !== base && p !== chosen).map((p) => ({p, always: false})) : [])];
  const data = [
    {type: "scatter", mode: "lines", name: "front", x: best.map((p) => p.x.mean), y: best.map((p) => p.y.mean), hoverinfo: "skip", showlegend: false, line: {shape: "hv", color: "#8c959f", width: 1.5}},
    {type: "scatter", mode: "markers", name: "selected", x: chosen ? [chosen.x.mean] : [], y: chosen ? [chosen.y.mean] : [], hoverinfo: "skip", showlegend: false,
      marker: {symbol: "circle", size: 24, color: "rgba(255,214,92,.45)", line: {color: "#8a6a00", width: 2}}},
    ...[...families].sort((a, b) => (a === "base") - (b === "base")).map((family) => trace(family, shown)),
  ];
  const line = (along) => ({type: "line", layer: "below", line: {color: "#6e7781", width: 1, dash: "dot"},
    ...(along === "x" ? {xref: "paper", x0: 0, x1: 1, y0: zero.y.mean, y1: zero.y.mean} : {yref: "paper", y0: 0, y1: 1, x0: zero.x.mean, x1: zero.x.mean})});
  const layout = {
    font: FONT, margin, hovermode: "closest", showlegend: false, uirevision: `${state.task} ${state.difficulty}`, paper_bgcolor: "#fff", plot_bgcolor: "#fff",
    xaxis: {title: {text: literal(axisName("think_tokens", "tokens")), font: FONT}, range: x, zeroline: false, gridcolor: "#eaeef2", ...TICKS},
    yaxis: {title: {text: literal(axisName("accuracy", "share")), standoff: 8, font: FONT}, range: y, tickformat: ".0%", zeroline: false, gridcolor: "#eaeef2", ...TICKS},
    shapes: zero ? [line("x"), line("y")] : [], annotations: placed(wanted, shown, plot), legend: {orientation: "h", y: -0.18},
  };
  Plotly.react(target, data, layout, {...CONFIG, modeBarButtonsToRemove: [...CONFIG.modeBarButtonsToRemove, "toImage"], modeBarButtonsToAdd: [PICTURE]});
  if (!target.dataset.listens) {
    target.dataset.listens = "yes";
    target.on("plotly_click", ({points}) => { const name = points[0]?.customdata; if (names.includes(name)) set({condition: name}); });
  }
}
const axisName = (metric, unit) => `${about(metric).label}${unit === "tokens" && !/token/i.test(about(metric).label) ? " (tokens)" : ""}`;
const TICKS = {linecolor: "#8c959f", ticks: "outside", tickcolor: "#8c959f"};
// plotly's "share" button is switched off: it would send the numbers to the site of its makers.
const CONFIG = {...plots.CONFIG, responsive: true};
const PICTURE = {
  name: "picture", title: "Save as a picture, with its legend", icon: Plotly.Icons.camera,
  click: (plot) => Plotly.downloadImage({data: plot.data, layout: {...plot.layout, showlegend: true, margin: {...plot.layout.margin, b: 110}}},
    {format: "png", scale: 2, width: plot.clientWidth, height: plot.clientHeight + 60, filename: "accuracy-against-thinking"}),
};

// --- the selected condition ------------------------------------------------------------------------------------

function reference(paper) {
  const id = /^(?:arxiv[: ]*)?(\d{4}\.\d{4,5})$/i.exec(paper.trim());
  return id ? h("a", {href: `https://arxiv.org/abs/${id[1]}`, rel: "noreferrer", target: "_blank"}, `arXiv:${id[1]}`) : paper;
}
function numbers(name, metric) {
  const v = value(name, metric), d = difference(name, metric), sure = isSure(d);
  if (!isNumber(v?.mean)) return h("td", {}, "–");
  const good = sure && about(metric).better !== "none" ? ((d.mean > 0) === (about(metric).better === "high") ? "good" : "bad") : "";
  const flag = sure ? h("span", {class: "flag", role: "img", "aria-label": `${d.mean > 0 ? "more" : "less"} than base${good && `, ${good === "good" ? "better" : "worse"}`}, significant after Holm`}, d.mean > 0 ? "▲" : "▼") : null;
  const under = d ? `${show(metric, d.mean, true)} ${interval(metric, d, true)}` : interval(metric, v);
  const title = isNumber(d?.p_holm) ? `difference from base: ${pText(d.p_holm)} after Holm's correction${isNumber(d.p) ? ` (${pText(d.p)} before it)` : ""}` : d?.note ? `difference from base: not tested (${d.note})` : null;
  return h("td", {class: `${sure ? "sure" : ""} ${good} ${!everything() && !perCell(metric) ? "asall" : ""}`.trim() || null, title}, flag, show(metric, v.mean), h("small", {}, under || "\u00a0"));
}
function drawCard() {
  const name = state.condition, c = conditions[name], seeds = c.seeds ?? [];
  const main = Object.keys(metrics).filter((m) => (metrics[m].group ?? "main") === "main" && value(name, m)).slice(0, 6);
  const rows = (main.length ? main : ["accuracy", "think_tokens"]).map((m) => h("tr", {}, h("th", {scope: "row"}, about(m).label, unitOf(m).unit && unitOf(m).unit !== "score" && !about(m).label.includes(unitOf(m).unit) ? `, ${unitOf(m).unit}` : ""), numbers(name, m)));
  const facts = [
    isNumber(c.front) && everything() ? ["on the front", `${percent(c.front)} % of resamples`] : null,
    seeds.length ? [seeds.length === 1 ? "seed" : "seeds", seeds.join(", ")] : null,
    c.paper ? ["paper", reference(String(c.paper))] : null,
    ...Object.keys(COSTS).filter((k) => isNumber(c.cost?.[k])).map((k) => [`${COSTS[k][0].toLowerCase()} ${k === "parameters_changed" ? "changed" : k === "training_steps" ? "" : "for responses"}`, cost(k, c.cost[k])]),
  ].filter(Boolean);
  $("card").replaceChildren(h("div", {class: "title"}, h("h3", {}, swatch(familyOf(name)), " ", name), h("p", {class: "soft"}, familyOf(name) + (name === base ? ", the baseline of all comparisons" : "")),
      c.note ? h("p", {}, c.note) : null),
    h("table", {}, h("tbody", {}, rows)), h("dl", {}, facts.map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)])),
    c.interventions?.length ? h("details", {}, h("summary", {}, "Exact interventions"), h("div", {class: "done", tabindex: "0"}, tree(c.interventions))) : "",
    h("div", {class: "tools"}, examples.length ? h("button", {type: "button", onclick: () => go($("examples"))}, "Transcripts ↓") : null,
      h("button", {type: "button", onclick: () => { go($("table")); row(name)?.scrollIntoView({block: "center"}); }}, "In the table ↓")));
}

// --- transcripts -----------------------------------------------------------------------------------------------

function buildExamples() {
  $("examples").hidden = !examples.length || !names.length;
  if ($("examples").hidden) return;
  $("condition").replaceChildren(...families.map((family) => h("optgroup", {label: family},
    names.filter((n) => familyOf(n) === family).map((n) => h("option", {value: n}, n)))));
  $("condition").addEventListener("change", () => set({condition: $("condition").value}));
  $("example").addEventListener("change", () => set({example: $("example").value}));
  const step = (by) => {
    const offered = eligible(), at = offered.findIndex((e) => String(e.id) === current().id.toString());
    set({example: String(offered[(at + by + offered.length) % offered.length].id)});
  };
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
}
const fits = (e) => (state.task === "all" || e.task === state.task) && (state.difficulty === "all" || e.difficulty === state.difficulty);
const eligible = () => (examples.some(fits) ? examples.filter(fits) : examples);
const current = () => eligible().find((e) => String(e.id) === state.example) ?? eligible()[0];
/** Thinking and answer of a response. Boards of version 0.1 do not have them apart; their models all write <think>. */
function parted(response) {
  if (response.open !== undefined) return {think: response.think, answer: response.answer, open: response.open};
  const text = response.text ?? "", close = text.indexOf("</think>"), opens = text.trimStart().startsWith("<think>");
  const inside = opens ? text.indexOf("<think>") + 7 : 0;
  if (close >= 0) return {think: text.slice(inside, close), answer: text.slice(close + 8), open: false};
  return opens ? {think: text.slice(inside), answer: null, open: true} : {think: null, answer: text, open: false};
}
function shared(a, b) {
  let n = 0;
  while (n < a.length && n < b.length && a[n] === b[n]) n++;
  return n === a.length && n === b.length ? n : Math.max(a.lastIndexOf("\n", n - 1), a.lastIndexOf(" ", n - 1)) + 1;
}
function pane(name, example, other) {
  const r = own(example.responses, name);
  const head = [swatch(familyOf(name)), h("b", {}, name)];
  if (!r) return h("article", {class: "response panel"}, h("header", {}, head), h("p", {class: "part soft"}, "No response of this condition to this problem was saved."));
  const p = parted(r), twin = other && own(example.responses, other), q = twin && parted(twin);
  const same = q && p.think !== null && q.think !== null ? shared(p.think, q.think) : 0;
  const verdict = typeof r.correct === "boolean" ? h("span", {class: `verdict ${r.correct ? "right-answer" : "wrong-answer"}`}, r.correct ? "✓ right" : "✗ wrong") : null;
  return h("article", {class: "response panel", "data-condition": name},
    h("header", {}, head, verdict, isNumber(r.think_tokens) ? h("span", {class: "soft"}, `${count(Math.round(r.think_tokens * 10) / 10)} think tokens`) : null),
    p.think === null ? null : h("div", {class: "part think", tabindex: "0", role: "region", "aria-label": `thinking of ${name}`}, h("p", {class: "name"}, p.open ? "thinking, never closed" : "thinking"),
      h("p", {class: "text"}, h("span", {class: "same"}, p.think.slice(0, same).replace(/^\n+/, "")), same ? p.think.slice(same).trimEnd() : p.think.trim())),
    p.answer === null ? null : h("div", {class: "part answer"}, h("p", {class: "name"}, p.think === null ? "response, without thinking" : "answer"), h("p", {class: "text"}, p.answer.trim() || "(empty)")));
}
function drawExamples() {
  if ($("examples").hidden) return;
  const e = current(), kinds = [...new Set(eligible().map((x) => [x.task, x.difficulty].filter(Boolean).join(", ")))];
  $("condition").value = state.condition;
  $("example").replaceChildren(...kinds.map((kind) => h("optgroup", {label: kind || "problems"}, eligible().filter((x) => [x.task, x.difficulty].filter(Boolean).join(", ") === kind)
    .map((x) => h("option", {value: String(x.id)}, `${examples.indexOf(x) + 1}. ${String(x.prompt ?? x.id).slice(0, 60)}`)))));
  $("example").value = String(e.id);
  $("question").replaceChildren(h("p", {class: "text"}, String(e.prompt ?? "")),
    h("p", {class: "how"}, "Right answer: ", h("b", {}, String(e.answer ?? "unknown")), [e.task, e.difficulty].filter(Boolean).map((kind) => ` · ${kind}`)));
  const alone = state.condition === base, left = pane(base, e, alone ? null : state.condition);
  if (alone) left.classList.add("alone");
  $("transcripts").replaceChildren(left, alone ? "" : pane(state.condition, e, base));
}

// --- the table -------------------------------------------------------------------------------------------------

const row = (name) => [...$("numbers").tBodies[0].rows].find((r) => r.dataset.condition === name);
function ordered(shown, column) {
  const sign = state.down ? -1 : 1;
  if (!column) return shown.sort((a, b) => sign * a.localeCompare(b, "en", {numeric: true}));
  const missing = (name) => !isNumber(column.sorted(name));
  return shown.sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : sign * (column.sorted(a) - column.sorted(b))) || names.indexOf(a) - names.indexOf(b));
}
function heading(key, label, unit, help, best) {
  const active = state.sort === key;
  const arrow = h("span", {class: "arrow", "aria-hidden": "true"}, active ? (state.down ? "↓" : "↑") : "↕");
  const sort = () => set({sort: key, down: active ? !state.down : best});
  return h("th", {scope: "col", "data-key": key, "aria-sort": active ? (state.down ? "descending" : "ascending") : null, title: help ?? null},
    h("button", {type: "button", onclick: sort}, h("span", {class: "label"}, key === "name" ? [label, arrow] : [arrow, label]), h("small", {}, unit || "\u00a0")));
}
function drawTable() {
  $("table").hidden = !names.length;
  const shown = columns(state.group), column = shown.find((c) => c.key === state.sort) ?? groups.flatMap(columns).find((c) => c.key === state.sort);
  const refocus = document.activeElement?.closest?.("#numbers thead th")?.dataset.key, picked = document.activeElement?.closest?.("#numbers tbody tr")?.dataset.condition;
  $("table-how").replaceChildren("Mean, and below it the paired difference from base (condition minus base) with its 95 % interval. For base, and in columns that a filter restricts, the interval is that of the mean. ",
    h("span", {class: "sure key good"}, h("span", {class: "flag"}, "▲"), h("span", {class: "flag"}, "▼"), " bold"), ": significantly more or less than base, after Holm's correction; the mark is ",
    h("span", {class: "sure key good"}, h("span", {class: "flag"}, "▲"), " blue"), " if that is better, ", h("span", {class: "sure key bad"}, h("span", {class: "flag"}, "▼"), " brown"), " if it is worse.",
    everything() ? "" : " Accuracy and think tokens are of the chosen problems; the dimmed columns are of all problems.");
  $("numbers").tHead.replaceChildren(h("tr", {}, heading("name", "Condition", "", null, false),
    shown.map((c) => heading(c.key, c.label, [c.unit, !everything() && perCell(c.key) ? [state.task, state.difficulty].filter((v) => v !== "all").join(", ") : ""].filter(Boolean).join(" · "), c.help, c.best))));
  const rows = [base, ...ordered(visible().filter((n) => n !== base), state.sort === "name" ? null : column)].filter((n) => own(conditions, n));
  $("numbers").tBodies[0].replaceChildren(...rows.map((name) => {
    const seeds = (conditions[name].seeds ?? []).length;
    return h("tr", {"data-condition": name, class: [name === base ? "base" : "", name === state.condition ? "chosen" : ""].join(" ").trim() || null},
      h("th", {scope: "row"}, h("button", {type: "button", class: "pick", "aria-pressed": String(name === state.condition), title: conditions[name].note ?? null, onclick: () => set({condition: name})}, swatch(familyOf(name)), h("span", {}, name)),
        h("small", {}, name === base ? "always on top" : `${familyOf(name)}${seeds > 1 ? `, ${seeds} seeds` : ""}`)),
      shown.map((c) => (c.metric ? numbers(name, c.metric) : h("td", {class: c.key === "front" && !everything() ? "asall" : null}, c.shown(name)))));
  }));
  $("box").style.setProperty("--head", `${$("numbers").tHead.offsetHeight}px`);
  const explained = shown.filter((c) => c.help);
  $("help").hidden = !explained.length;
  $("help").querySelector("dl").replaceChildren(...explained.flatMap((c) => [h("dt", {}, c.label), h("dd", {}, c.help)]));
  if (refocus) [...$("numbers").tHead.querySelectorAll("th")].find((th) => th.dataset.key === refocus)?.querySelector("button").focus({preventScroll: true});
  if (picked) row(picked)?.querySelector("button").focus({preventScroll: true});
}
function save(text, name, type) {
  const link = h("a", {href: URL.createObjectURL(new Blob([text], {type})), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
/** The numbers of the table in all groups of columns, unrounded, as CSV. Text that a spreadsheet could read as a formula gets a leading '. */
function csv() {
  const all = groups.flatMap(columns), quote = (v) => `"${String(v ?? "").replace(/^(?=[=+@\-\t])/, typeof v === "number" ? "" : "'").replaceAll('"', '""')}"`;
  const under = [state.task === "all" ? "" : state.task, state.difficulty === "all" ? "" : state.difficulty].filter(Boolean).join("; ");
  const key = (metric) => (under && perCell(metric) ? `${metric} (${under})` : metric);  // the other columns are of all problems
  const head = ["condition", "family", ...all.flatMap((c) => (c.metric ? ["", "_low", "_high", "_difference", "_difference_low", "_difference_high", "_p_holm"].map((end) => key(c.key) + end) : [c.key]))];
  const lines = [base, ...visible().filter((n) => n !== base)].map((name) => [name, familyOf(name), ...all.flatMap((c) => {
    if (!c.metric) return [c.sorted(name)];
    const v = value(name, c.metric) ?? {}, d = difference(name, c.metric) ?? {};
    return [v.mean, v.low, v.high, d.mean, d.low, d.high, d.p_holm];
  })]);
  return [head, ...lines].map((line) => line.map(quote).join(",")).join("\r\n");
}

// --- learning curves, figures, methods, provenance -------------------------------------------------------------

const pen2 = (name) => { const i = Object.keys(curves).indexOf(name); return {color: COLOURS[i % COLOURS.length], dash: DASHES[Math.floor(i / COLOURS.length) % DASHES.length]}; };
function buildCurves() {
  const all = Object.keys(curves);
  $("curves").hidden = !all.length;
  $("curve-names").replaceChildren(...all.map((name) => {
    const {color, dash} = pen2(name);
    return h("button", {type: "button", class: "chip", "data-value": name, "aria-pressed": "false", onclick: () => { state.curves = toggled(state.curves, name); remember(); drawCurves(); }},
      h("svg", {class: "mark", viewBox: "0 0 14 14", "aria-hidden": "true"}, h("line", {x1: 0, x2: 14, y1: 7, y2: 7, stroke: color, "stroke-width": 3, "stroke-dasharray": dash === "solid" ? null : "4 2"})),
      name, h("small", {}, `${curves[name].length} ${curves[name].length === 1 ? "seed" : "seeds"}`));
  }));
}
function mean(runs, metric) {
  const sums = new Map();
  for (const run of runs) (run.step ?? []).forEach((step, i) => { if (isNumber(run[metric]?.[i])) sums.set(step, [...(sums.get(step) ?? []), run[metric][i]]); });
  return [...sums].filter(([, values]) => values.length === runs.length).sort((a, b) => a[0] - b[0]).map(([step, values]) => [step, values.reduce((a, b) => a + b) / values.length]);
}
function drawCurves() {
  if ($("curves").hidden) return;
  press("curve-names", (v) => state.curves.has(v));
  for (const [id, metric, title, format] of [["curve-accuracy", "accuracy", "Accuracy", ".0%"], ["curve-tokens", "think_tokens", "Think tokens", ""]]) {
    const data = Object.keys(curves).filter((n) => state.curves.has(n)).flatMap((name) => {
      const line = pen2(name), average = mean(curves[name], metric);
      return [...(curves[name].length > 1 ? curves[name].map((run) => ({type: "scatter", mode: "lines", x: run.step, y: run[metric], line: {...line, width: 1}, opacity: 0.3, hoverinfo: "skip"})) : []),
        {type: "scatter", mode: "lines", x: average.map((p) => p[0]), y: average.map((p) => p[1]), line: {...line, width: 2.5}, name: literal(name),
          hovertemplate: `${literal(name).replace(/[{}%]/g, "")}<br>step %{x}: %{y${format ? ":.1%" : ":.1f"}}<extra></extra>`}];
    });
    Plotly.react($(id), data, {font: FONT, showlegend: false, hovermode: "closest", margin: {l: 55, r: 24, t: 34, b: 56}, title: {text: title, font: {size: 14}, x: 0, xref: "paper", xanchor: "left", y: 0.97},
      xaxis: {title: {text: "training step", font: FONT}, gridcolor: "#eaeef2", zeroline: false, ...TICKS}, yaxis: {gridcolor: "#eaeef2", zeroline: false, ...TICKS, tickformat: format, rangemode: metric === "think_tokens" ? "tozero" : "normal"}}, CONFIG);
  }
}
const paragraphs = (text) => String(text ?? "").split(/\n\s*\n/).filter(Boolean).map((p) => h("p", {}, p));
function buildFigures() {
  const all = part("figures", []);
  $("figures").hidden = !all.length;
  const seen = new IntersectionObserver((entries) => entries.filter((e) => e.isIntersecting).forEach(({target}) => {
    seen.unobserve(target);
    plots.draw(target, all[Number(target.dataset.figure)].figure);
  }), {rootMargin: "800px"});
  $("gallery").replaceChildren(...all.map(({title, text, figure}, i) => {
    const plot = h("div", {class: "plot", "data-figure": i, "data-least": figure.layout?.meta?.least_width, role: "img", "aria-label": title ?? "figure"});
    plot.style.minHeight = `${figure.layout?.height ?? 420}px`;
    return h("article", {class: "panel"}, h("h3", {}, title ?? ""), paragraphs(text), h("div", {class: "frame"}, plot));
  }));
  document.querySelectorAll("[data-figure]").forEach((plot) => seen.observe(plot));
}
function tree(value) {
  if (Array.isArray(value)) return value.some((v) => v && typeof v === "object") ? h("dl", {}, value.map((v, i) => [h("dt", {}, String(i + 1)), h("dd", {}, tree(v))])) : value.map(String).join(", ");
  if (value && typeof value === "object") return h("dl", {}, Object.entries(value).map(([k, v]) => [h("dt", {}, k.replaceAll("_", " ")), h("dd", {}, tree(v))]));
  return value === null || value === undefined ? "–" : String(value);
}
function buildRest() {
  const methods = part("methods", []);
  $("methods").hidden = !methods.length;
  $("method-list").replaceChildren(...methods.map((m) => h("article", {}, h("h3", {}, m.title ?? ""), paragraphs(m.text))));
  $("provenance").hidden = !board.provenance;
  $("origin").replaceChildren(tree(board.provenance));
  $("json").addEventListener("click", () => save(JSON.stringify(board, null, 1), "board.json", "application/json"));
  $("csv").addEventListener("click", () => save(csv(), "board.csv", "text/csv"));
}

// --- start -----------------------------------------------------------------------------------------------------

function draw() {
  if (!names.length) return;
  drawFilters();
  drawPareto();
  drawCard();
  drawExamples();
  drawTable();
}
state = read();
$("compared").hidden = !names.length;
buildFilters();
buildExamples();
buildCurves();
buildFigures();
buildRest();
draw();
drawCurves();
drawHead();
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); go($("table")); });
addEventListener("hashchange", () => { state = read(); draw(); drawCurves(); });
// On paper, which is narrower than most windows.
const onScreen = ["pareto", "curve-accuracy", "curve-tokens"].map($);
addEventListener("beforeprint", () => onScreen.filter((plot) => plot.data).forEach((plot) => Plotly.relayout(plot, {width: plot.id === "pareto" ? 680 : 330})));
addEventListener("afterprint", () => onScreen.filter((plot) => plot.data).forEach((plot) => Plotly.relayout(plot, {width: null, autosize: true})));
let resized, width = innerWidth;
addEventListener("resize", () => { clearTimeout(resized); if (innerWidth !== width) resized = setTimeout(() => { width = innerWidth; draw(); }, 200); });
document.documentElement.dataset.ready = "yes";
})();
