// The page: which of its views is seen, and where pictures that are dropped or pasted go.

import { getJson } from "./api.js";
import * as caption from "./caption.js";
import * as chat from "./chat.js";
import { byId } from "./dom.js";
import { fileOf, picturesIn } from "./pictures.js";
import * as settings from "./settings.js";
import * as watch from "./watch.js";

const VIEWS = ["chat", "caption", "watch"];
let greeting = null;

function current() {
  const wanted = location.hash.slice(1);
  return VIEWS.includes(wanted) ? wanted : "chat";
}

function showView() {
  const name = current();
  for (const view of VIEWS) {
    byId(view).hidden = view !== name;
    if (view === name) byId(`to-${view}`).setAttribute("aria-current", "page");
    else byId(`to-${view}`).removeAttribute("aria-current");
  }
  document.title = name === "chat" ? "gato" : `gato: ${name}`;
  watch.look(name === "watch" && !document.hidden);
  if (name === "chat" && matchMedia("(pointer: fine)").matches) byId("words").focus();
}

function ask(files) {
  location.hash = "#chat";
  chat.attach(files);
}

function take(files) {
  if (!files.length) return;
  if (current() === "caption") caption.describe(files);
  else ask(files);
}

function listenForPictures() {
  let depth = 0;
  const mark = (on) => document.body.classList.toggle("dropping", on);
  addEventListener("dragenter", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    depth += 1;
    mark(true);
  });
  addEventListener("dragleave", () => {
    depth = Math.max(0, depth - 1);
    if (!depth) mark(false);
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    mark(false);
    take(picturesIn(event.dataTransfer));
  });
  addEventListener("paste", (event) => {
    const files = picturesIn(event.clipboardData);
    if (!files.length) return;
    event.preventDefault();
    take(files);
  });
}

async function greet() {
  try {
    const { data } = await getJson("v1/models");
    if (data.length) {
      byId("model").textContent = data[0].id === "gato" ? "" : data[0].id;
      chat.useModel(data[0].id);
    }
    await watch.load();
  } catch (error) {
    greeting = null; // tried again when another view is asked for
    byId("model").textContent = error.message;
  }
}

settings.begin();
chat.begin();
caption.begin();
watch.begin();
caption.onAsk(ask);
watch.onAsk((frame) => ask([fileOf(frame)]));
listenForPictures();
addEventListener("hashchange", () => {
  showView();
  greeting ??= greet();
});
document.addEventListener("visibilitychange", () => {
  watch.look(current() === "watch" && !document.hidden);
});
byId("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address says which view is seen
  byId("main").focus();
});
showView();
greeting = greet();
document.documentElement.dataset.ready = "";
