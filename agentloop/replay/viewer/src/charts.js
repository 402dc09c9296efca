// Trends over steps. One path a series, so a thousand steps cost no more elements than ten.

import { h, svg } from "./dom.js";
import { count, END_WORDS, isNumber, number, plural, small } from "./format.js";

const HEIGHT = 92;
const PAD = { left: 34, right: 4, top: 8, bottom: 16 };

export class Chart {
  /**
   * `draw(series, plot)` gives SVG elements and the words for the bottom and the top of the scale, `read(entry)` the words for a
   * step, `onStep(step)` is called for a choice; `keys(entry)`, where colours mean something: what `read` joins, as
   * `[class, words]`.
   */
  constructor({ title, draw, read, onStep, keys = null }) {
    Object.assign(this, { drawSeries: draw, read, onStep, keys, series: [], hover: null, selected: null });
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
      h("div", { class: "chart-head" }, (this.title = h("span", { class: "chart-title" }, title)), this.readout),
      this.plot,
    );
    this.observer = new ResizeObserver(() => this._draw());
    this.observer.observe(this.el);
  }

  /** What is pointed at stays pointed at. */
  update(series, selected) {
    const step = this.series[this.hover]?.step;
    const at = series.findIndex((entry) => entry.step === step);
    this.series = series;
    this.selected = selected;
    this.hover = at >= 0 ? at : null;
    this._draw();
  }

  rename(title) {
    this.title.textContent = title;
    this.el.setAttribute("aria-label", `${title} by step; Enter chooses the step`);
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
    const { drawn, low, high } = this.drawSeries(this.series, { x, y, slot, width });
    const scale = this.series.length ? [this._edge(low, y(0)), this._edge(high, y(1) + 7)] : [];
    this.plot.replaceChildren(this.cursor, ...drawn, base, ...labels, ...scale);
    this._mark();
  }

  _label(i, x, width) {
    const anchor = i ? "end" : "start";
    const label = svg("text", { class: "tick", x: i ? width - PAD.right : PAD.left, y: HEIGHT - 3, "text-anchor": anchor });
    label.textContent = i ? String(this.series[i].step) : `step ${this.series[i].step}`;
    return label;
  }

  /** A value of the scale, at its height. */
  _edge(words, y) {
    const label = svg("text", { class: "tick", x: PAD.left - 5, y, "text-anchor": "end" });
    label.textContent = words ?? "";
    return label;
  }

  _mark() {
    const chosen = this.series.findIndex((entry) => entry.step === this.selected);
    const at = this.hover ?? (chosen >= 0 ? chosen : null);
    const entry = this.series[at ?? this.series.length - 1];
    const when = at === null ? "last: " : `step ${entry?.step}: `;
    this.readout.textContent = this.readout.title = entry ? `${when}${this.read(entry)}` : "nothing here";
    if (entry && this.keys) {
      const keys = this.keys(entry).flatMap(([name, words], i) => [i ? ", " : "", h("i", { class: `bar-key ${name}`, "aria-hidden": "true" }), words]);
      this.readout.replaceChildren(when, ...keys);
    }
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

/** How far the trainer's log-probabilities are from the rollout's: the mean and, above it, the mean's spread over turns. */
export function driftChart(onStep) {
  return new Chart({
    title: "Mean difference",
    onStep,
    draw(series, plot) {
      const top = Math.max(1e-9, ...series.map((entry) => entry.figures.mean_abs ?? 0));
      const scale = scaled(0, top);
      const of = series.map((entry) => (isNumber(entry.figures.mean_abs) ? scale(entry.figures.mean_abs) : null));
      return { drawn: line(of, plot, "line"), low: "0", high: top.toPrecision(2) };
    },
    read: ({ figures }) => (isNumber(figures.mean_abs) ? `mean ${small(figures.mean_abs)}, most ${small(figures.max_abs)}` : "not recorded"),
  });
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

/** Of a step, what ended how often; the class is that of the bar's part. */
const endKeys = (entry) =>
  ENDS.flatMap((name, i) => (entry.ends[name] ? [[`bar${i}`, `${END_WORDS[name] ?? name} ${entry.ends[name]}`]] : []));

const short = (x) => (Math.abs(x) >= 1e6 ? `${(x / 1e6).toFixed(1)}M` : Math.abs(x) >= 1e4 ? `${Math.round(x / 1e3)}k` : number(x, 2));
const percent = (share) => `${Math.round(100 * share)}%`;
const sum = (values) => values.reduce((total, value) => total + value, 0);

export function runCharts(onStep) {
  const reward = new Chart({
    title: "Reward",
    onStep,
    draw(series, plot) {
      const known = series.filter((entry) => entry.reward.n).map((entry) => entry.reward);
      if (!known.length) return { drawn: [] };
      const [least, most] = [Math.min(...known.map((r) => r.min)), Math.max(...known.map((r) => r.max))];
      const scale = scaled(least, most);
      const of = (value) => series.map(({ reward: r }) => (r.n ? scale(Math.max(r.min, Math.min(r.max, value(r)))) : null));
      const drawn = [...band(of((r) => r.mean - r.std), of((r) => r.mean + r.std), plot, "band"), ...line(of((r) => r.mean), plot, "line")];
      return { drawn, low: least < most ? short(least) : "", high: least < most ? short(most) : "" };
    },
    read: ({ reward: r }) => (r.n ? `mean ${number(r.mean)} \u00b1 ${number(r.std)} (${number(r.min)} \u2026 ${number(r.max)})` : "not recorded"),
  });
  const flat = new Chart({
    title: "No gradient",
    onStep,
    draw: (series, plot) => ({ drawn: bars(series, ["flat"], (entry) => entry.flat / entry.groups, ["bar bar7"], plot), low: "0%", high: "100%" }),
    read: ({ flat: n, groups }) => `${count(n)} of ${plural(groups, "group")}: all rewards equal`,
  });
  const ends = new Chart({
    title: "End reasons",
    onStep,
    draw: (series, plot) => ({
      drawn: bars(series, ENDS, (entry, name) => (entry.ends[name] ?? 0) / entry.n, ENDS.map((_, i) => `bar bar${i}`), plot),
      low: "0%",
      high: "100%",
    }),
    keys: endKeys,
    read: (entry) => endKeys(entry).map(([, words]) => words).join(", "),
  });
  const tools = new Chart({
    title: "Tool failures",
    onStep,
    draw(series, plot) {
      const share = (entry, name) => (name === "failed" ? sum(Object.values(entry.failed)) : entry.malformed) / Math.max(1, entry.calls + entry.malformed);
      const top = Math.max(0.05, ...series.map((entry) => share(entry, "failed") + share(entry, "malformed")));
      const drawn = bars(series, ["failed", "malformed"], (entry, name) => share(entry, name) / top, ["bar bar4", "bar bar6"], plot);
      return { drawn, low: "0%", high: percent(top) };
    },
    read(entry) {
      if (!entry.failuresKnown) return "not recorded";
      const parts = Object.entries(entry.failed).map(([status, n]) => `${status} ${n}`);
      const malformed = entry.malformed ? `; ${count(entry.malformed)} malformed` : "";
      return `${parts.length ? parts.join(", ") : "none"} of ${plural(entry.calls, "call")}${malformed}`;
    },
  });
  const tokens = new Chart({
    title: "Tokens",
    onStep,
    draw(series, plot) {
      const top = Math.max(1, ...series.map((entry) => entry.tokens.max ?? 0));
      const scale = scaled(0, top);
      const of = (field, name) => series.map((entry) => (entry[field].n ? scale(entry[field][name]) : null));
      const drawn = [
        ...band(of("tokens", "min"), of("tokens", "max"), plot, "band band2"),
        ...line(of("tokens", "mean"), plot, "line line2"),
        ...line(of("sampled", "mean"), plot, "line line3"),
      ];
      return { drawn, low: "0", high: short(top) };
    },
    read: ({ tokens: all, sampled }) =>
      all.n ? `mean ${count(Math.round(all.mean))}, sampled ${count(sampled.n ? Math.round(sampled.mean) : null)}` : "not recorded",
  });
  return [reward, flat, ends, tools, tokens];
}
