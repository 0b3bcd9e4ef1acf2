// Reads a JSON list of objects, writes a JSON list of what is wrong with each ("" where nothing is).
import { readFileSync } from "node:fs";

const packages = {
  "monitoring.coreos.com/v1": "@kubernetes-models/prometheus-operator",
  "gateway.networking.k8s.io/v1": "@kubernetes-models/gateway-api",
  "keda.sh/v1alpha1": "@kubernetes-models/keda",
};

// The schemas let unknown fields pass, but they look at every field that they know: what was never read is unknown.
function watched(value, path, unread) {
  if (value === null || typeof value !== "object") return value;
  const children = new Map();
  for (const key of Object.keys(value)) {
    unread.add(`${path}.${key}`);
    children.set(key, watched(value[key], `${path}.${key}`, unread));
  }
  return new Proxy(value, {
    get(target, key) {
      unread.delete(`${path}.${String(key)}`);
      return children.has(key) ? children.get(key) : target[key];
    },
  });
}

const faults = [];
for (const object of JSON.parse(readFileSync(0))) {
  const models = await import(`${packages[object.apiVersion]}/${object.apiVersion}`);
  const unread = new Set();
  const model = new models[object.kind](object); // copies what it is given, so:
  model.spec = watched(object.spec, "spec", unread);
  try {
    model.validate();
    faults.push(unread.size ? `unknown: ${[...unread].join(", ")}` : "");
  } catch (error) {
    faults.push(String(error.message));
  }
}
console.log(JSON.stringify(faults));
