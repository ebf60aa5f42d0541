// Making elements. Text always becomes text nodes: nothing here, or on this page, parses HTML.

/** An element with properties (`class`, `onclick`, attributes; null leaves out) and children. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** One of the symbols in index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button with an icon, and its name for those who do not see it. */
export function iconButton(label, iconName, onclick, properties = {}) {
  const names = { type: "button", class: "icon", "aria-label": label, title: label };
  return element("button", { ...names, onclick, ...properties }, icon(iconName));
}

export const byId = (id) => document.getElementById(id);
