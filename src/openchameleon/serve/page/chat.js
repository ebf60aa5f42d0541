// What happens in a conversation: asking, answering, stopping, trying again. Knows no elements.

import { ApiError, respond } from "./api.js";
import { applyEvent, forgetOldest, newConversation, newTurn, toInput } from "./conversation.js";

const N_PARTIALS = 18; // How often a growing picture is shown.
const MAX_TRIES = 5; // Of one answer, by itself, while the server is busy.
const FORGETTING = ["context_length_exceeded", "too_many_images", "request_too_large"];

/**
 * `on` has `change()`, after anything changed; `settings()`, fields of a request; `model()`, the
 * model's name or undefined; `key()`, which asks for an API key and says whether one was given.
 */
export class Chat {
  conversation = newConversation();
  #stopping = null; // AbortController of the answer under way
  #countdown = null;
  #tries = 0;

  constructor(on) {
    this.on = on;
  }

  get answering() {
    return this.#stopping !== null;
  }

  get #last() {
    return this.conversation.turns.at(-1);
  }

  /** Replaces everything, as after a reload. An answer that was under way has stopped. */
  open(conversation) {
    this.stop();
    this.#stopping = null;
    for (const turn of conversation.turns) {
      if (turn.state === "streaming") {
        Object.assign(turn, { state: "stopped", note: "Stopped when the page was left." });
      }
      if (turn.error) turn.error.secondsLeft = 0;
    }
    this.conversation = conversation;
    this.on.change();
  }

  send(parts) {
    this.cancelRetry();
    this.conversation.turns.push(newTurn("user", parts));
    return this.#answer();
  }

  /** Answers the last message again, in place of the answer that is there. */
  retry() {
    if (this.answering) return null;
    this.cancelRetry();
    if (this.#last.role === "assistant") this.conversation.turns.pop();
    return this.#answer();
  }

  /** Takes the last message and its answer out, and returns the message's parts. */
  takeLast() {
    const { turns } = this.conversation;
    const last = turns.findLastIndex((turn) => turn.role === "user");
    const [message] = turns.splice(last);
    this.conversation.start = Math.min(this.conversation.start, turns.length);
    return message.parts;
  }

  stop() {
    this.cancelRetry();
    this.#stopping?.abort();
  }

  cancelRetry() {
    clearInterval(this.#countdown);
    this.#countdown = null;
    this.#tries = 0;
    if (this.#last?.error?.secondsLeft) {
      this.#last.error.secondsLeft = 0;
      this.on.change();
    }
  }

  async #answer() {
    const { conversation } = this;
    const turn = newTurn("assistant");
    conversation.turns.push(turn);
    const stopping = new AbortController();
    this.#stopping = stopping;
    this.on.change();
    let failure = null;
    try {
      await this.#stream(turn, stopping.signal);
      turn.state = "done";
    } catch (error) {
      turn.state = stopping.signal.aborted ? "stopped" : "failed";
      if (stopping.signal.aborted) turn.note = "Stopped.";
      else failure = error;
    }
    if (conversation !== this.conversation) return;
    this.#stopping = null;
    if (failure) this.#fail(turn, failure);
    this.on.change();
  }

  /** Streams the answer; leaves out old turns as long as the prompt has no room for them. */
  async #stream(turn, signal) {
    const { conversation } = this;
    const settings = this.on.settings();
    turn.seed = settings.seed;
    for (;;) {
      const input = toInput(conversation.turns.slice(conversation.start, -1));
      const body = { model: this.on.model(), input, partial_images: N_PARTIALS, ...settings };
      try {
        for await (const event of respond(body, signal)) {
          applyEvent(turn, event);
          this.on.change();
        }
        // Cut before its first word: the prompt fills the context, or nearly.
        const cut = turn.note && !turn.parts.length && !settings.max_output_tokens;
        if (!cut || !forgetOldest(conversation)) return;
        turn.note = "";
      } catch (error) {
        if (!FORGETTING.includes(error.code) || !forgetOldest(conversation)) throw error;
      }
    }
  }

  async #fail(turn, error) {
    if (!(error instanceof ApiError)) console.error(error);
    const words = error instanceof ApiError ? error.message : "Something on this page went wrong.";
    turn.error = { message: words, secondsLeft: 0 };
    if (error.status === 401 && (await this.on.key())) this.retry();
    else if (error.retryAfter && ++this.#tries < MAX_TRIES) this.#countDown(turn, error.retryAfter);
  }

  #countDown(turn, seconds) {
    const tries = this.#tries;
    turn.error.secondsLeft = seconds;
    this.#countdown = setInterval(() => {
      turn.error.secondsLeft -= 1;
      if (turn.error.secondsLeft > 0) return this.on.change();
      this.retry();
      this.#tries = tries;
    }, 1000);
  }
}
