// Requests to the server that sent this page. Its token travels in a header, never in an address.

const TOKEN = "gato-token";
let askForToken = async () => false;

/** Let `ask(refused)` be called where a token is needed; it resolves to whether to try again. */
export function whenTokenIsNeeded(ask) {
  askForToken = ask;
}

export function token() {
  return sessionStorage.getItem(TOKEN) ?? "";
}

export function setToken(value) {
  if (value) sessionStorage.setItem(TOKEN, value);
  else sessionStorage.removeItem(TOKEN);
}

/** What the server answered instead of what was asked for. */
export class Refusal extends Error {
  constructor(status, message, retryAfter = 0) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

async function refusal(response) {
  let message = `the server answered ${response.status}`;
  try {
    const body = await response.json();
    message = body.error?.message ?? body.detail ?? message;
  } catch {
    // an answer without words
  }
  return new Refusal(response.status, message, Number(response.headers.get("Retry-After")) || 0);
}

/** Return the server's answer; where it needs a token, ask for it and try again. */
export async function request(path, { body, signal } = {}) {
  for (;;) {
    const given = token();
    const headers = {};
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (given) headers.Authorization = `Bearer ${given}`;
    let response;
    try {
      response = await fetch(path, {
        method: body === undefined ? "GET" : "POST",
        headers,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal,
        credentials: "omit",
        cache: "no-store",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal(0, "the server cannot be reached");
    }
    if (response.ok) return response;
    if (response.status === 401 && (await askForToken(Boolean(given)))) continue;
    throw await refusal(response);
  }
}

export async function getJson(path) {
  return (await request(path)).json();
}

/** Yield {event, data} of a stream of server-sent events; data is text. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value.replaceAll("\r\n", "\n");
      const blocks = rest.split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const told = { event: "message", data: [] };
        for (const line of block.split("\n")) {
          if (line.startsWith("data:")) told.data.push(line.slice(5).replace(/^ /, ""));
          else if (line.startsWith("event:")) told.event = line.slice(6).trim();
        }
        if (told.data.length) yield { event: told.event, data: told.data.join("\n") };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
