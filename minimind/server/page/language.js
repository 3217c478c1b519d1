/** The page's words in the language of <html lang>, which `theme.js` sets. */

import en from "./strings_en.js";
import zh from "./strings_zh.js";

const isChinese = () => document.documentElement.lang.startsWith("zh");

/** The string `key`, with each `{name}` in it replaced by `values[name]`. */
export function t(key, values = {}) {
  const table = isChinese() ? zh : en;
  return table[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Whether there is a string `key`. */
export const hasText = (key) => Object.hasOwn(zh, key);

/** What went wrong, an ApiError or what is kept of one, in words. */
export function errorText({ kind, message }) {
  return t(hasText(`error_${kind}`) ? `error_${kind}` : "error_failed", { message });
}

/** A number as the language writes it, with at most `digits` after the point. */
export function number(value, digits = 0) {
  return value.toLocaleString(document.documentElement.lang, { maximumFractionDigits: digits });
}

/**
 * Put words where the static page asks for them: data-text, data-label (also on hovering), data-placeholder.
 * Some are others where the model is of a certain `stage`.
 */
export function translate(root, stage) {
  const words = (key) => t(hasText(`${key}_${stage}`) ? `${key}_${stage}` : key);
  for (const node of root.querySelectorAll("[data-text]")) node.textContent = words(node.dataset.text);
  for (const node of root.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", t(node.dataset.label));
    if (node.nodeName === "BUTTON") node.title = t(node.dataset.label);
  }
  for (const node of root.querySelectorAll("[data-placeholder]")) node.placeholder = words(node.dataset.placeholder);
}
