// The expert's panel: what is asked of an answer besides the words. Empty fields ask nothing.

const STORED = "settings";

/** `form` is #settings; `onchange` is told when a value changes. */
export class Settings {
  constructor(form, onchange) {
    this.form = form;
    this.onchange = onchange;
    for (const [name, value] of Object.entries(stored())) {
      if (form.elements[name]) form.elements[name].value = value;
    }
    form.addEventListener("input", () => this.#changed());
    form.addEventListener("reset", () => setTimeout(() => this.#changed()));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      form.hidePopover();
    });
    this.#changed();
  }

  /** Fields of a request; a seed always, so that an answer can be had again. */
  get request() {
    const request = { mode: this.form.elements.mode.value };
    for (const name of ["seed", "guidance", "temperature"]) {
      const input = this.form.elements[name];
      if (!Number.isNaN(input.valueAsNumber)) request[name] = input.valueAsNumber;
    }
    request.seed ??= crypto.getRandomValues(new Uint32Array(1))[0];
    return request;
  }

  get seed() {
    return this.form.elements.seed.value;
  }

  set seed(seed) {
    this.form.elements.seed.value = seed;
    this.#changed();
  }

  /** How many values are not the usual ones. */
  get nChanged() {
    const { mode, seed, guidance, temperature } = this.form.elements;
    const given = [seed, guidance, temperature].filter((input) => input.value);
    return (mode.value !== "interleaved") + given.length;
  }

  #changed() {
    const values = Object.fromEntries(new FormData(this.form));
    try {
      localStorage.setItem(STORED, JSON.stringify(values));
    } catch {
      // Kept for this visit only.
    }
    this.onchange(this);
  }
}

function stored() {
  try {
    return JSON.parse(localStorage.getItem(STORED)) ?? {};
  } catch {
    return {};
  }
}
