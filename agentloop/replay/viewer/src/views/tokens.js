// The tokens of one trajectory, as the model saw them. Only the rows in sight are in the page.

import { codesOf, legendOf, MODES, strip } from "../colours.js";
import { copyText, h, perFrame, toggle, uniqueId } from "../dom.js";
import { count, isNumber, MISSING, number, plural, visible } from "../format.js";
import { paintCodes, Strip } from "../minimap.js";
import { facts, segmented } from "../parts.js";
import { ORIGINS } from "../sample.js";
import { parseBound } from "../search.js";

const ROW = 21;
const OVERSCAN = 5;
const GUTTER = 116;
const GAP = 2;
const GUTTER_WORDS = ["prompt", "", "tool", "template"];

export class TokensPane {
  /** `onMove(token)` is told of the token under the cursor, when the user moved it. */
  constructor(app, onMove) {
    this.app = app;
    this.onMove = onMove;
    this.sample = null;
    this.cursor = 0;
    this.anchor = null;
    this.rows = new Map();
    // Read when they change: reading them from the page would lay it out in the midst of drawing.
    this.top = 0;
    this.height = 0;
    this.width = 0;
    this.over = [];
    this.threshold = 0.5;
    this.found = [];
    this.id = uniqueId("tokens");

    this.modes = segmented(
      "Colour tokens by",
      Object.entries(MODES).map(([name, mode]) => [name, mode.name, mode.about]),
      app.mode,
      (mode) => app.setMode(mode),
    );
    this.legend = h("div", { class: "legend", role: "note", "aria-label": "Legend" });
    this.map = new Strip((context, width, height) => this.paintMap(context, width, height), {
      class: "map",
      title: "the whole trajectory; click to go there",
      onclick: (event) => {
        const box = this.map.el.getBoundingClientRect();
        if (this.sample) this.moveTo(Math.floor(((event.clientX - box.left) / box.width) * this.sample.n), { centre: true });
      },
    });
    this.map.el.setAttribute("aria-hidden", "true");
    this.lens = h("i", { class: "lens" });
    this.jumpWords = h("span", { class: "dim", "data-field": "jump", role: "status" });
    this.limit = h("input", {
      class: "number",
      size: 4,
      value: "0.5",
      inputMode: "decimal",
      "aria-label": "differences over",
      oninput: (event) => {
        this.threshold = parseBound(event.target.value) ?? 0.5;
        this.findDifferences();
      },
    });
    this.jumps = h(
      "span",
      { class: "jumps" },
      h("button", { class: "tool", "data-action": "previous", title: "p", onclick: () => this.jump(-1) }, "\u2039 previous"),
      h("button", { class: "tool", "data-action": "next", title: "n", onclick: () => this.jump(1) }, "next \u203a"),
      h("label", { class: "bound" }, "over ", this.limit),
      this.jumpWords,
    );
    this.findWords = h("span", { class: "dim", role: "status" });
    this.findInput = h("input", {
      type: "search",
      class: "search small",
      placeholder: "Find in tokens",
      "aria-label": "Find text in the tokens; Enter goes to the next place",
      oninput: () => this.find(),
      onkeydown: (event) => {
        if (event.key === "Enter") this.nextFound(event.shiftKey ? -1 : 1);
        if (event.key === "Escape") {
          this.findInput.value = "";
          this.find();
          this.focus();
          event.stopPropagation();
        }
      },
    });
    this.copyButton = h("button", { class: "tool", title: "copy the selected tokens' text (Ctrl+C)", onclick: () => this.copy("text") }, "Copy text");
    this.copyIds = h("button", { class: "tool", title: "copy the selected tokens' ids", onclick: () => this.copy("ids") }, "Copy ids");
    this.spacer = h("div", { class: "spacer", role: "presentation" });
    this.scroller = h(
      "div",
      {
        class: "tokens",
        role: "listbox",
        tabindex: 0,
        dir: "ltr",
        "aria-label": "Tokens",
        "aria-multiselectable": "true",
        onscroll: () => {
          this.top = this.scroller.scrollTop;
          this.draw();
        },
        onkeydown: (event) => this._key(event),
        onpointerdown: (event) => this._down(event),
        onpointermove: (event) => this._over(event),
        onpointerleave: () => this.hideTip(),
        onblur: () => this.hideTip(),
      },
      this.spacer,
    );
    this.probe = h("span", { class: "tok probe", "aria-hidden": "true" }, "0000000000");
    this.tip = h("div", { class: "tip", role: "tooltip", id: `${this.id}-tip`, hidden: true });
    this.detail = h("div", { class: "detail", "aria-live": "polite" });
    this.el = h(
      "section",
      { class: "pane tokens-pane", "aria-label": "Tokens" },
      h("div", { class: "bar" }, this.modes, h("span", { class: "grow" }), this.findInput, this.findWords),
      h("div", { class: "bar legend-bar" }, this.legend),
      this.jumps,
      h("div", { class: "map-box" }, this.map.el, this.lens),
      this.scroller,
      h("div", { class: "bar foot" }, this.detail, h("span", { class: "grow" }), this.copyButton, this.copyIds),
      this.probe,
    );
    this.draw = perFrame(() => this._draw());
    this.observer = new ResizeObserver(() => this.resized());
    this.observer.observe(this.scroller);
  }

  // -- what is shown ------------------------------------------------------------------------------------------------

  /** `grown`: more of the same trajectory; cursor, selection and place stay. */
  load(sample, grown = false) {
    this._clear();
    this.sample = sample;
    if (!grown) {
      this.cursor = 0;
      this.anchor = null;
    }
    this.hideTip();
    this.scroller.setAttribute("aria-label", `${plural(sample.n, "token")} of ${visible(sample.header.id)}`);
    this.findDifferences();
    this.find();
    this.layout();
    if (!grown) this.scrollTo(0);
    this.drawLegend();
    this.map.draw();
    this._draw();
    this.drawDetail();
  }

  setMode(mode) {
    this.modes.querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.value === mode)));
    if (!this.sample) return;
    this.drawLegend();
    this.map.draw();
    this._clear();
    this._draw();
  }

  repaint() {
    if (this.sample) this.map.draw();
  }

  drawLegend() {
    const { mode } = this.app;
    this.el.setAttribute("data-mode", mode);
    const entries = legendOf(this.sample, mode).filter(([, , n]) => n > 0);
    const about = h("span", { class: "dim legend-about" }, MODES[mode].about);
    const keys = entries.map(([code, words, n]) =>
      h("span", { class: "key", "data-code": code }, h("i", { class: `swatch c${code}` }), words, h("span", { class: "dim" }, ` ${count(n)}`)),
    );
    const notes = [];
    if (MODES[mode].heat && this.sample.header.masked) notes.push("This trajectory is masked: none of its tokens is trained, so none has a colour.");
    if (mode === "difference" && !this.sample.columns.train_logprob) notes.push("The trainer's part: not recorded.");
    if (mode === "entropy" && !this.sample.columns.entropy) notes.push("Entropy: not recorded.");
    this.legend.replaceChildren(about, ...keys, ...notes.map((note) => h("span", { class: "note" }, note)));
    toggle(this.jumps, "hidden", mode !== "difference");
  }

  /** Break the tokens into rows: at newlines, where a segment of another turn begins, and at the edge. */
  layout() {
    const { sample } = this;
    if (!this.width) this.measure();
    const room = this.width;
    const starts = [];
    const { pieces, segments } = sample;
    let segment = 0;
    let used = 0;
    let broke = true;
    for (let i = 0; i < sample.n; i++) {
      const wide = Math.min(room, pieces[i].cells * this.ch + GAP);
      let newTurn = false;
      while (segment < segments.length && segments[segment].start <= i) {
        newTurn = i > 0 && (segments[segment].origin === "sampled" || segments[segment].turn !== segments[segment - 1].turn);
        segment += 1;
      }
      if (broke || newTurn || used + wide > room) {
        starts.push(i);
        used = 0;
      }
      used += wide;
      broke = pieces[i].breaks;
    }
    this.starts = Uint32Array.from(starts);
    this.spacer.style.height = `${starts.length * ROW}px`;
  }

  /** What the layout depends on; true if it has changed. */
  measure() {
    const ch = this.probe.getBoundingClientRect().width / 10 || 7.5;
    const width = Math.max(160, this.scroller.clientWidth - GUTTER - 24);
    this.height = this.scroller.clientHeight;
    const changed = Math.abs(width - this.width) >= 1 || Math.abs(ch - this.ch) > 0.01;
    this.ch = ch;
    this.width = width;
    return changed;
  }

  resized() {
    if (!this.scroller.clientWidth) return;
    const inSight = this.sample && this.isInSight(this.cursor);
    const changed = this.measure();
    if (!this.sample) return;
    if (changed) {
      const top = this.starts[Math.floor(this.top / ROW)] ?? 0;
      this.layout();
      this._clear();
      this.scrollTo(this.rowOf(inSight ? this.cursor : top) * ROW - (inSight ? this.height / 3 : 0));
    } else if (inSight && !this.isInSight(this.cursor)) {
      this.scrollTo((this.rowOf(this.cursor) + 1) * ROW - this.height);
    }
    this._draw();
  }

  scrollTo(top) {
    const most = Math.max(0, this.starts.length * ROW - this.height);
    const to = Math.round(Math.max(0, Math.min(most, top)));
    if (to === this.top) return;
    this.top = to;
    this.scroller.scrollTop = to;
  }

  rowOf(token) {
    let [low, high] = [0, this.starts.length];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.starts[middle] <= token) low = middle;
      else high = middle;
    }
    return low;
  }

  isInSight(token) {
    const top = this.rowOf(token) * ROW;
    return top >= this.top && top + ROW <= this.top + this.height;
  }

  _clear() {
    for (const row of this.rows.values()) row.remove();
    this.rows.clear();
  }

  _draw() {
    if (!this.sample) return;
    const height = this.height || 300;
    const first = Math.max(0, Math.floor(this.top / ROW) - OVERSCAN);
    const last = Math.min(this.starts.length, Math.ceil((this.top + height) / ROW) + OVERSCAN);
    for (const [i, row] of this.rows) {
      if (i < first || i >= last) {
        row.remove();
        this.rows.delete(i);
      }
    }
    const fresh = document.createDocumentFragment();
    for (let i = first; i < last; i++) {
      if (this.rows.has(i)) continue;
      const row = this._row(i);
      fresh.append(row);
      this.rows.set(i, row);
    }
    if (fresh.childNodes.length) this.spacer.append(fresh);
    const share = (row) => (100 * (this.starts[row] ?? this.sample.n)) / Math.max(1, this.sample.n);
    const top = Math.floor(this.top / ROW);
    this.lens.style.left = `${share(top)}%`;
    this.lens.style.right = `${100 - share(top + Math.ceil(height / ROW))}%`;
  }

  _row(i) {
    const { sample } = this;
    const codes = codesOf(sample, this.app.mode);
    const [start, end] = [this.starts[i], this.starts[i + 1] ?? sample.n];
    const row = document.createElement("div");
    row.className = "trow";
    row.style.top = `${i * ROW}px`;
    const gutter = document.createElement("span");
    gutter.className = "gutter";
    gutter.setAttribute("aria-hidden", "true");
    if (sample.segments[sample.segmentOf(start)].start === start) {
      const name = document.createElement("b");
      name.textContent = sample.isSampled(start) ? `turn ${sample.turnOf(start)}` : GUTTER_WORDS[sample.origin[start]];
      gutter.append(name);
      row.classList.add("opens");
    }
    gutter.append(String(start));
    row.append(gutter);
    const { pieces } = sample;
    const version = this.app.mode === "version" ? sample.version : null;
    const difference = this.app.mode === "difference" ? sample.difference : null;
    const decorated = this.found.length > 0 || this.anchor !== null || (this.cursor >= start && this.cursor < end);
    for (let k = start; k < end; k++) {
      const span = document.createElement("span");
      const piece = pieces[k];
      let name = `tok c${codes[k]}`;
      if (piece.kind !== "text") name += ` k-${piece.kind}`;
      if (version && k && version[k] >= 0 && version[k - 1] >= 0 && version[k] !== version[k - 1]) name += " shift";
      if (difference && Math.abs(difference[k]) > this.threshold) name += " over";
      if (!piece.exact || piece.cells * this.ch > this.width) {
        name += " box";
        span.style.width = `${Math.min(this.width - GAP, piece.cells * this.ch)}px`;
      }
      span.className = name;
      span.textContent = piece.text;
      span.token = k;
      if (decorated) this._decorate(span);
      row.append(span);
    }
    return row;
  }

  /** Cursor, selection or finds have changed. */
  _mark() {
    for (const row of this.rows.values()) {
      for (const span of row.children) if (span.token !== undefined) this._decorate(span);
    }
  }

  _decorate(span) {
    const { token, classList } = span;
    const [from, to] = this.selection();
    const on = token === this.cursor;
    toggle(span, "sel", this.anchor !== null && token >= from && token < to);
    toggle(span, "found", this.found.length > 0 && this.isFound(token));
    if (on === classList.contains("cursor")) return;
    classList.toggle("cursor", on);
    if (on) {
      span.id = `${this.id}-at`;
      span.setAttribute("role", "option");
      span.setAttribute("aria-selected", "true");
      span.setAttribute("aria-label", this.spoken(token));
      this.scroller.setAttribute("aria-activedescendant", span.id);
    } else for (const name of ["id", "role", "aria-selected", "aria-label"]) span.removeAttribute(name);
  }

  paintMap(context, width, height) {
    if (!this.sample) return;
    const cells = Math.min(2000, width);
    const codes = this.sample.once(`map-${this.app.mode}-${cells}`, () => strip(this.sample, this.app.mode, cells));
    paintCodes(context, width, height, codes, this.app.colours);
  }

  // -- the cursor ---------------------------------------------------------------------------------------------------

  /** Put the cursor on a token and bring it into sight. */
  moveTo(token, { centre = false, extend = false, quiet = false } = {}) {
    const { sample } = this;
    if (!sample?.n) return;
    if (extend) this.anchor ??= this.cursor;
    else this.anchor = null;
    this.cursor = Math.max(0, Math.min(sample.n - 1, token));
    if (centre || !this.isInSight(this.cursor)) {
      const top = this.rowOf(this.cursor) * ROW;
      if (centre) this.scrollTo(top - this.height / 3);
      else this.scrollTo(top < this.top ? top : top - this.height + ROW);
    }
    this._draw();
    this._mark();
    this.drawDetail();
    if (!quiet) this.onMove(this.cursor);
  }

  /** Tokens that copying is about, as a range. */
  selection() {
    if (this.anchor === null) return [this.cursor, this.cursor + 1];
    return [Math.min(this.anchor, this.cursor), Math.max(this.anchor, this.cursor) + 1];
  }

  _key(event) {
    if (!this.sample) return;
    const modified = event.ctrlKey || event.metaKey;
    if (modified && event.key === "c") {
      this.copy("text");
      event.preventDefault();
      return;
    }
    if (modified && event.key === "a") {
      this.cursor = 0;
      this.moveTo(this.sample.n - 1, { extend: true });
      event.preventDefault();
      return;
    }
    if (modified || event.altKey) return;
    const row = this.rowOf(this.cursor);
    const page = Math.max(1, Math.floor(this.height / ROW) - 1);
    const column = this.cursor - this.starts[row];
    const inRow = (i) => {
      const r = Math.max(0, Math.min(this.starts.length - 1, i));
      return Math.min(this.starts[r] + column, (this.starts[r + 1] ?? this.sample.n) - 1);
    };
    const moves = {
      ArrowRight: this.cursor + 1,
      ArrowLeft: this.cursor - 1,
      ArrowDown: inRow(row + 1),
      ArrowUp: inRow(row - 1),
      PageDown: inRow(row + page),
      PageUp: inRow(row - page),
      Home: this.starts[row],
      End: (this.starts[row + 1] ?? this.sample.n) - 1,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.moveTo(moves[event.key], { extend: event.shiftKey });
    this.showTip(this.cursor);
  }

  _token(event) {
    return event.target.closest?.(".tok")?.token;
  }

  _down(event) {
    const token = this._token(event);
    if (token === undefined || event.button !== 0) return;
    event.preventDefault();
    this.focus();
    this.moveTo(token, { extend: event.shiftKey });
  }

  _over(event) {
    const token = this._token(event);
    if (token === undefined) {
      this.hideTip();
      return;
    }
    if (event.buttons & 1) this.moveTo(token, { extend: true });
    else this.showTip(token);
  }

  async copy(what) {
    if (!this.sample) return;
    const [from, to] = this.selection();
    const text = what === "ids" ? `[${this.sample.columns.ids.subarray(from, to).join(", ")}]` : this.sample.text(from, to);
    if (what === "text" && !this.sample.hasText) this.app.say("The record holds no text of tokens, only ids.");
    else if (await copyText(text, this.el)) this.app.say(`Copied ${what === "ids" ? "the ids" : "the text"} of ${plural(to - from, "token")}.`);
    else this.app.say("The browser does not let this page copy.");
  }

  // -- what is known of a token ---------------------------------------------------------------------------------------

  describe(i) {
    const { sample } = this;
    const { columns } = sample;
    const sampled = sample.isSampled(i);
    const value = (column, digits = 6) => {
      if (!column || Number.isNaN(column[i])) return sampled ? MISSING : "\u2014";
      return column[i] === 0 ? "0" : Math.abs(column[i]) < 1e-4 ? column[i].toExponential(6) : column[i].toFixed(digits);
    };
    const trained = columns.train_logprob ? !Number.isNaN(columns.train_logprob[i]) : false;
    const version = sample.version[i];
    const place = sample.segmentOf(i);
    const segment = sample.segments[place];
    const pairs = [
      ["token", count(i), "position"],
      ["id", String(columns.ids[i]), "id"],
      ["text", this.quoted(i), "text"],
      ["origin", ORIGINS[sample.origin[i]], "origin"],
      ["turn", segment.turn < 0 ? "prompt" : `turn ${segment.turn}`, "turn"],
      ["segment", `${place}: ${count(segment.start)} \u2026 ${count(segment.end - 1)}`, "segment"],
      ["mask", sampled ? "1" : "0", "mask"],
    ];
    const character = sample.characterAround(i);
    if (character) {
      pairs.splice(3, 0, ["part of", `\u201c${visible(character[2])}\u201d, tokens ${count(character[0])} \u2026 ${count(character[1] - 1)}`, "character"]);
    }
    if (sampled && !sample.isTrained(i)) {
      pairs.push(["trained", sample.header.masked ? "no: the trajectory is masked" : "no: rejected by the trainer", "trained"]);
    }
    pairs.push(["log-probability", value(columns.logprob), "logprob"]);
    if (sampled && columns.logprob && !Number.isNaN(columns.logprob[i])) {
      pairs.push(["probability", number(Math.exp(columns.logprob[i]), 4), "probability"]);
    }
    pairs.push(["entropy", value(columns.entropy), "entropy"]);
    pairs.push(["weights", version >= 0 ? (sample.versionNames[version] === "mixed" ? "mixed" : `v${sample.versionNames[version]}`) : sampled ? MISSING : "\u2014", "version"]);
    pairs.push(["trainer's", trained ? value(columns.train_logprob) : sampled ? MISSING : "\u2014", "train_logprob"]);
    const difference = sample.difference[i];
    const known = isNumber(difference);
    const differenceWords = known ? `${difference > 0 ? "+" : ""}${difference.toFixed(6)}` : sample.isTrained(i) ? MISSING : "\u2014";
    pairs.push(["train \u2212 rollout", differenceWords, "difference"]);
    if (known) pairs.push(["ratio", number(Math.exp(difference), 4), "ratio"]);
    if (columns.is_weight && sampled) pairs.push(["importance weight", value(columns.is_weight, 4), "is_weight"]);
    pairs.push(["advantage", sampled ? value(columns.advantage, 4) : "\u2014", "advantage"]);
    return pairs;
  }

  quoted(i) {
    const { sample } = this;
    if (!sample.hasText) return MISSING;
    if (sample.pieces[i].kind === "part") {
      return `bytes ${Array.from(sample.bytesOf(i), (byte) => byte.toString(16).padStart(2, "0")).join(" ")}`;
    }
    return visible(JSON.stringify(sample.text(i, i + 1)).slice(0, 600));
  }

  spoken(i) {
    const { sample } = this;
    const pairs = Object.fromEntries(this.describe(i).map(([, value, field]) => [field, value]));
    const parts = [`token ${i}`, pairs.text, `id ${pairs.id}`, pairs.origin, pairs.turn];
    if (sample.isSampled(i)) parts.push(`log-probability ${pairs.logprob}`);
    if (sample.columns.train_logprob && sample.isTrained(i)) parts.push(`train minus rollout ${pairs.difference}`);
    return parts.join(", ");
  }

  showTip(i) {
    const span = this.spanOf(i);
    if (!span) return;
    if (this.tipToken !== i || this.tip.hidden) {
      this.tip.replaceChildren(facts(this.describe(i)));
      this.tip.setAttribute("data-token", i);
      this.tipToken = i;
      this.tip.hidden = false;
    }
    const [box, frame] = [span.getBoundingClientRect(), this.app.frame.getBoundingClientRect()];
    const below = box.bottom + 6 + this.tip.offsetHeight < frame.bottom;
    const left = Math.max(4, Math.min(box.left - frame.left, frame.width - this.tip.offsetWidth - 8));
    const top = below ? box.bottom - frame.top + 6 : Math.max(4, box.top - frame.top - this.tip.offsetHeight - 6);
    this.tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
  }

  hideTip() {
    this.tip.hidden = true;
    this.tipToken = null;
  }

  spanOf(i) {
    const row = this.rows.get(this.rowOf(i));
    return row ? row.children[1 + i - this.starts[this.rowOf(i)]] : null;
  }

  drawDetail() {
    const { sample, cursor } = this;
    this.el.setAttribute("data-token", cursor);
    const [from, to] = this.selection();
    const selected = to - from > 1 ? `${plural(to - from, "token")} selected; ` : "";
    this.detail.textContent = sample.n ? `${selected}${this.spoken(cursor)}` : "This trajectory has no tokens.";
  }

  // -- differences and finding ----------------------------------------------------------------------------------------

  findDifferences() {
    const { sample, threshold } = this;
    if (!sample) return;
    this.over = [];
    let biggest = -1;
    const { difference } = sample;
    for (let i = 0; i < sample.n; i++) {
      if (Math.abs(difference[i]) > threshold) this.over.push(i);
      if (!Number.isNaN(difference[i]) && (biggest < 0 || Math.abs(difference[i]) > Math.abs(difference[biggest]))) biggest = i;
    }
    this.at = -1;
    if (this.over.length) this.jumpWords.textContent = `${count(this.over.length)} over ${threshold}`;
    else if (biggest >= 0) this.jumpWords.textContent = `none over ${threshold}; the biggest is ${number(difference[biggest])} at token ${count(biggest)}`;
    else this.jumpWords.textContent = "train values: not recorded";
    if (this.app.mode === "difference" && this.rows.size) {
      this._clear();
      this._draw();
    }
  }

  /** To the next (or previous) trained token whose difference is over the threshold. */
  jump(direction) {
    if (this.app.mode !== "difference") this.app.setMode("difference");
    const { over } = this;
    if (!over.length) {
      this.app.say(this.jumpWords.textContent);
      return;
    }
    const onOne = over.indexOf(this.cursor);
    if (onOne >= 0 && this.at >= 0) this.at = (onOne + direction + over.length) % over.length;
    else if (direction > 0) this.at = Math.max(0, over.findIndex((i) => i >= this.cursor));
    else this.at = (over.findLastIndex((i) => i < this.cursor) + over.length) % over.length;
    this.moveTo(over[this.at], { centre: !this.isInSight(over[this.at]) });
    this.jumpWords.textContent = `${this.at + 1} of ${count(over.length)} over ${this.threshold}: ${number(this.sample.difference[over[this.at]])}`;
    this.showTip(this.cursor);
  }

  find() {
    const query = this.findInput.value;
    this.found = query && this.sample ? this.sample.find(query) : [];
    this.findInput.disabled = Boolean(this.sample && !this.sample.hasText);
    this.findWords.textContent = !query ? "" : this.found.length ? plural(this.found.length, "place") : "not found";
    if (this.rows.size) this._mark();
  }

  /** Find what was searched for in the run, from the cursor on. */
  lookFor(text) {
    if (!this.sample?.hasText) return;
    this.findInput.value = text;
    this.find();
    if (!this.found.length) this.findInput.value = ""; // it is in what was never a token, as an error is
    this.find();
    this.nextFound(1);
  }

  isFound(token) {
    let [low, high] = [0, this.found.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.found[middle][1] <= token) low = middle + 1;
      else high = middle;
    }
    return low < this.found.length && this.found[low][0] <= token;
  }

  nextFound(direction) {
    if (!this.found.length) return;
    const next = direction > 0 ? this.found.findIndex(([start]) => start > this.cursor) : this.found.findLastIndex(([start]) => start < this.cursor);
    const first = this.foundOnce ? next : this.found.findIndex(([start]) => start >= this.cursor);
    this.foundOnce = true;
    const place = first >= 0 ? first : direction > 0 ? 0 : this.found.length - 1;
    this.moveTo(this.found[place][0], { centre: true });
    this.findWords.textContent = `${place + 1} of ${plural(this.found.length, "place")}`;
  }

  focus() {
    this.scroller.focus({ preventScroll: true });
  }

  destroy() {
    this.observer.disconnect();
    this.draw.cancel();
    this.map.destroy();
  }
}
