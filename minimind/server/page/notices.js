/** Short words to the person: shown at the foot of the page, or only spoken by a screen reader. */

import { element, iconButton } from "./dom.js";
import { t } from "./language.js";

const SHOWN = 7000; // milliseconds
let timer;

/** Say `text` to a screen reader. */
export function announce(text) {
  document.getElementById("status").textContent = text;
}

/** Show `text` for a while, with a button `label` that calls `action` where those are given. */
export function toast(text, label, action) {
  const box = document.getElementById("toast");
  const close = () => {
    clearTimeout(timer);
    box.replaceChildren();
  };
  const act = () => {
    close();
    action();
  };
  box.replaceChildren(element("span", {}, text));
  if (action) box.append(element("button", { type: "button", class: "link", click: act }, label));
  box.append(iconButton("close", t("close"), close));
  clearTimeout(timer);
  timer = setTimeout(close, SHOWN);
}

let shownTopic = null;

/** Show `text` above the conversation until it is hidden; one topic at a time. `action` is what its button does. */
export function showBanner(topic, text, label, action) {
  const banner = document.querySelector(".banner");
  const [words, button] = banner.children;
  words.textContent = text;
  button.textContent = label;
  button.onclick = action;
  banner.hidden = false;
  shownTopic = topic;
}

/** Hide what is shown about `topic`. */
export function hideBanner(topic) {
  if (shownTopic !== topic) return;
  document.querySelector(".banner").hidden = true;
  shownTopic = null;
}

/** Ask for the API key in a dialog; resolves to it, or null. */
export function askForKey(refused) {
  const dialog = document.getElementById("key-dialog");
  const form = dialog.querySelector("form");
  const input = dialog.querySelector("input");
  dialog.querySelector(".refused").hidden = !refused;
  input.value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    let key = null;
    form.onsubmit = (event) => {
      event.preventDefault();
      key = input.value.trim() || null;
      dialog.close();
    };
    dialog.addEventListener("close", () => resolve(key), { once: true });
  });
}
