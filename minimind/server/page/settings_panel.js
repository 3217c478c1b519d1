/** The dialog of settings: sampling, system prompt, theme and language, the conversations as a file. */

import { element, icon } from "./dom.js";
import { t, translate } from "./language.js";
import { toast } from "./notices.js";
import { FIELDS, SEED_MOST, reset, set, setting } from "./settings.js";

const CHOICES = { theme: ["auto", "light", "dark"], language: ["auto", "zh", "en"] };
const LANGUAGES = { zh: "中文", en: "English" }; // each in its own words

export class SettingsPanel {
  /** onChats(): told when conversations were imported or deleted. */
  constructor({ dialog, store, chat, onChats }) {
    Object.assign(this, { dialog, store, chat, onChats });
    const on = (selector, type, act) => dialog.querySelector(selector).addEventListener(type, act);
    on(".close", "click", () => dialog.close());
    on(".reset", "click", () => {
      reset();
      this.show();
    });
    on("#system", "input", (event) => set("system", event.target.value));
    on(".export", "click", () => this.exportFile());
    on(".import", "click", () => dialog.querySelector(".file").click());
    on(".file", "change", (event) => this.importFile(event.target));
    on(".delete-all", "click", () => this.deleteAll());
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
  }

  open() {
    this.show();
    this.dialog.showModal();
  }

  show() {
    const fields = [...Object.keys(FIELDS).map((name) => this.numberField(name)), this.seedField()];
    this.dialog.querySelector(".fields").replaceChildren(...fields);
    this.dialog.querySelector("#system").value = setting("system");
    const choices = Object.keys(CHOICES).map((name) => this.choiceField(name));
    this.dialog.querySelector(".choices").replaceChildren(...choices);
  }

  /** A slider and the same value as a number beside it. */
  numberField(name) {
    const { min, max, step } = FIELDS[name];
    const limits = { min: String(min), max: String(max), step: String(step) };
    const note = element("p", { class: "note", id: `${name}-note` }, t(`${name}Note`));
    const box = element("input", { type: "number", id: name, "aria-describedby": note.id, ...limits });
    const slider = element("input", { type: "range", tabindex: "-1", "aria-hidden": "true", ...limits });
    const show = (value) => (box.value = slider.value = String(value));
    show(setting(name));
    slider.addEventListener("input", () => show(set(name, slider.value)));
    box.addEventListener("change", () => show(set(name, box.value)));
    const label = element("label", { for: name }, t(name));
    return element("div", { class: "field" }, element("div", { class: "field-head" }, label, box), slider, note);
  }

  seedField() {
    const note = element("p", { class: "note", id: "seed-note" }, t("seedNote"));
    const limits = { min: "0", max: String(SEED_MOST), step: "1" };
    const box = element("input", { type: "number", id: "seed", "aria-describedby": note.id, ...limits });
    box.placeholder = t("seedRandom");
    box.value = setting("seed") ?? "";
    box.addEventListener("change", () => (box.value = set("seed", box.value) ?? ""));
    const label = element("label", { for: "seed" }, t("seed"));
    return element("div", { class: "field" }, element("div", { class: "field-head" }, label, box), note);
  }

  choiceField(name) {
    const options = CHOICES[name].map((value) => {
      const input = element("input", { type: "radio", name, value });
      input.checked = window.appearance.chosen[name] === value;
      input.addEventListener("change", () => window.appearance.choose(name, value));
      return element("label", {}, input, element("span", {}, LANGUAGES[value] ?? t(value)));
    });
    const legend = element("legend", {}, t(name));
    return element("fieldset", { class: "choice" }, legend, element("div", { class: "segments" }, ...options));
  }

  /** The language changed while the dialog is open. */
  translate() {
    translate(this.dialog);
    const focused = document.activeElement;
    const { name, value } = this.dialog.contains(focused) ? focused : {};
    this.show();
    if (name) this.dialog.querySelector(`input[name="${name}"][value="${value}"]`)?.focus();
  }

  exportFile() {
    const url = URL.createObjectURL(new Blob([this.store.exportText()], { type: "application/json" }));
    const day = new Date().toISOString().slice(0, 10);
    element("a", { href: url, download: `minimind-${day}.json` }, icon("download")).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  }

  async importFile(input) {
    const text = (await input.files[0]?.text().catch(() => "")) ?? "";
    input.value = ""; // the same file may be chosen again
    const count = this.store.importText(text);
    this.dialog.close();
    toast(count === null ? t("importFailed") : t("imported", { count }));
    if (count) this.onChats();
  }

  deleteAll() {
    const conversations = this.store.list();
    for (const conversation of conversations) {
      this.chat.stop(conversation);
      this.store.remove(conversation.id);
    }
    this.dialog.close();
    this.onChats();
    if (conversations.length === 0) return;
    toast(t("deletedAll", { count: conversations.length }), t("undo"), () => {
      for (const conversation of conversations) this.store.save(conversation);
      this.onChats();
    });
  }
}
