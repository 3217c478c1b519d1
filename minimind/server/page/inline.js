/**
 * Markdown inside a line (code, links, emphasis) as DOM nodes.
 *
 * Emphasis is found with CommonMark's stack of delimiters (spec.commonmark.org, "Phase 2: inline structure").
 * Unlike there, `**中文。**后` is bold although a full stop stands inside, a line break is a line break, and
 * `2*3*4` stays what it is. Time grows with the length of the text alone, whatever a model writes.
 */

import { element } from "./dom.js";

const TOKEN = new RegExp(
  [
    "\\\\(?<escaped>[!-/:-@\\[-`{-~])",
    "(?<ticks>`+)",
    "(?<run>\\*+|_+|~~)",
    "(?<open>!?\\[)",
    "(?<close>\\])",
    "<(?<angled>https?://[^\\s<>]+)>",
    "(?<bare>https?://[\\w\\-.~:/?#@!$&'()+,;=%]+)", // ASCII only: 见https://example.com的说明
    "\\\\?(?<br>\\n)",
  ].join("|"),
  "gi",
);
const DESTINATION = /\(\s*<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y;
const TIMES = /\w\*\w|[\d)%] ?\*[\d($.]/; // 2*3*4, (5 - 2)*$6, 20% *3: a product, as models write it
const DEEPEST = 16; // emphasis in emphasis; deeper stays text, for a browser's layout is recursive

/** `text` as a DocumentFragment. */
export function renderInline(text) {
  const out = document.createDocumentFragment();
  const marks = []; // runs of * _ ~~ that may begin or end emphasis
  let brackets = []; // [ that may begin a link
  const ticks = backticksOf(text);
  let at = 0;

  for (TOKEN.lastIndex = 0; at < text.length; ) {
    const found = TOKEN.exec(text);
    if (found === null) break;
    const { escaped, ticks: fence, run, open, close, angled, bare, br } = found.groups;
    const end = TOKEN.lastIndex;
    if (found.index > at) out.append(text.slice(at, found.index));
    at = end;

    if (escaped) out.append(escaped);
    else if (br) out.append(element("br"));
    else if (fence) {
      const closing = ticks.after(fence.length, end);
      if (closing < 0) out.append(fence);
      else {
        out.append(element("code", {}, trimOnce(text.slice(end, closing).replaceAll("\n", " "))));
        at = closing + fence.length;
      }
    } else if (angled) out.append(link(angled) ?? found[0]);
    else if (bare) {
      const url = withoutTrail(bare);
      out.append(link(url) ?? url);
      at = found.index + url.length;
    } else if (run) {
      const node = document.createTextNode(run);
      out.append(node);
      marks.push({ node, char: run[0], count: run.length, length: run.length, ...flanks(text, found.index, end) });
    } else if (open) {
      const node = document.createTextNode(open);
      out.append(node);
      brackets.push({ node, marks: marks.length });
    } else if (close) {
      const bracket = brackets.pop();
      DESTINATION.lastIndex = end;
      const destination = bracket && DESTINATION.exec(text);
      const anchor = destination && link(destination[1]);
      if (!anchor) out.append(close);
      else {
        emphasise(marks.splice(bracket.marks));
        fill(anchor, bracket.node);
        bracket.node.replaceWith(anchor);
        brackets = []; // no links in links
        at = DESTINATION.lastIndex;
      }
    }
    TOKEN.lastIndex = at;
  }
  out.append(text.slice(at));
  emphasise(marks);
  out.normalize();
  return out;
}

/** An <a> to `url`, or null unless that is an http or https address. */
function link(url) {
  let parsed;
  try {
    parsed = new URL(url);
  } catch {
    return null;
  }
  if (!["http:", "https:"].includes(parsed.protocol)) return null;
  const attributes = { href: parsed.href, title: parsed.href, target: "_blank", rel: "noopener noreferrer" };
  return element("a", attributes, url);
}

/** Move what stands after `mark` into `anchor`, in place of its text; links that were found in it become text. */
function fill(anchor, mark) {
  if (mark.nextSibling) anchor.textContent = "";
  while (mark.nextSibling) anchor.append(mark.nextSibling);
  for (const inner of anchor.querySelectorAll("a")) inner.replaceWith(...inner.childNodes);
}

/** Where runs of backticks stand; `after(length, from)` is the next of that length, or -1. Ask in rising order. */
function backticksOf(text) {
  const places = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!places.has(run.length)) places.set(run.length, { at: 0, list: [] });
    places.get(run.length).list.push(index);
  }
  return {
    after(length, from) {
      const place = places.get(length);
      while (place && place.at < place.list.length && place.list[place.at] < from) place.at++;
      return place?.list[place.at] ?? -1;
    },
  };
}

function trimOnce(code) {
  const padded = code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "";
  return padded ? code.slice(1, -1) : code;
}

/** A bare address without the punctuation that ends the sentence around it. */
function withoutTrail(url) {
  let end = url.length;
  const unbalanced = () => url.slice(0, end).split(")").length > url.slice(0, end).split("(").length;
  while (".,;:!?'_~".includes(url[end - 1]) || (url[end - 1] === ")" && end > url.length - 8 && unbalanced())) end--;
  return url.slice(0, end);
}

/** Whether the run of delimiters at [start, end) of `text` may open and close emphasis. */
function flanks(text, start, end) {
  const before = text[start - 1] ?? " ";
  const after = text[end] ?? " ";
  let opens = /\S/.test(after);
  let closes = /\S/.test(before);
  if (text[start] === "_") {
    const word = /[\p{L}\p{N}]/u;
    opens &&= !word.test(before); // some_snake_case
    closes &&= !word.test(after);
  } else if (text[start] === "*" && end - start === 1 && TIMES.test(text.slice(Math.max(start - 2, 0), end + 1))) {
    opens = closes = false;
  }
  return { opens, closes };
}

/** Wrap what stands between matching `marks` in <strong>, <em> and <del>. */
function emphasise(marks) {
  const openers = [];
  const searched = new Map(); // kind of closer → height of `openers` below which it has no match
  const depths = new Map();
  for (const closer of marks) {
    while (closer.closes && closer.count > 0) {
      const kind = `${closer.char}${closer.opens}${closer.length % 3}`;
      let at = openers.length - 1;
      while (at >= (searched.get(kind) ?? 0) && !matches(openers[at], closer)) at--;
      if (at < (searched.get(kind) ?? 0)) {
        searched.set(kind, openers.length);
        break;
      }
      const opener = openers[at];
      const used = Math.min(opener.count, closer.count, 2);
      if (!wrap(opener, closer, used, depths)) {
        openers.length = 0; // what began before would be deeper still
        break;
      }
      openers.length = opener.count > 0 ? at + 1 : at;
      for (const [key, height] of searched) searched.set(key, Math.min(height, openers.length));
    }
    if (closer.opens && closer.count > 0) openers.push(closer);
  }
}

function matches(opener, closer) {
  if (opener.char !== closer.char) return false;
  const both = opener.closes || closer.opens; // **a*b**: the star in the middle is no end of the two before
  const thirds = opener.length % 3 !== 0 || closer.length % 3 !== 0;
  return !(both && thirds && (opener.length + closer.length) % 3 === 0);
}

/** Take `used` characters off both marks and wrap what is between; false if that would be too deep. */
function wrap(opener, closer, used, depths) {
  const tag = opener.char === "~" ? "del" : used === 2 ? "strong" : "em";
  const inside = [];
  for (let node = opener.node.nextSibling; node !== closer.node; node = node.nextSibling) inside.push(node);
  const depth = 1 + inside.reduce((most, node) => Math.max(most, depths.get(node) ?? 0), 0);
  if (depth > DEEPEST) return false;
  const wrapper = element(tag, {}, ...inside);
  depths.set(wrapper, depth);
  opener.node.after(wrapper);
  for (const mark of [opener, closer]) {
    mark.count -= used;
    mark.node.data = mark.char.repeat(mark.count);
  }
  return true;
}
