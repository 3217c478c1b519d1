/** The chat page: puts its parts together. */

import { Api } from "./api.js";
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { icon } from "./dom.js";
import { errorText, t, translate } from "./language.js";
import { Models } from "./models.js";
import { askForKey, hideBanner, showBanner } from "./notices.js";
import { SettingsPanel } from "./settings_panel.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";

const page = document.querySelector(".page");
const keyDialog = document.getElementById("key-dialog");
const find = (selector) => page.querySelector(selector);
const onClick = (selector, act) => find(selector).addEventListener("click", act);

const api = new Api(askForKey);
const store = new Store(onStorage, onOtherTab);
const models = new Models(api, find(".model"), onNoModels);
const chat = new Chat({ api, store, models, log: find(".log"), onChange, onAsk: focusComposer, onScroll });
const composer = new Composer(find(".composer"), (text) => chat.send(text), () => chat.stop());
const sidebar = new Sidebar({ page, store, chat, toggle: find(".toggle") });
const panel = new SettingsPanel({ dialog: document.getElementById("settings"), store, chat, onChats });

/** Another conversation is shown, or an answer began or ended. */
function onChange() {
  const { conversation } = chat;
  page.classList.toggle("empty", conversation.messages.length === 0);
  composer.show(Boolean(chat.generation));
  sidebar.update();
  const hash = conversation.messages.length ? `#${conversation.id}` : "";
  if (location.hash !== hash) history.pushState(null, "", hash || location.pathname + location.search);
  document.title = conversation.title ? `${conversation.title} · MiniMind` : "MiniMind";
}

function onScroll(atEnd) {
  find(".to-end").hidden = atEnd;
}

/** Conversations were imported or deleted: show the one there was, if it is still there. */
function onChats() {
  chat.open(chat.conversation.id);
}

function onOtherTab(id) {
  if (id === chat.conversation.id && !chat.generation && store.get(id)) chat.open(id);
  else sidebar.update();
}

let troubleSeen = false; // and closed: not again at every save

function onStorage(trouble) {
  if (!trouble) {
    troubleSeen = false;
    hideBanner("storage");
  } else if (!troubleSeen) {
    troubleSeen = true;
    showBanner("storage", t(trouble), t("close"), () => hideBanner("storage"));
  }
}

function onNoModels(error) {
  showBanner("models", `${t("error_models")} ${errorText(error)}`, t("retry"), loadModels);
}

async function loadModels() {
  hideBanner("models");
  await models.load();
  showStage();
}

/** A pretrained model is asked for other things than one that answers. */
function showStage() {
  translate(document, models.current?.minimind?.stage);
}

function newChat() {
  chat.open();
  sidebar.leave();
  focusComposer();
}

function focusComposer() {
  if (matchMedia("(pointer: fine)").matches) composer.focus(); // elsewhere it would bring up a keyboard
}

function showWords() {
  showStage();
  composer.show(Boolean(chat.generation));
  models.show();
  panel.translate();
  sidebar.update();
  chat.rebuild();
}

for (const node of document.querySelectorAll("[data-icon]")) node.append(icon(node.dataset.icon));
onClick(".new-chat", newChat);
onClick(".bar-new", newChat);
onClick(".open-settings", () => panel.open());
find(".model").addEventListener("change", showStage);
onClick(".to-end", () => chat.toEnd());
onClick(".examples", ({ target }) => target.matches("button") && chat.send(target.textContent));
keyDialog.querySelector(".cancel").addEventListener("click", () => keyDialog.close());
addEventListener("popstate", () => chat.open(location.hash.slice(1)));

let language = document.documentElement.lang;
document.documentElement.addEventListener("appearance", () => {
  if (document.documentElement.lang !== language) showWords();
  language = document.documentElement.lang;
});

translate(document);
chat.open(location.hash.slice(1));
focusComposer();
loadModels();
