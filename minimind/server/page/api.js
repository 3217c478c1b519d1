/** The server's OpenAI-compatible API: the list of models, and answers while they come. */

const KEY = "minimind.key";
const SENDABLE = /^[\x21-\x7e]*$/; // what a header can hold

/** What went wrong, for `error_{kind}` in the tables of strings. */
export class ApiError extends Error {
  /**
   * kind: "network" (no connection), "broken" (ended early), "busy" (429), "unauthorized" (401),
   * "refused" (other 4xx) or "failed" (5xx, or what is no such API).
   * message: the server's own words. code: its word for programs. retryAfter: seconds, where it is busy.
   */
  constructor(kind, message = "", { code = "", retryAfter = 0 } = {}) {
    super(message);
    this.kind = kind;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

export class Api {
  /** askForKey(refused): resolves to a key, or null where the person gives none. */
  constructor(askForKey) {
    this.askForKey = askForKey;
    this.asking = null;
  }

  /** The models, each `{id, minimind: {stage, adapter, max_length, reasoning}}`. Raises: ApiError. */
  async models() {
    const response = await this.request("v1/models", {});
    const list = (await jsonOf(response))?.data;
    if (!Array.isArray(list)) throw new ApiError("failed", "GET /v1/models");
    return list.filter((model) => typeof model?.id === "string");
  }

  /**
   * Ask for an answer to `body.messages`, or for what follows `body.prompt`; yields `{reasoning}`, `{content}`,
   * `{finish}` and `{usage}` as they come.
   * Raises: ApiError, and AbortError when `signal` ends it.
   */
  async *stream(body, signal) {
    const whole = { ...body, stream: true, stream_options: { include_usage: true } };
    const init = { method: "POST", body: JSON.stringify(whole), signal };
    const response = await this.request("prompt" in body ? "v1/completions" : "v1/chat/completions", init);
    if (!response.headers.get("content-type")?.startsWith("text/event-stream")) {
      throw new ApiError("failed", errorMessage(await jsonOf(response)) || "no event stream");
    }
    let finished = false;
    for await (const data of events(response.body, signal)) {
      if (data === "[DONE]") return;
      const chunk = parse(data);
      if (chunk === null) throw new ApiError("broken");
      if (chunk.error) throw new ApiError("failed", errorMessage(chunk));
      const choice = chunk.choices?.[0];
      const { reasoning_content: reasoning, content = choice?.text } = choice?.delta ?? {};
      if (reasoning && typeof reasoning === "string") yield { reasoning };
      if (content && typeof content === "string") yield { content };
      if (choice?.finish_reason) yield { finish: String(choice.finish_reason) };
      if (chunk.usage) yield { usage: chunk.usage };
      finished ||= Boolean(choice?.finish_reason);
    }
    if (!finished) throw new ApiError("broken");
  }

  /** fetch with the key there is; asks for one where it is missing or refused, and tries again. */
  async request(path, init) {
    for (;;) {
      const key = readKey();
      const response = SENDABLE.test(key) ? await send(path, init, key) : { ok: false, status: 401 };
      if (response.ok) return response;
      if (response.status !== 401) throw await errorOf(response);
      if (key === readKey()) {
        this.asking ??= this.askForKey(Boolean(key)).finally(() => (this.asking = null)); // once for all requests
        const given = await this.asking;
        init.signal?.throwIfAborted();
        if (!given) throw new ApiError("unauthorized");
        keepKey(given);
      }
    }
  }
}

async function send(path, init, key) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  try {
    return await fetch(path, { ...init, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError("network");
  }
}

let rememberedKey = ""; // where the browser's storage is switched off

function readKey() {
  try {
    return sessionStorage.getItem(KEY) ?? rememberedKey;
  } catch {
    return rememberedKey;
  }
}

function keepKey(key) {
  rememberedKey = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // it holds until the page is left
  }
}

async function errorOf(response) {
  const body = await jsonOf(response);
  const message = errorMessage(body) || `HTTP ${response.status}`;
  if (response.status === 429) return new ApiError("busy", message, { retryAfter: retryAfter(response) });
  return new ApiError(response.status < 500 ? "refused" : "failed", message, { code: body?.error?.code });
}

/** Seconds that the server asks to wait: Retry-After holds them, or a date. */
function retryAfter(response) {
  const header = response.headers.get("retry-after") ?? "";
  const seconds = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.min(Math.max(Math.ceil(seconds), 1), 600) : 1;
}

const errorMessage = (body) => (typeof body?.error?.message === "string" ? body.error.message : "");

async function jsonOf(response) {
  return parse(await response.text().catch(() => ""));
}

function parse(text) {
  try {
    const value = JSON.parse(text);
    return typeof value === "object" ? value : null;
  } catch {
    return null;
  }
}

/** The `data` of each server-sent event (html.spec.whatwg.org, 9.2) in a body. */
async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let lines = [];
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const pieces = (rest + value).split("\n");
      rest = pieces.pop();
      for (const piece of pieces) {
        const line = piece.replace(/\r$/, "");
        if (line.startsWith("data:")) lines.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && lines.length) {
          yield lines.join("\n");
          lines = [];
        }
      }
    }
  } catch (error) {
    throw error instanceof ApiError || signal.aborted ? error : new ApiError("broken");
  } finally {
    reader.cancel().catch(() => {}); // the server shall stop writing
  }
}
