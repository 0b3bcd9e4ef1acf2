// Models of images: labels, boxes, classes of pixels, features.

import { pathOf, post } from "./api.js";
import { drawing } from "./draw.js";
import { bar, button, bytesOf, colourOf, field, h, number, percent, styled } from "./dom.js";
import { picker } from "./picker.js";

const VERBS = { classification: ":classify", detection: ":detect", segmentation: ":segment", features: ":features" };
const USUAL = "5"; // labels, if no number is sent
const SMALL = 64; // grey images up to this size are drawn rather than picked

// {node, destroy} for `tryOut`.
export function images(model, outcome) {
  const verb = VERBS[model.task];
  const view = VIEWS[model.task](() => current && ask());
  const picture = h("img", { alt: "The image that was sent" });
  const stage = h("div", { class: "stage", hidden: true }, picture);
  let current = null;
  let address = "";

  const ask = () => {
    const path = pathOf(model, verb, view.parameters());
    outcome.shell(path, "--data-binary @image.png");
    if (current) outcome.wait(post(path, current, current.type), (answer) => view.show(answer, stage));
  };
  const take = (image, visible) => {
    current = image;
    URL.revokeObjectURL(address);
    address = URL.createObjectURL(image);
    picture.src = address;
    stage.replaceChildren(picture);
    stage.hidden = !visible;
    ask();
  };
  const clear = () => {
    current = null;
    stage.hidden = true;
    outcome.clear();
  };
  const source = picker((image) => take(image, true), (message) => outcome.fail(message));
  const [height, width, channels] = (model.inputs[0]?.shape ?? []).slice(1).map(Number);
  const drawn = model.task === "classification" && channels === 1 && width > 0 && height > 0 && Math.max(width, height) <= SMALL;
  const pad = drawn ? drawing(width, height, (image) => take(image, false), clear) : null;
  ask();
  const inputs = h("div", { class: "inputs" }, pad?.node, source.node, stage, view.controls);
  const node = h("div", { class: `split${drawn ? " drawn" : " picture"}` }, inputs, outcome.node);
  const destroy = () => {
    source.destroy();
    URL.revokeObjectURL(address);
  };
  return { node, destroy };
}

function whole(value, least, most) {
  return h("input", { type: "number", value, min: least, max: most, step: 1, inputmode: "numeric" });
}

function slider(value, attributes = {}) {
  return h("input", { type: "range", min: 0, max: 1, step: 0.01, value, ...attributes });
}

function classification(again) {
  const count = whole(USUAL, 1, 1000);
  count.addEventListener("change", again);
  return {
    controls: h("div", { class: "controls" }, field("Labels to show", count)),
    parameters: () => (count.value === USUAL ? {} : { top_k: Math.max(1, Math.trunc(count.valueAsNumber) || 1) }),
    show: (answer) => {
      const values = answer.results?.[0]?.values ?? []; // of a regression model
      if (values.length) return h("ol", { class: "bars" }, values.map((one) => h("li", {}, `${one.label}: ${number(one.value ?? 0, 4)}`)));
      const [first, ...others] = answer.results?.[0]?.labels ?? [];
      if (!first) return h("p", { class: "hint" }, "No labels.");
      const rows = [first, ...others].map((scored) => bar(scored.label || `#${scored.index ?? 0}`, scored.probability ?? 0));
      return [
        h("p", { class: "winner" }, h("strong", {}, first.label || `#${first.index ?? 0}`), ` ${percent(first.probability ?? 0)}`),
        h("ol", { class: "bars" }, rows),
      ];
    },
  };
}

function detection() {
  const least = slider(0.5, { id: "least-score" });
  const reading = h("output", { for: "least-score" });
  let redraw = () => {};
  least.addEventListener("input", () => redraw());
  return {
    controls: h("div", { class: "controls" }, field("Least score", least), reading),
    parameters: () => ({}),
    show: (answer, stage) => {
      const found = answer.results?.[0] ?? {};
      const list = h("div", {});
      redraw = () => {
        const objects = (found.objects ?? []).filter((object) => (object.score ?? 0) >= least.valueAsNumber);
        reading.textContent = number(least.valueAsNumber, 2);
        stage.querySelectorAll(".box").forEach((old) => old.remove());
        const pairs = objects.map((object) => boxed(object, found));
        stage.append(...pairs.map(([frame]) => frame).reverse()); // the best one on top
        const best = found.objects?.[0];
        const none = best ? `No object has this score; the best has ${number(best.score ?? 0, 2)}.` : "No objects found.";
        list.replaceChildren(pairs.length ? h("ol", { class: "bars" }, pairs.map(([, row]) => row)) : h("p", { class: "hint" }, none));
      };
      redraw();
      return list;
    },
  };
}

// A frame over the image, and its row in the list; pointing at one shows the other.
function boxed(object, image) {
  const { x_min = 0, y_min = 0, x_max = 0, y_max = 0 } = object.box ?? {};
  const [width, height] = [image.image_width, image.image_height];
  const share = (value, whole) => `${(100 * value) / whole}%`;
  const name = object.label || `#${object.index ?? 0}`;
  const frame = styled(h("div", { class: "box", "aria-hidden": "true" }, h("span", {}, `${name} ${number(object.score ?? 0, 2)}`)), {
    "--class": colourOf(object.index ?? 0),
    left: share(x_min, width),
    top: share(y_min, height),
    width: share(x_max - x_min, width),
    height: share(y_max - y_min, height),
  });
  frame.classList.toggle("right", x_min > 0.6 * width);
  const mark = (on) => () => frame.classList.toggle("marked", on);
  const row = bar(name, object.score ?? 0, { onmouseenter: mark(true), onmouseleave: mark(false) });
  return [frame, styled(row, { "--class": colourOf(object.index ?? 0) })];
}

const BACKGROUND = /^_*background_*$/i;

function segmentation() {
  const opacity = slider(0.6);
  let overlay = null;
  opacity.addEventListener("input", () => overlay && styled(overlay, { opacity: opacity.value }));
  return {
    controls: h("div", { class: "controls" }, field("Opacity of the classes", opacity)),
    parameters: () => ({}),
    show: (answer, stage) => {
      const found = answer.results?.[0] ?? {};
      const classes = found.classes ?? [];
      const hidden = new Set(classes.filter((one) => BACKGROUND.test(one.label)).map((one) => one.index ?? 0));
      const [height, width] = found.labels?.shape ?? [0, 0];
      overlay = styled(h("canvas", { width, height, class: "overlay", "aria-hidden": "true" }), { opacity: opacity.value });
      const labels = bytesOf(found.labels?.data ?? "");
      paint(overlay, labels, hidden);
      stage.querySelector(".overlay")?.remove();
      stage.append(overlay);
      const rows = classes.map((one) => {
        const index = one.index ?? 0;
        const shown = button(one.label || `#${index}`, () => {
          hidden.delete(index) || hidden.add(index);
          shown.setAttribute("aria-pressed", String(!hidden.has(index)));
          paint(overlay, labels, hidden);
        }, { class: "swatch", "aria-pressed": String(!hidden.has(index)) });
        const row = bar("", one.share ?? 0);
        row.firstChild.replaceWith(shown);
        return styled(row, { "--class": colourOf(index) });
      });
      return h("ul", { class: "bars" }, rows);
    },
  };
}

function paint(canvas, labels, hidden) {
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const colours = new Map();
  for (const index of new Set(labels)) {
    if (hidden.has(index)) continue;
    pen.fillStyle = colourOf(index);
    pen.fillRect(0, 0, 1, 1);
    colours.set(index, pen.getImageData(0, 0, 1, 1).data);
  }
  const pixels = pen.createImageData(canvas.width, canvas.height);
  labels.forEach((index, at) => colours.has(index) && pixels.data.set(colours.get(index), 4 * at));
  pen.putImageData(pixels, 0, 0);
}

function features() {
  return {
    controls: null,
    parameters: () => ({}),
    show: (answer) => h("ul", { class: "maps" }, (answer.maps ?? []).map(featureMap)),
  };
}

// Its shape and range; maps also as a picture: the mean over the channels.
function featureMap(map) {
  const bytes = bytesOf(map.data ?? "");
  const values = new Float32Array(bytes.buffer, 0, bytes.length >> 2);
  const [, channels, rows, columns] = (map.shape ?? []).map(Number);
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
  const text = `[${(map.shape ?? []).join(", ")}]${map.stride ? `, stride ${map.stride}` : ""}, from ${number(low)} to ${number(high)}`;
  return h("li", {}, h("b", {}, map.name), h("span", { class: "hint" }, text), rows ? heat(values, channels, rows, columns) : null);
}

function heat(values, channels, rows, columns) {
  const cells = rows * columns;
  const means = Array.from({ length: cells }, (_, cell) => {
    let sum = 0;
    for (let channel = 0; channel < channels; channel++) sum += values[channel * cells + cell];
    return sum / channels;
  });
  const low = means.reduce((a, b) => Math.min(a, b));
  const range = means.reduce((a, b) => Math.max(a, b)) - low || 1;
  const canvas = h("canvas", { width: columns, height: rows, class: "heat", role: "img", "aria-label": "Mean over the channels" });
  const pen = canvas.getContext("2d");
  means.forEach((mean, cell) => {
    pen.fillStyle = `hsl(190 60% ${Math.round(8 + (84 * (mean - low)) / range)}%)`;
    pen.fillRect(cell % columns, Math.floor(cell / columns), 1, 1);
  });
  return canvas;
}

const VIEWS = { classification, detection, segmentation, features };
