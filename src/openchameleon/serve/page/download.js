// A conversation as one file: a page, Markdown, or the data that the API takes.

import { SMALL, toInput } from "./conversation.js";

const STYLE = `
:root { color-scheme: light dark; }
body {
  max-width: 42rem; margin: 0 auto; padding: 2rem 1.25rem; font: 17px/1.6 system-ui, sans-serif;
}
article { margin: 0 0 1.75rem; overflow-wrap: anywhere; }
.user {
  margin-left: 15%; padding: .7rem 1rem; border-radius: 1rem; background: rgb(128 128 128 / .14);
}
p { margin: 0 0 .6rem; white-space: pre-wrap; }
img { max-width: 100%; min-width: min(18rem, 100%); border-radius: .6rem; image-rendering: auto; }
.small { width: 15rem; min-width: 0; }
footer { opacity: .6; font-size: .85rem; }`;

const escape = (text) =>
  text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

/** Hands a file to the person. */
export function saveFile(name, href) {
  const link = document.createElement("a");
  link.href = href;
  link.download = name;
  link.click();
}

/** `format`: "html", "markdown" or "json". */
export async function downloadConversation(turns, format, model) {
  const [ending, type, text] = await {
    html: async () => ["html", "text/html", await toHtml(turns, model)],
    markdown: async () => ["md", "text/markdown", toMarkdown(turns)],
    json: async () => ["json", "application/json", toJson(turns, model)],
  }[format]();
  const url = URL.createObjectURL(new Blob([text], { type: `${type};charset=utf-8` }));
  saveFile(`conversation-${new Date().toISOString().slice(0, 10)}.${ending}`, url);
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** The name of the file that a picture becomes. */
export function pictureName(part, number) {
  const ending = part.src.slice("data:image/".length).split(/[;+]/)[0].replace("jpeg", "jpg");
  return `picture-${number}.${ending}`;
}

const shownParts = (turn) => turn.parts.filter((p) => (p.type === "text" ? p.text.trim() : p.src));

async function toHtml(turns, model) {
  const part = async (p) => {
    if (p.type === "text") return `<p>${escape(p.text.trim())}</p>`;
    const kind = (await isSmall(p.src)) ? ' class="small"' : "";
    return `<p><img${kind} src="${escape(p.src)}" alt="${escape(p.name ?? "")}"></p>`;
  };
  const article = async (turn) => {
    const parts = await Promise.all(shownParts(turn).map(part));
    return `<article class="${turn.role}">\n${parts.join("\n")}\n</article>`;
  };
  const articles = await Promise.all(turns.map(article));
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>A conversation with ${escape(model)}</title>
<style>${STYLE}</style>
</head>
<body>
${articles.join("\n")}
<footer>With ${escape(model)}, ${new Date().toISOString().slice(0, 10)}.</footer>
</body>
</html>
`;
}

function toMarkdown(turns) {
  const part = (p, i) => (p.type === "text" ? p.text.trim() : `![picture ${i + 1}](${p.src})`);
  const who = { user: "You", assistant: "Answer" };
  const turnText = (turn) => `## ${who[turn.role]}\n\n${shownParts(turn).map(part).join("\n\n")}\n`;
  return turns.map(turnText).join("\n");
}

function toJson(turns, model) {
  return `${JSON.stringify({ model, input: toInput(turns) }, null, 2)}\n`;
}

async function isSmall(src) {
  const image = new Image();
  image.src = src;
  await image.decode().catch(() => {});
  return Math.max(image.naturalWidth, image.naturalHeight) < SMALL;
}
