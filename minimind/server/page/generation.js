/** One answer that is being written: asks the server for it, fills in its message, keeps the time. */

import { ApiError } from "./api.js";
import { requestFields, setting } from "./settings.js";

const BASE = "minimind"; // what the server calls the base weights
const SHORTEST = 0.05; // seconds; what came at once says nothing about speed

export class Generation {
  /** message: the empty answer at the end of `conversation`. model: as listed, or null. */
  constructor(api, conversation, message, model) {
    this.api = api;
    this.message = message;
    this.abort = new AbortController();
    this.body = { model: model?.id ?? BASE, messages: promptOf(conversation), ...requestFields() };
    message.most = model?.minimind?.max_length;
  }

  /** Seconds since thinking began, while it lasts; null otherwise. */
  get thinkingSeconds() {
    return this.thinkingSince ? (performance.now() - this.thinkingSince) / 1000 : null;
  }

  stop() {
    this.abort.abort();
  }

  /** Let the answer come; `onChange` is called after each piece. What goes wrong ends up in the message. */
  async run(onChange) {
    const { message } = this;
    try {
      for await (const event of this.api.stream(this.body, this.abort.signal)) {
        this.take(event);
        onChange();
      }
    } catch (error) {
      if (this.abort.signal.aborted) message.finish = "stopped";
      else if (error instanceof ApiError) {
        const retryAt = Date.now() + error.retryAfter * 1000;
        message.error = { kind: error.kind, message: error.message, retryAt };
      } else throw error;
    } finally {
      this.endThinking();
      message.finish ||= message.error ? "error" : "stop";
    }
  }

  take({ reasoning, content, finish, usage }) {
    const { message } = this;
    if (reasoning || content) {
      this.last = performance.now();
      this.first ??= this.last;
    }
    if (reasoning) {
      this.thinkingSince ??= this.last;
      message.reasoning += reasoning;
    }
    if (content) {
      this.endThinking();
      message.content += content;
    }
    if (finish) message.finish = finish;
    if (usage) {
      message.prompt = usage.prompt_tokens;
      message.tokens = usage.completion_tokens;
      const seconds = (this.last - this.first) / 1000;
      // The first token ends the wait for the prompt; the others were drawn in this time.
      if (seconds > SHORTEST && message.tokens > 1) message.speed = (message.tokens - 1) / seconds;
    }
  }

  /** Thinking that begins again after a part of the answer counts on. */
  endThinking() {
    if (!this.thinkingSince) return;
    this.message.thinkingSeconds = (this.message.thinkingSeconds ?? 0) + this.thinkingSeconds;
    this.thinkingSince = undefined;
  }
}

/**
 * What the model gets to read: questions and their answers in turn, without its thoughts. A question whose answer
 * never came is left out, as in the terminal's chat.
 */
function promptOf({ messages }) {
  const asked = messages.slice(0, -1); // the last is the answer that is to come
  const whole = asked.filter(({ role, content }, index) => {
    const answer = role === "user" ? asked[index + 1]?.content : content;
    return index === asked.length - 1 || answer !== "";
  });
  const turns = whole.map(({ role, content }) => ({ role, content }));
  return setting("system").trim() ? [{ role: "system", content: setting("system") }, ...turns] : turns;
}
