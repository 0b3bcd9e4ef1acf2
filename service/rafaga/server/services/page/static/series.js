// Forecasters: a series from the text field or a file, and its forecast.

import { pathOf, post } from "./api.js";
import { chart } from "./chart.js";
import { button, field, h, number } from "./dom.js";
import { example } from "./examples.js";

const PAUSE_MS = 400;

const SEPARATOR = /\s*[,;\t]\s*|\s+(?=[-+.\d])/;
const numeric = (cell) => cell !== "" && Number.isFinite(Number(cell));

// {values, names}: of plain numbers in any layout, or of the last column of a table. `names` holds the first column of
// a table, otherwise it is empty. Throws Error with the line that is not a number.
export function parseSeries(text) {
  const rows = text
    .split(/\r?\n/)
    .map((line, at) => ({ cells: line.trim().split(SEPARATOR), at: at + 1 }))
    .filter(({ cells }) => cells.some(Boolean));
  const head = rows.length > 1 && !rows[0].cells.some(numeric) ? rows.shift() : null;
  const first = rows.map(({ cells }) => cells[0]);
  const columns = (head ?? rows[0])?.cells.length;
  const even = /[,;\t]/.test(text) && rows.length > 2 && rows.every(({ cells }) => cells.length === columns);
  const rising = first.every((cell, at) => numeric(cell) && (!at || Number(cell) > Number(first[at - 1])));
  const table = columns > 1 && (head !== null || (even && ((rising && columns === 2) || !first.some(numeric))));
  const values = [];
  for (const { cells, at } of rows) {
    for (const cell of table ? [cells[columns - 1] ?? ""] : cells.filter(Boolean)) {
      if (!numeric(cell)) throw new Error(`Line ${at}: “${cell.slice(0, 40)}” is not a number.`);
      values.push(Number(cell));
    }
  }
  return { values, names: table ? first : [] };
}

// {node, destroy} for `tryOut`.
export function series(model, outcome) {
  const about = model.forecast ?? {};
  const { min_history: least = 1, max_history: most = 1, max_horizon: longest = 1, unit = "", step = "step" } = about;
  const text = h("textarea", { rows: 8, spellcheck: "false", autocapitalize: "off", placeholder: "315.7 317.5 317.9 …\n\nor a table:\n1958-03, 315.7" });
  const horizon = h("input", { type: "number", min: 1, max: longest, step: 1, value: longest });
  const count = h("span", { class: "hint", role: "status" });
  const file = h("input", { type: "file", accept: ".csv,.txt,.tsv,text/*", class: "unseen", id: "series-file" });
  let timer = 0;
  let plot = null;

  const steps = () => Math.min(longest, Math.max(1, Math.trunc(horizon.valueAsNumber) || longest));
  const shell = () => outcome.shell(pathOf(model, ":forecast", steps() === longest ? {} : { horizon: steps() }), "--data-binary @series.csv");
  const show = (given) => (answer) => {
    plot?.destroy();
    plot = chart({ ...given, quantiles: answer.quantiles ?? [], unit, step });
    return plot.node;
  };
  const ask = () => {
    clearTimeout(timer);
    shell();
    if (!text.value.trim()) {
      count.textContent = "";
      outcome.clear();
      return;
    }
    let given;
    try {
      given = parseSeries(text.value);
    } catch (error) {
      count.textContent = "";
      outcome.fail(error.message);
      return;
    }
    const { values } = given;
    count.textContent = `${values.length} values${values.length > most ? `; the model uses the last ${most}` : ""}`;
    const body = JSON.stringify({ history: values });
    outcome.wait(post(pathOf(model, ":forecast", steps() === longest ? {} : { horizon: steps() }), body, "application/json"), show(given));
  };
  const soon = () => {
    clearTimeout(timer);
    timer = setTimeout(ask, PAUSE_MS);
  };
  const fill = (value) => {
    text.value = value;
    ask();
  };
  const read = async (chosen) => chosen && fill(await chosen.text());
  text.addEventListener("input", soon);
  text.addEventListener("dragover", (event) => event.preventDefault());
  text.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return; // text drops itself
    event.preventDefault();
    read(event.dataTransfer.files[0]);
  });
  horizon.addEventListener("change", ask);
  file.addEventListener("change", () => {
    read(file.files[0]);
    file.value = "";
  });
  shell();
  const per = `one per ${step}`;
  const hint = `At least ${number(least)} values, ${unit ? `in ${unit}, ` : ""}${per}, oldest first: numbers, or the last column of a table.`;
  const open = h("label", { class: "button", for: "series-file" }, file, "Open a CSV file");
  const sample = example(about);
  const buttons = h("div", { class: "buttons" }, button(sample.name, () => fill(sample.text)), open);
  const inputs = h("div", { class: "inputs" }, field("Series", text, hint), count, buttons, field(`Steps ahead (${step}s)`, horizon));
  const destroy = () => {
    clearTimeout(timer);
    plot?.destroy();
  };
  return { node: h("div", { class: "split series" }, inputs, outcome.node), destroy };
}
