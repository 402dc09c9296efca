// The run: trends, filters, and its groups or trajectories.

import { runCharts } from "../charts.js";
import { h, toggle } from "../dom.js";
import { count, isNumber, number, oneLine, plural, visible } from "../format.js";
import { VirtualList } from "../list.js";
import { BADGES, series, stats } from "../overview.js";
import { advantageCell, badges, countCell, endBadge, facts, rewardBars, rewardCell, segmented } from "../parts.js";
import { parseBound, searchRun } from "../search.js";
import { ConsistencyPanel } from "./consistency.js";

// Name, class, and what to sort by.
const COLUMNS = {
  groups: [
    ["group", ""],
    ["step", "num", (group) => group.step],
    ["prompt", ""],
    ["n", "num", (group) => group.rows.length],
    ["rewards", ""],
    ["mean", "num", (group) => group.stats.mean],
    ["std", "num", (group) => group.stats.std],
    ["badges", ""],
  ],
  trajectories: [
    ["trajectory", ""],
    ["step", "num", (row) => row.step],
    ["ended", ""],
    ["reward", "num", (row) => row.reward],
    ["advantage", "num", (row) => row.advantage],
    ["turns", "num", (row) => row.turns],
    ["calls", "num", (row) => row.tool_calls],
    ["tokens", "num", (row) => row.tokens],
    ["sampled", "num", (row) => row.sampled_tokens],
    ["badges", ""],
  ],
  hits: [
    ["trajectory", ""],
    ["step", "num", (row) => row.step],
    ["ended", ""],
    ["reward", "num", (row) => row.reward],
    ["advantage", "num", (row) => row.advantage],
    ["where", ""],
    ["found", ""],
  ],
};

const BEFORE_HIT = 16;

export class RunView {
  constructor(app) {
    this.app = app;
    this.filters = { partition: null, step: null, badges: new Set(), low: null, high: null, hits: null };
    this.kind = "groups";
    this.searching = null;
    this.sort = { by: null, down: true };

    this.charts = runCharts((step) => this.chooseStep(step));
    this.component = null;
    this.which = h("select", {
      class: "which-reward hidden",
      "aria-label": "which part of the reward the trend shows",
      onchange: () => {
        this.component = this.which.value || null;
        this.charts[0].rename(this.component === null ? "Reward" : visible(this.component));
        this.update();
      },
    });
    this.facts = h("div", { class: "run-facts" });
    this.partitions = h("span");
    this.chips = h("span", { class: "chips", role: "group", "aria-label": "Filters" });
    this.stepChip = h("span");
    this.tally = h("span", { class: "tally", role: "status" });
    this.low = this._bound("lowest reward", "low");
    this.high = this._bound("highest reward", "high");
    this.search = h("input", {
      type: "search",
      class: "search",
      placeholder: "Search text",
      "aria-label": "Search the text of all trajectories; Enter searches",
      onkeydown: (event) => {
        if (event.key === "Enter") this.runSearch();
        if (event.key === "Escape" && this.search.value) {
          this.search.value = "";
          this.runSearch();
          event.stopPropagation();
        }
      },
      onsearch: () => this.runSearch(),
    });
    this.kinds = segmented(
      "List",
      [["groups", "Groups"], ["trajectories", "Trajectories"], ["consistency", "Trainer against rollout", "how far their log-probabilities of the same tokens are apart"]],
      this.kind,
      (kind) => {
        this.shows(kind === "consistency");
        if (kind === "consistency") return;
        this.kind = kind;
        this.redrawList();
      },
    );
    this.consistency = new ConsistencyPanel(app);
    this.consistency.el.hidden = true;
    this.head = h("div", { class: "list-head", role: "row" });
    this.list = new VirtualList({
      label: "Groups",
      rowHeight: 32,
      head: this.head,
      render: (i) => (this.kind === "groups" ? this.groupRow(this.items[i]) : this.trajectoryRow(this.items[i])),
      onOpen: (i) => this.open(this.items[i]),
    });
    this.items = [];
    this.arrived = h("span", { class: "arrived" });
    this.el = h(
      "section",
      { class: "view run-view", "aria-label": "Run" },
      this.facts,
      h("div", { class: "charts" }, this.charts.map((chart, i) => h("div", { class: "chart-box" }, chart.el, i ? null : this.which))),
      h(
        "div",
        { class: "bar filters" },
        this.partitions,
        this.stepChip,
        this.chips,
        h("label", { class: "bound" }, "reward ", this.low, " \u2026 ", this.high),
        this.search,
      ),
      h("div", { class: "bar" }, this.kinds, this.tally, h("span", { class: "grow" }), this.arrived),
      this.list.el,
      this.consistency.el,
    );
  }

  /** The comparison of trainer and rollout, of the whole run, in the list's place. */
  shows(consistency) {
    this.list.el.hidden = consistency;
    this.consistency.el.hidden = !consistency;
    if (consistency) this.consistency.show(this.app.overview);
    else this.list.draw();
  }

  _bound(label, name) {
    return h("input", {
      class: "number",
      inputMode: "decimal",
      size: 4,
      "aria-label": label,
      "data-filter": name,
      oninput: (event) => {
        this.filters[name] = parseBound(event.target.value);
        this.update();
      },
    });
  }

  /** A new overview has come. */
  load() {
    const { overview } = this.app;
    const { partitions } = overview;
    if (!partitions.includes(this.filters.partition)) this.filters.partition = partitions[0] ?? null;
    this.partitions.replaceChildren(
      ...(partitions.length > 1
        ? [segmented("Partition", partitions.map((name) => [name, visible(name)]), this.filters.partition, (name) => {
            this.filters.partition = name;
            this.filters.step = null;
            this.update();
          })]
        : []),
    );
    this._drawWhich();
    const { run } = overview;
    const about = [["model", run.model], ["started", run.created], ...Object.entries(run.facts ?? {})];
    this.facts.replaceChildren(
      facts(about.filter(([, value]) => value !== null && value !== undefined).slice(0, 12)
        .map(([name, value]) => [visible(name), oneLine(typeof value === "object" ? JSON.stringify(value) : value).slice(0, 120)])),
    );
    this.update();
    if (!this.consistency.el.hidden) this.consistency.show(overview);
    if (this.searched && this.looked && overview !== this.looked) this.runSearch(true);
    this.looked = overview;
  }

  /** Components of the reward, for its trend. */
  _drawWhich() {
    const names = new Set(this.app.overview.rows.flatMap((row) => Object.keys(row.components ?? {})));
    if (this.component !== null && !names.has(this.component)) this.component = null;
    toggle(this.which, "hidden", names.size < 2);
    if (this.which.options.length === names.size + 1 && [...this.which.options].every((option) => !option.value || names.has(option.value))) return;
    const option = (value, words) => h("option", { value, selected: value === (this.component ?? "") }, words);
    this.which.replaceChildren(option("", "all of it"), ...[...names].slice(0, 50).map((name) => option(name, visible(name))));
  }

  chooseStep(step) {
    this.filters.step = step;
    this.list.el.scrollTop = 0;
    this.update();
    if (step !== null) this.app.say(`Step ${step}: ${this.tally.textContent}`);
  }

  /** The filters have changed. */
  update() {
    const { overview } = this.app;
    const everyStep = overview.select({ ...this.filters, step: null });
    this.rows = this.filters.step === null ? everyStep : everyStep.filter((row) => row.step === this.filters.step);
    const entries = series(everyStep, this.component);
    for (const chart of this.charts) chart.update(entries, this.filters.step);
    this._drawChips();
    const arrival = overview.arrival(this.filters.partition, this.filters.step);
    this.arrived.textContent =
      arrival.arrived === null ? "train side: not recorded" : `train side: ${count(arrival.arrived)} of ${count(arrival.expected)} arrived`;
    toggle(this.arrived, "missing", arrival.arrived === null);
    this.redrawList();
  }

  _drawChips() {
    const { overview } = this.app;
    const focused = this.chips.getRootNode().activeElement?.dataset?.filter;
    const without = overview.select({ ...this.filters, badges: [] });
    this.chips.replaceChildren(
      ...Object.entries(BADGES).map(([name, [words, about]]) => {
        const n = without.filter((row) => row.badges.includes(name)).length;
        if (name === "damaged" && !n && !this.filters.badges.has(name)) return "";
        const on = this.filters.badges.has(name);
        return h(
          "button",
          {
            class: `chip chip-${name}${n || on ? "" : " empty"}`,
            "data-filter": name,
            "aria-pressed": String(on),
            title: `${words}: ${about}`,
            onclick: () => {
              if (!this.filters.badges.delete(name)) this.filters.badges.add(name);
              this.update();
            },
          },
          words,
          h("b", null, count(n)),
        );
      }),
    );
    if (focused) this.chips.querySelector(`[data-filter="${focused}"]`)?.focus();
    this.stepChip.replaceChildren(
      ...(this.filters.step === null
        ? []
        : [h("button", { class: "chip step", "aria-label": `step ${this.filters.step}: show all steps`, onclick: () => {
            this.chooseStep(null);
            this.list.el.focus();
          } }, `step ${this.filters.step} \u00d7`)]),
    );
  }

  redrawList() {
    const { groups } = this.app.overview;
    const active = this.items[this.list.active]?.key;
    const keys = new Set(this.rows.map((row) => row.group));
    const rewards = stats(this.rows.map((row) => row.reward).filter(isNumber));
    this.range = [Math.min(0, rewards.min ?? 0), Math.max(1, rewards.max ?? 1)];
    this.items = this._sorted(this.kind === "groups" ? [...keys].map((key) => groups.get(key)) : this.rows);
    const total = this.app.overview.rows.length;
    this.tally.textContent = `${count(keys.size)} ${keys.size === 1 ? "group" : "groups"}, ${count(this.rows.length)} of ${plural(total, "trajectory", "trajectories")}${
      rewards.n ? `, mean reward ${number(rewards.mean)}` : ""
    }`;
    this._drawHead();
    this.list.el.setAttribute("aria-label", this.kind === "groups" ? "Groups" : "Trajectories");
    const place = active === undefined ? -1 : this.items.findIndex((item) => item.key === active);
    if (place >= 0) this.list.active = place;
    this.list.reset(this.items.length);
    this.el.querySelector(".list-empty")?.remove();
    if (!this.items.length) this.list.spacer.after(h("div", { class: "list-empty" }, total ? "No trajectory fits these filters." : "This run holds no trajectories yet."));
  }

  /** Click on a column's name: sorted by it, from the most; again: from the least; again: as recorded. */
  _drawHead() {
    const focused = this.head.getRootNode().activeElement?.dataset?.sort;
    const { by, down } = this.sort;
    this.head.className = `list-head row ${this.kind}${this.showsHits ? " hits" : ""}`;
    this.head.replaceChildren(
      ...this.columns.map(([name, cls, value]) => {
        if (!value) return h("span", { class: cls, role: "columnheader" }, name);
        const on = by === name;
        const order = !on ? "none" : down ? "descending" : "ascending";
        const sort = () => {
          this.sort = !on ? { by: name, down: true } : down ? { by: name, down: false } : { by: null, down: true };
          this.redrawList();
        };
        const sign = on ? (down ? " \u2193" : " \u2191") : "";
        return h("span", { class: cls, role: "columnheader", "aria-sort": order }, h("button", { class: "sort", "data-sort": name, onclick: sort }, name, sign));
      }),
    );
    if (focused) this.head.querySelector(`[data-sort="${focused}"]`)?.focus({ preventScroll: true });
  }

  _sorted(items) {
    const value = this.columns.find(([name]) => name === this.sort.by)?.[2];
    if (!value) return items;
    const sign = this.sort.down ? -1 : 1;
    // What was not recorded comes last either way.
    return [...items].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (!isNumber(x) || !isNumber(y)) return isNumber(y) - isNumber(x);
      return sign * (x - y);
    });
  }

  get showsHits() {
    return this.kind === "trajectories" && this.filters.hits !== null;
  }

  get columns() {
    return COLUMNS[this.showsHits ? "hits" : this.kind];
  }

  groupRow(group) {
    const found = new Map();
    for (const row of group.rows) for (const name of row.badges) found.set(name, (found.get(name) ?? 0) + 1);
    const hit = this.filters.hits && group.rows.map((row) => this.filters.hits.get(row.key)).find(Boolean);
    return h(
      "div",
      { class: "row groups", "data-group": group.key },
      h("span", { class: "name" }, visible(group.uid)),
      h("span", { class: "num" }, group.step),
      hit ? excerptCell(hit.excerpt, this.searched) : h("span", { class: "clip dim", title: group.prompt }, group.prompt || "\u2014"),
      h("span", { class: "num" }, group.rows.length),
      rewardBars(group.rows, ...this.range),
      rewardCell(group.stats.mean, "mean"),
      rewardCell(group.stats.std, "std"),
      h(
        "span",
        { class: "badges" },
        [...found].map(([name, n]) =>
          h("span", { class: `badge badge-${name}`, "data-badge": name, title: BADGES[name][1] }, name === "zero_variance" ? BADGES[name][0] : `${n} ${BADGES[name][0]}`),
        ),
      ),
    );
  }

  trajectoryRow(row) {
    const hit = this.filters.hits?.get(row.key);
    const last = hit
      ? [h("span", { class: "dim" }, hit.where), excerptCell(hit.excerpt, this.searched)]
      : [...[row.turns, row.tool_calls, row.tokens, row.sampled_tokens].map((value) => countCell(value)), badges(row)];
    return h(
      "div",
      { class: `row trajectories${hit ? " hits" : ""}`, "data-key": row.key },
      h("span", { class: "name" }, visible(row.id)),
      h("span", { class: "num" }, row.step),
      endBadge(row),
      rewardCell(row.reward),
      advantageCell(row),
      ...last,
    );
  }

  open(item) {
    if (this.kind === "groups") this.app.go({ view: "group", key: (item.rows.find((row) => this.filters.hits?.has(row.key)) ?? item.rows[0]).key });
    else {
      const hit = this.filters.hits?.get(item.key);
      const going = this.app.go({ view: "conversation", key: item.key, turn: hit?.turn >= 0 ? hit.turn : undefined });
      if (hit) going.then(() => this.app.state.key === item.key && this.app.views.sample.tokens.lookFor(this.searched));
    }
  }

  /** Search for what is in the field; `again`: there is more to be searched than the last time. */
  async runSearch(again = false) {
    const text = again ? this.searched : this.search.value;
    if (text === this.searched && !again) return;
    this.searched = text;
    this.searching?.abort();
    if (!text) {
      this.filters.hits = null;
      this.el.removeAttribute("data-searched");
      this.update();
      return;
    }
    const { signal } = (this.searching = new AbortController());
    if (!again) this.app.say(`Searching for \u201c${oneLine(text)}\u201d \u2026`);
    this.el.removeAttribute("data-searched");
    if (!again) this.kinds.choose("trajectories");
    const total = this.app.overview.rows.length;
    let found = null;
    const show = (hits) => {
      this.filters.hits = new Map(hits.map((hit) => [hit.key, hit]));
      this.update();
    };
    try {
      for await (const { hits, searched } of searchRun(this.app, text, signal)) {
        found = hits;
        if (again) continue; // what was found before stays until all is known
        show(hits);
        const words = `\u201c${oneLine(text)}\u201d is in ${plural(hits.length, "trajectory", "trajectories")}`;
        this.app.say(`${words}; searched ${count(searched)}${searched < total ? ` of ${count(total)}` : ""}`);
      }
      if (signal.aborted) return;
      if (again && found) show(found);
      this.el.setAttribute("data-searched", text);
    } catch (error) {
      if (!signal.aborted) this.app.fail(error);
    }
  }

  show() {
    this.list.draw();
  }

  focus() {
    (this.list.el.hidden ? this.consistency.el : this.list.el).focus({ preventScroll: true });
  }

  destroy() {
    this.searching?.abort();
    this.consistency.destroy();
    for (const chart of this.charts) chart.destroy();
    this.list.destroy();
  }
}

/** What was found, with little before it, so that it is in sight. */
function excerptCell(excerpt, needle) {
  const [shown, wanted] = [oneLine(excerpt), oneLine(needle ?? "")];
  const at = wanted ? shown.toLowerCase().indexOf(wanted.toLowerCase()) : -1;
  if (at < 0) return h("span", { class: "clip dim", title: shown }, shown);
  const start = Math.max(0, at - BEFORE_HIT);
  const end = at + wanted.length;
  return h("span", { class: "clip dim", title: shown }, (start ? "\u2026" : "") + shown.slice(start, at), h("mark", null, shown.slice(at, end)), shown.slice(end));
}
