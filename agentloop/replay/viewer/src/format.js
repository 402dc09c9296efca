// Numbers and words for people. What is null was not recorded, and is never shown as 0.

export const MISSING = "not recorded";

export const isNumber = (x) => typeof x === "number" && Number.isFinite(x);

export function number(x, digits = 3) {
  if (!isNumber(x)) return MISSING;
  if (Number.isInteger(x)) return String(x);
  const fixed = x.toFixed(digits);
  return Number(fixed) === 0 ? x.toPrecision(2) : fixed;
}

export function signed(x, digits = 3) {
  return isNumber(x) && x > 0 ? `+${number(x, digits)}` : number(x, digits);
}

/** Of numbers that span magnitudes: two digits of it. */
export function small(x) {
  if (!isNumber(x)) return MISSING;
  return x === 0 ? "0" : Math.abs(x) >= 0.01 && Math.abs(x) < 1000 ? number(x) : x.toPrecision(2);
}

export function count(x) {
  return isNumber(x) ? x.toLocaleString("en-US") : MISSING;
}

export function seconds(x) {
  if (!isNumber(x)) return MISSING;
  if (x < 0.0005) return "0 s";
  if (x < 1) return `${Math.round(x * 1000)} ms`;
  if (x < 100) return `${x.toFixed(x < 10 ? 2 : 1)} s`;
  return `${Math.floor(x / 60)} min ${Math.round(x % 60)} s`;
}

export function plural(n, one, many = `${one}s`) {
  return `${count(n)} ${n === 1 ? one : many}`;
}

export const END_WORDS = {
  final_answer: "final answer",
  turn_limit: "turn limit",
  token_limit: "token limit",
  deadline: "deadline passed",
  tool_failure: "tool failed",
  engine_failure: "engine failed",
  parse_failure: "malformed call",
  aborted: "aborted",
};

export const STOP_WORDS = {
  stop: "closed by the model",
  length: "cut off: token budget ran out",
  aborted: "aborted from outside",
};

export const STATUS_WORDS = {
  ok: "ok",
  error: "failed: error",
  timeout: "failed: timeout",
  invalid_arguments: "failed: invalid arguments",
  unknown_tool: "failed: unknown tool",
  infra: "failed: infrastructure",
  not_run: "not run: over the limit",
  cancelled: "cancelled",
};

export function endWord(row) {
  if (row.end_reason) return END_WORDS[row.end_reason] ?? visible(row.end_reason);
  return row.complete ? "program error" : "has not ended";
}

// -- text that a model or a tool wrote --------------------------------------------------------------------------------

// The joiner between two parts of one emoji is seen; all others are not.
// C0 and C1 controls, zero-width and bidirectional marks, line separators, tag characters, lone surrogates.
const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200c\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb]|[\u{e0000}-\u{e0fff}]|[\ud800-\udfff]|(?<!\p{Extended_Pictographic}[\ufe0f\u{1f3fb}-\u{1f3ff}]?)\u200d|\u200d(?!\p{Extended_Pictographic})/gu;

function mark(c) {
  const code = c.codePointAt(0);
  if (code === 13) return "\u240d";
  if (code < 32) return String.fromCharCode(0x2400 + code);
  if (code === 127) return "\u2421";
  return `\u27e8U+${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
}

/** `text` with every character that acts on a screen instead of being seen (ANSI escapes, bidi marks) made visible. */
export function visible(text) {
  return String(text).replace(/\r\n/g, "\n").replace(UNSEEN, mark);
}

/** As `visible`, in one line. */
export function oneLine(text) {
  return visible(text).replace(/\s+/g, " ").trim();
}

/** How many columns of a monospace font `text` takes. */
export function cells(text) {
  let width = 0;
  for (const c of text) {
    const code = c.codePointAt(0);
    if (code < 0x300) width += 1;
    else if (/\p{Mn}|\p{Me}/u.test(c)) width += 0;
    else if (isWide(code)) width += 2;
    else width += 1;
  }
  return width;
}

function isWide(code) {
  return (
    (code >= 0x1100 && code <= 0x115f) ||
    (code >= 0x2e80 && code <= 0xa4cf) ||
    (code >= 0xa960 && code <= 0xa97f) ||
    (code >= 0xac00 && code <= 0xd7ff) ||
    (code >= 0xf900 && code <= 0xfaff) ||
    (code >= 0xfe30 && code <= 0xfe6f) ||
    (code >= 0xff00 && code <= 0xff60) ||
    (code >= 0xffe0 && code <= 0xffe6) ||
    (code >= 0x2600 && code <= 0x27bf) ||
    (code >= 0x1f000 && code <= 0x1faff) ||
    (code >= 0x20000 && code <= 0x3ffff)
  );
}
