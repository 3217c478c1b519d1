/** The choice of a model: the base weights, or an adapter over them. */

import { element } from "./dom.js";
import { hasText, t } from "./language.js";
import { limitTokens } from "./settings.js";

const KEY = "minimind.model";

export class Models {
  /** select: the <select> to fill. onTrouble(error): told when the list cannot be read. */
  constructor(api, select, onTrouble) {
    this.api = api;
    this.select = select;
    this.onTrouble = onTrouble;
    this.list = [];
    this.failed = false;
    this.show();
    select.addEventListener("change", () => this.choose(select.value));
  }

  /** The model that answers, or null while none is known. */
  get current() {
    return this.list.find((model) => model.id === this.select.value) ?? null;
  }

  async load() {
    this.failed = false;
    try {
      this.list = await this.api.models();
    } catch (error) {
      this.failed = true;
      this.onTrouble(error);
    }
    this.show();
  }

  choose(id) {
    this.select.value = id;
    limitTokens(this.current?.minimind?.max_length);
    try {
      localStorage.setItem(KEY, id);
    } catch {
      // it holds until the page is left
    }
  }

  show() {
    const option = (model) => element("option", { value: model.id }, nameOf(model));
    const group = (label, models) => models.length && element("optgroup", { label }, ...models.map(option));
    const bases = this.list.filter((model) => !model.minimind?.adapter);
    const adapters = this.list.filter((model) => model.minimind?.adapter);
    const groups = adapters.length
      ? [group(t("baseWeights"), bases), group(t("adapters"), adapters)].filter(Boolean)
      : bases.map(option);
    const chosen = this.select.value || kept();
    const none = element("option", { value: "" }, t(this.failed ? "error_models" : "modelsLoading"));
    this.select.replaceChildren(...(groups.length ? groups : [none]));
    this.select.disabled = this.list.length === 0;
    const known = this.list.find((model) => model.id === chosen) ?? bases[0] ?? this.list[0];
    if (known) this.select.value = known.id;
    limitTokens(this.current?.minimind?.max_length);
  }
}

function nameOf({ id, minimind: { stage, adapter, reasoning } = {} }) {
  const kind = stage && !adapter ? ` · ${hasText(`stage_${stage}`) ? t(`stage_${stage}`) : stage}` : "";
  const name = (adapter || id) + kind;
  return reasoning && (adapter || stage !== "reason") ? t("withThinking", { name }) : name;
}

function kept() {
  try {
    return localStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}
