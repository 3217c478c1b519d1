/** One answer that is being written: asks the server for it, fills in its message, keeps the time. */

import { ApiError } from "./api.js";
import { requestFields, setting } from "./settings.js";

const BASE = "minimind"; // what the server calls the base weights
const TOO_LONG = "context_length_exceeded"; // OpenAI's word for messages that do not fit
const SHORTEST = 0.05; // seconds; what came at once says nothing about speed

export class Generation {
  /** message: the empty answer at the end of `conversation`. model: as listed, or null. */
  constructor(api, conversation, message, model) {
    this.api = api;
    this.message = message;
    this.abort = new AbortController();
    this.model = model?.id ?? BASE;
    this.continues = model?.minimind?.stage === "pretrain"; // a text: it knows no turns
    const said = conversation.messages.slice(0, -1);
    this.turns = turnsOf(this.continues ? said.slice(-1) : said);
    message.most = model?.minimind?.max_length;
    message.leftOut = 0;
    this.fit(conversation);
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
      while (!(await this.ask(onChange)));
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

  /** Whether the answer came; if not, the conversation was too long, and is now shorter. */
  async ask(onChange) {
    const messages = this.prompt();
    const asked = this.continues ? { prompt: messages[0].content } : { messages };
    const body = { model: this.model, ...asked, ...requestFields() };
    this.message.characters = charactersOf(messages);
    try {
      for await (const event of this.api.stream(body, this.abort.signal)) {
        this.take(event);
        onChange();
      }
    } catch (error) {
      if (error.code !== TOO_LONG || this.turns.length < 2) throw error;
      this.leaveOut(Math.ceil(this.turns.length / 4));
      return false;
    }
    return true;
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

  prompt() {
    const system = setting("system").trim() && !this.continues ? [{ role: "system", content: setting("system") }] : [];
    return [...system, ...this.turns.flat()];
  }

  /**
   * Leave out the oldest turns until the rest should fit beside an answer, as in the terminal's chat. How many
   * tokens a text takes is told from the last answer's; the server has the last word.
   */
  fit({ messages }) {
    const known = messages.findLast(({ prompt, characters }) => prompt && characters);
    const { most } = this.message;
    if (!known || !most) return;
    const room = most - Math.min(setting("max_tokens"), Math.floor(most / 4));
    const tokens = () => (charactersOf(this.prompt()) * known.prompt) / known.characters;
    while (this.turns.length > 1 && tokens() > room) this.leaveOut(1);
  }

  leaveOut(count) {
    this.turns.splice(0, count);
    this.message.leftOut += count;
  }
}

/**
 * Questions with their answers, as the model gets to read them: without thoughts. A question whose answer never
 * came is left out, as in the terminal's chat.
 */
function turnsOf(messages) {
  const turns = [];
  messages.forEach(({ role, content }, index) => {
    const answer = role === "user" ? messages[index + 1]?.content : content;
    if (answer === "") return;
    if (role === "user" || turns.length === 0) turns.push([]);
    turns.at(-1).push({ role, content });
  });
  return turns;
}

const charactersOf = (messages) => messages.reduce((sum, { content }) => sum + content.length, 0);
