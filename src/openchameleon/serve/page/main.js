// The page: connects what a person does with the conversation, and the conversation with what is
// shown.

import { models, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { SMALL, newConversation, picturesOf, textOf } from "./conversation.js";
import { byId, element, icon } from "./dom.js";
import { downloadConversation, pictureName, saveFile } from "./download.js";
import { Follow } from "./follow.js";
import { Settings } from "./settings.js";
import { load, save } from "./store.js";
import { ConversationView } from "./view.js";

const SUGGESTIONS = ["What can you do?", "Draw a cat.", "Tell a story with pictures."];

let model = {}; // as /v1/models describes it
let drawing = 0; // the frame that will show what changed
let saving = 0;
let told = true; // whether the newest answer was announced

const chat = new Chat({
  change: () => (drawing ||= requestAnimationFrame(show)),
  settings: () => settings.request,
  model: () => model.id,
  key: askForKey,
});
const view = new ConversationView(byId("turns"), {
  retry,
  cancelRetry: () => chat.cancelRetry(),
  edit: startEdit,
  copy: copyText,
  keepSeed: (seed) => {
    settings.seed = seed;
    toast(`Seed ${seed} is used from now on.`);
  },
  enlarge,
  use: (part) => {
    composer.addPicture({ ...part, name: "from the conversation" });
    composer.editor.focus();
  },
  save: (part) => saveFile(nameOf(part), part.src),
});
const follow = new Follow(byId("scroller"), byId("turns"), byId("latest"));
const composer = new Composer(byId("editor"), { change: composed, problem: showProblem });
const settings = new Settings(byId("settings"), showSettings);
let undoEdit = null; // what brings the message back that is being edited

function show() {
  drawing = 0;
  const { conversation, answering } = chat;
  view.show(conversation);
  byId("welcome").hidden = conversation.turns.length > 0;
  byId("download").disabled = byId("new").disabled = !conversation.turns.length;
  byId("send").hidden = answering;
  byId("stop").hidden = !answering;
  const ended = !told && !answering;
  announce(conversation.turns.at(-1), answering);
  composed();
  if (ended) keep();
}

/** Told to those who listen: that an answer has begun, and all of it when it is there. */
function announce(turn, answering) {
  if (answering) told = false;
  if (told) return;
  told = !answering;
  const pictures = turn?.parts.filter((part) => part.progress === 1).length;
  const drawn = pictures ? ` ${pictures} ${pictures > 1 ? "pictures" : "picture"}.` : "";
  const answer = turn?.role === "assistant" ? textOf(turn) + drawn : "";
  const words = answering ? "Answering." : answer || turn?.note || "";
  if (byId("status").textContent !== words) byId("status").textContent = words;
}

function composed() {
  byId("send").disabled = !composer.parts.length || chat.answering;
  saving ||= setTimeout(keep, 400);
}

/** Saves what is there at once: a reload may come before the time of `composed` is over. */
function keep() {
  clearTimeout(saving);
  saving = 0;
  save(chat.conversation, composer.parts);
}

function submit() {
  const { parts } = composer;
  if (!parts.length || chat.answering) return;
  undoEdit = null;
  byId("editing").hidden = true;
  composer.parts = [];
  showProblem("");
  follow.start();
  chat.send(parts);
}

function startEdit() {
  const before = { ...chat.conversation, turns: [...chat.conversation.turns] };
  const draft = composer.parts;
  undoEdit = () => {
    chat.open(before);
    composer.parts = draft;
  };
  chat.cancelRetry();
  composer.parts = chat.takeLast();
  byId("editing").hidden = false;
  chat.on.change();
  composer.focus();
}

function endEdit() {
  byId("editing").hidden = true;
  undoEdit?.();
  undoEdit = null;
  composer.focus();
}

function startNew() {
  const { conversation } = chat;
  chat.open(newConversation());
  toast("A new conversation.", "Bring the old one back", () => chat.open(conversation));
  composer.focus();
}

function retry() {
  if (settings.seed !== "") toast("The seed is fixed in the settings: expect the same answer.");
  follow.start();
  chat.retry();
}

async function copyText(turn, button) {
  if (navigator.clipboard) await navigator.clipboard.writeText(textOf(turn));
  else copyWithoutClipboard(textOf(turn)); // over plain http, away from this machine
  button.replaceChildren(icon("check"));
  setTimeout(() => button.replaceChildren(icon("copy")), 1500);
}

function copyWithoutClipboard(text) {
  const area = element("textarea", { class: "visually-hidden" }, text);
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

const nameOf = (part) => pictureName(part, picturesOf(chat.conversation).indexOf(part) + 1);

function enlarge(part, alt) {
  const dialog = byId("lightbox");
  const image = dialog.querySelector("img");
  Object.assign(image, { src: part.src, alt });
  image.onload = () => image.classList.toggle("small", image.naturalWidth < SMALL);
  Object.assign(dialog.querySelector("a"), { href: part.src, download: nameOf(part) });
  dialog.showModal();
}

function askForKey() {
  const dialog = byId("key-dialog");
  byId("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => {
      const given = dialog.returnValue === "ok" && byId("key").value !== "";
      if (given) setKey(byId("key").value);
      if (given) loadModel();
      resolve(given);
    };
  });
}

function showProblem(sentence) {
  byId("problem").textContent = sentence;
  byId("problem").hidden = !sentence;
}

function showSettings({ nChanged }) {
  byId("changed").textContent = nChanged || "";
  const name = "Settings of the answer";
  const label = nChanged ? `${name}, ${nChanged} changed` : name;
  byId("open-settings").setAttribute("aria-label", label);
}

let toasting = 0;
function toast(words, action = null, act = null) {
  const bar = byId("toast");
  bar.replaceChildren(words);
  const click = () => {
    act();
    bar.hidden = true;
  };
  if (action) bar.append(element("button", { type: "button", onclick: click }, action));
  bar.hidden = false;
  clearTimeout(toasting);
  toasting = setTimeout(() => (bar.hidden = true), action ? 8000 : 3000);
}

function showTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").setAttribute("aria-pressed", theme === "dark");
}

function switchTheme() {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  showTheme(theme);
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // Kept for this visit only.
  }
}

async function loadModel() {
  try {
    [model] = await models();
    byId("model").textContent = model.id;
  } catch (error) {
    // The first answer will say what is wrong; a server that is starting is asked again.
    if (error.retryAfter) setTimeout(loadModel, 1000 * error.retryAfter);
  }
  const ask = (words) => () => !chat.answering && chat.send([{ type: "text", text: words }]);
  byId("suggestions").replaceChildren(
    ...(model.examples?.length ? model.examples : SUGGESTIONS).map((words) =>
      element("li", {}, element("button", { type: "button", onclick: ask(words) }, words)),
    ),
  );
}

function listenToKeys() {
  byId("editor").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    if (event.target !== byId("editor")) return;
    event.preventDefault();
    submit();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open], :popover-open")) return;
    if (chat.answering || chat.conversation.turns.at(-1)?.error?.secondsLeft) chat.stop();
    else if (undoEdit) endEdit();
  });
}

function listenToDrops() {
  const hasFiles = (event) => event.dataTransfer.types.includes("Files");
  const zone = byId("dropzone");
  let leaving = 0;
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event) && !composer.dragging) return;
    event.preventDefault();
    clearTimeout(leaving);
    zone.classList.toggle("shown", hasFiles(event));
    leaving = setTimeout(() => zone.classList.remove("shown"), 300);
  });
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event) && !composer.dragging) return;
    event.preventDefault();
    zone.classList.remove("shown");
    if (composer.dragging) composer.dropChip(event);
    else composer.addFiles(event.dataTransfer.files, event);
  });
}

function listen() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
    composer.focus();
  });
  byId("stop").addEventListener("click", () => chat.stop());
  byId("new").addEventListener("click", startNew);
  byId("theme").addEventListener("click", switchTheme);
  byId("cancel-edit").addEventListener("click", endEdit);
  byId("attach").addEventListener("click", () => byId("files").click());
  byId("files").addEventListener("change", async ({ target }) => {
    await composer.addFiles([...target.files]);
    target.value = "";
  });
  byId("downloads").addEventListener("click", ({ target }) => {
    const { format } = target.closest("button")?.dataset ?? {};
    if (format) downloadConversation(chat.conversation.turns, format, model.id ?? "OpenChameleon");
    byId("downloads").hidePopover();
  });
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", ({ target }) => {
      if (target === dialog || target.closest(".close")) dialog.close();
    });
  }
  addEventListener("pagehide", keep);
  listenToKeys();
  listenToDrops();
}

async function start() {
  listen();
  showTheme(document.documentElement.dataset.theme);
  const saved = await load();
  if (saved) {
    chat.open(saved.conversation);
    composer.parts = saved.draft;
  }
  show();
  follow.start();
  loadModel();
  if (matchMedia("(pointer: fine)").matches) composer.focus();
}

start();
