// Trends over steps. One path a series, so a thousand steps cost no more elements than ten.

import { h, svg } from "./dom.js";
import { count, END_WORDS, number, plural } from "./format.js";

const HEIGHT = 92;
const PAD = { left: 4, right: 4, top: 8, bottom: 16 };

export class Chart {
  /** `draw(series, plot)` gives SVG elements, `read(entry)` the words for a step, `onStep(step)` is called for a choice. */
  constructor({ title, draw, read, onStep }) {
    Object.assign(this, { title, drawSeries: draw, read, onStep, series: [], hover: null, selected: null });
    this.readout = h("span", { class: "readout" });
    this.plot = svg("svg", { class: "plot", "aria-hidden": "true" });
    this.el = h(
      "div",
      {
        class: "chart",
        role: "slider",
        tabindex: 0,
        "aria-label": `${title} by step; Enter chooses the step`,
        onpointermove: (event) => this._point(event),
        onpointerleave: () => this._hover(null),
        onclick: () => this._choose(),
        onkeydown: (event) => this._key(event),
        onblur: () => this._hover(null),
      },
      h("div", { class: "chart-head" }, h("span", { class: "chart-title" }, title), this.readout),
      this.plot,
    );
    this.observer = new ResizeObserver(() => this._draw());
    this.observer.observe(this.el);
  }

  update(series, selected) {
    this.series = series;
    this.selected = selected;
    this.hover = null;
    this._draw();
  }

  _draw() {
    const width = Math.max(80, this.plot.clientWidth || 240);
    const n = Math.max(1, this.series.length);
    const slot = (width - PAD.left - PAD.right) / n;
    this.geometry = { slot };
    const x = (i) => PAD.left + (i + 0.5) * slot;
    const y = (share) => PAD.top + (1 - share) * (HEIGHT - PAD.top - PAD.bottom);
    this.plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.plot.setAttribute("height", HEIGHT);
    const base = svg("path", { class: "axis", d: `M${PAD.left} ${y(0)}H${width - PAD.right}` });
    this.cursor = svg("path", { class: "cursor", d: "" });
    const labels = this.series.length
      ? [this._label(0, x, width), this.series.length > 1 ? this._label(this.series.length - 1, x, width) : null].filter(Boolean)
      : [];
    this.x = x;
    this.plot.replaceChildren(this.cursor, ...this.drawSeries(this.series, { x, y, slot, width }), base, ...labels);
    this._mark();
  }

  _label(i, x, width) {
    const anchor = i ? "end" : "start";
    const label = svg("text", { class: "tick", x: i ? width - PAD.right : PAD.left, y: HEIGHT - 3, "text-anchor": anchor });
    label.textContent = i ? String(this.series[i].step) : `step ${this.series[i].step}`;
    return label;
  }

  _mark() {
    const chosen = this.series.findIndex((entry) => entry.step === this.selected);
    const at = this.hover ?? (chosen >= 0 ? chosen : null);
    const entry = this.series[at ?? this.series.length - 1];
    this.readout.textContent = entry ? `${at === null ? "last: " : `step ${entry.step}: `}${this.read(entry)}` : "nothing here";
    const wide = Math.max(2, this.geometry.slot);
    this.cursor.setAttribute("d", at === null ? "" : `M${this.x(at) - wide / 2} ${PAD.top - 4}h${wide}V${HEIGHT - PAD.bottom}h${-wide}z`);
    this.el.setAttribute("aria-valuemin", 0);
    this.el.setAttribute("aria-valuemax", Math.max(0, this.series.length - 1));
    this.el.setAttribute("aria-valuenow", at ?? Math.max(0, this.series.length - 1));
    this.el.setAttribute("aria-valuetext", entry ? `step ${entry.step}: ${this.read(entry)}` : "nothing here");
  }

  _hover(i) {
    this.hover = i;
    this._mark();
  }

  _point(event) {
    const box = this.plot.getBoundingClientRect();
    const i = Math.floor((event.clientX - box.left - PAD.left) / this.geometry.slot);
    this._hover(this.series.length ? Math.max(0, Math.min(this.series.length - 1, i)) : null);
  }

  _choose() {
    const at = this.hover ?? this.series.length - 1;
    if (this.series[at]) this.onStep(this.series[at].step === this.selected ? null : this.series[at].step);
  }

  _key(event) {
    const last = this.series.length - 1;
    const at = this.hover ?? Math.max(0, this.series.findIndex((entry) => entry.step === this.selected));
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last };
    if (event.key === "Enter" || event.key === " ") this._choose();
    else if (event.key in moves && last >= 0) this._hover(Math.max(0, Math.min(last, moves[event.key])));
    else return;
    event.preventDefault();
  }

  destroy() {
    this.observer.disconnect();
  }
}

const scaled = (least, greatest) => (value) => (greatest > least ? (value - least) / (greatest - least) : 0.5);

function line(points, { x, y }, name) {
  let d = "";
  let pen = "M";
  points.forEach((share, i) => {
    if (share === null) pen = "M";
    else {
      d += `${pen}${x(i).toFixed(1)} ${y(share).toFixed(1)}`;
      pen = "L";
    }
  });
  const paths = [svg("path", { class: name, d })];
  if (points.length <= 40) {
    const dots = points.map((share, i) => (share === null ? "" : `M${x(i).toFixed(1)} ${y(share).toFixed(1)}h0`)).join("");
    paths.push(svg("path", { class: `${name} dots`, d: dots }));
  }
  return paths;
}

function band(low, high, { x, y }, name) {
  const known = low.map((value, i) => (value === null ? -1 : i)).filter((i) => i >= 0);
  if (known.length < 2) return [];
  const there = known.map((i) => `${x(i).toFixed(1)} ${y(high[i]).toFixed(1)}`);
  const back = known.reverse().map((i) => `${x(i).toFixed(1)} ${y(low[i]).toFixed(1)}`);
  return [svg("path", { class: name, d: `M${[...there, ...back].join("L")}z` })];
}

function bars(series, names, value, classes, { x, y, slot }) {
  const wide = Math.max(0.8, Math.min(18, slot * 0.78));
  const base = new Float64Array(series.length);
  return names.map((name, k) => {
    let d = "";
    series.forEach((entry, i) => {
      const share = value(entry, name);
      if (!share) return;
      const [low, high] = [y(base[i]), y(base[i] + share)];
      d += `M${(x(i) - wide / 2).toFixed(1)} ${low.toFixed(1)}h${wide.toFixed(1)}V${high.toFixed(1)}h${(-wide).toFixed(1)}z`;
      base[i] += share;
    });
    return svg("path", { class: classes[k], d });
  });
}

const ENDS = ["final_answer", "turn_limit", "token_limit", "deadline", "tool_failure", "engine_failure", "parse_failure", "aborted",
  "program error", "incomplete"];

export function runCharts(onStep) {
  const reward = new Chart({
    title: "Reward",
    onStep,
    draw(series, plot) {
      const known = series.filter((entry) => entry.reward.n);
      const scale = scaled(Math.min(...known.map((e) => e.reward.min)), Math.max(...known.map((e) => e.reward.max)));
      const of = (name) => series.map((entry) => (entry.reward.n ? scale(entry.reward[name]) : null));
      return [...band(of("min"), of("max"), plot, "band"), ...line(of("mean"), plot, "line")];
    },
    read: ({ reward: r }) => (r.n ? `mean ${number(r.mean)} (${number(r.min)} \u2026 ${number(r.max)})` : "not recorded"),
  });
  const ends = new Chart({
    title: "End reasons",
    onStep,
    draw: (series, plot) =>
      bars(series, ENDS, (entry, name) => (entry.ends[name] ?? 0) / entry.n, ENDS.map((_, i) => `bar bar${i}`), plot),
    read: (entry) =>
      ENDS.filter((name) => entry.ends[name])
        .map((name) => `${END_WORDS[name] ?? name} ${entry.ends[name]}`)
        .join(", "),
  });
  const tools = new Chart({
    title: "Tool failures",
    onStep,
    draw(series, plot) {
      const rate = (entry) => Object.values(entry.failed).reduce((sum, n) => sum + n, 0) / Math.max(1, entry.calls);
      const top = Math.max(0.05, ...series.map(rate));
      return bars(series, ["failed"], (entry) => rate(entry) / top, ["bar bar4"], plot);
    },
    read(entry) {
      if (!entry.failuresKnown) return "not recorded";
      const parts = Object.entries(entry.failed).map(([status, n]) => `${status} ${n}`);
      return `${parts.length ? parts.join(", ") : "none"} of ${plural(entry.calls, "call")}`;
    },
  });
  const tokens = new Chart({
    title: "Tokens",
    onStep,
    draw(series, plot) {
      const scale = scaled(0, Math.max(1, ...series.map((entry) => entry.tokens.max ?? 0)));
      const of = (field, name) => series.map((entry) => (entry[field].n ? scale(entry[field][name]) : null));
      return [
        ...band(of("tokens", "min"), of("tokens", "max"), plot, "band band2"),
        ...line(of("tokens", "mean"), plot, "line line2"),
        ...line(of("sampled", "mean"), plot, "line line3"),
      ];
    },
    read: ({ tokens: all, sampled }) =>
      all.n ? `mean ${count(Math.round(all.mean))}, sampled ${count(sampled.n ? Math.round(sampled.mean) : null)}` : "not recorded",
  });
  return [reward, ends, tools, tokens];
}
