// Asks one model: the part that fits its task, the request for a shell, and where the time of the answer went.

import { curl } from "./api.js";
import { button, duration, h } from "./dom.js";
import { images } from "./image.js";
import { sequences } from "./sequence.js";
import { series } from "./series.js";
import { tensors } from "./tensors.js";

const PARTS = {
  classification: images,
  detection: images,
  segmentation: images,
  features: images,
  forecasting: series,
  sequence: sequences,
};

// Where the part shows its answers. Answers that were overtaken by a newer request are dropped.
class Outcome {
  #turn = 0;
  node = h("div", { class: "outcome", "aria-live": "polite" });
  #times = h("p", { class: "times" });
  #error = h("p", { class: "error", role: "alert", hidden: true });
  #shell = h("code", {});

  footer() {
    const copied = h("span", { role: "status", class: "hint" });
    const copy = button("Copy", async () => {
      await navigator.clipboard.writeText(this.#shell.textContent);
      copied.textContent = "Copied";
    });
    const line = h("div", { class: "shell" }, this.#shell, copied, navigator.clipboard ? copy : null);
    return h("div", {}, this.#error, this.#times, line);
  }

  shell(path, data) {
    this.#shell.textContent = curl(path, data);
  }

  // `ask`: a promise of {answer, seconds}. `show`: gets the answer, and returns nodes.
  async wait(ask, show) {
    const turn = ++this.#turn;
    this.node.setAttribute("aria-busy", "true");
    try {
      const { answer, seconds } = await ask;
      if (turn !== this.#turn) return;
      this.node.replaceChildren(...[show(answer)].flat());
      this.#times.replaceChildren(...times(answer, seconds));
      this.fail("");
    } catch (error) {
      if (turn === this.#turn) this.fail(error.message);
    }
    if (turn === this.#turn) this.node.removeAttribute("aria-busy");
  }

  fail(message) {
    this.#error.textContent = message;
    this.#error.hidden = !message;
    if (!message) return;
    this.node.replaceChildren();
    this.#times.replaceChildren();
  }

  clear() {
    this.#turn++;
    this.node.replaceChildren();
    this.#times.replaceChildren();
    this.fail("");
  }
}

function times(answer, seconds) {
  const timing = answer.timing ?? {};
  const spent = (name) => duration(Number(timing[name] ?? 0) / 1e6);
  const parts = [`round trip ${duration(seconds)}`];
  if (answer.timing) {
    parts.push(`queue ${spent("queue_us")}`);
    if (Number(timing.preprocess_us ?? 0)) parts.push(`decode ${spent("preprocess_us")}`);
    parts.push(`inference ${spent("inference_us")}`, `batch of ${timing.batch_size ?? 1}`);
  }
  return parts.map((text) => h("span", {}, text));
}

// {node, destroy}
export function tryOut(model) {
  const outcome = new Outcome();
  const part = (PARTS[model.task] ?? tensors)(model, outcome);
  const title = h("h3", { id: "try-title" }, "Try it");
  const node = h("section", { class: "card try", "aria-labelledby": "try-title" }, title, part.node, outcome.footer());
  return { node, destroy: part.destroy ?? (() => {}) };
}
