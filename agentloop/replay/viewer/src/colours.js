// What a token's colour means. A mode gives every token a code; a code has one look per theme, in rows as on canvas.
//
// Ramps change evenly in lightness, and opposite signs are blue and orange: readable without telling red from green. What
// counts is never said by colour alone: see the outlines and underlines in style.css, the legends and the tooltips.

export const CODE = { plain: 0, missing: 1, origin: 2, untrained: 6, trained: 7, dropped: 8, heat: 10, version: 20, mixed: 28, diff: 30 };

const PROBABILITY_EDGES = [0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1];
const ENTROPY_EDGES = [0.05, 0.1, 0.25, 0.5, 1, 1.5, 2];
const DIFF_EDGES = [0.05, 0.2, 0.5, 1];

// [background, text] in rows, and [background] on canvas where it differs.
const LIGHT = {
  0: ["transparent", "#5b6570", "#dfe3e8"],
  1: ["transparent", "#1c2128", "#b9c0c9"],
  2: ["#e9ecf0", "#1c2128", "#b3bcc8"],
  3: ["#cfe2fb", "#10243f", "#3b7dd8"],
  4: ["#fde3b8", "#3a2600", "#e69f00"],
  5: ["#ecdff5", "#2f1840", "#a873c9"],
  6: ["#eef0f3", "#5b6570", "#d3d8df"],
  7: ["#b9d6f7", "#0d2240", "#1f66c7"],
  8: ["#f3e6c8", "#4a3a10", "#c9a33a"],
  10: ["#fffbe6", "#1c2128", "#fdf3c4"],
  11: ["#fff1c2", "#1c2128"],
  12: ["#fee08b", "#1c2128"],
  13: ["#fec44f", "#1c2128"],
  14: ["#fda93a", "#1c2128"],
  15: ["#f98e2b", "#1c2128"],
  16: ["#ee7a28", "#15181d"],
  17: ["#e2691d", "#0c0e11"],
  20: ["#cfe2fb", "#10243f", "#3b7dd8"],
  21: ["#fde3b8", "#3a2600", "#e69f00"],
  22: ["#c4ebdb", "#06301f", "#009e73"],
  23: ["#f6d3e4", "#401028", "#cc79a7"],
  24: ["#f5eea6", "#333000", "#d6c71c"],
  25: ["#d3eefb", "#06283a", "#56b4e9"],
  26: ["#fbd3bd", "#411600", "#d55e00"],
  27: ["#dcdfe4", "#1c2128", "#7b8794"],
  28: ["#e4d3f3", "#2f1840", "#8b4fb5"],
  30: ["#5b9fdf", "#07131f"],
  31: ["#8fbeea", "#0a1c2e"],
  32: ["#bcd9f3", "#10243f"],
  33: ["#e0eefa", "#1c2128"],
  34: ["#f4f5f6", "#1c2128", "#e3e6ea"],
  35: ["#fdeed6", "#1c2128"],
  36: ["#fbd7a1", "#2b1c02"],
  37: ["#f5b660", "#2b1c02"],
  38: ["#ea8f22", "#1a1002"],
};

const DARK = {
  0: ["transparent", "#98a3b0", "#2b3139"],
  1: ["transparent", "#e3e7ec", "#4a525d"],
  2: ["#2b313a", "#dfe4ea", "#566070"],
  3: ["#1c4373", "#e3eefb", "#4f93e6"],
  4: ["#5a4011", "#fdeccb", "#e0a020"],
  5: ["#45305a", "#f0e4f9", "#a77fd0"],
  6: ["#262b33", "#98a3b0", "#333a44"],
  7: ["#1f4f8a", "#eaf3fe", "#5a9df0"],
  8: ["#4a4018", "#f0e5bd", "#a88f35"],
  10: ["#26231f", "#e3e7ec", "#3a3226"],
  11: ["#3a2d1c", "#ece8e2"],
  12: ["#523a18", "#f2ece3"],
  13: ["#6d4a14", "#f7f0e4"],
  14: ["#885a10", "#fff7ea"],
  15: ["#b8730f", "#120b00"],
  16: ["#de9122", "#120b00"],
  17: ["#ffb648", "#120b00"],
  20: ["#1c4373", "#e3eefb", "#4f93e6"],
  21: ["#5a4011", "#fdeccb", "#e0a020"],
  22: ["#0b4a38", "#d3f5e8", "#19b286"],
  23: ["#5a2842", "#fbe2ee", "#d283ae"],
  24: ["#4d4710", "#f7f1c0", "#cfc125"],
  25: ["#124a63", "#d9f1fd", "#56b4e9"],
  26: ["#5e2a0c", "#fde0cf", "#e06f1c"],
  27: ["#3a414b", "#e3e7ec", "#8894a2"],
  28: ["#4b2b69", "#f1e4fb", "#b07fdb"],
  30: ["#5aa0e6", "#06101b"],
  31: ["#2e6cab", "#f2f8ff"],
  32: ["#23507f", "#e6f1fc"],
  33: ["#1f3a58", "#dde9f5"],
  34: ["#272c34", "#c6cdd6", "#333a44"],
  35: ["#46351c", "#f3e9da"],
  36: ["#6a4915", "#f9efdf"],
  37: ["#8f5d10", "#fff7ea"],
  38: ["#efa02e", "#140c00"],
};

const TABLES = { light: LIGHT, dark: DARK };

export function canvasColours(theme) {
  const colours = [];
  for (const [code, [background, , canvas]] of Object.entries(TABLES[theme])) colours[code] = canvas ?? background;
  return colours;
}

/** The style sheet of both themes' codes. */
export function colourRules() {
  const rules = [];
  for (const [theme, table] of Object.entries(TABLES)) {
    for (const [code, [background, text, canvas]] of Object.entries(table)) {
      rules.push(`.theme-${theme} .c${code}{background-color:${background};color:${text}}`);
      rules.push(`.theme-${theme} .m${code}{background-color:${canvas ?? background}}`);
    }
  }
  return rules.join("\n");
}

// -- modes ------------------------------------------------------------------------------------------------------------

const step = (value, edges) => {
  let level = 0;
  while (level < edges.length && value >= edges[level]) level += 1;
  return level;
};

const heatMode = (read, level) => (sample) => {
  const codes = new Uint8Array(sample.n);
  const column = read(sample);
  for (let i = 0; i < sample.n; i++) {
    if (!sample.isTrained(i)) continue;
    const value = column ? column[i] : NaN;
    codes[i] = Number.isNaN(value) ? CODE.missing : level(value);
  }
  return codes;
};

function probabilityLevel(logprob) {
  const p = Math.exp(logprob);
  let level = 0;
  while (level < PROBABILITY_EDGES.length && p < PROBABILITY_EDGES[level]) level += 1;
  return CODE.heat + level;
}

function diffLevel(value) {
  const size = step(Math.abs(value), DIFF_EDGES);
  return CODE.diff + 4 + (value < 0 ? -size : size);
}

/** Neighbouring versions differ, and one version looks the same in every trajectory. */
function versionCode(version) {
  return typeof version === "number" ? CODE.version + (((version % 8) + 8) % 8) : CODE.mixed;
}

export const MODES = {
  origin: {
    name: "Origin",
    about: "who wrote the token",
    codes(sample) {
      const codes = new Uint8Array(sample.n);
      for (let i = 0; i < sample.n; i++) codes[i] = CODE.origin + sample.origin[i];
      return codes;
    },
  },
  mask: {
    name: "Mask",
    about: "which tokens are trained",
    codes(sample) {
      const codes = new Uint8Array(sample.n);
      for (let i = 0; i < sample.n; i++) {
        codes[i] = sample.isTrained(i) ? CODE.trained : sample.isSampled(i) ? CODE.dropped : CODE.untrained;
      }
      return codes;
    },
  },
  probability: {
    name: "Probability",
    about: "how likely the model found its own token",
    heat: true,
    codes: heatMode((sample) => sample.columns.logprob, probabilityLevel),
  },
  entropy: {
    name: "Entropy",
    about: "how undecided the model was, in nats",
    heat: true,
    codes: heatMode((sample) => sample.columns.entropy, (value) => CODE.heat + step(value, ENTROPY_EDGES)),
  },
  version: {
    name: "Weights",
    about: "which weight version sampled the token",
    codes(sample) {
      const codes = new Uint8Array(sample.n);
      for (let i = 0; i < sample.n; i++) {
        if (!sample.isSampled(i)) continue;
        const place = sample.version[i];
        if (place < 0) codes[i] = CODE.missing;
        else codes[i] = versionCode(sample.versionNames[place]);
      }
      return codes;
    },
  },
  difference: {
    name: "Train \u2212 rollout",
    about: "trainer's log-probability less the rollout's",
    heat: true,
    codes: heatMode((sample) => sample.difference, diffLevel),
  },
};

export function codesOf(sample, mode) {
  return sample.once(`codes-${mode}`, () => MODES[mode].codes(sample));
}

/** Entries `[code, words, number of tokens]` for the legend of a sample. */
export function legendOf(sample, mode) {
  const counts = sample.once(`counts-${mode}`, () => {
    const found = new Uint32Array(64);
    for (const code of codesOf(sample, mode)) found[code] += 1;
    return found;
  });
  return legendEntries(mode, sample.versionNames).map(([code, words]) => [code, words, counts[code]]);
}

export function legendEntries(mode, versionNames = []) {
  const missing = [CODE.missing, "not recorded"];
  const plain = [CODE.plain, "not trained"];
  if (mode === "origin") return ["prompt", "sampled", "observation", "template"].map((name, i) => [CODE.origin + i, name]);
  if (mode === "mask") return [[CODE.trained, "trained"], [CODE.dropped, "sampled, not trained"], [CODE.untrained, "not sampled"]];
  if (mode === "version") {
    const versions = versionNames.map((name) => [versionCode(name), typeof name === "number" ? `v${name}` : String(name)]);
    return [...versions, missing, [CODE.plain, "not sampled"]];
  }
  if (mode === "difference") {
    const words = ["\u2264 \u22121", "\u22121 \u2026 \u22120.5", "\u22120.5 \u2026 \u22120.2", "\u22120.2 \u2026 \u22120.05", "\u00b1 0.05"];
    const names = [...words, "0.05 \u2026 0.2", "0.2 \u2026 0.5", "0.5 \u2026 1", "\u2265 1"];
    return [...names.map((name, i) => [CODE.diff + i, name]), missing, plain];
  }
  const edges = mode === "probability" ? PROBABILITY_EDGES : ENTROPY_EDGES;
  const [first, last] = mode === "probability" ? ["\u2265", "<"] : ["<", "\u2265"];
  const names = [`${first} ${edges[0]}`, ...edges.slice(1).map((edge, i) => `${edges[i]} \u2026 ${edge}`), `${last} ${edges.at(-1)}`];
  return [...names.map((name, i) => [CODE.heat + i, name]), missing, plain];
}

/** One code for each of `cells` stretches of tokens: the loudest heat, or what most tokens have. */
export function strip(sample, mode, cells) {
  const codes = codesOf(sample, mode);
  const out = new Uint8Array(Math.min(cells, sample.n));
  const counts = new Uint32Array(64);
  for (let cell = 0; cell < out.length; cell++) {
    const start = Math.floor((cell * sample.n) / out.length);
    const end = Math.floor(((cell + 1) * sample.n) / out.length);
    let best = codes[start];
    if (MODES[mode].heat) {
      for (let i = start; i < end; i++) if (loudness(codes[i]) > loudness(best)) best = codes[i];
    } else {
      for (let i = start; i < end; i++) counts[codes[i]] += 1;
      for (let i = start; i < end; i++) {
        if (counts[codes[i]] > counts[best]) best = codes[i];
      }
      for (let i = start; i < end; i++) counts[codes[i]] = 0;
    }
    out[cell] = best;
  }
  return out;
}

function loudness(code) {
  if (code >= CODE.diff) return 2 + Math.abs(code - CODE.diff - 4);
  if (code >= CODE.heat) return 2 + code - CODE.heat;
  return code;
}
