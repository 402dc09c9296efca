// A trajectory as one strip of colour.

import { h } from "./dom.js";

/** A canvas that `paint(context, width, height)` draws, in device pixels, at its size and again when that changes. */
export class Strip {
  constructor(paint, props = {}) {
    this.paint = paint;
    this.el = h("canvas", { ...props, class: `strip ${props.class ?? ""}` });
    this.size = [0, 0];
    this.observer = new ResizeObserver(([{ contentRect }]) => {
      this.size = [contentRect.width, contentRect.height];
      this.draw();
    });
    this.observer.observe(this.el);
  }

  draw() {
    const scale = globalThis.devicePixelRatio || 1;
    const [width, height] = this.size.map((length) => Math.round(length * scale));
    if (!width || !height) return;
    if (this.el.width !== width) this.el.width = width;
    if (this.el.height !== height) this.el.height = height;
    const context = this.el.getContext("2d");
    context.clearRect(0, 0, width, height);
    this.paint(context, width, height);
  }

  destroy() {
    this.observer.disconnect();
  }
}

/** Draw strip codes over `share` of the width, and marks at shares of the width. */
export function paintCodes(context, width, height, codes, colours, share = 1, marks = []) {
  const used = Math.max(1, Math.round(width * share));
  let from = 0;
  while (from < codes.length) {
    let to = from + 1;
    while (to < codes.length && codes[to] === codes[from]) to += 1;
    const x = Math.floor((from / codes.length) * used);
    context.fillStyle = colours[codes[from]] ?? "#888";
    context.fillRect(x, 0, Math.max(1, Math.floor((to / codes.length) * used) - x), height);
    from = to;
  }
  for (const [at, colour, wide] of marks) {
    context.fillStyle = colour;
    context.fillRect(Math.round(at * width) - wide / 2, 0, wide, height);
  }
}
