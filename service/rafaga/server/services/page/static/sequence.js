// Models of sequences: what follows the symbols so far. A click on an answer appends it.

import { getJson, pathOf, post } from "./api.js";
import { bar, button, field, h, percent } from "./dom.js";

// {node} for `tryOut`.
export function sequences(model, outcome) {
  const most = model.sequence?.max_length ?? 1;
  const text = h("input", { type: "text", spellcheck: "false", autocapitalize: "off", autocomplete: "off" });
  const alphabet = h("div", { class: "buttons", role: "group", "aria-label": "Symbols" });
  let single = true; // whether every symbol is one character

  const symbols = () => {
    const written = text.value.trim();
    return (single && !/\s/.test(written) ? [...written] : written.split(/\s+/)).filter(Boolean);
  };
  const put = (list) => {
    text.value = list.join(single ? "" : " ");
    ask();
  };
  const ask = () => {
    const path = pathOf(model, ":predict");
    const given = symbols();
    const body = JSON.stringify({ symbols: given });
    outcome.shell(path, `-d '${body.replaceAll("'", "'\\''")}'`);
    if (given.length) outcome.wait(post(path, body, "application/json"), show);
    else outcome.clear();
  };
  const append = (symbol) => put([...symbols(), symbol]);
  const show = (answer) => {
    const rows = (answer.labels ?? []).map((scored) => {
      const row = bar("", scored.probability ?? 0);
      const name = `Append ${scored.label}, ${percent(scored.probability ?? 0)}`;
      row.firstChild.replaceWith(button(scored.label ?? "", () => append(scored.label), { class: "symbol", "aria-label": name }));
      return row;
    });
    return [h("p", { class: "hint" }, "What follows; click to append:"), h("ol", { class: "bars" }, rows)];
  };
  text.addEventListener("input", ask);
  const hint = `Up to ${most} symbols, from the beginning of the sequence on.`;
  const tools = h("div", { class: "buttons" }, button("Remove last", () => put(symbols().slice(0, -1))), button("Clear", () => put([])));
  const inputs = h("div", { class: "inputs" }, field("Sequence", text, hint), alphabet, tools);
  getJson(pathOf(model)).then(
    ({ labels = [] }) => {
      single = labels.every((label) => [...label].length === 1);
      alphabet.replaceChildren(...labels.slice(0, 64).map((label) => button(label, () => append(label), { class: "symbol" })));
    },
    (error) => outcome.fail(error.message),
  );
  ask();
  return { node: h("div", { class: "split" }, inputs, outcome.node) };
}
