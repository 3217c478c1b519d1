/**
 * Theme and language before the first paint: a classic script in <head>, so that nothing flashes.
 * The choices ("auto" or a value) are kept in the browser; the page below reads `document.documentElement`.
 */
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const systemLanguage = () => (/^zh\b/i.test(navigator.language) ? "zh" : "en");

  const chosen = { theme: "auto", language: "auto" };
  for (const name of Object.keys(chosen)) {
    try {
      chosen[name] = localStorage.getItem(`minimind.${name}`) ?? "auto";
    } catch {
      // storage is switched off: follow the system
    }
  }

  function show() {
    root.dataset.theme = ["light", "dark"].includes(chosen.theme) ? chosen.theme : dark.matches ? "dark" : "light";
    const language = ["zh", "en"].includes(chosen.language) ? chosen.language : systemLanguage();
    root.lang = language === "zh" ? "zh-CN" : "en";
  }

  /** Choose "auto" or a value for `name`, "theme" or "language". */
  function choose(name, value) {
    chosen[name] = value;
    try {
      localStorage.setItem(`minimind.${name}`, value);
    } catch {
      // it holds until the tab is closed
    }
    show();
    root.dispatchEvent(new Event("appearance"));
  }

  dark.addEventListener("change", show);
  show();
  window.appearance = { chosen, choose };
})();
