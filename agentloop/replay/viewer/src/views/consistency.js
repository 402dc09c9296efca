// Trainer against rollout, of the run: trend, turns, positions, and the tokens that are furthest apart.

import { driftChart } from "../charts.js";
import { h, redrawn } from "../dom.js";
import { count, isNumber, MISSING, number, oneLine, plural, signed, small, visible } from "../format.js";
import { facts } from "../parts.js";

const FIGURES = [
  ["tokens", "tokens", (of) => count(of.tokens)],
  ["mean |d|", "mean of the differences' sizes, in nats", (of) => small(of.mean_abs)],
  ["most", "the largest difference, whatever its sign", (of) => small(of.max_abs)],
  ["KL (k3)", "estimate of the divergence of the trainer from the rollout", (of) => small(of.k3)],
  ["outside", "share of the tokens whose ratio is outside of the clip range", (of) => percent(of.ratio_outside)],
];

const percent = (share) => (isNumber(share) ? `${number(100 * share, 2)}%` : MISSING);

export class ConsistencyPanel {
  constructor(app) {
    this.app = app;
    this.report = undefined;
    this.step = null;
    this.round = 0;
    this.chart = driftChart((step) => {
      this.step = step;
      this.draw();
    });
    this.el = h("section", { class: "consistency", "aria-label": "Trainer against rollout", tabindex: 0 });
  }

  /** Of this overview; it is asked for once. */
  async show(overview) {
    if (overview === this.overview && this.report !== undefined) return;
    const round = (this.round += 1);
    this.overview = overview;
    if (this.report === undefined) this.el.replaceChildren(h("div", { class: "loading" }, "Comparing \u2026"));
    let report = null;
    if (overview.can.includes("consistency")) {
      try {
        report = (await this.app.request({ kind: "consistency" })).header.report ?? null;
      } catch (error) {
        if (round !== this.round) return;
        this.overview = null;
        this.el.replaceChildren(h("div", { class: "problem", role: "alert" }, visible(error?.message ?? error)));
        return;
      }
    }
    if (round !== this.round) return;
    this.report = report;
    this.draw();
  }

  draw() {
    const { report } = this;
    const compared = report?.all?.tokens;
    this.el.setAttribute("data-compared", compared ?? "none");
    if (!report || !(report.by?.step ?? []).length) {
      const why = report ? "the trainer's part of no trajectory has arrived" : "the trainer's part was not recorded; agentloop.train_side=true records it";
      this.el.replaceChildren(h("div", { class: "list-empty missing" }, `Trainer against rollout: ${MISSING} (${why}).`));
      return;
    }
    const steps = report.by.step;
    const chosen = steps.find((entry) => entry.name === this.step);
    if (!chosen) this.step = null;
    const of = chosen ?? report.all;
    this.chart.update(steps.map((entry) => ({ step: entry.name, figures: entry })), this.step);
    const onChart = this.el.getRootNode().activeElement === this.chart.el;
    redrawn(this.el, () =>
      this.el.replaceChildren(
        facts([
          ["of", chosen ? `the trainer's step ${chosen.name}` : "the whole run"],
          ["trajectories", isNumber(report.expected) ? `${count(report.arrived)} of ${count(report.expected)} arrived` : count(report.trajectories)],
          ["tokens", `${count(of.tokens)} compared${of.not_recorded ? `, ${count(of.not_recorded)} ${MISSING}` : ""}`],
          ["mean difference", signedSmall(of.mean), "mean"],
          ["its size", `mean ${small(of.mean_abs)}, most ${small(of.max_abs)}`, "mean_abs"],
          ["KL (k3)", small(of.k3), "k3"],
          [`ratio outside ${report.clip.join(" \u2026 ")}`, percent(of.ratio_outside), "ratio_outside"],
          ["correlation", isNumber(of.correlation) ? number(of.correlation, 4) : MISSING, "correlation"],
        ]),
        report.not_recomputed ? h("div", { class: "dim" }, `${plural(report.not_recomputed, "trajectory", "trajectories")} not compared: the trainer took the rollout's log-probabilities as its own.`) : "",
        ...(report.findings ?? []).map((sentence) => h("div", { class: "problem" }, visible(sentence))),
        h(
          "div",
          { class: "parts" },
          h("div", { class: "chart-box" }, this.chart.el),
          this.worst(chosen),
          table("By turn", "turn", chosen ? chosen.turns : report.by.turn),
          ...(chosen ? [] : [table("By position in the response", "token", report.by.position), table("By position in the turn", "token", report.by.in_turn)]),
        ),
      ),
    );
    if (onChart) this.chart.el.focus({ preventScroll: true }); // it is the same one, and was taken out and put back
  }

  /** Tokens that are furthest apart; each opens its conversation there. */
  worst(chosen) {
    const tokens = (this.report.worst_tokens ?? []).filter((token) => !chosen || (token.trained_step === chosen.step && token.update === chosen.update));
    if (!tokens.length) return h("div", { class: "dim" }, chosen ? "None of the tokens that are furthest apart is of this step." : "");
    return h(
      "div",
      { class: "wide-table" },
      h(
        "table",
        { class: "worst" },
        h("caption", null, "Tokens that are furthest apart"),
        head(["token", "difference", "trainer", "rollout", "trajectory", "turn", "at"]),
        h("tbody", null, tokens.map((token) => this.worstRow(token))),
      ),
    );
  }

  worstRow(token) {
    const words = token.text === null ? `#${token.token_id ?? "?"}` : oneLine(JSON.stringify(token.text));
    const there = isNumber(token.token) && this.app.overview.byKey.has(token.key);
    const open = () => {
      this.app.setMode("difference");
      this.app.go({ view: "tokens", key: token.key, token: token.token, turn: token.turn });
    };
    const name = `${words}, train minus rollout ${signedSmall(token.diff)}, trajectory ${visible(token.id)}, token ${token.token}`;
    return h(
      "tr",
      { "data-key": token.key, "data-token": token.token },
      h("td", null, there ? h("button", { class: "link", "aria-label": name, onclick: open }, words) : words),
      h("td", { "data-field": "diff" }, token.infinite ? "infinite" : signed(token.diff)),
      h("td", null, token.infinite && token.trainer === null ? "\u2212\u221e" : number(token.trainer)),
      h("td", null, token.infinite && token.rollout === null ? "\u2212\u221e" : number(token.rollout)),
      h("td", null, `${token.step} ${visible(token.id)}`),
      h("td", null, token.turn),
      h("td", null, isNumber(token.token) ? count(token.token) : MISSING),
    );
  }

  destroy() {
    this.round += 1;
    this.chart.destroy();
  }
}

const signedSmall = (x) => (isNumber(x) && x > 0 ? `+${small(x)}` : small(x));

const head = (names) => h("thead", null, h("tr", null, names.map((name) => h("th", { scope: "col" }, name))));

function table(title, first, groups) {
  const top = Math.max(0, ...groups.map((group) => group.mean_abs ?? 0));
  return h(
    "div",
    { class: "wide-table" },
    h(
      "table",
      { "data-table": title },
      h("caption", null, title),
      h("thead", null, h("tr", null, h("th", { scope: "col" }, first), FIGURES.map(([name, about]) => h("th", { scope: "col", title: about }, name)), h("td", { "aria-hidden": "true" }))),
      h(
        "tbody",
        null,
        groups.map((group) => {
          const bar = h("i");
          bar.style.width = `${top > 0 ? (100 * (group.mean_abs ?? 0)) / top : 0}%`;
          return h(
            "tr",
            { "data-name": group.name },
            h("th", { scope: "row" }, visible(group.name)),
            FIGURES.map(([, , read]) => h("td", null, read(group))),
            h("td", { "aria-hidden": "true" }, h("span", { class: "meter" }, bar)),
          );
        }),
      ),
    ),
  );
}
