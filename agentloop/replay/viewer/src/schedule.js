// When things happened, in seconds from the trajectory's first request.

import { isNumber } from "./format.js";

/** `{turns: [{from, to, end}], total}`: generation from `from` to `to`, tools until `end`. */
export function scheduleOf(header) {
  const turns = [];
  let now = 0;
  const times = (header.turns ?? []).map((turn) => turn.t);
  const first = header.turns?.[0];
  // A turn's time is when its generation had come. Without a full set of times, one follows at once upon the other.
  const zero = first && times.every(isNumber) ? first.t - (first.generate_s ?? 0) : null;
  for (const turn of header.turns ?? []) {
    const took = turn.generate_s ?? 0;
    const to = zero === null ? now + took : Math.max(now, turn.t - zero);
    const from = Math.max(now, to - took);
    const calls = Math.max(0, ...(turn.calls ?? []).map((call) => (call.queue_s ?? 0) + (call.run_s ?? 0)));
    const end = to + (turn.tools_s || calls);
    turns.push({ from, to, end });
    now = end;
  }
  return { turns, total: Math.max(now, 0.001) };
}
