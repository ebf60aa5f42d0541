// Shows a conversation, and changes only what has changed. What a model wrote is text, never HTML.

import { SMALL, wholeParts } from "./conversation.js";
import { element, icon, iconButton } from "./dom.js";

/**
 * `on` has what can be done: retry(), cancelRetry(), edit(), copy(turn, button), keepSeed(seed),
 * enlarge(part, alt), use(part), save(part).
 */
export class ConversationView {
  #shown = new Map(); // turn id -> TurnView

  constructor(list, on) {
    this.list = list;
    this.on = on;
  }

  show({ turns, start }) {
    const lastUser = turns.findLastIndex((turn) => turn.role === "user");
    const views = turns.map((turn, i) => {
      const view = this.#shown.get(turn.id) ?? new TurnView(turn, this.on);
      const asked = turns.slice(0, i).findLast((t) => t.role === "user");
      view.show({ isLast: i === turns.length - 1, isLastUser: i === lastUser, asked });
      view.root.classList.toggle("forgotten", i < start);
      view.divider.hidden = i === 0 || i !== start;
      return view;
    });
    this.#shown = new Map(views.map((view) => [view.turn.id, view]));
    const roots = views.map((view) => view.root);
    const there = this.list.children;
    const same = roots.length === there.length && roots.every((root, i) => root === there[i]);
    if (!same) this.list.replaceChildren(...roots);
  }
}

class TurnView {
  #parts = []; // one element a part
  #foot = ""; // what the foot was made for
  #countdown = document.createTextNode("");

  constructor(turn, on) {
    this.turn = turn;
    this.on = on;
    this.body = element("div", { class: "body" });
    this.foot = element("div", { class: "foot" });
    const forgotten = "The model no longer sees what is above";
    this.divider = element("p", { class: "divider" }, forgotten);
    const name = turn.role === "user" ? "You" : "Answer";
    const who = element("h3", { class: "visually-hidden" }, name);
    this.root = element("li", { class: `turn ${turn.role}` }, this.divider, who,
      this.body, this.foot);
  }

  show(context) {
    const { turn } = this;
    this.root.setAttribute("aria-busy", turn.state === "streaming");
    this.root.classList.toggle("streaming", turn.state === "streaming");
    this.root.classList.toggle("waiting", turn.state === "streaming" && !turn.parts.length);
    turn.parts.forEach((part, i) => this.#showPart(part, i, context));
    const { message, secondsLeft } = turn.error ?? {};
    const { isLast, isLastUser } = context;
    const foot = JSON.stringify(
      [turn.state, turn.note, message, secondsLeft > 0, isLast, isLastUser],
    );
    if (foot !== this.#foot) this.foot.replaceChildren(...this.#footOf(context));
    this.#foot = foot;
    this.#countdown.data = secondsLeft > 0 ? ` Trying again in ${secondsLeft} s.` : "";
  }

  #showPart(part, i, context) {
    if (!this.#parts[i]) {
      this.#parts[i] = part.type === "text" ? new TextView() : new PictureView(part, context, this);
      this.body.append(this.#parts[i].root);
    }
    this.#parts[i].show(part, this.turn.state);
  }

  *#footOf({ isLast, isLastUser }) {
    const { turn, on } = this;
    if (turn.note) yield element("p", { class: "note" }, turn.note);
    if (turn.error) yield this.#error(turn.error);
    if (turn.state === "streaming") return;
    const actions = [];
    if (turn.role === "assistant" && wholeParts(turn).some((part) => part.type === "text")) {
      const copy = iconButton("Copy the text", "copy", () => on.copy(turn, copy));
      actions.push(copy);
    }
    if (turn.role === "assistant" && isLast && !turn.error) {
      actions.push(iconButton("Answer again", "retry", on.retry));
    }
    if (turn.role === "assistant" && turn.seed !== undefined && !turn.error) {
      const title = "Use this seed from now on";
      const keep = () => on.keepSeed(turn.seed);
      actions.push(element("button", { type: "button", class: "seed", title, onclick: keep },
        `Seed ${turn.seed}`));
    }
    if (isLastUser) actions.push(iconButton("Edit your message", "edit", on.edit));
    if (actions.length) yield element("div", { class: "actions" }, ...actions);
  }

  #error({ message, secondsLeft }) {
    const { on } = this;
    const counting = secondsLeft > 0;
    // Only the sentence is read out, not every second.
    const seconds = element("span", { class: "countdown", "aria-hidden": "true" }, this.#countdown);
    const words = element("p", {}, element("span", { role: "alert" }, message), seconds);
    const again = { type: "button", onclick: on.retry };
    const cancel = { type: "button", class: "plain", onclick: on.cancelRetry };
    return element("div", { class: "error" }, words,
      element("button", again, icon("retry"), counting ? "Try now" : "Try again"),
      ...(counting ? [element("button", cancel, "Cancel")] : []));
  }
}

class TextView {
  constructor() {
    this.text = document.createTextNode("");
    this.root = element("p", { class: "text" }, this.text);
  }

  show(part) {
    const text = part.text.replace(/^\s+|\s+$/g, "");
    if (this.text.data !== text) this.text.data = text;
    this.root.hidden = !text;
  }
}

class PictureView {
  constructor(part, { asked }, { turn, on }) {
    const words = asked?.parts.find((p) => p.type === "text")?.text.slice(0, 200);
    const drawn = words ? `Picture drawn for: ${words}` : "Picture drawn by the model";
    const alt = turn.role === "user" ? `Your picture ${part.name ?? ""}`.trim() : drawn;
    this.image = element("img", { alt, onload: () => this.#sized(this.image.naturalWidth) });
    const enlarge = { type: "button", class: "enlarge", title: "Enlarge" };
    this.open = element("button", { ...enlarge, onclick: () => on.enlarge(part, alt) }, this.image);
    this.bar = element("span", { class: "progress", role: "progressbar", "aria-label": "Drawing",
      "aria-valuemin": 0, "aria-valuemax": 100 });
    this.tools = element("span", { class: "tools" },
      iconButton("Ask about this picture", "reply", () => on.use(part)),
      iconButton("Save the picture", "download", () => on.save(part)));
    this.root = element("figure", { class: "picture" }, this.open, this.bar, this.tools);
    if (part.side) this.#sized(part.side);
  }

  show(part, state) {
    const whole = part.progress === 1;
    if (part.src && this.image.getAttribute("src") !== part.src) this.image.src = part.src;
    this.root.classList.toggle("growing", !whole && state === "streaming");
    this.root.classList.toggle("unfinished", !whole && state !== "streaming");
    this.open.disabled = !whole;
    this.tools.hidden = !whole;
    this.bar.hidden = whole || state !== "streaming";
    this.bar.setAttribute("aria-valuenow", Math.round(100 * part.progress));
    this.root.style.setProperty("--done", `${100 * part.progress}%`);
  }

  #sized(side) {
    this.root.classList.toggle("small", side < SMALL);
  }
}
