// One turn of a conversation, one message of its prompt, and their parts.

import { copyText, h } from "../dom.js";
import { count, isNumber, MISSING, number, oneLine, plural, seconds, signed, STATUS_WORDS, STOP_WORDS, visible } from "../format.js";
import { contentText } from "../search.js";

const LONG = 4000;
const PART = 20_000;
const UNBROKEN = /\S{1000}/;

/** Text that a model, a tool or a dataset wrote; a long one is cut until asked for. */
export function textBlock(text, { kind = "", label = "text" } = {}) {
  const shown = visible(text);
  const pre = h("pre", { class: `text ${kind}`, dir: "auto" }, shown.length > LONG ? shown.slice(0, LONG) : shown || "(empty)");
  if (!shown) pre.classList.add("dim");
  if (shown.length <= LONG) return pre;
  const more = h(
    "button",
    {
      class: "link more",
      onclick: () => {
        pre.replaceChildren(...parts(shown).map((part) => h("span", { class: "part" }, part)));
        pre.classList.toggle("unbroken", UNBROKEN.test(shown));
        more.remove();
      },
    },
    `show all of the ${label}: ${count(shown.length)} characters`,
  );
  return h("div", null, pre, more);
}

/** A long text in pieces that are laid out as they come into sight, cut behind a newline where there is one. */
function parts(text) {
  const found = [];
  for (let at = 0; at < text.length; ) {
    let end = Math.min(text.length, at + PART);
    const newline = text.lastIndexOf("\n", end - 1);
    if (end < text.length && newline > at + PART / 2) end = newline + 1;
    else if (end < text.length && /[\ud800-\udbff]/.test(text[end - 1])) end -= 1;
    found.push(text.slice(at, end));
    at = end;
  }
  return found;
}

/** A message of the prompt; `onFork`, if it can be edited and gone on from, gets its new text. */
export function message(item, onFork) {
  const extra = item?.tool_calls ? `\n${JSON.stringify(item.tool_calls, null, 2)}` : "";
  const text = contentText(item?.content) + extra;
  const role = visible(item?.role ?? "message");
  return h(
    "article",
    { class: `card message role-${["system", "user", "assistant", "tool"].includes(role) ? role : "other"}`, "data-role": role },
    h("div", { class: "card-head" }, h("span", { class: "role" }, role)),
    h(
      "div",
      { class: "card-body" },
      textBlock(text, { label: `${role} message` }),
      onFork ? editButton("fork with another prompt", "another prompt", text, onFork) : null,
    ),
  );
}

/** The line that is always there; `onOpen` brings the turn's tokens. */
export function turnHead(turn, onOpen) {
  const cut = turn.stop_reason && turn.stop_reason !== "stop";
  const failed = (turn.calls ?? []).filter((call) => call.status !== "ok").length;
  const wrong = [
    cut ? STOP_WORDS[turn.stop_reason] ?? visible(turn.stop_reason) : null,
    failed ? `${plural(failed, "failed call")}` : null,
    turn.parse_errors?.length ? plural(turn.parse_errors.length, "malformed call") : null,
  ].filter(Boolean);
  const versions = versionWords(turn);
  return h(
    "button",
    {
      class: "card-head turn-head",
      "data-turn": turn.index,
      "aria-label": `Turn ${turn.index}: show its tokens${wrong.length ? `; ${wrong.join("; ")}` : ""}`,
      onclick: onOpen,
    },
    h("span", { class: "role" }, `turn ${turn.index}`),
    h("span", { class: "dim" }, [
      plural(turn.end - turn.start, "token"),
      seconds(turn.generate_s),
      turn.calls?.length ? plural(turn.calls.length, "call") : null,
      versions,
    ].filter(Boolean).join(" \u00b7 ")),
    wrong.map((words) => h("span", { class: "badge badge-error" }, words)),
  );
}

function versionWords(turn) {
  const { weight_version: last, min_weight_version: first } = turn;
  if (!isNumber(last)) return null;
  return isNumber(first) && first !== last ? `weights v${first} \u2192 v${last}` : `weights v${last}`;
}

/** What unfolds below the head. */
export function turnBody(turn, { reward, fork, drift }) {
  const text = turn.text === null || turn.text === undefined
    ? h("div", { class: "missing" }, `text ${MISSING}: see the tokens`)
    : textBlock(turn.text, { kind: "sampled-text", label: "turn" });
  text.setAttribute("data-field", "text");
  const about = [
    ["stopped", STOP_WORDS[turn.stop_reason] ?? visible(turn.stop_reason ?? MISSING)],
    ["generated in", seconds(turn.generate_s)],
    turn.calls?.length ? ["tools took", seconds(turn.tools_s)] : null,
    isNumber(turn.cached_tokens) && turn.cached_tokens ? ["cached tokens", count(turn.cached_tokens)] : null,
    isNumber(reward) ? ["reward of this turn", signed(reward)] : null,
    turn.closed_by_template ? ["end of turn", "added by the template"] : null,
  ].filter(Boolean);
  return h(
    "div",
    { class: "card-body" },
    text,
    (turn.parse_errors ?? []).map((error) =>
      h("div", { class: "problem", "data-field": "parse-error" }, h("b", null, "Malformed tool call: "), visible(error)),
    ),
    (turn.calls ?? []).map((call, place) => callCard(call, place, fork)),
    h("div", { class: "meta" }, about.map(([name, value]) => h("span", null, h("i", null, name), " ", value)), drift ? driftWords(drift) : null, fork ? forkButton(turn, fork) : null),
  );
}

/** How far trainer and rollout are apart in the turn; brings the token where they are furthest. */
function driftWords({ words, open }) {
  const value = open ? h("button", { class: "link", onclick: open }, words) : h("span", { class: "missing" }, words);
  return h("span", { "data-field": "drift" }, h("i", null, "train \u2212 rollout"), " ", value);
}

function callCard(call, place, fork) {
  const ok = call.status === "ok";
  const retries = (call.attempts ?? 1) - 1;
  const about = [
    ["ran", seconds(call.run_s)],
    call.queue_s >= 0.001 ? ["waited", seconds(call.queue_s)] : null,
    retries > 0 ? ["attempts", `${call.attempts} (${plural(retries, "retry", "retries")})`] : null,
    call.cut_tokens ? ["left out", `${plural(call.cut_tokens, "token")} of the result`] : null,
    isNumber(call.reward) && call.reward !== 0 ? ["reward", signed(call.reward)] : null,
    !ok && call.on_error ? ["policy", visible(call.on_error)] : null,
    ...Object.entries(call.metrics ?? {}).slice(0, 8).map(([name, value]) => [visible(name), isNumber(value) ? number(value) : oneLine(value)]),
  ].filter(Boolean);
  return h(
    "div",
    { class: `call ${ok ? "ok" : "failed"}`, "data-call": place, "data-status": call.status },
    h(
      "div",
      { class: "call-head" },
      h("span", { class: "tool-name" }, visible(call.name)),
      h("span", { class: `status ${ok ? "good" : "bad"}`, "data-field": "status" }, `${ok ? "\u2713" : "\u2717"} ${STATUS_WORDS[call.status] ?? visible(call.status)}`),
      h("span", { class: "dim" }, visible(call.id ?? "")),
    ),
    h("div", { class: "call-args", "data-field": "arguments" }, args(call.arguments)),
    h("div", { class: "call-label" }, ok ? "result" : "what the model was told"),
    withField(textBlock(call.text ?? "", { kind: "result", label: "result" }), "result"),
    h("div", { class: "meta" }, about.map(([name, value]) => h("span", { "data-field": name }, h("i", null, name), " ", value))),
    fork?.edit ? editButton("fork with another result", "another result of the tool", call.text ?? "", (text) => fork.edit(place, text)) : null,
  );
}

function withField(el, field) {
  el.setAttribute("data-field", field);
  return el;
}

function args(value) {
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    return textBlock(typeof value === "string" ? value : JSON.stringify(value, null, 2), { kind: "args", label: "arguments" });
  }
  const entries = Object.entries(value);
  if (!entries.length) return h("div", { class: "dim" }, "no arguments");
  return h(
    "dl",
    { class: "args" },
    entries.map(([name, item]) => [
      h("dt", null, visible(name)),
      h("dd", null, textBlock(typeof item === "string" ? item : JSON.stringify(item, null, 2), { kind: "args", label: "argument" })),
    ]),
  );
}

function forkButton(turn, fork) {
  if (!fork.command) return null;
  const command = fork.command(turn.index);
  return h(
    "button",
    { class: "link", title: visible(command), onclick: async (event) => fork.say((await copyText(command, event.target.parentNode)) ? `Copied: ${command}` : command) },
    "copy fork command",
  );
}

/** A button that unfolds a form below itself: another text, and from there on a new conversation. */
function editButton(words, label, text, onSubmit) {
  const area = h("textarea", { class: `edit${UNBROKEN.test(text) ? " unbroken" : ""}`, rows: 5, value: text, "aria-label": label });
  const form = h("div", { class: "fork-form", hidden: true }, area, h("button", { class: "tool", onclick: () => onSubmit(area.value) }, "Fork and go on"));
  const button = h(
    "button",
    {
      class: "link",
      "aria-expanded": "false",
      onclick: () => {
        form.hidden = !form.hidden;
        button.setAttribute("aria-expanded", String(!form.hidden));
        if (!form.hidden) area.focus();
      },
    },
    words,
  );
  return h("div", { class: "fork" }, button, form);
}
