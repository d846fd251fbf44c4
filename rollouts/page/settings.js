// How answers are written, the colours, and the server's token.

import { byId } from "./dom.js";
import { setToken, token, whenTokenIsNeeded } from "./api.js";

const KEY = "gato-settings";
const FIRST = { temperature: 0, topP: 1, seed: 0, maxTokens: 128, pictureSide: 0, theme: "system" };
const THEMES = { system: "as the system", light: "light", dark: "dark" };
const values = { ...FIRST, ...stored() };

function stored() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? "{}");
    const known = Object.entries(found).filter(([k, v]) => k in FIRST && typeof v === typeof FIRST[k]);
    return Object.fromEntries(known);
  } catch {
    return {};
  }
}

function store() {
  try {
    localStorage.setItem(KEY, JSON.stringify(values));
  } catch {
    // a browser that keeps nothing: the settings last as long as the page
  }
}

/** Return what is asked of the server beside the messages. */
export function sampling() {
  const { temperature, topP, seed, maxTokens } = values;
  return { temperature, top_p: topP, seed, max_tokens: maxTokens };
}

/** Return the most pixels of a picture's side; 0 leaves it to the model. */
export function pictureSide() {
  return values.pictureSide;
}

const dialog = byId("settings");
const numbers = {
  temperature: byId("temperature"),
  topP: byId("top-p"),
  seed: byId("chat-seed"),
  maxTokens: byId("max-tokens"),
  pictureSide: byId("picture-side"),
};
let answer = null;

function fill(from) {
  for (const [name, field] of Object.entries(numbers)) field.value = from[name];
  show();
}

function show() {
  byId("temperature-shown").textContent = Number(numbers.temperature.value).toFixed(2);
  byId("top-p-shown").textContent = Number(numbers.topP.value).toFixed(2);
}

function take() {
  for (const [name, field] of Object.entries(numbers)) {
    if (field.checkValidity() && field.value !== "") values[name] = Number(field.value);
  }
  store();
}

// Taken over before the dialog closes: its close event comes later, when the settings may
// be open again. Escape closes it without.
function keep() {
  take();
  dialog.close();
}

function open(note) {
  fill(values);
  byId("token").value = token();
  byId("token-note").textContent =
    note ?? "only where it asks for one; forgotten when this tab closes";
  if (!dialog.open) dialog.showModal();
  if (note) byId("token").focus();
}

function colours() {
  if (values.theme === "system") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.dataset.theme = values.theme;
  byId("theme").setAttribute("aria-label", `Colours: ${THEMES[values.theme]}`);
}

export function begin() {
  colours();
  byId("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    values.theme = names[(names.indexOf(values.theme) + 1) % names.length];
    colours();
    store();
  });
  byId("open-settings").addEventListener("click", () => open());
  byId("close-settings").addEventListener("click", keep);
  byId("defaults").addEventListener("click", () => fill(FIRST));
  byId("settings-form").addEventListener("input", show);
  byId("settings-form").addEventListener("submit", (event) => {
    event.preventDefault();
    take();
    setToken(byId("token").value.trim());
    dialog.close("done");
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) keep();
  });
  dialog.addEventListener("close", () => {
    answer?.(dialog.returnValue === "done" && token() !== "");
    answer = null;
    dialog.returnValue = "";
  });
  whenTokenIsNeeded((refused) => {
    const note = refused ? "the server takes another token" : "the server asks for its token";
    const asked = new Promise((resolve) => {
      const before = answer;
      answer = (again) => {
        before?.(again);
        resolve(again);
      };
    });
    open(note);
    return asked;
  });
}
