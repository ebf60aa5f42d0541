// Keeps the newest words in sight while they come, until the reader scrolls up.

const NEAR = 48; // pixels

export class Follow {
  #following = true;

  constructor(scroller, content, button) {
    this.scroller = scroller;
    this.button = button;
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    button.addEventListener("click", () => this.start());
    const observer = new ResizeObserver(() => (this.#following ? this.start() : this.#scrolled()));
    observer.observe(content);
    observer.observe(scroller);
  }

  /** Goes to the end, and stays there. */
  start() {
    this.#following = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.button.hidden = true;
  }

  #scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    this.#following = scrollHeight - scrollTop - clientHeight < NEAR;
    this.button.hidden = this.#following;
  }
}
