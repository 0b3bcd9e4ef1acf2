// A forecast as SVG: the end of the history, the median, and the intervals between quantiles as a fan.

import { h, number, svg } from "./dom.js";

const [TOP, RIGHT, BOTTOM] = [12, 14, 28];

// {node, destroy}. values: the history; names: of its steps, or empty; quantiles: [{level, values}] by rising level.
export function chart({ values, names, quantiles, unit, step }) {
  const horizon = quantiles[0]?.values?.length ?? 0;
  if (!horizon) return { node: h("p", { class: "hint" }, "The model gave no steps."), destroy: () => {} };
  const shown = values.slice(-Math.max(48, 3 * horizon));
  const first = values.length - shown.length;
  const median = quantiles.reduce((a, b) => (Math.abs(b.level - 0.5) < Math.abs(a.level - 0.5) ? b : a)).values;
  const fans = intervals(quantiles);
  const nameAt = (at) => (at > 0 ? `+${at}` : names[first + shown.length - 1 + at] ?? (at ? `−${-at}` : "now"));

  const holder = h("div", { class: "plot" });
  const reading = h("p", { class: "reading", role: "status" });
  const text = rounding([...shown, ...quantiles.flatMap((one) => one.values)]);
  const tell = (at) => {
    const end = unit ? ` ${unit}` : "";
    if (at <= 0) {
      reading.replaceChildren(h("b", {}, nameAt(at)), ` ${text(shown[shown.length - 1 + at])}${end}`);
      return;
    }
    const spans = fans.map((fan) => h("span", {}, `${fan.name}: ${text(fan.low[at - 1])} to ${text(fan.high[at - 1])}`));
    reading.replaceChildren(h("b", {}, `+${at} ${step}${at > 1 ? "s" : ""}`), ` ${text(median[at - 1])}${end}`, ...spans.flatMap((span) => [" ", span]));
  };
  tell(horizon);

  const draw = () => {
    if (holder.clientWidth) holder.replaceChildren(plot({ shown, median, fans, horizon, unit, step, nameAt, tell, width: holder.clientWidth }));
  };
  const observer = new ResizeObserver(draw);
  observer.observe(holder);
  const node = h("div", { class: "forecast" }, legend(fans), holder, reading, table(quantiles, step, text));
  return { node, destroy: () => observer.disconnect() };
}

// The widest first: {name, low, high}.
function intervals(quantiles) {
  const pairs = [];
  for (let at = 0; at < Math.floor(quantiles.length / 2); at++) {
    const [low, high] = [quantiles[at], quantiles.at(-1 - at)];
    pairs.push({ name: `${Math.round(100 * (high.level - low.level))} %`, low: low.values, high: high.values });
  }
  return pairs;
}

// Formats numbers with the decimals that distinguish values of this range.
function rounding(values) {
  const range = values.reduce((a, b) => Math.max(a, b)) - values.reduce((a, b) => Math.min(a, b));
  const digits = Math.min(8, Math.max(0, 2 - Math.floor(Math.log10(range || 1))));
  return (value) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function ticks(low, high, wanted) {
  const raw = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const found = [];
  for (let at = Math.ceil(low / step); at * step <= high; at++) found.push(at * step);
  return found;
}

function plot({ shown, median, fans, horizon, unit, step, nameAt, tell, width }) {
  const height = Math.round(Math.min(340, Math.max(220, 0.5 * width)));
  const all = [...shown, ...median, ...fans.flatMap((fan) => [...fan.low, ...fan.high])];
  const [least, most] = [all.reduce((a, b) => Math.min(a, b)), all.reduce((a, b) => Math.max(a, b))];
  const air = 0.06 * (most - least) || 1;
  const marks = ticks(least - air, most + air, height / 60);
  const texts = marks.map((mark) => number(mark, 4));
  const left = 14 + 7.5 * Math.max(...texts.map((text) => text.length), unit.length);
  const past = shown.length - 1;
  const x = (at) => left + ((at + past) / (past + horizon)) * (width - left - RIGHT);
  const y = (value) => TOP + ((most + air - value) / (most - least + 2 * air)) * (height - TOP - BOTTOM);
  const point = (at, value) => `${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
  const now = shown[past];
  const path = (points) => `M${points.join("L")}`;

  const grid = marks.flatMap((mark, at) => [
    svg("line", { class: "grid", x1: left, x2: width - RIGHT, y1: y(mark), y2: y(mark) }),
    svg("text", { x: left - 8, y: y(mark) + 4, "text-anchor": "end" }, texts[at]),
  ]);
  const bands = fans.map((fan) => {
    const up = fan.high.map((value, at) => point(at + 1, value));
    const down = fan.low.map((value, at) => point(at + 1, value)).reverse();
    return svg("path", { class: "band", d: `${path([point(0, now), ...up, ...down])}Z` });
  });
  const history = svg("path", { class: "history", d: path(shown.map((value, at) => point(at - past, value))) });
  const middle = svg("path", { class: "median", d: path([point(0, now), ...median.map((value, at) => point(at + 1, value))]) });
  const border = svg("line", { class: "now", x1: x(0), x2: x(0), y1: TOP, y2: height - BOTTOM });
  const ahead = `+${horizon} ${step}${horizon > 1 ? "s" : ""}`;
  const below = { y: height - 8 };
  const [begin, middleName, end] = [nameAt(-past), nameAt(0), x(horizon) - x(0) > 130 ? ahead : `+${horizon}`];
  const room = (from, to, name) => to - from > 8 * (name.length + middleName.length / 2);
  const axis = [
    svg("text", { ...below, x: left, "text-anchor": "start" }, begin),
    room(left, x(0), begin) && room(x(0), width - RIGHT, end) ? svg("text", { ...below, x: x(0), "text-anchor": "middle" }, middleName) : null,
    svg("text", { ...below, x: width - RIGHT, "text-anchor": "end" }, end),
  ];
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: height - BOTTOM, visibility: "hidden" });
  const dot = svg("circle", { class: "dot", r: 4, visibility: "hidden" });
  const label = `Forecast of ${horizon} ${step}s after ${shown.length} observations. The arrow keys read single values.`;
  const box = { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "aria-label": label };
  const root = svg("svg", box, grid, border, bands, history, middle, axis, cursor, dot);

  let at = 0;
  const move = (to) => {
    at = Math.max(-past, Math.min(horizon, to));
    const value = at > 0 ? median[at - 1] : shown[past + at];
    for (const [name, position] of [["x1", x(at)], ["x2", x(at)]]) cursor.setAttribute(name, position);
    dot.setAttribute("cx", x(at));
    dot.setAttribute("cy", y(value));
    for (const mark of [cursor, dot]) mark.setAttribute("visibility", "visible");
    tell(at);
  };
  root.addEventListener("pointermove", (event) => {
    const place = event.clientX - root.getBoundingClientRect().left;
    move(Math.round(((place - left) / (width - left - RIGHT)) * (past + horizon)) - past);
  });
  root.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: -past, End: horizon }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    move(to);
  });
  return root;
}

function legend(fans) {
  const keys = [["history", "history"], ["median", "median"]].map(([kind, name]) => h("li", { class: kind }, name));
  const widest = fans.length ? [h("li", { class: "band" }, `${fans.map((fan) => fan.name).join(", ")} interval${fans.length > 1 ? "s" : ""}`)] : [];
  return h("ul", { class: "legend" }, keys, widest);
}

function table(quantiles, step, text) {
  const heads = [step, ...quantiles.map((one) => `${number(100 * one.level)} %`)].map((text) => h("th", { scope: "col" }, text));
  const rows = quantiles[0].values.map((_, at) =>
    h("tr", {}, h("th", { scope: "row" }, `+${at + 1}`), quantiles.map((one) => h("td", {}, text(one.values[at])))),
  );
  const body = h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows));
  return h("details", {}, h("summary", {}, "Numbers"), h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Quantiles" }, body));
}
