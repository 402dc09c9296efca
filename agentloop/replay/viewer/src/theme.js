// Light or dark, as the page around us is.

/** Calls `onChange("light" | "dark")` when the host page's theme changes; gives the present one and how to stop. */
export function watchTheme(onChange) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let last = pageTheme(dark.matches);
  const check = () => {
    const now = pageTheme(dark.matches);
    if (now === last) return;
    last = now;
    onChange(now);
  };
  dark.addEventListener("change", check);
  const observer = new MutationObserver(check);
  const attributes = { attributes: true, attributeFilter: ["class", "data-theme", "theme", "data-jp-theme-light", "data-vscode-theme-kind"] };
  observer.observe(document.documentElement, attributes);
  if (document.body) observer.observe(document.body, attributes);
  return {
    theme: last,
    stop() {
      dark.removeEventListener("change", check);
      observer.disconnect();
    },
  };
}

function pageTheme(prefersDark) {
  const [body, html] = [document.body, document.documentElement];
  const jupyter = body?.dataset.jpThemeLight;
  if (jupyter) return jupyter === "false" ? "dark" : "light";
  for (const el of [body, html]) {
    if (!el) continue;
    const named = `${el.getAttribute("data-theme") ?? ""} ${el.getAttribute("theme") ?? ""} ${el.dataset.vscodeThemeKind ?? ""}`;
    if (/dark/i.test(named) || el.classList.contains("dark") || el.classList.contains("dark-theme")) return "dark";
    if (/light/i.test(named) || el.classList.contains("light") || el.classList.contains("light-theme")) return "light";
  }
  return prefersDark ? "dark" : "light";
}
