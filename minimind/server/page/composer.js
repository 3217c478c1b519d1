/** Where the person writes: grows with the text, sends on Enter, and stops an answer. */

import { icon } from "./dom.js";
import { t } from "./language.js";
import { isComposing } from "./message_view.js";

export class Composer {
  /** form: holds a <textarea> and a button. onSend(text) and onStop() do what they say. */
  constructor(form, onSend, onStop) {
    this.area = form.querySelector("textarea");
    this.button = form.querySelector("button");
    this.onSend = onSend;
    this.busy = false;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.busy) onStop();
      else this.send();
    });
    this.area.addEventListener("input", () => this.fit());
    this.area.addEventListener("keydown", (event) => {
      if (isComposing(event)) return;
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        if (!this.busy) this.send();
      } else if (event.key === "Escape" && this.busy) onStop();
    });
    this.show(false);
  }

  send() {
    const text = this.area.value.trim();
    if (!text) return;
    this.area.value = "";
    this.onSend(text);
    this.fit();
  }

  /** Whether an answer is coming, which the button then stops. */
  show(busy) {
    this.busy = busy;
    const label = t(busy ? "stop" : "send");
    this.button.replaceChildren(icon(busy ? "stop" : "send"));
    this.button.setAttribute("aria-label", label);
    this.button.title = label;
    this.fit();
  }

  fit() {
    this.button.disabled = !this.busy && this.area.value.trim() === "";
    this.area.style.height = "auto";
    this.area.style.height = `${this.area.scrollHeight}px`; // the style sheet sets the most
  }

  focus() {
    this.area.focus();
  }
}
