// Any other model: named arrays as JSON, in the Open Inference protocol.

import { pathOf, post } from "./api.js";
import { button, field, h } from "./dom.js";

const TYPES = { bool: "BOOL", string: "BYTES", float16: "FP16", float32: "FP32", float64: "FP64" };
const SHOWN = 20_000; // characters of an answer

const typeOf = (dtype) => TYPES[dtype] ?? dtype.toUpperCase();

// One row of zeros: free sizes become 1.
function zeros(spec) {
  const shape = (spec.shape ?? []).map((size) => Math.max(1, Number(size)));
  const length = Math.min(1000, shape.reduce((a, b) => a * b, 1));
  const zero = { bool: false, string: "" }[spec.dtype] ?? 0;
  return { name: spec.name, shape, datatype: typeOf(spec.dtype), data: Array(length).fill(zero) };
}

// {node} for `tryOut`.
export function tensors(model, outcome) {
  const path = pathOf(model, "/infer", {}, "v2");
  const start = model.inputs.map((spec) => JSON.stringify(zeros(spec))).join(",\n  ");
  const text = h("textarea", { rows: 9, spellcheck: "false" });
  text.value = `{"inputs": [\n  ${start}\n]}`;
  const show = (answer) => {
    const written = (answer.outputs ?? []).map((output) => `${output.name} ${output.datatype} [${output.shape}]\n${JSON.stringify(output.data)}`);
    return h("pre", { tabindex: 0 }, written.join("\n\n").slice(0, SHOWN));
  };
  const run = () => outcome.wait(post(path, text.value, "application/json"), show);
  outcome.shell(path, "-d @request.json");
  const hint = "A request of the Open Inference protocol.";
  const inputs = h("div", { class: "inputs" }, field("Request", text, hint), h("div", { class: "buttons" }, button("Run", run, { class: "primary" })));
  return { node: h("div", { class: "split series" }, inputs, outcome.node) };
}
