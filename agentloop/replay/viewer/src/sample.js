// One trajectory: its header, its token columns, and what follows from them.

import { bufferOf, ViewerError } from "./frame.js";
import { cells, visible } from "./format.js";

const TYPES = { u8: Uint8Array, u16: Uint16Array, u32: Uint32Array, f32: Float32Array };

export const ORIGINS = ["prompt", "sampled", "observation", "template"];
const SAMPLED = 1;

export class Sample {
  /** `known` keeps the looks of tokens for other samples of the same tokenizer. */
  constructor(header, buffers, specialIds, known = new Map()) {
    this.header = header;
    this.key = header.key;
    this.n = header.n;
    this.turns = header.turns ?? [];
    this.columns = readColumns(header, bufferOf(buffers));
    if (!this.columns.ids) throw new ViewerError(`Trajectory ${header.key}: its token ids are missing.`);
    this.special = specialIds;
    this.known = known;
    // With what is derived from them.
    this.bytes = Object.values(this.columns).reduce((sum, column) => sum + column.byteLength, 0) + 40 * this.n;
    this._segments();
    this._versions();
    this._cache = new Map();
  }

  _segments() {
    const { n } = this;
    this.origin = new Uint8Array(n);
    this.segments = [];
    let at = 0;
    for (const [name, length, turn] of this.header.segments ?? []) {
      const origin = ORIGINS.indexOf(name);
      if (origin < 0) throw new ViewerError(`Trajectory ${this.key}: '${visible(name)}' is not an origin.`);
      this.origin.fill(origin, at, at + length);
      this.segments.push({ origin: name, start: at, end: at + length, turn });
      at += length;
    }
    if (at !== n) throw new ViewerError(`Trajectory ${this.key}: its segments cover ${at} of ${n} tokens.`);
  }

  /** Which segment a token is in. */
  segmentOf(i) {
    let [low, high] = [0, this.segments.length];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.segments[middle].start <= i) low = middle;
      else high = middle;
    }
    // Segments without tokens share a start with the one that follows.
    while (low + 1 < this.segments.length && this.segments[low].end <= i) low += 1;
    return low;
  }

  /** The turn that a token belongs to; -1 is the prompt. */
  turnOf(i) {
    return this.segments[this.segmentOf(i)]?.turn ?? -1;
  }

  _versions() {
    const names = (this.header.versions ?? []).map(([name]) => name).filter((name) => name !== null);
    this.versionNames = [...new Set(names)];
  }

  /** Of each token its version's place in `versionNames`; -1: not sampled, or not told. */
  get version() {
    return this.once("version", () => {
      const places = new Int32Array(this.n).fill(-1);
      let at = 0;
      for (const [name, length] of this.header.versions ?? []) {
        if (name !== null) places.fill(this.versionNames.indexOf(name), at, at + length);
        at += length;
      }
      return places;
    });
  }

  /** What is dear to work out is worked out once. */
  once(name, make) {
    if (!this._cache.has(name)) this._cache.set(name, make());
    return this._cache.get(name);
  }

  isSampled(i) {
    return this.origin[i] === SAMPLED;
  }

  /** Whether the token got (or, before the trainer's part has arrived, is to get) a gradient. */
  isTrained(i) {
    return this.origin[i] === SAMPLED && !this.header.masked && this.columns.train_mask?.[i] !== 0;
  }

  /** Trainer's log-probability less the rollout's; NaN where one is missing or the token is not trained. */
  get difference() {
    return this.once("difference", () => {
      const { logprob, train_logprob: train } = this.columns;
      const values = new Float32Array(this.n).fill(NaN);
      if (logprob && train) for (let i = 0; i < this.n; i++) if (this.isTrained(i)) values[i] = train[i] - logprob[i];
      return values;
    });
  }

  // -- text ---------------------------------------------------------------------------------------------------------

  get hasText() {
    return Boolean(this.columns.piece_len && this.columns.piece_bytes);
  }

  /** Where each token's bytes begin, and where the last one's end. */
  get offsets() {
    return this.once("offsets", () => {
      const offsets = new Uint32Array(this.n + 1);
      for (let i = 0; i < this.n; i++) offsets[i + 1] = offsets[i] + this.columns.piece_len[i];
      return offsets;
    });
  }

  bytesOf(start, end = start + 1) {
    return this.columns.piece_bytes.subarray(this.offsets[start], this.offsets[end]);
  }

  text(start, end) {
    return this.hasText ? new TextDecoder("utf-8", { ignoreBOM: true }).decode(this.bytesOf(start, end)) : "";
  }

  /** How each token is drawn: `{text, cells, breaks, kind, exact}`; equal tokens share one. */
  get pieces() {
    return this.once("pieces", () => {
      const { known, hasText } = this;
      if (known.size > MOST_KNOWN) known.clear();
      const pieces = new Array(this.n);
      const { ids, piece_bytes: bytes } = this.columns;
      const offsets = hasText ? this.offsets : null;
      for (let i = 0; i < this.n; i++) {
        const id = ids[i];
        let entry = known.get(id);
        if (!entry || !(hasText ? sameBytes(entry.bytes, bytes, offsets[i], offsets[i + 1]) : entry.bytes === null)) {
          // Copied, so that the cache does not hold on to the sample.
          const own = hasText ? bytes.slice(offsets[i], offsets[i + 1]) : null;
          const piece = hasText ? pieceOf(own, this.special?.has(id) ?? false, !this.special) : idPiece(id);
          entry = { bytes: own, piece };
          known.set(id, entry);
        }
        pieces[i] = entry.piece;
      }
      return pieces;
    });
  }

  /** The tokens around `i` that hold one character together, `[start, end, character]`, or null. */
  characterAround(i) {
    if (!this.hasText || this.pieces[i].kind !== "part") return null;
    for (let start = i; start >= Math.max(0, i - 4); start--) {
      for (let end = i + 1; end <= Math.min(this.n, start + 5); end++) {
        if (end - start < 2) continue;
        const text = decodeStrict(this.bytesOf(start, end));
        if (text !== null) return [start, end, text];
      }
    }
    return null;
  }

  /** Positions of the tokens in which `query` begins; ASCII letters match in either case. */
  find(query) {
    if (!this.hasText || !query) return [];
    const haystack = this.once("haystack", () => latin1(this.columns.piece_bytes).toLowerCase());
    const needle = latin1(new TextEncoder().encode(query)).toLowerCase();
    const found = [];
    for (let at = haystack.indexOf(needle); at >= 0; at = haystack.indexOf(needle, at + 1)) {
      const token = this.tokenAt(at);
      if (found.at(-1)?.[0] !== token) found.push([token, this.tokenAt(at + needle.length - 1) + 1]);
    }
    return found;
  }

  /** The token that holds a byte. */
  tokenAt(byte) {
    let [low, high] = [0, this.n];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.offsets[middle] <= byte) low = middle;
      else high = middle;
    }
    // Tokens without bytes share an offset with the one that follows; the byte is in the last of these.
    while (low + 1 < this.n && this.offsets[low + 1] <= byte) low += 1;
    return low;
  }
}

/** The first position at which two samples differ, or null if they are the same. */
export function firstDifference(a, b) {
  const n = Math.min(a.n, b.n);
  const [x, y] = [a.columns.ids, b.columns.ids];
  for (let i = 0; i < n; i++) if (x[i] !== y[i]) return i;
  return a.n === b.n ? null : n;
}

function readColumns(header, buffer) {
  const { buffer: whole, byteOffset, byteLength } = buffer;
  const columns = {};
  for (const { name, dtype, offset, length } of header.columns ?? []) {
    const Type = TYPES[dtype];
    if (!Type) throw new ViewerError(`Trajectory ${header.key}: column ${name} has the unknown type ${dtype}.`);
    if (offset + length * Type.BYTES_PER_ELEMENT > byteLength) {
      throw new ViewerError(`Trajectory ${header.key}: column ${name} is cut off.`);
    }
    if (name !== "piece_bytes" && length !== header.n) {
      throw new ViewerError(`Trajectory ${header.key}: column ${name} has ${length} of ${header.n} values.`);
    }
    columns[name] = new Type(whole, byteOffset + offset, length);
  }
  return columns;
}

// -- how a token looks ------------------------------------------------------------------------------------------------

const MOST_KNOWN = 50_000;
const LONGEST = 400;
const SPECIAL = /^(<[|\uff5c][^<>]{1,60}[|\uff5c]>|<\/?(s|bos|eos|pad|unk|im_start|im_end)>|\[\/?(INST|BOS|EOS|PAD|UNK|TOOL_CALLS)\])$/;
const BLANK = /^[ \t\n\r]+$/;

function pieceOf(bytes, isSpecial, guess) {
  if (!bytes.length) return look("\u2205", isSpecial ? "special" : "empty", false);
  const plain = asciiText(bytes);
  const text = plain ?? decodeStrict(bytes);
  if (text === null) {
    const hex = Array.from(bytes.subarray(0, 12), (byte) => byte.toString(16).padStart(2, "0")).join(" ");
    return look(`\u2039${hex}${bytes.length > 12 ? "\u2026" : ""}\u203a`, "part", bytes.includes(10));
  }
  const blank = BLANK.test(text);
  const kind = isSpecial || (guess && SPECIAL.test(text)) ? "special" : blank ? "blank" : "text";
  if (plain !== null && !blank && plain.length <= LONGEST) return { text: plain, cells: plain.length, breaks: false, kind, exact: true };
  let shown = blank ? text.replaceAll(" ", "\u00b7") : text;
  shown = visible(shown.slice(0, LONGEST).replaceAll("\r", "\u240d").replaceAll("\n", "\u21b5").replaceAll("\t", "\u2192"));
  if (/^(\p{Mn}|\p{Me})/u.test(shown)) shown = `\u25cc${shown}`;
  return look(shown, kind, text.includes("\n"));
}

/** `exact`: a monospace font gives it just this width. */
function look(text, kind, breaks) {
  return { text, cells: Math.max(1, cells(text)), breaks, kind, exact: false };
}

/** The text of bytes that are all printable ASCII, else null. */
function asciiText(bytes) {
  for (let k = 0; k < bytes.length; k++) if (bytes[k] < 32 || bytes[k] > 126) return null;
  return String.fromCharCode(...bytes.subarray(0, 2 * LONGEST));
}

function sameBytes(own, bytes, start, end) {
  if (own === null || own.length !== end - start) return false;
  for (let k = 0; k < own.length; k++) if (own[k] !== bytes[start + k]) return false;
  return true;
}

function idPiece(id) {
  const text = `#${id}`;
  return { text, cells: text.length, breaks: false, kind: "id", exact: true };
}

const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

function decodeStrict(bytes) {
  try {
    return strict.decode(bytes);
  } catch {
    return null;
  }
}

function latin1(bytes) {
  const parts = [];
  for (let at = 0; at < bytes.length; at += 8192) parts.push(String.fromCharCode(...bytes.subarray(at, at + 8192)));
  return parts.join("");
}
