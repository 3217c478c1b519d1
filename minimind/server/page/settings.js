/** How answers are drawn: the values a person chose, within sane limits, kept in the browser. */

const KEY = "minimind.settings";

/** Limits and defaults (those of `minimind/chat/options.py`); top_k 0 is no limit, seed null is another each time. */
export const FIELDS = {
  temperature: { min: 0, max: 2, step: 0.05, start: 0.85 },
  top_p: { min: 0.05, max: 1, step: 0.05, start: 0.85 },
  top_k: { min: 0, max: 200, step: 1, start: 0 },
  repetition_penalty: { min: 1, max: 2, step: 0.01, start: 1.05 },
  max_tokens: { min: 1, max: 8192, step: 1, start: 1024 },
};
export const SEED_MOST = Number.MAX_SAFE_INTEGER;

const settings = { ...defaults(), system: "" };
load();

/** The value of `name` as it stands. */
export function setting(name) {
  return name === "max_tokens" ? Math.min(settings.max_tokens, FIELDS.max_tokens.max) : settings[name];
}

/** Set `name` to the nearest value that makes sense, and keep it. Returns that value. */
export function set(name, value) {
  settings[name] = sane(name, value);
  keep();
  return settings[name];
}

/** Back to the defaults; the system prompt, which is a text of the person's own, stays. */
export function reset() {
  Object.assign(settings, defaults());
  keep();
}

/** A model of at most `tokens` cannot answer with more. */
export function limitTokens(tokens) {
  FIELDS.max_tokens.max = tokens > 0 ? Math.floor(tokens) : 8192;
}

/** The fields of a request for an answer. */
export function requestFields() {
  const { temperature, top_p, top_k, repetition_penalty, seed } = settings;
  const fields = { temperature, top_p, repetition_penalty, max_tokens: setting("max_tokens") };
  if (top_k > 0) fields.top_k = top_k;
  if (seed !== null) fields.seed = seed;
  return fields;
}

function defaults() {
  return { ...Object.fromEntries(Object.entries(FIELDS).map(([name, { start }]) => [name, start])), seed: null };
}

function keep() {
  try {
    localStorage.setItem(KEY, JSON.stringify(settings));
  } catch {
    // they hold until the page is left
  }
}

function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY)) ?? {};
    for (const name of Object.keys(settings)) if (name in kept) settings[name] = sane(name, kept[name]);
  } catch {
    // nothing kept, or nothing of ours: the defaults hold
  }
}

function sane(name, value) {
  if (name === "system") return typeof value === "string" ? value : "";
  const given = value !== null && value !== "" && Number.isFinite(Number(value));
  if (name === "seed") return given ? Math.min(Math.max(Math.round(Number(value)), 0), SEED_MOST) : null;
  const { min, max, step, start } = FIELDS[name];
  if (!given) return start;
  const steps = Math.round(Math.min(Math.max(Number(value), min), max) / step);
  return Number((steps * step).toFixed(2)); // 0.15000000000000002
}
