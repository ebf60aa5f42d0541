// Picture files -> data URLs small enough to send. What is refused says why, with its size.

const MAX_BYTES = 20 * 2 ** 20;
// The whole conversation is sent with every turn, and no model here reads more than this.
const MAX_SIDE = 1024;
const MAX_SENT = 1.5 * 2 ** 20; // bytes of one picture
const MAX_PIXELS = 120e6;
const AS_IS = ["image/png", "image/jpeg", "image/webp", "image/gif"];

export const mebibytes = (bytes) => `${(bytes / 2 ** 20).toFixed(bytes < 10 * 2 ** 20 ? 1 : 0)} MB`;

/** A part of a message. Throws an Error that a person can read. */
export async function readPicture(file) {
  const name = file.name || "The picture";
  if (file.size > MAX_BYTES) {
    const sizes = `${mebibytes(file.size)}; the most is ${mebibytes(MAX_BYTES)}`;
    throw new Error(`${name} is too large: it has ${sizes}.`);
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${name} cannot be read as a picture. PNG, JPEG, WebP and GIF can.`);
  }
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) {
    throw new Error(`${name} is too large: ${width} x ${height} pixels; use a smaller copy.`);
  }
  const small = Math.max(width, height) <= MAX_SIDE && file.size <= MAX_SENT;
  const src = small && AS_IS.includes(file.type) ? await dataUrl(file) : shrunk(bitmap, file.type);
  bitmap.close();
  return { type: "picture", src, name: file.name || "pasted picture", progress: 1 };
}

function shrunk(bitmap, type) {
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const png = type === "image/png" ? canvas.toDataURL("image/png") : null;
  context.globalCompositeOperation = "destination-over"; // JPEG has no transparency
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  return png?.length <= (4 / 3) * MAX_SENT ? png : canvas.toDataURL("image/jpeg", 0.9);
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}
