// The API as a page to read, made from what the server says of itself in openapi.json.

import { request } from "./api.js";
import { byId, element } from "./dom.js";

byId("base").textContent = new URL("v1", location.href).href;
try {
  show(await (await request("openapi.json")).json());
} catch (error) {
  byId("trouble").textContent = `The description could not be read: ${error.message}`;
  byId("trouble").hidden = false;
}

function show(api) {
  const named = (reference) => api.components.schemas[reference.split("/").pop()];
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const title = element("h2", { id: operation.operationId },
        element("code", { class: "method" }, method.toUpperCase()), element("code", {}, path));
      byId("operations").append(title, element("p", {}, operation.description ?? ""));
      const body = operation.requestBody?.content["application/json"]?.schema;
      if (body) {
        const fields = named(body.$ref);
        byId("operations").append(element("h3", {}, "Request"), table(fields));
      }
    }
  }
  byId("operations").append(element("h2", {}, "Parts of requests and answers"));
  for (const [name, schema] of Object.entries(api.components.schemas)) {
    if (name.endsWith("Request") || !schema.properties) continue;
    byId("operations").append(element("h3", { id: name }, element("code", {}, name)), table(schema));
  }
}

/** The fields of an object: name, kind, what is said of it. */
function table(schema) {
  const required = schema.required ?? [];
  const rows = Object.entries(schema.properties).map(([name, field]) => {
    const must = required.includes(name) ? " (required)" : "";
    return element("div", { class: "entry" },
      element("dt", {}, element("code", {}, name)),
      element("dd", {}, element("span", { class: "kind" }, ...kind(field), must),
        field.description ? ` ${field.description}` : ""));
  });
  return element("dl", {}, ...rows);
}

/** A field's kind and limits, in words and links. */
function kind(field) {
  if (field.$ref) {
    const name = field.$ref.split("/").pop();
    return [element("a", { href: `#${name}` }, name)];
  }
  const choices = (field.anyOf ?? field.oneOf)?.filter((choice) => choice.type !== "null");
  if (choices) return choices.flatMap((choice, i) => (i ? [" or ", ...kind(choice)] : kind(choice)));
  if (field.enum) return [field.enum.map((value) => JSON.stringify(value)).join(", ")];
  if (field.const !== undefined) return [JSON.stringify(field.const)];
  if (field.type === "array") return ["list of ", ...(field.items ? kind(field.items) : ["anything"])];
  return [(field.type ?? "anything") + limits(field)];
}

function limits(field) {
  const least = field.minimum ?? field.exclusiveMinimum;
  const most = field.maximum ?? field.exclusiveMaximum;
  if (least === undefined && most === undefined) return "";
  const above = field.exclusiveMinimum === undefined ? "" : "above ";
  const below = field.exclusiveMaximum === undefined ? "" : "below ";
  return ` (${above}${least ?? "any"} to ${below}${most ?? "any"})`;
}
