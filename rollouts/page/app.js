// The page: which of its views is seen, and where pictures that are dropped or pasted go.

import { getJson } from "./api.js";
import * as caption from "./caption.js";
import * as chat from "./chat.js";
import { byId } from "./dom.js";
import { fileOf, filesIn, picturesIn } from "./pictures.js";
import * as settings from "./settings.js";
import * as watch from "./watch.js";

const VIEWS = ["chat", "caption", "watch"];
let greeting = null; // what is fetched at first, on its way or there; null where that failed
let naming = null; // of it the model's name

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
  const holdsFiles = (event) => Boolean(event.dataTransfer?.types.includes("Files"));
  // Text goes where it is typed too. Elsewhere a link that is dropped would leave the page.
  const isOurs = (event) => holdsFiles(event) || !event.target.closest?.("textarea, input");
  addEventListener("dragenter", (event) => {
    if (!holdsFiles(event)) return;
    depth += 1;
    mark(true);
  });
  addEventListener("dragleave", () => {
    depth = Math.max(0, depth - 1);
    if (!depth) mark(false);
  });
  addEventListener("dragover", (event) => {
    if (isOurs(event)) event.preventDefault();
  });
  addEventListener("drop", (event) => {
    if (isOurs(event)) event.preventDefault();
    depth = 0;
    mark(false);
    take(filesIn(event.dataTransfer)); // what is no picture is told when it is read
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
    naming = getJson("v1/models").then(({ data }) => data[0]?.id ?? "gato");
    const name = await naming;
    byId("model").textContent = name === "gato" ? "" : name;
    await watch.load();
  } catch (error) {
    greeting = null; // tried again when another view or an answer is asked for
    byId("model").textContent = error.message;
  }
}

/** Return the model's name, which is asked for again where that has failed. */
function modelName() {
  greeting ??= greet();
  return naming;
}

settings.begin();
chat.begin();
caption.begin();
watch.begin();
chat.asks(modelName);
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
