/** Building DOM nodes. Nothing on this page is ever parsed as HTML, so text can only be text. */

const SVG = "http://www.w3.org/2000/svg";

/** What stands on buttons: strokes on a square of 24 × 24. */
const ICONS = {
  plus: "M12 5v14M5 12h14",
  sidebar: "M4 5.5h16v13H4zM9.5 5.5v13",
  sliders: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.5v5M9 14.5v5",
  send: "M12 19V5.5M6 11l6-6 6 6",
  stop: "M7.5 7.5h9v9h-9z",
  copy: "M9 9h10.5v10.5H9zM15 9V4.5H4.5V15H9",
  check: "M5 12.5l4.5 4.5L19 7",
  edit: "M4.5 19.5l1-4.5L16 4.5l3.5 3.5L9 18.5zM13.5 7l3.5 3.5",
  trash: "M5 7h14M9.5 7V4.5h5V7M7 7l.8 12.5h8.4L17 7M10.5 10.5v5.5M13.5 10.5v5.5",
  again: "M19 12a7 7 0 1 1-2.2-5.1M19.5 3.5v4.2h-4.2",
  close: "M6 6l12 12M18 6L6 18",
  chevron: "M9 6l6 6-6 6",
  down: "M12 5v13.5M6 13l6 6 6-6",
  upload: "M12 15.5V4.5M7.5 9L12 4.5 16.5 9M4.5 15.5v4h15v-4",
  download: "M12 4.5v11M7.5 11l4.5 4.5 4.5-4.5M4.5 15.5v4h15v-4",
};

/**
 * A node with `attributes` and `children` (nodes or strings; null is left out). An attribute that is a function
 * listens to the event of that name; undefined and false leave it out, true sets it without a value.
 */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** One of `ICONS`; the button around it carries the words. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  const attributes = { viewBox: "0 0 24 24", class: `icon icon-${name}`, "aria-hidden": "true" };
  for (const [key, value] of Object.entries(attributes)) svg.setAttribute(key, value);
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button that shows an icon and says `label` to screen readers and on hovering. */
export function iconButton(name, label, onClick) {
  const attributes = { type: "button", class: "icon-button", "aria-label": label, title: label };
  return element("button", { ...attributes, click: onClick }, icon(name));
}

/** Put `text` on the clipboard; resolves to whether that worked. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text); // a page over plain http from another machine has no clipboard of its own
  }
}

function copyBySelection(text) {
  const focused = document.activeElement;
  const area = element("textarea", { class: "visually-hidden", readonly: true, "aria-hidden": "true" });
  area.value = text;
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return copied;
}
