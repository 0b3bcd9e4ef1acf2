// An image from the user: a file that is picked, dropped or pasted.

import { h } from "./dom.js";

// What the server decodes; other kinds that the browser knows are converted.
const DECODED = ["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"];

async function readable(file) {
  if (DECODED.includes(file.type)) return file;
  try {
    const bitmap = await createImageBitmap(file);
    const canvas = h("canvas", { width: bitmap.width, height: bitmap.height });
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    return await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  } catch {
    throw new Error(`${file.name || "This file"} is not an image that this browser can read.`);
  }
}

// `onimage` gets a Blob that the server decodes, `onerror` a message. {node, destroy}
export function picker(onimage, onerror) {
  const take = async (file) => {
    if (!file) return;
    try {
      onimage(await readable(file));
    } catch (error) {
      onerror(error.message);
    }
  };
  const input = h("input", { type: "file", id: "picked", accept: "image/*", class: "unseen" });
  input.addEventListener("change", () => {
    take(input.files[0]);
    input.value = ""; // the same file can be picked again
  });
  const node = h(
    "label",
    { class: "drop", for: "picked" },
    input,
    h("span", { class: "call" }, "Choose an image"),
    h("span", { class: "hint" }, "or drop or paste one here"),
  );
  const over = (event) => {
    event.preventDefault();
    node.classList.toggle("over", event.type === "dragover");
  };
  const drop = (event) => {
    over(event);
    take(event.dataTransfer.files[0]);
  };
  node.addEventListener("dragover", over);
  node.addEventListener("dragleave", over);
  node.addEventListener("drop", drop);
  // A file that misses the box would replace the page.
  const miss = (event) => event.preventDefault();
  const paste = (event) => take([...event.clipboardData.files].find((file) => file.type.startsWith("image/")));
  const listeners = [["dragover", miss], ["drop", miss], ["paste", paste]];
  for (const [name, listener] of listeners) document.addEventListener(name, listener);
  const destroy = () => listeners.forEach(([name, listener]) => document.removeEventListener(name, listener));
  return { node, destroy };
}
