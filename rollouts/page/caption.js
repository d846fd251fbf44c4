// Pictures that are dropped, and what the model says they show.

import { request } from "./api.js";
import { byId, copy, make, roundButton } from "./dom.js";
import { fileOf, read } from "./pictures.js";

let askAbout = () => {};

export function onAsk(ask) {
  askAbout = ask;
}

/** Describe pictures, the newest above. */
export async function describe(files) {
  for (const file of files) await one(file);
}

async function one(file) {
  const said = make("p", {}, "…");
  const image = make("img", { alt: "" });
  const foot = make("footer");
  const item = make("li", {}, image, make("div", {}, said, foot));
  byId("captions").prepend(item);
  try {
    const picture = await read(file);
    image.src = picture.uri;
    if (Math.max(picture.width, picture.height) <= 96) image.classList.add("small");
    const response = await request("v1/captions", { body: { image: picture.uri } });
    const { text } = await response.json();
    said.textContent = text || "nothing was said";
    image.alt = text;
    foot.append(
      roundButton("copy", "Copy the description", () => copy(text, said)),
      roundButton("ask", "Ask about this picture", () => askAbout([fileOf(picture.uri)])),
    );
  } catch (error) {
    said.textContent = error.message;
    said.className = "bad";
    said.setAttribute("role", "alert");
  }
}

export function begin() {
  byId("to-be-captioned").addEventListener("change", (event) => {
    describe([...event.target.files]);
    event.target.value = "";
  });
}
