/**
 * A model's answer, written in Markdown, as DOM nodes: paragraphs, headings, lists, quotes, code, tables.
 *
 * What is not Markdown stays text, tags above all. An answer that grows is rendered again and again, so only the
 * blocks that changed are replaced: what the reader selected above stays selected.
 */

import { element } from "./dom.js";
import { renderInline } from "./inline.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?: (.*)|)$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(.*)|)$/;
const DEEPEST = 8; // lists and quotes in each other; deeper stays text
const WIDEST = 64; // columns of a table

const sources = new WeakMap(); // a block's node → the lines it was made from

/**
 * Show `text` in `container`, whose children this owns.
 * `codeHead(language, code)` makes what stands above a block of code; `code()` is its text when asked.
 */
export function renderMarkdown(container, text, codeHead) {
  const lines = text.replaceAll("\r\n", "\n").split("\n").map(expandTabs);
  const blocks = blocksOf(lines, 0);
  blocks.forEach((block, index) => {
    const old = container.children[index];
    if (old && sources.get(old) === block.source) return;
    const code = block.kind === "code" && old?.dataset.language === block.language && old.querySelector("code");
    const node = code ? old : render(block, codeHead);
    if (code) code.textContent = block.text;
    sources.set(node, block.source);
    if (!old) container.append(node);
    else if (old !== node) old.replaceWith(node);
  });
  while (container.children.length > blocks.length) container.lastElementChild.remove();
}

function expandTabs(line) {
  return line.replace(/^[ \t]+/, (space) => space.replaceAll("\t", "    "));
}

const isBlank = (line) => line.trim() === "";
const indentOf = (line) => line.length - line.trimStart().length;

/** The blocks that `lines` consist of, each with its `kind`, what it holds and its `source`. */
function blocksOf(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (isBlank(lines[at])) {
      at++;
      continue;
    }
    const [block, end] =
      takeFence(lines, at) ??
      takeLine(lines, at) ??
      (depth < DEEPEST ? (takeQuote(lines, at, depth) ?? takeList(lines, at, depth)) : null) ??
      takeTable(lines, at) ??
      takeParagraph(lines, at, depth);
    blocks.push({ ...block, source: lines.slice(at, end).join("\n") });
    at = end;
  }
  return blocks;
}

function takeFence(lines, at) {
  const begin = FENCE.exec(lines[at]);
  if (!begin) return null;
  const indent = indentOf(lines[at]);
  const isEnd = (line) => {
    const mark = line.trim();
    return indentOf(line) < 4 && mark.length >= begin[1].length && mark === begin[1][0].repeat(mark.length);
  };
  let end = at + 1;
  while (end < lines.length && !isEnd(lines[end])) end++;
  const code = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, indentOf(line))));
  const language = begin[2].trim().split(" ")[0].slice(0, 32);
  return [{ kind: "code", language, text: code.join("\n") }, Math.min(end + 1, lines.length)];
}

function takeLine(lines, at) {
  if (RULE.test(lines[at])) return [{ kind: "rule" }, at + 1];
  const heading = HEADING.exec(lines[at]);
  if (!heading) return null;
  return [{ kind: "heading", level: heading[1].length, text: withoutHashes(heading[2] ?? "") }, at + 1];
}

/** A heading's text without the `##` that may end it. */
function withoutHashes(text) {
  const whole = text.trim();
  let end = whole.length;
  while (whole[end - 1] === "#") end--;
  return end === 0 || whole[end - 1] === " " ? whole.slice(0, end).trim() : whole;
}

function takeQuote(lines, at, depth) {
  let end = at;
  const inner = [];
  for (let quote; end < lines.length && (quote = QUOTE.exec(lines[end])); end++) inner.push(quote[1]);
  return inner.length ? [{ kind: "quote", blocks: blocksOf(inner, depth + 1) }, end] : null;
}

/** The marker of a list item: its indent, its kind ("-", "." …), where its text begins, its number and its text. */
function itemOf(line) {
  const found = ITEM.exec(line);
  if (!found || RULE.test(line)) return null;
  const [, indent, marker, space = " ", text = ""] = found;
  const room = space.length > 4 ? 1 : space.length;
  return {
    indent: indent.length,
    kind: marker.at(-1),
    width: indent.length + marker.length + room,
    number: parseInt(marker, 10), // NaN for a bullet
    text: space.slice(room) + text,
  };
}

function takeList(lines, at, depth) {
  const first = itemOf(lines[at]);
  if (!first || first.indent > 3) return null;
  const items = [];
  let loose = false;
  let end = at;
  for (let item = first; item; ) {
    const inner = [item.text];
    let next = end + 1;
    for (; next < lines.length; next++) {
      const line = lines[next];
      const nested = itemOf(line);
      // Models indent a list in a list by two spaces, even where the text above begins at the third.
      const inside = indentOf(line) >= item.width || (nested && nested.indent >= first.indent + 2);
      const goesOn = !isBlank(lines[next - 1]) && !nested && !beginsBlock(lines, next) && !isBlank(line);
      if (!isBlank(line) && !inside && !goesOn) break;
      inner.push(line.slice(Math.min(item.width, indentOf(line))));
    }
    while (isBlank(inner.at(-1)) && inner.length > 1) inner.pop();
    const blocks = blocksOf(inner, depth + 1);
    items.push(blocks);
    loose ||= blocks.filter((block) => block.kind === "paragraph").length > 1;
    const following = next < lines.length ? itemOf(lines[next]) : null;
    const same = following && following.kind === first.kind && following.indent < first.indent + 2;
    loose ||= same && isBlank(lines[next - 1]);
    end = same ? next : end + inner.length;
    item = same ? following : null;
  }
  return [{ kind: "list", number: first.number, loose, items }, end];
}

/** The cells of a table's row; `\|` is no border. */
function cellsOf(line) {
  const cells = [""];
  const row = line.trim();
  for (let at = row.startsWith("|") ? 1 : 0; at < row.length; at++) {
    if (row[at] === "\\" && row[at + 1] === "|") cells[cells.length - 1] += row[++at];
    else if (row[at] === "|") cells.push("");
    else cells[cells.length - 1] += row[at];
  }
  if (row.endsWith("|") && cells.length > 1 && cells.at(-1) === "") cells.pop();
  return cells.map((cell) => cell.trim());
}

function beginsTable(lines, at) {
  const rule = lines[at + 1] ?? "";
  if (!lines[at].includes("|") || !rule.includes("-") || !/^[-|: ]+$/.test(rule)) return false;
  const sides = cellsOf(rule);
  const even = sides.length <= WIDEST && sides.length === cellsOf(lines[at]).length;
  return even && sides.every((cell) => /^:?-+:?$/.test(cell));
}

function sideOf(rule) {
  if (!rule.endsWith(":")) return undefined;
  return rule.startsWith(":") ? "center" : "right";
}

function takeTable(lines, at) {
  if (!beginsTable(lines, at)) return null;
  let end = at + 2;
  while (end < lines.length && !isBlank(lines[end]) && !beginsBlock(lines, end)) end++;
  const sides = cellsOf(lines[at + 1]).map(sideOf);
  const rows = lines.slice(at + 2, end).map((line) => cellsOf(line).slice(0, sides.length));
  return [{ kind: "table", sides, head: cellsOf(lines[at]), rows }, end];
}

/** Whether the line at `at` ends the paragraph before it. */
function beginsBlock(lines, at) {
  const line = lines[at];
  const item = itemOf(line);
  const list = item && item.indent < 4 && item.text !== "" && !(item.number > 1 || item.number === 0);
  return list || FENCE.test(line) || RULE.test(line) || HEADING.test(line) || QUOTE.test(line);
}

function takeParagraph(lines, at, depth) {
  let end = at + 1;
  const begins = (next) => beginsTable(lines, next) || (depth < DEEPEST && beginsBlock(lines, next));
  while (end < lines.length && !isBlank(lines[end]) && !begins(end)) end++;
  const text = lines.slice(at, end).map((line) => line.trim());
  return [{ kind: "paragraph", text: text.join("\n") }, end];
}

function render(block, codeHead) {
  const inside = (blocks) => blocks.map((inner) => render(inner, codeHead));
  switch (block.kind) {
    case "code": {
      const code = element("code", {}, block.text);
      const head = codeHead(block.language, () => code.textContent);
      const pre = element("pre", { tabindex: "0" }, code);
      return element("div", { class: "code", "data-language": block.language }, head, pre);
    }
    case "rule":
      return element("hr");
    case "heading":
      return element(`h${block.level}`, {}, renderInline(block.text));
    case "quote":
      return element("blockquote", {}, ...inside(block.blocks));
    case "list": {
      const ordered = !Number.isNaN(block.number);
      const start = ordered && block.number !== 1 && String(block.number);
      const items = block.items.map(inside).map((nodes) => (block.loose ? nodes : nodes.map(unwrap)));
      return element(ordered ? "ol" : "ul", { start }, ...items.map((nodes) => element("li", {}, ...nodes)));
    }
    case "table":
      return renderTable(block);
    default:
      return element("p", {}, renderInline(block.text));
  }
}

/** The text of an item in a list without blank lines needs no paragraph around it. */
function unwrap(node) {
  if (node.nodeName !== "P") return node;
  const text = document.createDocumentFragment();
  text.append(...node.childNodes);
  return text;
}

function renderTable({ sides, head, rows }) {
  const row = (tag, cells) => {
    const nodes = cells.map((cell, column) => element(tag, { class: sides[column] }, renderInline(cell)));
    return element("tr", {}, ...nodes);
  };
  const body = element("tbody", {}, ...rows.map((cells) => row("td", cells)));
  const table = element("table", {}, element("thead", {}, row("th", head)), body);
  return element("div", { class: "table", tabindex: "0" }, table);
}
