// The list of models, and what is known about one of them.

import { h, number, percent } from "./dom.js";
import { ratesOf, sparkline } from "./live.js";

const STATES = {
  READY: ["ready", "Ready"],
  LOADING: ["loading", "Loading"],
  FAILED: ["failed", "Failed"],
  DRAINING: ["loading", "Draining"],
};
const METRICS = {
  top1: "top-1",
  top5: "top-5",
  recall_at_10: "recall@10",
  mase: "MASE",
  mase_seasonal_naive: "MASE of the seasonal naive",
  mase_holt_winters: "MASE of Holt-Winters",
  map: "mAP",
  mae: "MAE",
  miou: "mIoU",
  pinball: "pinball loss",
};
// Shares of 1, shown in per cent.
const SHARES = /^(top\d+|recall_at_\d+|similarity|agreement|legal|remembered|coverage_\w+|map|f1|miou|accuracy|skill)$/;
const HEADLINES = ["top1", "map", "miou", "recall_at_10", "similarity", "agreement", "legal", "mase", "mae"];

export const keyOf = (model) => `${model.name}/${model.version}`;

// A model of the catalog with the fields that may be missing. alone: there is no other version of it.
export function complete(model, alone) {
  const lists = { inputs: [], outputs: [], metrics: [] };
  const filled = { state: "STATE_UNSPECIFIED", reason: "", task: "", precision: "", trained: false, ...lists, ...model };
  return { ...filled, version: String(model.version ?? 0), alone };
}

export function stateOf(model) {
  const [kind, word] = STATES[model.state] ?? ["loading", String(model.state)];
  return h("span", { class: `state ${kind}` }, word);
}

const nameOf = ({ name }) =>
  METRICS[name] ?? name.replace(/^coverage_(\d+)$/, "coverage of the $1 % interval").replaceAll("_", " ");
const shown = (metric, value) => (SHARES.test(metric.name) ? percent(value) : number(value));
const valueOf = (metric) => shown(metric, metric.value ?? 0);
const withError = (metric) =>
  metric.standard_error ? `${valueOf(metric)} ± ${shown(metric, metric.standard_error)}` : valueOf(metric);

export function headline(model) {
  const best = HEADLINES.map((name) => model.metrics.find((metric) => metric.name === name)).find(Boolean);
  const metric = best ?? model.metrics[0];
  return metric ? `${nameOf(metric)} ${valueOf(metric)}` : "";
}

const rates = new Map(); // elements of the list, by model: [name, element]

// `models`: of the catalog. `selected`: a key.
export function list(nav, models, selected) {
  rates.clear();
  const rows = models.map((model) => {
    const link = `#/${encodeURIComponent(model.name)}/${model.version}`;
    const kind = [model.task || "plain ONNX", model.precision].filter(Boolean).join(" · ");
    const rate = h("span", { class: "rate" });
    rates.set(keyOf(model), [model.name, rate]);
    return h(
      "li",
      {},
      h(
        "a",
        { href: link, "aria-current": keyOf(model) === selected && "page" },
        h("span", { class: "title" }, h("b", {}, model.name), ` v${model.version}`),
        stateOf(model),
        h("span", { class: "facts" }, kind, h("span", {}, headline(model))),
        rate,
      ),
    );
  });
  const empty = h("p", { class: "hint" }, "No model yet: publish a bundle into the repository.");
  const items = h("ul", {}, rows);
  nav.replaceChildren(h("h2", {}, `Models (${models.length})`), models.length ? items : empty);
  // Where the list is a strip, on small screens.
  const current = nav.querySelector("[aria-current]")?.parentElement;
  if (current) items.scrollLeft = current.offsetLeft - items.offsetLeft - 12;
}

// Only the figures change: a link that is replaced while it is clicked would miss the click.
export function updateRates(history) {
  for (const [name, element] of rates.values()) {
    const rates = ratesOf(history.of(name));
    element.replaceChildren(...(rates.some(Boolean) ? [sparkline(rates), `${number(rates.at(-1))}/s`] : []));
  }
}

function facts(rows) {
  const known = rows.filter(([, value]) => value);
  return h("dl", { class: "about" }, known.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

const tensors = (specs) =>
  specs.map((spec) => h("code", {}, `${spec.name}: ${spec.dtype} [${(spec.shape ?? []).map((n) => (Number(n) < 0 ? "any" : n)).join(", ")}]`));

// Weights, data, accuracy and shapes.
export function about(model) {
  const made = model.provenance ?? {};
  const drop = model.accuracy_drop;
  const tools = [made.created?.slice(0, 10), made.torch && `PyTorch ${made.torch}`, made.onnx && `ONNX ${made.onnx}`];
  const rows = [
    ["Architecture", model.architecture],
    ["Trained on", model.trained ? model.dataset : ""],
    ["Parameters", Number(model.parameters) > 0 && Number(model.parameters).toLocaleString("en")],
    ["Weights", model.weights_source],
    ["Licence", model.weights_license],
    ["SHA-256", model.weights_sha256 && h("code", {}, model.weights_sha256)],
    ["Exported", tools.filter(Boolean).join(", ")],
    ["Served as", model.precision && `${model.precision}, batches of up to ${model.max_batch_size ?? "?"} rows`],
    ["Loses to fp32", drop && `${percent(drop.drop ?? 0)} ${nameOf({ name: drop.metric ?? "" })} on ${drop.samples ?? 0} samples`],
    ["Images", model.image_preparation],
    ["Inputs", model.inputs.length && tensors(model.inputs)],
    ["Outputs", model.outputs.length && tensors(model.outputs)],
  ];
  return h("section", { class: "card", "aria-labelledby": "about-title" }, h("h3", { id: "about-title" }, "About"), facts(rows));
}

export function accuracy(model) {
  const title = h("h3", { id: "accuracy-title" }, "Accuracy");
  const box = (content) => h("section", { class: "card", "aria-labelledby": "accuracy-title" }, title, content);
  if (!model.metrics.length) {
    const why = model.trained ? "Not measured: the export had no held-out data." : "Not measured.";
    return box(h("p", { class: "hint" }, why));
  }
  // How often each single quantile was above the truth: detail of the coverages.
  const metrics = model.metrics.filter((metric) => !metric.name.startsWith("coverage_q"));
  const sourceOf = (metric) => `${metric.dataset ?? ""}, ${Number(metric.samples ?? 0).toLocaleString("en")} samples`;
  return box(
    [...new Set(metrics.map(sourceOf))].map((source) => {
      const rows = metrics.filter((metric) => sourceOf(metric) === source);
      const row = (metric) => h("tr", {}, h("th", { scope: "row" }, nameOf(metric)), h("td", {}, withError(metric)));
      return h("table", {}, h("caption", {}, source), h("tbody", {}, rows.map(row)));
    }),
  );
}
