// Requests to the server. Addresses are relative, so that the page also works behind a path of a proxy.

const KEY = "rafaga-token";

export const token = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

export class ServerError extends Error {
  // status: of HTTP; 0 if no answer came.
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (token.get()) headers.Authorization = `Bearer ${token.get()}`;
  try {
    return await fetch(path, { ...options, headers, cache: "no-store" });
  } catch {
    throw new ServerError(0, "No answer from the server. Is it still running?");
  }
}

async function checked(response) {
  if (response.ok) return response;
  const text = await response.text();
  let message = text.trim();
  try {
    message = JSON.parse(text).error ?? message;
  } catch {
    // Proxies answer in plain text.
  }
  if (response.status === 401) window.dispatchEvent(new CustomEvent("unauthenticated", { detail: message }));
  throw new ServerError(response.status, String(message).slice(0, 2000) || `HTTP status ${response.status}`);
}

export const getText = async (path) => (await checked(await request(path))).text();
export const getJson = async (path) => (await checked(await request(path))).json();

// Of a model, or of what it does. The version is left out where there is only one.
export function pathOf(model, verb = "", parameters = {}, protocol = "v1") {
  const version = model.alone ? "" : `/versions/${model.version}`;
  const query = new URLSearchParams(parameters);
  return `${protocol}/models/${encodeURIComponent(model.name)}${version}${verb}${query.size ? `?${query}` : ""}`;
}

// The answer of a model, and the seconds until it was here.
export async function post(path, body, type) {
  const start = performance.now();
  const response = await checked(await request(path, { method: "POST", body, headers: { "Content-Type": type } }));
  const answer = await response.json();
  return { answer, seconds: (performance.now() - start) / 1e3 };
}

// The same request for a shell. `data`: arguments that give the body.
export function curl(path, data) {
  const secret = token.get() ? ' -H "Authorization: Bearer $TOKEN"' : "";
  const address = new URL(path, document.baseURI).href.replaceAll("'", "%27");
  return `curl${secret} ${data} ${/[?&]/.test(address) ? `'${address}'` : address}`;
}
