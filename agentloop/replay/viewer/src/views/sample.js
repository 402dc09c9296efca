// The conversation, and its tokens beside it.

import { h, redrawn, toggle } from "../dom.js";
import { count, isNumber, MISSING, number, oneLine, plural, seconds, signed, small, visible } from "../format.js";
import { advantageCell, badges, endBadge } from "../parts.js";
import { scheduleOf } from "../schedule.js";
import { message, turnBody, turnHead } from "./turn.js";
import { TokensPane } from "./tokens.js";

const FAR = 500;

export class SampleView {
  constructor(app) {
    this.app = app;
    this.sample = null;
    this.turn = -1;
    this.play = null;
    this.tokens = new TokensPane(app, (token) => this.tokenMoved(token));
    this.head = h("div", { class: "sample-head" });
    this.about = h("div", { class: "sample-about" });
    this.scroller = h("div", {
      class: "conversation",
      role: "feed",
      tabindex: 0,
      "aria-label": "Conversation; j and k go to the next and the previous turn",
    });
    for (const kind of ["wheel", "pointerdown", "keydown", "touchmove"]) {
      this.scroller.addEventListener(kind, () => (this.pinned = null), { passive: true });
    }
    this.playButton = h("button", { class: "tool play", title: "space", "aria-label": "play back in time", onclick: () => this.togglePlay() }, "\u25b6");
    this.clock = h("input", {
      type: "range",
      class: "clock",
      min: 0,
      max: 1000,
      value: 1000,
      "aria-label": "time",
      oninput: () => {
        this.stop();
        this.seek((Number(this.clock.value) / 1000) * this.schedule.total);
      },
    });
    this.clockWords = h("span", { class: "dim clock-words", "data-field": "clock" });
    this.speed = h("select", { "aria-label": "speed", class: "speed" }, ["1", "4", "16", "64"].map((x) => h("option", { value: x }, `${x}\u00d7`)));
    this.tabs = ["conversation", "tokens"].map((view) =>
      h("button", { class: "tab", "data-view": view, onclick: () => app.go({ ...app.state, view }) }, view),
    );
    this.talk = h(
      "section",
      { class: "pane talk-pane", "aria-label": "Conversation" },
      h("div", { class: "bar player" }, this.playButton, this.clock, this.clockWords, this.speed),
      this.scroller,
    );
    this.el = h(
      "section",
      { class: "view sample-view", "aria-label": "Trajectory" },
      this.head,
      this.about,
      h("div", { class: "tabs", role: "group", "aria-label": "Show" }, this.tabs),
      h("div", { class: "panes" }, this.talk, this.tokens.el),
    );
    this.observer = new IntersectionObserver((entries) => this._seen(entries), { root: this.scroller, rootMargin: `${FAR}px 0px` });
  }

  /** Show a link, of which the sample has been fetched; `stay`: not if it is on show already. */
  show(sample, row, { view, turn, token }, stay = false) {
    toggle(this.el, "shows-tokens", view === "tokens");
    for (const tab of this.tabs) tab.setAttribute("aria-pressed", String(tab.dataset.view === view));
    if (sample === this.sample && row !== this.row) {
      this.row = row; // of a newer overview
      redrawn(this.head, () => this.drawHead());
    }
    const known = sample.key === this.sample?.key;
    if (sample !== this.sample) this.load(sample, row, stay && known);
    if (stay && known) return;
    if (turn !== undefined) this.toTurn(turn, { tokens: token === undefined });
    if (token !== undefined) {
      this.tokens.moveTo(token, { centre: true, quiet: true });
      if (turn === undefined) this.toTurn(sample.turnOf(Math.min(token, sample.n - 1)), { tokens: false });
    }
  }

  /** `grown`: more of the trajectory that is on show, which is looked at from where the reader is. */
  load(sample, row, grown = false) {
    this.sample = sample;
    this.row = row;
    this.schedule = scheduleOf(sample.header);
    this.tokens.load(sample, grown);
    redrawn(this.head, () => this.drawHead());
    if (grown) {
      const { scroller } = this;
      const atEnd = scroller.scrollTop > 0 && scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 24;
      this.drawTalk(true);
      if (atEnd) scroller.scrollTop = scroller.scrollHeight;
      if (this.time === null) this.clockWords.textContent = seconds(this.schedule.total);
      return;
    }
    this.stop();
    this.turn = -1;
    this.pinned = null;
    this.drawTalk(false);
    this.clock.value = 1000;
    this.time = null;
    this.clockWords.textContent = seconds(this.schedule.total);
  }

  drawHead() {
    const { row, sample } = this;
    const siblings = this.app.overview.siblings(row);
    const { header } = sample;
    const near = (offset) => siblings[siblings.indexOf(row) + offset];
    const step = (offset, words, sign, key) =>
      h("button", { class: "tool", disabled: !near(offset), "aria-label": `${words} sibling`, title: key, onclick: () => this.sibling(offset) }, sign);
    this.head.replaceChildren(
      step(-1, "previous", "\u2039", "["),
      h("b", { class: "sample-id" }, visible(row.id)),
      step(1, "next", "\u203a", "]"),
      h("span", { class: "pair" }, h("i", null, "reward"), " ", h("b", { "data-field": "reward" }, number(header.reward?.value ?? row.reward))),
      h("span", { class: "pair" }, h("i", null, "advantage"), " ", advantageCell(row)),
      endBadge(row),
      badges(row),
      h("span", { class: "grow" }),
      h("button", { class: "tool", title: "an address of this token", onclick: () => this.app.copyLink() }, "Copy link"),
      h("button", { class: "tool", title: "g", onclick: () => this.app.go({ view: "group", key: row.key }) }, plural(siblings.length, "sibling")),
    );
    const components = Object.entries(header.reward?.components ?? {});
    const info = Object.entries(header.reward?.info ?? {});
    const parts = [
      ...components.map(([name, value]) => [visible(name), signed(value), "component"]),
      ["tokens", sample.n ? `${count(sample.n)} (${count(row.sampled_tokens)} sampled)` : MISSING],
      ["took", seconds(header.total_s)],
      header.score_s ? ["scored in", seconds(header.score_s)] : null,
      ["train side", trainWords(header, sample)],
      ["train \u2212 rollout", apartWords(apart(sample, 0, sample.n))],
      header.ground_truth !== null && header.ground_truth !== undefined
        ? ["ground truth", oneLine(typeof header.ground_truth === "string" ? header.ground_truth : JSON.stringify(header.ground_truth)).slice(0, 160)]
        : null,
      ...info.map(([name, value]) => [visible(name), oneLine(typeof value === "string" ? value : JSON.stringify(value)).slice(0, 160)]),
    ].filter(Boolean);
    this.about.replaceChildren(
      ...parts.map(([name, value, kind]) => h("span", { class: `pair ${kind ?? ""}`, "data-field": name, title: value }, h("i", null, name), " ", value)),
      ...(header.error ? [h("div", { class: "problem", "data-field": "error" }, h("b", null, "Error: "), visible(header.error))] : []),
    );
  }

  /** `grown`: cards of turns that are as they were stay, with all that the reader did to them. */
  drawTalk(grown) {
    const { header } = this.sample;
    const rewards = header.reward?.turns ?? [];
    if (!grown) {
      this.observer.disconnect();
      this.cards = new Map();
    }
    const prompts = header.messages ?? [];
    const lastOfUser = prompts.findLastIndex((item) => item?.role === "user");
    const canFork = this.app.overview.can.includes("fork");
    const messages = grown ? [] : prompts.map((item, i) =>
      message(item, canFork && i === lastOfUser && typeof item.content === "string" ? (text) => this._forkFrom(0, null, text) : null),
    );
    const fresh = (header.turns ?? []).map((turn) => {
      const told = JSON.stringify([turn, rewards[turn.index] ?? null]);
      const old = this.cards.get(turn.index);
      if (old?.told === told) return null;
      const body = h("div", { class: "lazy" });
      body.fill = () => {
        if (body.firstChild) return;
        body.append(turnBody(turn, { reward: rewards[turn.index], fork: this._fork(turn), drift: this._drift(turn) }));
        body.style.minHeight = "";
      };
      body.empty = () => {
        if (!body.firstChild || body.contains(body.getRootNode().activeElement)) return;
        body.style.minHeight = `${body.offsetHeight}px`;
        body.replaceChildren();
      };
      body.style.minHeight = "120px";
      const card = h("article", { class: "card turn", "data-turn": turn.index, "aria-label": `Turn ${turn.index}` }, turnHead(turn, () => this.openTurn(turn.index)), body);
      Object.assign(card, { body, told });
      this.cards.set(turn.index, card);
      if (old) {
        this.observer.unobserve(old);
        old.replaceWith(card);
        body.fill();
      }
      this.observer.observe(card);
      return old ? null : card;
    });
    const turns = fresh.filter(Boolean);
    const end = h(
      "div",
      { class: `card end-card ${this.row.end_reason === "final_answer" ? "" : "bad"}` },
      h("b", null, `End: ${endBadge(this.row).textContent}`),
      this.row.complete ? h("span", { class: "dim" }, `, reward ${rewardWords(header.reward)}`) : null,
      header.masked ? h("span", { class: "dim" }, " \u2014 masked: no gradient from this trajectory") : null,
    );
    if (grown) {
      this.scroller.lastChild.replaceWith(...turns, end);
      this._markTurn();
      return;
    }
    const scrolled = this.scroller.scrollTop;
    this.scroller.replaceChildren(h("div", { class: "prompt", "data-turn": -1 }, messages), ...turns, end);
    if (scrolled) this.scroller.scrollTop = 0;
    for (const card of turns.slice(0, 2)) card.body.fill();
    this._markTurn();
  }

  /** What trainer and rollout differ by in a turn, and the way there; null where the trainer's part is not there. */
  _drift(turn) {
    const { sample } = this;
    if (!sample.columns.train_logprob) return null;
    const found = apart(sample, turn.start, turn.end);
    const open = () => {
      this.app.setMode("difference");
      this.app.go({ view: this.app.wide ? this.app.state.view : "tokens", key: this.row.key, turn: turn.index, token: found.at });
    };
    return { words: apartWords(found), open: found.n ? open : null };
  }

  _fork(turn) {
    const { overview } = this.app;
    const { row } = this;
    const template = overview.commands.fork;
    const fork = { say: (words) => this.app.say(words) };
    if (typeof template === "string") {
      const values = { id: row.id, step: row.step, partition: row.partition, key: row.key };
      fork.command = (index) => template.replace(/\{(\w+)\}/g, (whole, name) => (name === "turn" ? index : (values[name] ?? whole)));
    }
    if (overview.can.includes("fork")) fork.edit = (call, text) => this._forkFrom(turn.index, call, text);
    return fork.command || fork.edit ? fork : null;
  }

  /** Have the host go on from a turn whose call number `call` was answered `text`; null: from the prompt `text`. */
  async _forkFrom(turn, call, text) {
    this.app.say("Forking: a new conversation goes on from here \u2026");
    try {
      const { header } = await this.app.request({ kind: "fork", key: this.row.key, turn, call, text });
      this.app.say("");
      this.app.notice(header.text ?? "Forked.", header.command);
    } catch (error) {
      this.app.fail(error);
    }
  }

  _seen(entries) {
    for (const entry of entries) {
      if (entry.isIntersecting) entry.target.body.fill();
      else if (this.cards.size > 12) entry.target.body.empty();
    }
    this._align();
  }

  /** Keep the turn that was asked for at the top while its neighbours are drawn, until the reader scrolls. */
  _align() {
    if (!this.pinned?.isConnected) return;
    const gap = this.pinned.getBoundingClientRect().top - this.scroller.getBoundingClientRect().top - 4;
    if (Math.abs(gap) >= 1) this.scroller.scrollTop += gap;
  }

  // -- moving ---------------------------------------------------------------------------------------------------------

  /** A turn was chosen: its first token comes into sight. */
  openTurn(index) {
    const turn = this.sample.turns[index];
    if (!turn) return;
    this.app.go({ view: this.app.wide ? this.app.state.view : "tokens", key: this.row.key, turn: index, token: Math.min(turn.start, this.sample.n - 1) });
  }

  /** Scroll to a turn, -1 for the prompt; `tokens`: the token pane too. */
  toTurn(index, { tokens = true } = {}) {
    const last = this.sample.turns.length - 1;
    this.turn = Math.max(-1, Math.min(last, index));
    const card = this.cards.get(this.turn);
    if (card) {
      card.body.fill();
      this.pinned = card;
      this._align();
    } else {
      this.pinned = null;
      this.scroller.scrollTop = 0;
    }
    this._markTurn();
    if (tokens) this.tokens.moveTo(this.turn < 0 ? 0 : this.sample.turns[this.turn].start, { centre: true, quiet: true });
  }

  stepTurn(offset) {
    const next = Math.max(-1, Math.min(this.sample.turns.length - 1, this.turn + offset));
    const turn = this.sample.turns[next];
    this.app.go({ view: this.app.state.view, key: this.row.key, turn: next, token: turn ? Math.min(turn.start, this.sample.n - 1) : 0 });
  }

  sibling(offset) {
    const siblings = this.app.overview.siblings(this.row);
    const next = siblings[siblings.indexOf(this.row) + offset];
    if (next) this.app.go({ view: this.app.state.view, key: next.key });
  }

  tokenMoved(token) {
    const turn = this.sample.turnOf(token);
    if (turn !== this.turn) {
      this.turn = turn;
      this._markTurn();
      this.pinned = null;
      if (this.app.wide) this.cards.get(turn)?.scrollIntoView({ block: "nearest" });
    }
    this.app.moved({ token, turn: undefined });
  }

  _markTurn() {
    for (const [index, card] of this.cards) toggle(card, "current", index === this.turn);
    this.el.setAttribute("data-turn", this.turn);
  }

  // -- playing back in time -------------------------------------------------------------------------------------------

  togglePlay() {
    if (this.play) {
      this.stop();
      return;
    }
    let last = performance.now();
    if (this.time === null || this.time >= this.schedule.total) this.time = 0;
    const tick = (now) => {
      this.time += ((now - last) / 1000) * Number(this.speed.value);
      last = now;
      this.seek(this.time);
      if (this.time >= this.schedule.total) this.stop();
      else this.play = requestAnimationFrame(tick);
    };
    this.playButton.textContent = "\u275a\u275a";
    this.playButton.setAttribute("aria-label", "pause");
    this.play = requestAnimationFrame(tick);
  }

  stop() {
    cancelAnimationFrame(this.play ?? 0);
    this.play = null;
    this.playButton.textContent = "\u25b6";
    this.playButton.setAttribute("aria-label", "play back in time");
  }

  /** Show the conversation as it was after `time` seconds. */
  seek(time) {
    const { turns, total } = this.schedule;
    let written = null;
    this.time = Math.min(time, total);
    const over = this.time >= total;
    this.clock.value = Math.round((this.time / total) * 1000);
    let current = -1;
    for (const [index, { from, to, end }] of turns.entries()) {
      const card = this.cards.get(index);
      if (this.time >= from || over) current = index;
      toggle(card, "future", !over && this.time < from);
      const writing = !over && this.time >= from && this.time < to;
      toggle(card, "writing", writing);
      const { start, end: stop } = this.sample.turns[index];
      if (writing) written = start + Math.floor(((stop - start) * (this.time - from)) / (to - from));
      toggle(card, "calling", !over && this.time >= to && this.time < end);
      const text = card.body.querySelector("[data-field=text]");
      const whole = this.sample.turns[index].text;
      if (!text || !whole || text.tagName !== "PRE") continue;
      const share = to > from ? (this.time - from) / (to - from) : 1;
      const shown = visible(writing ? whole.slice(0, Math.max(0, Math.floor(whole.length * share))) : whole);
      if (text.textContent !== shown) text.textContent = shown;
    }
    const state = turns[current];
    const doing = over ? "ended" : !state ? "waiting" : this.time < state.to ? `turn ${current}: generating` : this.time < state.end ? `turn ${current}: tools` : `turn ${current}`;
    this.clockWords.textContent = `${seconds(this.time)} of ${seconds(total)}, ${doing}`;
    if (current !== this.turn && current >= 0) this.toTurn(current);
    if (written !== null) this.tokens.moveTo(written, { quiet: true });
  }

  // -- the rest -------------------------------------------------------------------------------------------------------

  setMode(mode) {
    this.tokens.setMode(mode);
  }

  repaint() {
    this.tokens.repaint();
  }

  focus(view) {
    if (view === "tokens") this.tokens.focus();
    else this.scroller.focus({ preventScroll: true });
  }

  destroy() {
    this.stop();
    this.observer.disconnect();
    this.tokens.destroy();
  }
}

/** Of the trained tokens from `start` to `end` that have both sides: how many, the mean size of their differences, the furthest. */
function apart(sample, start, end) {
  const found = { n: 0, mean: 0, at: -1, most: 0 };
  const { difference } = sample;
  for (let i = start; i < end; i++) {
    const value = difference[i];
    if (Number.isNaN(value)) continue;
    found.n += 1;
    found.mean += Math.abs(value);
    if (found.at < 0 || Math.abs(value) > Math.abs(found.most)) [found.at, found.most] = [i, value];
  }
  found.mean /= Math.max(1, found.n);
  return found;
}

const apartWords = ({ n, mean, most, at }) => (n ? `mean ${small(mean)}, most ${signed(most)} at token ${count(at)}` : MISSING);

function trainWords(header, sample) {
  const { train } = header;
  if (!train || !sample.columns.train_logprob) return `${MISSING}`;
  const when = isNumber(train.step) && train.step !== header.step ? ` in step ${train.step}` : "";
  return train.recomputed === false ? `arrived${when}; took the rollout's log-probabilities` : `arrived${when}`;
}

function rewardWords(reward) {
  if (!reward) return MISSING;
  const parts = Object.entries(reward.components ?? {}).map(([name, value]) => `${visible(name)} ${signed(value)}`);
  return `${number(reward.value)}${parts.length ? ` (${parts.join(", ")})` : ""}`;
}
