// Pictures from files, the clipboard and a drag, made small enough for the model.

import { pictureSide } from "./settings.js";

const PATCH = 16;
const LARGEST = 1024;
let memory = 0;

/** Be told how many tokens the model remembers: a picture may take half of them. */
export function remember(tokens) {
  memory = tokens;
}

/** Return the width and height of a picture that the model has room for. */
export function fitted(width, height) {
  const side = pictureSide() || LARGEST;
  let scale = Math.min(1, side / Math.max(width, height));
  const tokens = (s) => Math.ceil((width * s) / PATCH) * Math.ceil((height * s) / PATCH);
  const most = memory ? Math.max(4, Math.floor(memory / 2)) : Infinity;
  while (tokens(scale) > most) scale *= 0.95;
  return [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
}

/** Return {uri, width, height} of a picture file; what else the file says is left behind. */
export async function read(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    throw new Error(`${blob.name ?? "this"} is no picture that the browser can show`);
  }
  const [width, height] = fitted(bitmap.width, bitmap.height);
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { alpha: false });
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return { uri: canvas.toDataURL("image/png"), width, height };
}

/** Return the picture files of a paste or a drop. */
export function picturesIn(transfer) {
  return [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
}

/** Return the file that a data URI holds. */
export function fileOf(uri) {
  const [head, body] = uri.split(",", 2);
  const bytes = Uint8Array.from(atob(body), (c) => c.charCodeAt(0));
  return new Blob([bytes], { type: head.slice(5).split(";")[0] });
}
