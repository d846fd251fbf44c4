// Small helpers of the page. What people and models write becomes text, never markup.

export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`there is no element ${id}`);
  return found;
}

/** Return an element with attributes (`on...` listens) and children: elements or text. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** Return one of the drawings that the page defines as symbols. */
export function icon(name) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  drawing.append(use);
  return drawing;
}

export function roundButton(name, label, onclick) {
  return make("button", { type: "button", class: "round", "aria-label": label, onclick }, icon(name));
}

/** Tell what has happened to those who do not see it. */
export function announce(text) {
  byId("announce").textContent = text;
}

/** Copy text; where the clipboard is closed to this page (plain http), select it instead. */
export async function copy(text, element) {
  try {
    await navigator.clipboard.writeText(text);
    announce("copied");
  } catch {
    getSelection().selectAllChildren(element);
    announce("selected");
  }
}

/** Return a number as people write it. */
export function short(value) {
  if (value == null) return "–";
  if (!Number.isFinite(value)) return String(value);
  return String(Math.abs(value) >= 1000 ? Math.round(value) : Number(value.toPrecision(3)));
}
