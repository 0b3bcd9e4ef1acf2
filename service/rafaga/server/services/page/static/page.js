// Puts the page together: the token, the readings every two seconds, and the selected model.

import { getJson, getText, token } from "./api.js";
import { byId, h, number } from "./dom.js";
import { live } from "./live.js";
import { History } from "./metrics.js";
import { about, accuracy, complete, keyOf, list, stateOf, updateRates } from "./models.js";
import { tryOut } from "./try.js";

const PERIOD_MS = 2000;
const SLOW = 3; // the catalog is read every third time

const history = new History();
let models = [];
let shown = ""; // what the article shows: rebuilt when this changes, so that typed text is kept
let listed = ""; // the same for the list
let current = null; // {destroy} of the part that asks the model
let timer = 0;
let reading = 0; // only the newest chain of readings goes on

function status(kind, text) {
  const line = byId("server");
  if (line.textContent !== text) line.replaceChildren(h("span", { class: `state ${kind}` }, text));
}

function traffic(figures) {
  if (!figures) return;
  const item = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
  byId("traffic").hidden = false;
  byId("traffic").replaceChildren(
    item("requests/s", number(figures.rate)),
    item("in flight", number(figures.inFlight)),
    item("refused/s", number(figures.refused)),
  );
}

function selected() {
  const [, name, version] = location.hash.match(/^#\/([^/]+)\/(\d+)$/) ?? [];
  const wanted = name === undefined ? null : models.find((m) => m.name === decodeURIComponent(name) && m.version === version);
  return wanted ?? models.find((model) => model.state === "READY") ?? models[0] ?? null;
}

function article(model) {
  const face = JSON.stringify(model);
  if (face === shown) return;
  shown = face;
  current?.destroy();
  const parts = [h("header", {}, h("h2", {}, model.name), h("span", { class: "version" }, `version ${model.version}`), stateOf(model))];
  if (model.state === "FAILED" || model.reason) parts.push(h("p", { class: "error" }, model.reason || "No reason given."));
  if (model.state === "READY") {
    if (!model.trained && model.task) {
      parts.push(h("p", { class: "notice" }, "Random weights: the answers mean nothing. This model is for load tests."));
    }
    current = tryOut(model);
    parts.push(current.node);
  } else {
    current = null;
  }
  const tiles = model.state !== "FAILED" && h("section", { class: "card", id: "live", "aria-labelledby": "live-title" }, h("h3", { id: "live-title" }, "Live"), h("div", {}));
  byId("model").replaceChildren(...parts, ...(tiles ? [tiles] : []), h("div", { class: "pair" }, about(model), accuracy(model)));
}

function draw() {
  const model = selected();
  const face = JSON.stringify([models, model && keyOf(model)]);
  if (face !== listed) list(byId("models"), models, model && keyOf(model));
  listed = face;
  updateRates(history);
  document.title = model ? `${model.name} · Rafaga` : "Rafaga";
  if (!model) {
    byId("model").replaceChildren();
    return;
  }
  article(model);
  byId("live")?.lastChild.replaceChildren(live(history.of(model.name)));
}

async function catalog() {
  const found = (await getJson("v1/models")).models ?? [];
  models = found.map((model) => complete(model, found.filter(({ name }) => name === model.name).length === 1));
  const ready = models.filter((model) => model.state === "READY").length;
  if (ready === models.length) status("ready", ready === 1 ? "1 model ready" : `${ready} models ready`);
  else status("loading", `${ready} of ${models.length} models ready`);
}

async function read(turn, count) {
  if (turn !== reading || document.hidden) return;
  try {
    if (count % SLOW === 0 || !models.length) await catalog();
    history.add(await getText("metrics"), performance.now());
    if (turn !== reading) return;
    byId("main").hidden = false;
    byId("sign-in").hidden = true;
    byId("forget").hidden = !token.get();
    traffic(history.server);
    draw();
  } catch (error) {
    if (error.status === 401) return; // `locked` has asked for another token
    status("failed", error.message);
  }
  timer = setTimeout(read, PERIOD_MS, turn, count + 1);
}

function start() {
  clearTimeout(timer);
  history.restart();
  read(++reading, 0);
}

// `refusal`: what the server said about the token.
function locked(refusal) {
  reading++;
  token.forget();
  models = [];
  shown = listed = "";
  current?.destroy();
  current = null;
  status("", "");
  byId("models").replaceChildren();
  byId("model").replaceChildren();
  for (const id of ["main", "forget", "traffic"]) byId(id).hidden = true;
  byId("sign-in").hidden = false;
  byId("refused").textContent = refusal;
  byId("token").focus();
}

byId("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  token.set(byId("token").value.trim());
  byId("token").value = "";
  start();
});
byId("forget").addEventListener("click", () => {
  locked("");
});
window.addEventListener("unauthenticated", ({ detail }) => locked(token.get() ? `The server refused this token: ${detail}` : ""));
document.addEventListener("visibilitychange", () => document.hidden || start());
window.addEventListener("hashchange", () => {
  if (!models.length || !location.hash.startsWith("#/")) return;
  draw();
  if (matchMedia("(max-width: 60rem)").matches) byId("model").scrollIntoView();
});
start();
