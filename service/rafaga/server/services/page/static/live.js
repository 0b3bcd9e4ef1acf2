// The live figures of one model, and the sparkline of each row of the list.

import { duration, h, number, svg } from "./dom.js";
import { POINTS } from "./metrics.js";

const WIDTH = 120;
const HEIGHT = 28;

// `values`: oldest first; NaN leaves a gap. The newest is at the right edge.
export function sparkline(values) {
  const peak = Math.max(...values.filter(Number.isFinite), 0) || 1;
  const step = WIDTH / (POINTS - 1);
  const start = WIDTH - step * (values.length - 1);
  let path = "";
  let drawn = false;
  values.forEach((value, at) => {
    const place = `${(start + at * step).toFixed(1)} ${(HEIGHT - 2 - (HEIGHT - 4) * (value / peak)).toFixed(1)}`;
    if (Number.isFinite(value)) path += drawn ? `L${place}` : `M${place}h0`; // a value without neighbours is a dot
    drawn = Number.isFinite(value);
  });
  const box = { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" };
  return svg("svg", box, svg("path", { d: path || "M0 0" }));
}

// As long as all points that are kept: nothing was seen before the first one.
export const ratesOf = (points) => [...Array(POINTS - points.length).fill(0), ...points.map((point) => point.rate)];

function tile(name, value, note, values) {
  return h("div", { class: "tile" }, h("dt", {}, name), h("dd", {}, h("strong", {}, value), sparkline(values), h("small", {}, note)));
}

// `points`: of History, oldest first.
export function live(points) {
  const now = points.at(-1);
  if (!now) return h("p", { class: "hint" }, "Waiting for the first two readings of /metrics.");
  const busy = [...points].reverse().find((point) => point.rate > 0);
  const named = (name) => (now.rate > 0 || !busy ? name : `${name}, last`);
  const of = (name) => points.map((point) => point[name]);
  return h(
    "dl",
    { class: "tiles" },
    tile("Requests/s", number(now.rate), now.queued ? `${number(now.queued)} rows in the queue` : "queue empty", ratesOf(points)),
    tile(
      named("Latency"),
      duration(busy?.latency),
      busy ? `wait ${duration(busy.wait)} + run ${duration(busy.run)}` : "no requests yet",
      of("latency"),
    ),
    tile(named("Wait, p99"), busy ? `≤ ${duration(busy.slowWait)}` : "–", "time in the queue", of("slowWait")),
    tile(named("Batch size"), number(busy?.batch ?? NaN), "rows per run, mean", of("batch")),
  );
}
