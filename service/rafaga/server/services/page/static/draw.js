// Draws one character, and brings it into the form of MNIST: white on black, scaled to 20 of 28 pixels, and moved so
// that its centre of mass is in the middle (LeCun et al. 1998).

import { button, h } from "./dom.js";

const SIDE = 280;
const PEN = 22;
const INNER = 20 / 28;
const PAUSE_MS = 120;

// Pixels that are not black: {left, top, width, height}, in pixels, or null.
function inked(pixels, side) {
  let [left, top, right, bottom] = [side, side, -1, -1];
  for (let at = 0; at < side * side; at++) {
    if (pixels[4 * at] < 16) continue;
    const [x, y] = [at % side, Math.floor(at / side)];
    [left, right] = [Math.min(left, x), Math.max(right, x)];
    [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
  }
  return right < 0 ? null : { left, top, width: right - left + 1, height: bottom - top + 1 };
}

function centre(pixels, width, height) {
  let [mass, x, y] = [0, 0, 0];
  for (let at = 0; at < width * height; at++) {
    mass += pixels[4 * at];
    x += pixels[4 * at] * ((at % width) + 0.5);
    y += pixels[4 * at] * (Math.floor(at / width) + 0.5);
  }
  return mass ? [x / mass, y / mass] : [width / 2, height / 2];
}

function black(width, height) {
  const canvas = h("canvas", { width, height });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.fillRect(0, 0, width, height);
  pen.imageSmoothingQuality = "high";
  return [canvas, pen];
}

// Halves the size until one more step would be too small: each target pixel is the mean of all its source pixels.
function shrunk(source, box, width, height) {
  let [canvas, pen] = black(box.width, box.height);
  pen.drawImage(source, box.left, box.top, box.width, box.height, 0, 0, box.width, box.height);
  while (canvas.width >= 2 * width && canvas.height >= 2 * height) {
    const [half, halfPen] = black(Math.ceil(canvas.width / 2), Math.ceil(canvas.height / 2));
    halfPen.drawImage(canvas, 0, 0, half.width, half.height);
    canvas = half;
  }
  return canvas;
}

// A canvas of the model's size; null where nothing is drawn.
export function normalised(source, width, height) {
  const side = source.width;
  const box = inked(source.getContext("2d").getImageData(0, 0, side, side).data, side);
  if (!box) return null;
  const scale = (INNER * Math.min(width, height)) / Math.max(box.width, box.height);
  const size = [Math.max(1, Math.round(box.width * scale)), Math.max(1, Math.round(box.height * scale))];
  const small = shrunk(source, box, ...size);
  const [fitted, fittedPen] = black(...size);
  fittedPen.drawImage(small, 0, 0, ...size);
  const [x, y] = centre(fittedPen.getImageData(0, 0, ...size).data, ...size);
  const [canvas, pen] = black(width, height);
  const inside = (offset, length, whole) => Math.max(0, Math.min(whole - length, Math.round(offset)));
  pen.drawImage(fitted, inside(width / 2 - x, size[0], width), inside(height / 2 - y, size[1], height));
  return canvas;
}

// `onimage` gets a PNG after each stroke, `onclear` is called when the drawing is gone. {node}
export function drawing(width, height, onimage, onclear) {
  const [canvas, pen] = black(SIDE, SIDE);
  canvas.id = "drawing";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "Drawing area: draw with the mouse, a finger or a pen. Without one, choose an image.");
  Object.assign(pen, { lineWidth: PEN, lineCap: "round", lineJoin: "round", strokeStyle: "#fff" });
  const seen = h("canvas", { width, height, class: "seen", role: "img", "aria-label": "The image that is sent" });
  const eye = seen.getContext("2d");
  const note = h("span", { class: "hint" }, `What is sent: ${width} × ${height}`);
  let last = null;
  let timer = 0;

  const send = () => {
    const image = normalised(canvas, width, height);
    if (!image) return;
    eye.drawImage(image, 0, 0);
    image.toBlob(onimage, "image/png");
  };
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) * SIDE) / box.width, ((event.clientY - box.top) * SIDE) / box.height];
  };
  const line = (from, to) => {
    pen.beginPath();
    pen.moveTo(...from);
    pen.lineTo(...to);
    pen.stroke();
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    clearTimeout(timer);
    last = place(event);
    line(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    for (const step of event.getCoalescedEvents?.() ?? [event]) {
      const next = place(step);
      line(last, next);
      last = next;
    }
  });
  const lift = () => {
    if (!last) return;
    last = null;
    timer = setTimeout(send, PAUSE_MS);
  };
  canvas.addEventListener("pointerup", lift);
  canvas.addEventListener("pointercancel", lift);
  const wipe = () => {
    clearTimeout(timer);
    pen.fillRect(0, 0, SIDE, SIDE);
    eye.clearRect(0, 0, width, height);
    onclear();
  };
  const tools = h("div", { class: "tools" }, seen, note, button("Clear", wipe));
  return { node: h("div", { class: "pad" }, canvas, tools) };
}
