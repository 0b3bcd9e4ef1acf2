// Live figures, from the differences between two readings of the server's Prometheus text.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:\\.|[^"\\])*)"/g;
const ESCAPED = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };
export const POINTS = 60;

// [{name, labels: Map, value}] of the text format.
export function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (!found) continue;
    const labels = new Map();
    for (const [, name, value] of (found[2] ?? "").matchAll(LABEL)) {
      labels.set(name, value.replace(/\\[n"\\]/g, (pair) => ESCAPED[pair]));
    }
    samples.push({ name: found[1], labels, value: Number(found[3].replace("+Inf", "Infinity")) });
  }
  return samples;
}

// The counters of one reading. Of the server: Map by series; of models: Map by model of Maps by series.
export function reading(text) {
  const server = new Map();
  const models = new Map();
  for (const { name, labels, value } of parse(text)) {
    if (!name.startsWith("rafaga_")) continue;
    const model = labels.get("model");
    let series = server;
    if (model !== undefined) {
      if (!models.has(model)) models.set(model, new Map());
      series = models.get(model);
    }
    const key = labels.has("le") ? `${name} ${labels.get("le")}` : name;
    series.set(key, (series.get(key) ?? 0) + value);
  }
  return { server, models };
}

// How much a counter grew; a counter that fell started anew.
function growth(before, after, name) {
  const old = before?.get(name) ?? 0;
  const now = after.get(name) ?? 0;
  return now < old ? now : now - old;
}

// The upper bound of the bucket that holds this quantile; NaN without observations.
function quantile(before, after, histogram, level) {
  const prefix = `${histogram}_bucket `;
  const buckets = [...after.keys()]
    .filter((key) => key.startsWith(prefix))
    .map((key) => [Number(key.slice(prefix.length).replace("+Inf", "Infinity")), growth(before, after, key)])
    .sort(([a], [b]) => a - b);
  const total = buckets.at(-1)?.[1] ?? 0;
  return total ? buckets.find(([, count]) => count >= level * total)[0] : NaN;
}

// Of one model between two readings. Times in seconds, sizes in rows.
export function figures(before, after, seconds) {
  const grew = (name) => growth(before, after, `rafaga_${name}`);
  const requests = grew("queue_seconds_count");
  const runs = grew("inference_seconds_count");
  const wait = grew("queue_seconds_sum") / requests;
  const run = grew("inference_seconds_sum") / runs;
  return {
    rate: requests / seconds,
    wait,
    run,
    latency: wait + run,
    slowWait: quantile(before, after, "rafaga_queue_seconds", 0.99),
    batch: grew("batch_size_sum") / runs,
    queued: after.get("rafaga_queue_rows") ?? 0,
  };
}

// The last two minutes, for each model and for the server.
export class History {
  #last = null;
  #models = new Map();
  server = null;

  add(text, now) {
    const next = reading(text);
    const last = this.#last;
    this.#last = { ...next, now };
    if (!last || now <= last.now) return;
    const seconds = (now - last.now) / 1e3;
    let rate = 0;
    for (const [name, counters] of next.models) {
      const point = figures(last.models.get(name), counters, seconds);
      this.#models.set(name, [...this.of(name), point].slice(-POINTS));
      rate += point.rate;
    }
    for (const name of this.#models.keys()) if (!next.models.has(name)) this.#models.delete(name);
    this.server = {
      rate, // of all models: the calls of this page for the catalog do not count
      refused: growth(last.server, next.server, "rafaga_refusals_total") / seconds,
      inFlight: next.server.get("rafaga_requests_in_flight") ?? 0,
    };
  }

  // After a pause, such as a hidden tab, one difference would be spread over all of it.
  restart() {
    this.#last = null;
  }

  of(model) {
    return this.#models.get(model) ?? [];
  }
}
