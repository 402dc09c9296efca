// A long list of which only the rows in sight are in the page.

import { h, perFrame, uniqueId } from "./dom.js";

const OVERSCAN = 6;

export class VirtualList {
  /** `render(i)` makes row i, `onOpen(i)` is called for a click or Enter; `head` is an element above the rows. */
  constructor({ label, rowHeight, render, onOpen, head = null }) {
    Object.assign(this, { rowHeight, render, onOpen, count: 0, active: 0, rows: new Map(), id: uniqueId("list") });
    this.spacer = h("div", { class: "spacer", role: "presentation" });
    this.el = h(
      "div",
      { class: "list", role: "grid", tabindex: 0, "aria-label": label, onscroll: () => this.draw(), onkeydown: (e) => this._key(e) },
      this.spacer,
    );
    if (head) this.el.prepend(head);
    this.head = head;
    this.draw = perFrame(() => this._draw());
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.el);
  }

  reset(count) {
    this.count = count;
    this.active = Math.min(this.active, Math.max(0, count - 1));
    this.el.setAttribute("aria-rowcount", count);
    this.spacer.style.height = `${count * this.rowHeight}px`;
    this.clear();
    this._draw();
  }

  clear() {
    for (const el of this.rows.values()) el.remove();
    this.rows.clear();
  }

  _draw() {
    const height = this.el.clientHeight || 400;
    const first = Math.max(0, Math.floor(this.el.scrollTop / this.rowHeight) - OVERSCAN);
    const last = Math.min(this.count, Math.ceil((this.el.scrollTop + height) / this.rowHeight) + OVERSCAN);
    for (const [i, el] of this.rows) {
      if (i < first || i >= last) {
        el.remove();
        this.rows.delete(i);
      }
    }
    for (let i = first; i < last; i++) {
      if (this.rows.has(i)) continue;
      const el = this.render(i);
      el.setAttribute("role", "row");
      for (const cell of el.children) cell.setAttribute("role", "gridcell");
      el.setAttribute("aria-rowindex", i + 1);
      el.id = `${this.id}-${i}`;
      el.style.transform = `translateY(${i * this.rowHeight}px)`;
      el.style.height = `${this.rowHeight}px`;
      el.addEventListener("click", () => {
        this.active = i;
        this.onOpen(i);
      });
      this.spacer.append(el);
      this.rows.set(i, el);
    }
    this._mark();
  }

  _mark() {
    for (const [i, el] of this.rows) el.classList.toggle("active", i === this.active);
    if (this.count) this.el.setAttribute("aria-activedescendant", `${this.id}-${this.active}`);
    else this.el.removeAttribute("aria-activedescendant");
  }

  _key(event) {
    const page = Math.max(1, Math.floor(this.el.clientHeight / this.rowHeight) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -this.count, End: this.count };
    if (event.key === "Enter" && this.count && event.target === this.el) this.onOpen(this.active);
    else if (event.key in moves) this.moveTo(this.active + moves[event.key]);
    else return;
    event.preventDefault();
  }

  moveTo(i) {
    this.active = Math.max(0, Math.min(this.count - 1, i));
    const top = this.active * this.rowHeight;
    const room = this.el.clientHeight - (this.head?.offsetHeight ?? 0) - this.rowHeight;
    if (top < this.el.scrollTop) this.el.scrollTop = top;
    else if (top > this.el.scrollTop + room) this.el.scrollTop = top - room;
    this._draw();
  }

  destroy() {
    this.observer.disconnect();
    this.draw.cancel();
  }
}
