/** The list of conversations; on a narrow page it slides over the rest. */

import { element, iconButton } from "./dom.js";
import { t } from "./language.js";
import { isComposing } from "./message_view.js";
import { toast } from "./notices.js";

const NARROW = matchMedia("(max-width: 800px)");

export class Sidebar {
  /** page: holds the .sidebar and a .main beside it. */
  constructor({ page, store, chat, toggle }) {
    Object.assign(this, { page, store, chat, toggle });
    this.sidebar = page.querySelector(".sidebar");
    this.main = page.querySelector(".main");
    this.list = this.sidebar.querySelector(".chats");
    toggle.addEventListener("click", () => this.setOpen(!this.open));
    page.querySelector(".backdrop").addEventListener("click", () => this.setOpen(false));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.open && NARROW.matches && !isComposing(event)) this.setOpen(false);
    });
    NARROW.addEventListener("change", () => this.setOpen(!NARROW.matches));
    this.setOpen(!NARROW.matches, false);
  }

  setOpen(open, moveFocus = true) {
    this.open = open;
    this.page.classList.toggle("sidebar-open", open);
    this.toggle.setAttribute("aria-expanded", String(open));
    this.sidebar.inert = !open;
    this.main.inert = open && NARROW.matches; // it lies under the sidebar
    if (moveFocus && NARROW.matches) (open ? this.sidebar.querySelector("button") : this.toggle).focus();
  }

  /** A conversation was chosen: a narrow page shows it now. */
  leave() {
    if (NARROW.matches) this.setOpen(false);
  }

  update() {
    if (this.list.querySelector(".rename")) return; // it updates the list when it is done
    const focused = this.list.contains(document.activeElement) ? document.activeElement.dataset.id : undefined;
    const rows = this.store.list().map((conversation) => this.row(conversation));
    this.list.replaceChildren(...rows);
    this.sidebar.querySelector(".no-chats").hidden = rows.length > 0;
    if (focused) this.list.querySelector(`[data-id="${focused}"]`)?.focus();
  }

  row(conversation) {
    const title = conversation.title || t("untitled");
    const current = conversation === this.chat.conversation;
    const attributes = { type: "button", class: "chat-title", title, "data-id": conversation.id };
    const open = element("button", { ...attributes, "aria-current": current && "true" }, title);
    open.addEventListener("click", () => {
      this.chat.open(conversation.id);
      this.leave();
    });
    const row = element("li", { class: current ? "current" : undefined }, open);
    if (this.chat.generations.has(conversation)) row.classList.add("busy");
    row.append(
      iconButton("edit", t("renameNamed", { title }), () => this.rename(row, conversation)),
      iconButton("trash", t("deleteNamed", { title }), () => this.remove(conversation)),
    );
    return row;
  }

  rename(row, conversation) {
    const input = element("input", { class: "rename", maxlength: "60", "aria-label": t("rename") });
    input.value = conversation.title;
    let done = false;
    const end = (keep) => {
      if (done) return;
      done = true;
      if (keep && input.value.trim()) {
        conversation.title = input.value.trim();
        this.store.save(conversation);
      }
      row.remove();
      this.update();
      this.list.querySelector(`[data-id="${conversation.id}"]`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (isComposing(event) || !["Enter", "Escape"].includes(event.key)) return;
      event.stopPropagation();
      end(event.key === "Enter");
    });
    input.addEventListener("blur", () => end(true));
    row.replaceChildren(input);
    input.select();
    input.focus();
  }

  remove(conversation) {
    const shown = conversation === this.chat.conversation;
    this.chat.stop(conversation);
    this.store.remove(conversation.id);
    if (shown) this.chat.open();
    this.update();
    const title = conversation.title || t("untitled");
    toast(t("deleted", { title }), t("undo"), () => {
      this.store.save(conversation);
      if (shown) this.chat.open(conversation.id);
      this.update();
    });
    (this.list.querySelector("button") ?? this.sidebar.querySelector("button")).focus();
  }
}
