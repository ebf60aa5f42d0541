// Where a message is written: text and pictures in one line of thought, in the order they are sent.
//
// A picture is a chip in the text. It is put where the caret is, dragged with the mouse, moved with
// the arrow keys or its own buttons, and deleted like a letter.

import { element, iconButton } from "./dom.js";
import { readPicture } from "./pictures.js";

export const MAX_PICTURES = 8;
const CHIP = "application/x-chip";

/** `on` has `change()` and `problem(sentence)`. */
export class Composer {
  #pictures = new WeakMap(); // chip -> part
  #caret = null; // where the caret was last in the editor
  #dragged = null;

  constructor(editor, on) {
    this.editor = editor;
    this.on = on;
    if (editor.contentEditable !== "plaintext-only") editor.contentEditable = "true";
    editor.addEventListener("input", () => this.#changed());
    editor.addEventListener("paste", (event) => this.#paste(event));
    editor.addEventListener("keydown", (event) => this.#key(event));
    document.addEventListener("selectionchange", () => this.#remember());
  }

  /** The message: trimmed text and pictures, in order. */
  get parts() {
    const parts = [];
    let text = "";
    const flush = () => {
      if (text.trim()) parts.push({ type: "text", text: text.trim() });
      text = "";
    };
    const walk = (node) => {
      if (this.#pictures.has(node)) {
        flush();
        parts.push(this.#pictures.get(node));
      } else if (node.nodeType === Node.TEXT_NODE) text += node.data;
      else if (node.nodeName === "BR") text += "\n";
      else {
        if (node.nodeName === "DIV" && text) text += "\n";
        node.childNodes.forEach(walk);
      }
    };
    this.editor.childNodes.forEach(walk);
    flush();
    return parts;
  }

  set parts(parts) {
    const nodes = parts.map((part) => (part.type === "text" ? part.text : this.#chip(part)));
    this.editor.replaceChildren(...nodes.flatMap((node) => [node, " "]));
    this.editor.normalize();
    this.#caret = null;
    this.#changed();
  }

  get nPictures() {
    return this.editor.querySelectorAll(".chip").length;
  }

  /** Puts the caret behind everything. */
  focus() {
    this.editor.focus();
    getSelection().selectAllChildren(this.editor);
    getSelection().collapseToEnd();
  }

  /** Reads picture files and inserts them at the caret, or at a point of the screen. */
  async addFiles(files, point = null) {
    if (point) this.#caret = this.#caretAt(point) ?? this.#caret;
    this.on.problem("");
    for (const file of files) {
      try {
        this.addPicture(await readPicture(file));
      } catch (error) {
        this.on.problem(error.message);
      }
    }
  }

  /** Inserts a picture at the caret. */
  addPicture(part) {
    if (this.nPictures >= MAX_PICTURES) {
      this.on.problem(`A message can have ${MAX_PICTURES} pictures at most.`);
      return;
    }
    this.#insert(this.#chip(part), this.#caret);
    this.on.problem("");
  }

  #insert(chip, caret) {
    const range = document.createRange();
    range.selectNodeContents(this.editor);
    range.collapse(false);
    if (caret && this.editor.contains(caret.startContainer)) {
      caret.deleteContents();
      range.setStart(caret.startContainer, caret.startOffset);
      range.collapse(true);
    }
    range.insertNode(chip);
    this.editor.normalize(); // the text around it may have been cut into an empty piece
    // Behind a chip a caret needs text to stand in.
    if (chip.nextSibling?.nodeType !== Node.TEXT_NODE) chip.after(" ");
    range.setStart(chip.nextSibling, chip.nextSibling.data.startsWith(" ") ? 1 : 0);
    range.collapse(true);
    this.#caret = range.cloneRange();
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    this.#changed();
  }

  #chip(part) {
    const label = `Picture ${part.name}. Arrow keys move it, Delete removes it.`;
    const tool = (name, icon, act) => iconButton(name, icon, act, { tabindex: -1 });
    const chip = element(
      "span",
      { class: "chip", contenteditable: "false", tabindex: 0, role: "group", "aria-label": label,
        draggable: "true", title: part.name },
      element("img", { src: part.src, alt: "", draggable: "false" }),
      element(
        "span",
        { class: "tools" },
        tool("Move earlier", "left", () => this.#move(chip, -1)),
        tool("Move later", "right", () => this.#move(chip, 1)),
        tool("Remove", "close", () => this.#remove(chip)),
      ),
    );
    this.#pictures.set(chip, part);
    chip.addEventListener("dragstart", (event) => {
      this.#dragged = chip;
      event.dataTransfer.setData(CHIP, "");
      event.dataTransfer.effectAllowed = "move";
    });
    chip.addEventListener("dragend", () => (this.#dragged = null));
    return chip;
  }

  /** Whether a drag is one of our chips; then `dropChip` puts it at the pointer. */
  get dragging() {
    return this.#dragged !== null;
  }

  dropChip(point) {
    const caret = this.#caretAt(point);
    const chip = this.#dragged;
    if (!caret || chip.contains(caret.startContainer)) return;
    chip.remove();
    this.#insert(chip, caret);
  }

  /** Moves a chip over the word or picture before (-1) or behind (1) it. */
  #move(chip, direction) {
    this.editor.normalize();
    const side = direction < 0 ? "previousSibling" : "nextSibling";
    let over = chip[side];
    if (over?.nodeType === Node.TEXT_NODE && !over.data.trim() && over[side]) over = over[side];
    if (over?.nodeType === Node.TEXT_NODE && direction < 0) {
      over = over.splitText(Math.max(0, over.data.search(/\S+\s*$/)));
    } else if (over?.nodeType === Node.TEXT_NODE) {
      over.splitText(over.data.match(/^\s*\S*\s?/)[0].length);
    }
    if (!over) return;
    if (direction < 0) over.before(chip);
    else over.after(chip);
    if (!chip.nextSibling) chip.after(" ");
    chip.focus();
    this.#changed();
  }

  #remove(chip) {
    chip.remove();
    this.#caret = null;
    this.focus();
    this.#changed();
  }

  #key(event) {
    const chip = event.target.closest?.(".chip");
    if (!chip) return;
    const moves = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
    if (moves[event.key]) this.#move(chip, moves[event.key]);
    else if (event.key === "Delete" || event.key === "Backspace") this.#remove(chip);
    else return;
    event.preventDefault();
  }

  #paste(event) {
    const text = event.clipboardData.getData("text/plain");
    const files = [...event.clipboardData.files];
    if (files.length && !text.trim()) this.addFiles(files);
    else document.execCommand("insertText", false, text);
    event.preventDefault();
  }

  /** Keeps the caret, which is lost when a button or the file chooser is used. */
  #remember() {
    const selection = getSelection();
    if (!selection.rangeCount) return;
    const range = selection.getRangeAt(0);
    const inside = this.editor.contains(range.commonAncestorContainer);
    const inChip = range.startContainer.parentElement?.closest(".chip");
    if (inside && !inChip) this.#caret = range.cloneRange();
  }

  #caretAt({ x, y }) {
    const position = document.caretPositionFromPoint?.(x, y);
    const range = position ? document.createRange() : document.caretRangeFromPoint?.(x, y);
    if (position) range.setStart(position.offsetNode, position.offset);
    return range && this.editor.contains(range.startContainer) ? range : null;
  }

  #changed() {
    this.editor.toggleAttribute("data-empty", !this.nPictures && !this.editor.textContent.trim());
    this.on.change();
  }
}
