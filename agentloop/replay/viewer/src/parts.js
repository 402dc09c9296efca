// Small pieces that several views share.

import { h } from "./dom.js";
import { count, endWord, isNumber, MISSING, number, signed } from "./format.js";
import { BADGES } from "./overview.js";

export function badges(row, skip = []) {
  const found = row.badges.filter((name) => !skip.includes(name));
  return h(
    "span",
    { class: "badges" },
    found.map((name) => h("span", { class: `badge badge-${name}`, "data-badge": name, title: BADGES[name][1] }, BADGES[name][0])),
  );
}

export function endBadge(row) {
  const good = row.end_reason === "final_answer";
  return h("span", { class: `end ${good ? "good" : "bad"}`, title: "why it ended" }, endWord(row));
}

export function countCell(value) {
  return h("span", { class: `num ${isNumber(value) ? "" : "missing"}` }, count(value));
}

export function rewardCell(value, name = "reward") {
  return h("span", { class: `num ${isNumber(value) ? "" : "missing"}`, "data-field": name }, number(value));
}

export function advantageCell(row) {
  const { advantage, advantage_source: source } = row;
  const title = source === "train" ? "the trainer's, mean over the trained tokens" : "from the group's rewards: (r \u2212 mean) / (std + 1e-6)";
  return h(
    "span",
    { class: `num ${isNumber(advantage) ? "" : "missing"}`, "data-field": "advantage", title: isNumber(advantage) ? title : MISSING },
    signed(advantage),
  );
}

/** A thin bar of rewards, one a sibling, for a group's row. */
export function rewardBars(rows, low, high) {
  const span = high > low ? high - low : 1;
  return h(
    "span",
    { class: "reward-bars", "aria-hidden": "true" },
    rows.slice(0, 32).map((row) => {
      const bar = h("i", { class: isNumber(row.reward) ? (row.masked ? "masked" : "") : "none" });
      if (isNumber(row.reward)) bar.style.height = `${Math.round(3 + (15 * (row.reward - low)) / span)}px`;
      return bar;
    }),
  );
}

export function segmented(label, options, chosen, onChoose) {
  const buttons = options.map(([value, words, title]) =>
    h(
      "button",
      {
        class: "seg",
        "data-value": value,
        title,
        "aria-pressed": String(value === chosen),
        onclick: () => {
          for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.value === value));
          onChoose(value);
        },
      },
      words,
    ),
  );
  const el = h("span", { class: "segmented", role: "group", "aria-label": label }, buttons);
  el.choose = (value) => buttons.find((button) => button.dataset.value === value)?.click();
  return el;
}

export function facts(pairs) {
  return h(
    "dl",
    { class: "facts" },
    pairs.map(([name, value, field]) =>
      h("div", null, h("dt", null, name), h("dd", { "data-field": field, class: value === MISSING ? "missing" : null }, value)),
    ),
  );
}
