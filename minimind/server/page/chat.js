/** The conversation on the page: asking, answering, editing, and what is shown of it. */

import { Generation } from "./generation.js";
import { errorText, t } from "./language.js";
import { AnswerView, QuestionView } from "./message_view.js";
import { announce } from "./notices.js";
import { newConversation, titleFrom } from "./store.js";

const NEAR = 48; // pixels from the end of the log that still count as its end
const TICK = 200; // milliseconds between updates of the seconds of thinking

export class Chat {
  /**
   * log: the element that scrolls. onChange(): told when another conversation is shown, or an answer begins or
   * ends. onAsk(): told when a question was put. onScroll(atEnd): told whether the end of the log is in sight.
   */
  constructor({ api, store, models, log, onChange, onAsk, onScroll }) {
    Object.assign(this, { api, store, models, log, onChange, onAsk, onScroll });
    this.column = log.querySelector(".messages");
    this.generations = new Map(); // conversation → what writes its last message, also while another is shown
    this.conversation = newConversation();
    this.views = [];
    this.atEnd = true;
    log.addEventListener("scroll", () => {
      this.atEnd = this.isNearEnd();
      onScroll(this.atEnd);
    });
    new ResizeObserver(() => this.followEnd()).observe(log); // a keyboard came up, the composer grew
  }

  /** What writes the last message of the conversation shown, or undefined. */
  get generation() {
    return this.generations.get(this.conversation);
  }

  /** Show the conversation with this id, or a new one. */
  open(id) {
    this.conversation = this.store.get(id) ?? newConversation();
    this.atEnd = true;
    this.rebuild();
    this.onChange();
  }

  /** Make all messages anew, for one more language or another conversation. */
  rebuild() {
    this.views = [];
    this.column.replaceChildren();
    this.update();
  }

  /** Make the page say what the conversation holds; messages that are there already stay. */
  update() {
    this.drawn = false;
    const { messages } = this.conversation;
    const changed = this.views.findIndex((view, index) => view.message !== messages[index]);
    for (const view of changed < 0 ? [] : this.views.splice(changed)) view.node.remove();
    for (const message of messages.slice(this.views.length)) {
      const view = message.role === "user" ? this.questionView(message) : this.answerView(message);
      this.views.push(view);
      this.column.append(view.node);
    }
    this.views.forEach((view, index) => {
      const last = index === messages.length - 1;
      if (last || view.wasLast !== last) view.update(last ? this.generation : undefined, last);
      view.wasLast = last;
    });
    this.followEnd();
  }

  followEnd() {
    if (this.atEnd) this.log.scrollTop = this.log.scrollHeight;
    this.onScroll(this.isNearEnd());
  }

  isNearEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.log;
    return scrollHeight - scrollTop - clientHeight < NEAR;
  }

  toEnd() {
    this.atEnd = true;
    this.followEnd();
  }

  questionView(message) {
    const { conversation } = this;
    const { messages } = conversation;
    const edit = (text) => {
      this.stop(conversation);
      const index = messages.indexOf(message);
      if (index === 0 && conversation.title === titleFrom(message.content)) conversation.title = "";
      messages.length = index;
      this.send(text);
    };
    return new QuestionView(message, { edit });
  }

  answerView(message) {
    return new AnswerView(message, { again: () => this.again() });
  }

  /** Ask `text` at the end of the conversation. */
  send(text) {
    const { conversation } = this;
    if (conversation.messages.length === 0) conversation.title ||= titleFrom(text);
    conversation.messages.push({ role: "user", content: text });
    this.answer();
  }

  /** Answer the last question anew. */
  again() {
    if (this.generation) return;
    const { messages } = this.conversation;
    if (messages.at(-1)?.role === "assistant") messages.pop();
    this.answer();
  }

  /** End the answer that comes, if one does; what has come is kept. */
  stop(conversation = this.conversation) {
    this.generations.get(conversation)?.stop();
    this.generations.delete(conversation);
  }

  /** Have the last question answered. */
  async answer() {
    const { conversation } = this;
    const message = { role: "assistant", content: "", reasoning: "" };
    conversation.messages.push(message);
    conversation.updated = Date.now();
    const generation = new Generation(this.api, conversation, message, this.models.current);
    this.generations.set(conversation, generation);
    this.store.save(conversation);
    this.atEnd = true;
    this.update();
    this.onChange();
    this.onAsk();
    announce(t("answering"));

    const ticking = setInterval(() => this.updateSoon(conversation), TICK);
    try {
      await generation.run(() => {
        this.store.save(conversation, true);
        this.updateSoon(conversation);
      });
    } finally {
      clearInterval(ticking);
      if (this.generations.get(conversation) === generation) this.generations.delete(conversation);
      if (this.store.get(conversation.id)) this.store.save(conversation);
      if (conversation === this.conversation) this.update();
      this.onChange();
    }
    announce(message.error ? errorText(message.error) : t("answered", { text: message.content }));
  }

  /** Update at the next frame, if the conversation is the one shown. */
  updateSoon(conversation) {
    if (conversation !== this.conversation || this.drawn) return;
    this.drawn = true;
    requestAnimationFrame(() => this.drawn && this.update());
  }
}
