/** A message on the page, and the buttons under it. */

import { copyText, element, icon, iconButton } from "./dom.js";
import { errorText, number, t } from "./language.js";
import { renderMarkdown } from "./markdown.js";
import { announce, toast } from "./notices.js";

const SHOWN = 1500; // milliseconds that a button says "copied"

/** A button that copies what `text()` returns, and says whether that worked. */
function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    if (!(await copyText(text()))) return toast(t("copyFailed"));
    button.replaceChildren(icon("check"));
    announce(t("copied"));
    setTimeout(() => button.replaceChildren(icon("copy")), SHOWN);
  });
  return button;
}

/** What a person wrote. actions: `edit(text)`. */
export class QuestionView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.node = element("article", { class: "question", "aria-label": t("you") });
    this.show();
  }

  update() {}

  show() {
    const { message } = this;
    this.editButton = iconButton("edit", t("editMessage"), () => this.showEditor());
    this.node.replaceChildren(
      element("div", { class: "bubble", dir: "auto" }, message.content),
      element("div", { class: "actions" }, copyButton(t("copy"), () => message.content), this.editButton),
    );
  }

  showEditor() {
    const { message, actions } = this;
    const area = element("textarea", { class: "edit-area", "aria-label": t("editMessage"), rows: "3" });
    area.value = message.content;
    const cancel = () => {
      this.show();
      this.editButton.focus();
    };
    const send = () => area.value.trim() && actions.edit(area.value);
    area.addEventListener("keydown", (event) => {
      if (isComposing(event)) return;
      if (event.key === "Escape") cancel();
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
      }
    });
    const button = (name, key, click) => element("button", { type: "button", class: name, click }, t(key));
    const buttons = [button("plain", "cancel", cancel), button("primary", "send", send)];
    const row = element("div", { class: "edit-row" }, element("span", { class: "note" }, t("editNote")), ...buttons);
    this.node.replaceChildren(element("div", { class: "edit" }, area, row));
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

/** Whether a key belongs to an input method, which is choosing characters: 229 is what Safari says at its end. */
export const isComposing = (event) => event.isComposing || event.keyCode === 229;

/** What the model wrote. actions: `again()`. */
export class AnswerView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.label = element("span");
    this.thoughts = element("div", { class: "markdown thoughts", dir: "auto" });
    this.thinking = element("details", { class: "thinking", hidden: true, toggle: () => this.renderThoughts() });
    this.thinking.append(element("summary", {}, icon("chevron"), this.label), this.thoughts);
    this.body = element("div", { class: "markdown", dir: "auto" });
    const dots = [element("i"), element("i"), element("i")];
    this.waiting = element("div", { class: "waiting", role: "img", "aria-label": t("waiting") }, ...dots);
    this.problem = element("div", { class: "problem", hidden: true });
    this.foot = element("div", { class: "foot", hidden: true });
    this.node = element("article", { class: "answer", "aria-label": t("answer") });
    this.node.append(this.thinking, this.body, this.waiting, this.problem, this.foot);
  }

  /** Show the message as it stands. generation: what is writing it, or undefined. last: whether nothing follows. */
  update(generation, last) {
    const { message } = this;
    this.node.classList.toggle("streaming", Boolean(generation));
    this.waiting.hidden = !generation || message.content !== "" || message.reasoning !== "";
    this.thinking.hidden = message.reasoning === "";
    const seconds = generation?.thinkingSeconds ?? null;
    const live = seconds !== null;
    this.thinking.classList.toggle("live", live);
    if (!this.thinking.hidden) {
      this.label.textContent = live ? t("thinkingNow", { seconds: Math.floor(seconds) }) : this.thoughtLabel();
      this.renderThoughts();
    }
    this.render(this.body, message.content);
    if (generation) return;
    this.showProblem(last);
    this.showFoot(last);
  }

  thoughtLabel() {
    const seconds = this.message.thinkingSeconds;
    if (seconds === undefined) return t("thought");
    return t("thoughtFor", { seconds: number(seconds, seconds < 10 ? 1 : 0) });
  }

  renderThoughts() {
    if (this.thinking.open) this.render(this.thoughts, this.message.reasoning);
  }

  render(container, text) {
    renderMarkdown(container, text, (language, code) => {
      const name = element("span", { class: "code-name" }, language || t("code"));
      return element("div", { class: "code-head" }, name, copyButton(t("copyCode"), code));
    });
  }

  showProblem(last) {
    const { error } = this.message;
    clearInterval(this.countdown);
    this.problem.hidden = !error;
    if (!error) return;
    this.problem.replaceChildren(element("span", {}, errorText(error)));
    if (last) this.problem.append(this.retryButton(error));
  }

  /** Where the server asked to wait, the button counts down first. */
  retryButton(error) {
    const button = element("button", { type: "button", class: "plain", click: () => this.actions.again() });
    const show = () => {
      const seconds = Math.ceil((error.retryAt - Date.now()) / 1000);
      button.disabled = seconds > 0;
      button.textContent = seconds > 0 ? t("retryIn", { seconds }) : t("retry");
      if (seconds <= 0) clearInterval(this.countdown);
    };
    this.countdown = setInterval(show, 250);
    show();
    return button;
  }

  showFoot(last) {
    const { message, actions } = this;
    this.foot.hidden = false;
    this.foot.replaceChildren();
    const buttons = element("div", { class: "actions" });
    if (message.content) buttons.append(copyButton(t("copy"), () => message.content));
    if (last && !message.error) buttons.append(iconButton("again", t("regenerate"), () => actions.again()));
    this.foot.append(buttons, element("span", { class: "figures" }, this.figures().join(" · ")));
  }

  figures() {
    const { content, reasoning, finish, error, tokens, prompt, speed, most, leftOut } = this.message;
    const figures = [];
    if (finish === "stop" && !content && !reasoning) figures.push(t("empty"));
    if (finish === "stopped" && !error) figures.push(t("stopped"));
    if (finish === "length") figures.push(t("cutOff"));
    if (tokens !== undefined) figures.push(t("tokens", { count: number(tokens) }));
    if (speed !== undefined) figures.push(t("speed", { speed: number(speed, speed < 10 ? 1 : 0) }));
    if (tokens !== undefined && prompt !== undefined && most) {
      figures.push(t("context", { used: number(prompt + tokens), most: number(most) }));
    }
    if (leftOut) figures.push(t("leftOut", { count: number(leftOut) }));
    return figures;
  }
}
