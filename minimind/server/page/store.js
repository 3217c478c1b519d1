/**
 * Conversations in the browser's localStorage, one entry each, so that two tabs do not overwrite each other's.
 * What cannot be stored is kept in memory, and said.
 */

const PREFIX = "minimind.chat.";
const FORMAT = "minimind-conversations";
const LONGEST_TITLE = 60; // characters
const TITLE_FROM_MESSAGE = 30;

/** A conversation that has no message yet; it is stored with its first. */
export function newConversation() {
  const id = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random().toString(36).slice(2)}`; // plain http has none
  return { id, title: "", created: Date.now(), updated: Date.now(), messages: [] };
}

/** A title from the first words of a message. */
export function titleFrom(text) {
  const words = [...text.trim().replace(/\s+/g, " ").slice(0, 4 * TITLE_FROM_MESSAGE)];
  return words.length > TITLE_FROM_MESSAGE ? `${words.slice(0, TITLE_FROM_MESSAGE).join("")}…` : words.join("");
}

export class Store {
  /**
   * onTrouble(key): told "storageFull" or "storageOff" where a conversation is not stored, and null when one is.
   * onChange(id): told when another tab changed a conversation, or removed it.
   */
  constructor(onTrouble, onChange) {
    this.conversations = new Map();
    this.onTrouble = onTrouble;
    this.pending = new Map(); // id → timer of a save that waits
    this.storage = openStorage();
    if (!this.storage) return;
    for (const key of Object.keys(this.storage)) this.read(key);
    addEventListener("storage", ({ key }) => {
      if (!key?.startsWith(PREFIX)) return;
      this.conversations.delete(key.slice(PREFIX.length));
      this.read(key);
      onChange(key.slice(PREFIX.length));
    });
    addEventListener("pagehide", () => [...this.pending.keys()].forEach((id) => this.saveNow(id)));
  }

  read(key) {
    if (!key.startsWith(PREFIX)) return;
    const conversation = conversationFrom(parse(this.storage.getItem(key)));
    if (conversation) this.conversations.set(conversation.id, conversation);
  }

  /** All conversations, the one used last first. */
  list() {
    return [...this.conversations.values()].sort((a, b) => b.updated - a.updated);
  }

  get(id) {
    return this.conversations.get(id);
  }

  /** Keep a conversation; while an answer comes, within a second. */
  save(conversation, soon = false) {
    this.conversations.set(conversation.id, conversation);
    if (!soon) this.saveNow(conversation.id);
    else if (!this.pending.has(conversation.id)) {
      this.pending.set(conversation.id, setTimeout(() => this.saveNow(conversation.id), 1000));
    }
  }

  saveNow(id) {
    clearTimeout(this.pending.get(id));
    this.pending.delete(id);
    const conversation = this.conversations.get(id);
    if (!conversation) return; // deleted since
    if (!this.storage) return this.onTrouble("storageOff");
    try {
      this.storage.setItem(PREFIX + id, JSON.stringify(conversation));
      this.onTrouble(null);
    } catch {
      this.onTrouble("storageFull");
    }
  }

  remove(id) {
    clearTimeout(this.pending.get(id));
    this.pending.delete(id);
    this.conversations.delete(id);
    this.storage?.removeItem(PREFIX + id);
  }

  /** All conversations as the text of a file. */
  exportText() {
    return JSON.stringify({ format: FORMAT, version: 1, conversations: this.list() }, null, 1);
  }

  /** Add the conversations of such a text; those with the id of one here replace it. Returns how many, or null. */
  importText(text) {
    const file = parse(text);
    if (file?.format !== FORMAT || !Array.isArray(file.conversations)) return null;
    const found = file.conversations.map(conversationFrom).filter((conversation) => conversation !== null);
    for (const conversation of found) this.save(conversation);
    return found.length;
  }
}

function openStorage() {
  try {
    localStorage.setItem("minimind.probe", "");
    localStorage.removeItem("minimind.probe");
    return localStorage;
  } catch (error) {
    return error.name === "QuotaExceededError" ? localStorage : null;
  }
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** A conversation out of what a file or the storage holds, or null: neither need be what this page wrote. */
function conversationFrom(value) {
  if (typeof value?.id !== "string" || !/^[\w-]{1,64}$/.test(value.id) || !Array.isArray(value.messages)) return null;
  const messages = value.messages.map(messageFrom);
  if (messages.length === 0 || messages.includes(null)) return null;
  return {
    id: value.id,
    title: string(value.title).slice(0, LONGEST_TITLE),
    created: finite(value.created) ?? 0,
    updated: finite(value.updated) ?? 0,
    messages,
  };
}

function messageFrom(value) {
  if (!["user", "assistant"].includes(value?.role) || typeof value.content !== "string") return null;
  if (value.role === "user") return { role: "user", content: value.content };
  const finish = string(value.finish);
  const error = value.error ?? (finish ? null : { kind: "broken" }); // the page was left while the answer came
  return {
    role: "assistant",
    content: value.content,
    reasoning: string(value.reasoning),
    thinkingSeconds: finite(value.thinkingSeconds),
    speed: finite(value.speed),
    prompt: finite(value.prompt),
    tokens: finite(value.tokens),
    most: finite(value.most),
    characters: finite(value.characters),
    leftOut: finite(value.leftOut),
    finish: finish || "error",
    error: error ? { kind: string(error.kind), message: string(error.message), retryAt: 0 } : undefined,
  };
}

const string = (value) => (typeof value === "string" ? value : "");
const finite = (value) => (Number.isFinite(value) && value >= 0 ? value : undefined);
