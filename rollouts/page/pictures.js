// Pictures from files, the clipboard and a drag, made small enough to be sent.

import { pictureSide } from "./settings.js";

// Of a side. The server brings it down to what the model was trained on, half of this at most.
const LARGEST = 256;

/** Return the width and height to which a picture is shrunk. */
function fitted(width, height) {
  const scale = Math.min(1, (pictureSide() || LARGEST) / Math.max(width, height));
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

/** Return the files of a paste or a drop. */
export function filesIn(transfer) {
  return [...(transfer?.files ?? [])];
}

/** Return those of them that are pictures. */
export function picturesIn(transfer) {
  return filesIn(transfer).filter((file) => file.type.startsWith("image/"));
}

/** Return the file that a data URI holds. */
export function fileOf(uri) {
  const [head, body] = uri.split(",", 2);
  const bytes = Uint8Array.from(atob(body), (c) => c.charCodeAt(0));
  return new Blob([bytes], { type: head.slice(5).split(";")[0] });
}
