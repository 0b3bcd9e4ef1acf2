// Reads a JSON list of objects, writes a JSON list of what is wrong with each ("" where nothing is).
import { readFileSync } from "node:fs";

const packages = {
  "monitoring.coreos.com/v1": "@kubernetes-models/prometheus-operator",
  "gateway.networking.k8s.io/v1alpha2": "@kubernetes-models/gateway-api",
  "keda.sh/v1alpha1": "@kubernetes-models/keda",
};

const faults = [];
for (const object of JSON.parse(readFileSync(0))) {
  const models = await import(`${packages[object.apiVersion]}/${object.apiVersion}`);
  try {
    new models[object.kind](object).validate();
    faults.push("");
  } catch (error) {
    faults.push(String(error.message));
  }
}
console.log(JSON.stringify(faults));
