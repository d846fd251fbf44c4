// Watching the agent play, beside what it reads and writes.

import { events, getJson, request } from "./api.js";
import { announce, byId, make, short } from "./dom.js";
import * as tokens from "./tokens.js";

const RATES = [1, 2, 5, 10, 15, 30, 60];
const BUTTONS = ["pause", "step", "restart", "stop"];
const FACTS = ["fact-step", "fact-action", "fact-time", "fact-seed"];
let tasks = new Map();
let live = null; // {id, control, task, paused, frame, finished, total, episode}
let picture = null; // the newest frame, not yet shown
let paced = ""; // the task whose speed is shown: its own, or one that was chosen for it
let askAbout = () => {};

export function onAsk(ask) {
  askAbout = ask;
}

/** Fill in the tasks of the checkpoint. */
export async function load() {
  const told = await getJson("v1/tasks");
  tasks = new Map(told.data.map((task) => [task.id, task]));
  const groups = Map.groupBy
    ? Map.groupBy(told.data, (task) => task.suite)
    : told.data.reduce((m, t) => m.set(t.suite, [...(m.get(t.suite) ?? []), t]), new Map());
  byId("task").replaceChildren(
    ...[...groups].map(([suite, members]) => {
      const options = members.map((task) => {
        const name = task.id.slice(suite.length + 1);
        return make("option", { value: task.id, disabled: !task.installed }, name);
      });
      return make("optgroup", { label: suite }, ...options);
    }),
  );
  const most = told.watch.steps_per_second;
  const offered = RATES.filter((rate) => rate <= most);
  byId("rate").replaceChildren(
    ...offered.map((rate) => make("option", { value: String(rate) }, `${rate} steps/s`)),
  );
  describeTask();
}

function describeTask() {
  const task = tasks.get(byId("task").value);
  const missing = [...tasks.values()].filter((t) => !t.installed);
  note(missing.length ? `Not here: ${missing.map((t) => `${t.id} (${t.fault})`).join("; ")}` : "");
  if (!task) note("This checkpoint plays no task that can be started here.");
  byId("begin").disabled = !task;
  if (task && !live) {
    byId("instruction").textContent = task.instruction;
    showScores(task, null, []);
    showRate(task);
  }
}

function showRate({ id, rate }) {
  const options = [...byId("rate").options];
  const near = options.reduce((a, b) =>
    Math.abs(b.value - rate) < Math.abs(a.value - rate) ? b : a, options[0]);
  if (near) near.selected = true;
  paced = id;
}

function note(text, bad = false) {
  byId("task-note").textContent = text;
  byId("task-note").hidden = !text;
  byId("task-note").classList.toggle("bad", bad);
}

function seed() {
  return Number(byId("seed").value);
}

// ---- an episode after the other ------------------------------------------------------------

async function watch() {
  stop();
  const task = tasks.get(byId("task").value);
  if (!task) return;
  const control = new AbortController();
  const mine = { control, task, paused: false, finished: [], id: null };
  live = mine;
  picture = null; // of the task before
  tokens.clear();
  for (const fact of FACTS) byId(fact).textContent = "–";
  byId("frame").hidden = true;
  byId("ask").disabled = true;
  wait("Starting the simulator");
  describeTask();
  byId("instruction").textContent = task.instruction;
  showScores(task, null, []);
  buttons(true);
  let reason = "";
  try {
    if (paced !== task.id) showRate(task);
    const body = { task: task.id, seed: seed(), rate: Number(byId("rate").value) || task.rate };
    const response = await opened(body, control.signal);
    for await (const { event, data } of events(response)) {
      if (live !== mine) return;
      const told = JSON.parse(data);
      if (event === "start") {
        mine.id = told.id;
        look(!byId("watch").hidden && !document.hidden);
      } else if (event === "episode") began(mine, told);
      else if (event === "step") stepped(mine, told);
      else if (event === "end") reason = told.reason;
    }
    reason ||= "the server ended it";
  } catch (error) {
    if (error.name === "AbortError") return;
    reason = error.message;
  }
  if (live !== mine) return;
  live = null;
  buttons(false);
  wait("");
  note(`It has ended: ${reason}.`, true);
}

/** Ask for an episode; where the last one's process is just ending, ask once more. */
async function opened(body, signal) {
  for (let tries = 0; ; tries += 1) {
    try {
      return await request("v1/watch", { body, signal });
    } catch (error) {
      if (error.status !== 429 || tries >= 3) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * (error.retryAfter || 1)));
      if (signal.aborted) throw new DOMException("stopped", "AbortError");
    }
  }
}

function began(mine, told) {
  Object.assign(mine, { episode: told.episode, actions: told.actions, total: 0 });
  byId("fact-seed").textContent = String(told.seed);
  byId("fact-step").textContent = "0";
  byId("fact-action").textContent = "–";
  wait(told.frame ? "" : "This environment draws no pictures");
  show(told.frame);
  tokens.clear();
  tokens.add("head", told.tokens);
  showScores(mine.task, null, mine.finished);
}

function stepped(mine, told) {
  show(told.frame);
  byId("fact-step").textContent = String(told.step);
  const action = named(told.action, mine.actions);
  byId("fact-action").textContent = action;
  byId("fact-time").textContent = `${short(told.milliseconds)} ms`;
  const name = typeof told.action === "number" ? action : "";
  tokens.add(String(told.step), told.tokens, told.tokens_left_out, name);
  const success = mine.task.measure === "success";
  const score = success ? (told.success == null ? null : Number(told.success)) : told.return;
  if (told.ended) {
    mine.finished.push(score ?? 0);
    const how = success ? (told.success ? "success" : "no success") : `return ${short(told.return)}`;
    wait(`Episode ${mine.episode}: ${how}`);
    announce(`episode ${mine.episode} has ended: ${how}`);
  }
  showScores(mine.task, score, mine.finished);
}

function named(action, names) {
  if (typeof action === "number") return names[action] ?? String(action);
  if (Array.isArray(action)) return action.flat(Infinity).map((n) => n.toFixed(2)).join(" ");
  return JSON.stringify(action);
}

// ---- what is shown -------------------------------------------------------------------------

/** Show a frame with the next repaint; those that come quicker are passed over. */
function show(frame) {
  if (!frame) return;
  if (!picture) {
    requestAnimationFrame(() => {
      if (!picture) return;
      const image = byId("frame");
      image.src = picture;
      image.alt = `what ${live?.task.id ?? "the task"} looks like now`;
      image.hidden = false;
      byId("ask").disabled = false;
      picture = null;
    });
  }
  picture = frame;
}

function wait(text) {
  byId("waiting").textContent = text;
}

/** Draw random's, the expert's and the agent's scores on one scale. */
function showScores(task, now, finished) {
  const mean = finished.length ? finished.reduce((a, b) => a + b, 0) / finished.length : null;
  const what = task.measure === "success" ? "success" : "return";
  const rows = [
    ["random", task.random_score, "random"],
    ["expert", task.expert_score, "expert"],
    [`${what} so far`, now, "ours"],
    [finished.length ? `mean of ${finished.length}` : "mean", mean, "mean"],
  ];
  const known = rows.map((row) => row[1]).filter((value) => value != null);
  const low = Math.min(0, ...known);
  const high = Math.max(task.measure === "success" ? 1 : 0, ...known);
  const place = (value) => (high > low ? (100 * (value - low)) / (high - low) : 0);
  byId("scores").replaceChildren(
    ...rows.map(([name, value, kind]) => {
      const track = make("span", { class: "track" });
      if (value != null) {
        const [from, to] = [place(Math.min(0, value)), place(Math.max(0, value))];
        const bar = make("i");
        bar.style.left = `${from}%`;
        bar.style.width = `${to - from}%`;
        track.append(bar);
      }
      return make("div", { class: `score ${kind}` }, make("span", {}, name), track, make("b", {}, short(value)));
    }),
  );
}

function buttons(playing) {
  for (const id of BUTTONS) byId(id).disabled = !playing;
  showPause(false);
}

function showPause(paused) {
  byId("pause").setAttribute("aria-label", paused ? "Go on" : "Pause");
  byId("pause-icon").setAttribute("href", paused ? "#icon-play" : "#icon-pause");
}

// ---- what a person does --------------------------------------------------------------------

async function change(wanted) {
  if (!live?.id) return;
  const mine = live;
  try {
    await request(`v1/watch/${encodeURIComponent(mine.id)}`, { body: wanted });
  } catch (error) {
    if (live === mine) note(error.message, true);
  }
}

function pause(paused) {
  if (!live?.id || live.paused === paused) return;
  live.paused = paused;
  showPause(paused);
  announce(paused ? "paused" : "going on");
  change({ paused });
}

function stop() {
  if (!live) return;
  const { control } = live;
  live = null;
  control.abort();
  buttons(false);
  wait("");
}

/** Rest while nobody looks. */
export function look(looking) {
  if (!live?.id) return;
  if (!looking && !live.paused) {
    live.rested = true;
    pause(true);
  } else if (looking && live.rested) {
    live.rested = false;
    pause(false);
  }
}

export function begin() {
  tokens.begin();
  byId("frame").addEventListener("load", ({ target }) => {
    const ratio = Math.min(1.5, Math.max(1, target.naturalWidth / target.naturalHeight));
    target.parentElement.style.aspectRatio = String(ratio);
  });
  byId("choice").addEventListener("submit", (event) => {
    event.preventDefault();
    watch();
  });
  byId("task").addEventListener("change", describeTask);
  byId("pause").addEventListener("click", () => pause(!live?.paused));
  byId("step").addEventListener("click", async () => {
    if (!live?.id) return;
    if (!live.paused) pause(true);
    else await change({ steps: 1 });
  });
  byId("restart").addEventListener("click", () => {
    if (!byId("seed").reportValidity()) return;
    if (live) live.finished = [];
    change({ restart: seed() });
  });
  byId("stop").addEventListener("click", () => {
    stop();
    byId("begin").focus();
  });
  byId("rate").addEventListener("change", () => {
    paced = byId("task").value;
    change({ rate: Number(byId("rate").value) });
  });
  byId("ask").addEventListener("click", () => {
    if (live) pause(true);
    askAbout(byId("frame").src);
  });
  byId("watch").addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
  });
}
