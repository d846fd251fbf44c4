// A conversation with the model, pictures anywhere in it, written as it comes.

import { events, request } from "./api.js";
import { announce, byId, copy, make, roundButton } from "./dom.js";
import { read } from "./pictures.js";
import { sampling } from "./settings.js";

const SMALL = 96; // pixels below which a picture is shown with its pixels
const turns = byId("turns");
const words = byId("words");
const MOST_PICTURES = 32; // of one request
let messages = []; // as the server reads them: the user's and the model's by turns
let leftOut = { turns: 0, why: "" }; // before those; they are seen, and not sent
let newest = null; // the user's last message, as it is seen
let attached = []; // {uri, width, height}, beside the message that is being typed
let reading = 0; // pictures that are on their way there
let sendWhenRead = false;
let writing = null; // what stops the answer that is being written
let modelName = async () => "gato";

/** Let `name` say which model is asked. */
export function asks(name) {
  modelName = name;
}

/** Put pictures beside the message that is being typed. */
export async function attach(files) {
  const beside = attached; // a conversation that is begun meanwhile goes without them
  reading += files.length;
  for (const file of files) {
    try {
      const picture = await read(file);
      beside.push(picture);
    } catch (error) {
      sendWhenRead = false;
      notice(error.message, true);
    }
    reading -= 1;
  }
  showAttached();
  words.focus();
  if (sendWhenRead && !reading) send();
}

function showAttached() {
  byId("attached").replaceChildren(
    ...attached.map((picture, i) => {
      const remove = roundButton("close", `Remove picture ${i + 1}`, () => {
        attached.splice(i, 1);
        showAttached();
        words.focus();
      });
      return make("li", {}, shown(picture, `picture ${i + 1}`), remove);
    }),
  );
}

function shown(picture, alt) {
  const small = Math.max(picture.width, picture.height) <= SMALL;
  return make("img", { src: picture.uri, alt, class: small ? "small" : null });
}

function notice(text, bad = false) {
  const element = byId("dropped");
  element.textContent = text;
  element.hidden = !text;
  element.classList.toggle("bad", bad);
}

function turn(role) {
  const said = make("p");
  const foot = make("footer");
  const item = make("li", { class: `turn ${role}` }, said, foot);
  item.setAttribute("aria-label", role === "user" ? "You" : "Answer");
  turns.append(item);
  byId("welcome").hidden = true;
  return { item, said, foot };
}

function toEnd() {
  const scroll = byId("conversation");
  scroll.scrollTop = scroll.scrollHeight;
}

function isAtEnd() {
  const scroll = byId("conversation");
  return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
}

function send() {
  const text = words.value.trim();
  if (writing || (!text && !attached.length && !reading)) return;
  sendWhenRead = reading > 0;
  if (sendWhenRead) {
    notice("This is sent as soon as the picture has been read.");
    return;
  }
  leaveUnanswered();
  const parts = attached.map(({ uri }) => ({ type: "image_url", image_url: { url: uri } }));
  if (text) parts.push({ type: "text", text });
  messages.push({ role: "user", content: attached.length ? parts : text });
  const { item, said, foot } = turn("user");
  said.textContent = text;
  said.hidden = !text;
  newest = item;
  foot.remove();
  if (attached.length) {
    const pictures = attached.map((picture, i) => shown(picture, `your picture ${i + 1}`));
    item.prepend(make("div", { class: "pictures" }, ...pictures));
  }
  words.value = "";
  attached = [];
  showAttached();
  write();
}

/** What failed is not tried again behind what is said now, nor said together with it. */
function leaveUnanswered() {
  for (const button of turns.querySelectorAll("button.again")) button.remove();
  if (messages.at(-1)?.role !== "user") return;
  messages.pop();
  newest.append(make("footer", {}, "not part of the conversation"));
}

/** Leave out the oldest turns: a user's message with its answer each. */
function leaveOut(count, why) {
  if (!count) return;
  messages.splice(0, 2 * count);
  leftOut = { turns: leftOut.turns + count, why };
}

/** Return how many turns to leave out for the others to hold no more pictures than are taken. */
function withTooManyPictures() {
  const held = ({ content }) =>
    Array.isArray(content) ? content.filter((part) => part.type === "image_url").length : 0;
  let count = 0;
  let rest = messages.reduce((sum, message) => sum + held(message), 0);
  for (; rest > MOST_PICTURES && 2 * count < messages.length - 1; count += 1) {
    rest -= held(messages[2 * count]);
  }
  return count;
}

/** Have the answer to the conversation written. */
async function write() {
  const control = new AbortController();
  const asked = messages;
  writing = control;
  showButton();
  const { item, said, foot } = turn("assistant");
  item.classList.add("writing");
  toEnd();
  let answer = "";
  let end = {};
  tellLeftOut();
  try {
    const model = await named(control.signal);
    const before = withTooManyPictures();
    const body = { model, messages: messages.slice(2 * before), stream: true, ...sampling() };
    body.stream_options = { include_usage: true };
    const response = await request("v1/chat/completions", { body, signal: control.signal });
    // What the model did not remember now, it will not with still more after it.
    const dropped = Number(response.headers.get("X-Gato-Dropped-Turns")) || 0;
    leaveOut(before, `at most ${MOST_PICTURES} pictures are sent together`);
    leaveOut(dropped, "the model does not remember as much");
    tellLeftOut();
    for await (const { data } of events(response)) {
      if (data === "[DONE]") continue;
      const told = JSON.parse(data);
      if (told.error) throw new Error(told.error.message);
      const choice = told.choices?.[0];
      const follow = isAtEnd();
      answer += choice?.delta?.content ?? "";
      said.textContent = answer;
      if (follow) toEnd();
      end = { finish: choice?.finish_reason ?? end.finish, usage: told.usage ?? end.usage };
    }
  } catch (error) {
    end.stopped = error.name === "AbortError";
    end.error = end.stopped ? null : error;
  }
  if (messages !== asked) return; // it was begun anew meanwhile
  item.classList.remove("writing");
  writing = null;
  showButton();
  if (!end.error) messages.push({ role: "assistant", content: answer });
  close(item, said, foot, answer, end);
}

/** Show below an answer how it ended and what can be done with it. */
function close(item, said, foot, answer, end) {
  const follow = isAtEnd();
  if (end.error) {
    foot.append(make("span", { class: "bad", role: "alert" }, end.error.message));
    const again = make("button", { type: "button", class: "again" }, "Try again");
    again.addEventListener("click", () => {
      item.remove();
      if (!writing) write();
    });
    foot.append(again);
  } else {
    foot.append(roundButton("copy", "Copy the answer", () => copy(answer, said)));
    const count = end.usage?.completion_tokens;
    const told = [count == null ? "" : `${count} ${count === 1 ? "token" : "tokens"}`];
    if (end.stopped) told.push("stopped");
    if (end.finish === "length") told.push("cut at the most tokens");
    if (!answer && !end.stopped) told.push("nothing was said");
    foot.append(make("span", {}, told.filter(Boolean).join(" · ")));
    announce(answer);
  }
  if (follow) toEnd();
}

/** Return the model's name, or stop with the answer that waits for it. */
function named(signal) {
  const stopped = new Promise((_, stop) => {
    signal.addEventListener("abort", () => stop(signal.reason));
  });
  return Promise.race([modelName(), stopped]);
}

function tellLeftOut() {
  const { turns: count, why } = leftOut;
  const those = count === 1 ? "The oldest turn was" : `The ${count} oldest turns were`;
  notice(count ? `${those} left out: ${why}.` : "");
}

function showButton() {
  byId("send").setAttribute("aria-label", writing ? "Stop" : "Send");
  byId("send-icon").setAttribute("href", writing ? "#icon-stop" : "#icon-send");
}

function reset() {
  writing?.abort();
  writing = null;
  messages = [];
  leftOut = { turns: 0, why: "" };
  attached = [];
  sendWhenRead = false;
  turns.replaceChildren();
  byId("welcome").hidden = false;
  showAttached();
  showButton();
  notice("");
  announce("a new conversation");
  words.focus();
}

export function begin() {
  const suggested = ["hello", "what can you do?", "which tasks do you know?"];
  byId("suggestions").append(
    ...suggested.map((text) => {
      const button = make("button", { type: "button" }, text);
      button.addEventListener("click", () => {
        words.value = text;
        send();
      });
      return button;
    }),
  );
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (writing) writing.abort();
    else send();
  });
  words.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  byId("chat").addEventListener("keydown", (event) => {
    if (event.key === "Escape") writing?.abort();
  });
  byId("attach").addEventListener("change", (event) => {
    attach([...event.target.files]);
    event.target.value = "";
  });
  byId("reset").addEventListener("click", reset);
}
