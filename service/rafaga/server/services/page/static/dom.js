// Builds elements. Text always becomes text nodes, never markup: names, labels and errors come from outside.

const SVG = "http://www.w3.org/2000/svg";

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export function h(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return build(document.createElementNS(SVG, tag), attributes, children);
}

// Styles that depend on data. The Content-Security-Policy allows them here, and forbids style attributes.
export function styled(node, properties) {
  for (const [name, value] of Object.entries(properties)) node.style.setProperty(name, value);
  return node;
}

export const byId = (id) => document.getElementById(id);

let fields = 0;

// A control with its label. `hint` is read out together with the label.
export function field(text, control, hint = "") {
  const id = (control.id ||= `field-${++fields}`);
  const note = hint ? h("span", { class: "hint", id: `${id}-hint` }, hint) : null;
  if (note) control.setAttribute("aria-describedby", note.id);
  return h("div", { class: "field" }, h("label", { for: id }, text), control, note);
}

export function button(text, onclick, attributes = {}) {
  return h("button", { type: "button", onclick, ...attributes }, text);
}

// One row of a ranking: a name, a bar, and its share in per cent.
export function bar(name, share, attributes = {}) {
  const fill = share > 0 ? styled(h("span", { class: "fill" }), { width: `${100 * Math.min(1, share)}%` }) : null;
  return h(
    "li",
    { class: "bar", ...attributes },
    h("span", { class: "name", title: name }, name),
    h("span", { class: "track", "aria-hidden": "true" }, fill),
    h("span", { class: "value" }, percent(share)),
  );
}

// A colour for each class, all of one lightness; neighbours differ clearly.
export const colourOf = (index) => `oklch(0.53 0.16 ${(25 + index * 137.508) % 360})`;

export const bytesOf = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

export function number(value, digits = 3) {
  if (!Number.isFinite(value)) return "–";
  if (value !== 0 && Math.abs(value) < 1e-4) return value.toExponential(1);
  return value.toLocaleString("en", { maximumSignificantDigits: Math.max(digits, Math.trunc(value).toString().length) });
}

export function percent(share) {
  if (share > 0 && share < 0.0005) return "< 0.1 %";
  if (share > 0.9995 && share < 1) return "> 99.9 %";
  return `${(100 * share).toLocaleString("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 })} %`;
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds >= 1) return `${number(seconds)} s`;
  return seconds >= 0.001 ? `${number(1e3 * seconds, 2)} ms` : `${number(1e6 * seconds, 2)} µs`;
}
