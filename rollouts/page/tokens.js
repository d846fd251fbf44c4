// The stream of tokens: a line per step, and every token of one step as a table.

import { byId, make, short } from "./dom.js";

const KEPT = 60; // lines
const CHIPS = 24; // of one kind in a line, before the rest is counted
const KINDS = {
  image: "image", frame: "image", text: "text", continuous: "number", vector: "number",
  discrete: "symbol", symbols: "symbol",
};
const NAMES = {
  image: "pictures", text: "words", number: "numbers", symbol: "whole numbers",
  written: "written by the model",
};
let chosen = null; // the line whose tokens the table shows; the newest where nobody chose
let due = 0; // when the table may be drawn again
let waiting = 0; // the timer until then
let listed = []; // the tokens that it shows, or would if it were open

export function begin() {
  byId("detail").addEventListener("toggle", draw);
  const key = Object.entries(NAMES).map(([kind, name]) => make("span", { class: `of-${kind}` }, name));
  byId("token-key").append(...key);
}

export function clear() {
  byId("stream").replaceChildren();
  clearTimeout(waiting);
  chosen = null;
  listed = [];
  byId("detail-title").textContent = "Every token of a step";
  draw();
}

function kindOf(token) {
  return token.target ? "written" : (KINDS[token.modality] ?? "control");
}

/** Add a step's tokens above those before: where they stand, and what the action is called. */
export function add(at, tokens, leftOut = 0, name = "") {
  const stream = byId("stream");
  const line = make("button", { type: "button", "aria-pressed": "false" }, make("span", { class: "at" }, at));
  for (const run of runs(tokens)) line.append(...drawn(run));
  if (name) line.append(make("span", { class: "more" }, name));
  if (leftOut) line.append(make("span", { class: "more" }, `and ${leftOut} more`));
  line.addEventListener("click", () => {
    chosen = chosen === line ? null : line;
    mark();
    table(at, tokens, leftOut);
  });
  const above = stream.scrollTop;
  stream.prepend(make("li", {}, line));
  while (stream.children.length > KEPT) stream.lastElementChild.remove();
  if (chosen && !chosen.isConnected) chosen = null;
  if (above > 4) stream.scrollTop = above + line.parentElement.offsetHeight;
  if (!chosen) later(at, tokens, leftOut);
}

function mark() {
  for (const line of byId("stream").querySelectorAll("button")) {
    line.setAttribute("aria-pressed", String(line === chosen));
  }
}

/** Return neighbours of one modality together. */
function runs(tokens) {
  const found = [];
  for (const token of tokens) {
    const last = found.at(-1);
    if (last?.[0].modality === token.modality && kindOf(last[0]) === kindOf(token)) last.push(token);
    else found.push([token]);
  }
  return found;
}

function drawn(run) {
  const kind = kindOf(run[0]);
  if (kind === "image") return [mosaic(run)];
  if (kind !== "written" && Array.isArray(run[0].value)) return [strips(run, kind)];
  const shown = run.slice(0, CHIPS).map((t) => make("span", { class: `chip of-${kind}` }, brief(t)));
  const rest = run.length - shown.length;
  return rest > 0 ? [...shown, make("span", { class: "more" }, `+${rest}`)] : shown;
}

function canvas(width, height, scale, label, kind) {
  const made = make("canvas", { width, height, class: `of-${kind}`, role: "img", "aria-label": label });
  made.style.width = `${width * scale}px`;
  made.style.height = `${height * scale}px`;
  return made;
}

/** Return the tokens of a picture as a small picture of their mean colours. */
function mosaic(run) {
  const places = run.map((t) => t.value);
  const rows = 1 + Math.max(...places.map((v) => v.row ?? 0));
  const columns = 1 + Math.max(...places.map((v) => v.column ?? 0));
  const scale = Math.max(3, Math.min(12, Math.floor(72 / Math.max(rows, columns))));
  const made = canvas(columns, rows, scale, `${run.length} tokens of a picture`, "image");
  const context = made.getContext("2d");
  for (const { row = 0, column = 0, rgb = [0, 0, 0] } of places) {
    context.fillStyle = `rgb(${rgb.join(",")})`;
    context.fillRect(column, row, 1, 1);
  }
  return made;
}

/** Return tokens that hold many numbers as a strip each, a number being a colour. */
function strips(run, kind) {
  const width = Math.max(...run.map((t) => t.value.length));
  const label = `${run.length} tokens of ${width} numbers`;
  const made = canvas(width, run.length, width > 20 ? 4 : 6, label, kind);
  const context = made.getContext("2d");
  run.forEach(({ value }, row) => {
    value.forEach((number, column) => {
      context.fillStyle = kind === "symbol" ? hue(number) : warmth(number);
      context.fillRect(column, row, 1, 1);
    });
  });
  return made;
}

const hue = (number) => (number ? `hsl(${(number * 67) % 360} 45% 55%)` : "hsl(0 0% 50% / .15)");

function warmth(number) {
  const part = Math.max(-1, Math.min(1, number));
  return `hsl(${part < 0 ? 215 : 32} 65% 55% / ${(0.12 + 0.88 * Math.abs(part)).toFixed(2)})`;
}

function brief(token) {
  const { value } = token;
  if (typeof value === "number") return short(value);
  if (typeof value === "string") return value.replaceAll("\u2581", " ");
  return full(value);
}

function full(value) {
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : value.toPrecision(4);
  if (Array.isArray(value)) return value.map(full).join(" ");
  if (value && typeof value === "object") {
    return Object.entries(value).map(([k, v]) => `${k} ${full(v)}`).join("  ");
  }
  return value == null ? "" : String(value);
}

/** Show the newest step's tokens, at most a few times a second. */
function later(at, tokens, leftOut) {
  clearTimeout(waiting);
  const show = () => {
    if (!chosen) table(at, tokens, leftOut);
  };
  const early = due - performance.now();
  if (early > 0) waiting = setTimeout(show, early);
  else show();
}

function table(at, tokens, leftOut) {
  due = performance.now() + 300;
  listed = tokens;
  byId("detail-title").textContent =
    `Every token of ${at === "head" ? "the head" : `step ${at}`}${leftOut ? `, but ${leftOut}` : ""}`;
  draw();
}

function draw() {
  if (!byId("detail").open) return;
  byId("tokens").replaceChildren(
    ...listed.map((token) => {
      const value = make("td", {}, full(token.value));
      if (token.value?.rgb) value.prepend(swatch(token.value.rgb));
      return make(
        "tr",
        { class: `of-${kindOf(token)}` },
        make("td", {}, String(token.position)),
        make("td", {}, token.modality),
        value,
        make("td", {}, token.target ? "yes" : ""),
      );
    }),
  );
}

function swatch(rgb) {
  const made = make("span", { class: "swatch" });
  made.style.background = `rgb(${rgb.join(",")})`;
  return made;
}
