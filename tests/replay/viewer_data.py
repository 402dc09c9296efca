"""Runs made up for the viewer, said in its protocol (docs/viewer.md): every value is known to the test that asks for it.

The Python side of the viewer has tests of its own with recorded runs; here the core alone is on trial.
"""

from __future__ import annotations

import base64
import gzip
import json
import struct
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

# Split characters, an emoji of four tokens, special tokens, newlines, an indent, a token without bytes.
WORDS = "the answer is so we compute first then add each term of it and check again with care"
EMOJI = [bytes([byte]) for byte in "🙂".encode()]
HALF, REST = "数".encode()[:2], "数".encode()[2:]
PIECES: list[bytes] = [
    *(b" " + word.encode() for word in WORDS.split(" ")),
    *(b"<|im_start|>", b"<|im_end|>", b"<tool_call>", b"</tool_call>", b'{"name"', b"", b" <b>", b"&amp;"),
    *(b"\n", b"\n\n", b"    ", b"\t", b"def", b"(", b")", b":", b"0", b"1", b"7", b"42", b"=", b"+"),
    *(text.encode() for text in ("你", "好", "é", "界", "🎉")),
    *(HALF, REST, *EMOJI),
]
ID_OF = {piece: 1000 + 7 * place for place, piece in enumerate(PIECES)}
SPECIAL_IDS = [ID_OF[b"<|im_start|>"], ID_OF[b"<|im_end|>"]]
DTYPES = {"ids": "<u4", "piece_len": "<u2", "piece_bytes": "u1", "train_mask": "u1"}
NAMES = {"<u4": "u32", "<u2": "u16", "u1": "u8", "<f4": "f32"}


@dataclass
class Trajectory:
    """A row of the overview, a sample's header and its columns."""

    row: dict[str, Any]
    header: dict[str, Any]
    pieces: list[bytes]
    columns: dict[str, Any]

    @property
    def key(self) -> str:
        return str(self.row["key"])

    @property
    def mask(self) -> Any:
        return np.concatenate([np.full(n, origin == "sampled", np.uint8) for origin, n, _ in self.header["segments"]])

    def frame(self) -> bytes:
        parts: list[bytes] = []
        table = []
        offset = 0
        for name, values in self.columns.items():
            dtype = DTYPES.get(name, "<f4")
            content = np.ascontiguousarray(values, dtype=dtype).tobytes()
            table.append({"name": name, "dtype": NAMES[dtype], "offset": offset, "length": len(values)})
            content += bytes(-len(content) % 8)
            parts.append(content)
            offset += len(content)
        return frame(self.header | {"columns": table}, b"".join(parts))


@dataclass
class MadeRun:
    trajectories: list[Trajectory]
    steps: list[dict[str, Any]] = field(default_factory=list)
    can: list[str] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    consistency: dict[str, Any] | None = None
    """What is answered of trainer against rollout."""

    def __getitem__(self, key: str) -> Trajectory:
        return next(trajectory for trajectory in self.trajectories if trajectory.key == key)

    def overview(self) -> dict[str, Any]:
        names = sorted({name for trajectory in self.trajectories for name in trajectory.row})
        return {
            "kind": "overview",
            "protocol": 1,
            "run": {
                "name": "made up",
                "model": "tiny",
                "created": "2026-01-02T03:04:05+00:00",
                "facts": {"seed": 1, "optimiser": "adam"},
            },
            "can": self.can,
            "special_ids": SPECIAL_IDS,
            "commands": self.commands,
            "steps": self.steps,
            "groups": {group: {"prompt": text} for group, text in self.prompts.items()},
            "trajectories": {name: [trajectory.row.get(name) for trajectory in self.trajectories] for name in names},
        }

    def answer(self, request: dict[str, Any]) -> bytes:
        """What a host's server answers."""
        if request["kind"] == "overview":
            return frame(self.overview())
        if request["kind"] == "sample":
            found = [trajectory for trajectory in self.trajectories if trajectory.key == request["key"]]
            return found[0].frame() if found else frame({"kind": "error", "message": f"no trajectory {request['key']}"})
        if request["kind"] == "consistency" and "consistency" in self.can:
            return frame({"kind": "consistency", "report": self.consistency})
        if request["kind"] == "search":
            hits = [
                {"key": item.key, "turn": 0, "where": "text", "excerpt": "…"}
                for item in self.trajectories
                if request["text"].lower() in json.dumps(item.header, ensure_ascii=False).lower()
            ]
            return frame({"kind": "search", "hits": hits[: request["limit"]], "searched": len(self.trajectories)})
        if request["kind"] == "fork" and "fork" in self.can:
            return frame(
                {
                    "kind": "fork",
                    "text": f"Forked {request['key']} at turn {request['turn']}, call {request['call']}: {request['text']}",
                }
            )
        return frame({"kind": "error", "message": f"'{request['kind']}' is not a kind of request"})


def frame(header: dict[str, Any], buffer: bytes = b"") -> bytes:
    packed = json.dumps(header, ensure_ascii=False).encode()
    return struct.pack("<II", len(packed), 0) + packed + bytes(-(8 + len(packed)) % 8) + buffer


def block(name: str, content: bytes) -> str:
    """A frame as it stands in a page."""
    return (
        f'<script type="text/plain" data-agentloop="{escape(name)}">'
        f"{base64.b64encode(gzip.compress(content, 1)).decode()}</script>\n"
    )


def page(run: MadeRun, script: str, policy: str | None = None, attributes: str = "") -> str:
    """The run as one page, as docs/viewer.md lays it out."""
    meta = f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">' if policy else ""
    samples = "".join(block(f"sample:{item.key}", item.frame()) for item in run.trajectories)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{meta}<title>replay</title></head><body>'
        f'<div id="agentloop-replay" data-host="embedded" {attributes}></div>\n{block("overview", frame(run.overview()))}'
        f"<script>{script}</script>\n{samples}</body></html>"
    )


# -- making --------------------------------------------------------------------------------------------------------------


def make(
    *,
    uid: str = "0",
    sibling: int = 0,
    step: int = 1,
    turns: int = 3,
    tokens: int = 60,
    seed: int = 0,
    reward: float | None = 1.0,
    train: bool = True,
    same_until: int = 0,
    **row: Any,
) -> Trajectory:
    """A trajectory of `turns` turns of `tokens` sampled tokens each, with a tool call in every turn but the last.

    Its first `same_until` tokens are those of every other trajectory that is made with the same `turns` and `tokens`.
    """
    rng = np.random.default_rng(seed)
    shared = np.random.default_rng(12345)
    segments: list[list[Any]] = [["prompt", 24, -1]]
    for index in range(turns):
        segments += [["sampled", tokens, index]]
        if index < turns - 1:
            segments += [["template", 4, index], ["observation", 12, index], ["template", 3, index]]
    n = sum(length for _, length, _ in segments)
    chosen = np.where(np.arange(n) < same_until, shared.integers(0, len(PIECES), n), rng.integers(0, len(PIECES), n))
    pieces = [PIECES[i] for i in chosen]
    for at in range(30 + (seed % 5), n - 8, 97):  # characters that come in several tokens, whole
        pieces[at : at + 2] = [HALF, REST]
        pieces[at + 2 : at + 6] = EMOJI
    if same_until:
        pieces[:same_until] = [PIECES[i] for i in chosen[:same_until]]
    mask = np.concatenate([np.full(length, origin == "sampled") for origin, length, _ in segments])
    logprob = np.where(mask, -rng.exponential(0.6, n), np.nan).astype(np.float32)
    columns: dict[str, Any] = {
        "ids": np.array([ID_OF[piece] for piece in pieces], np.uint32),
        "logprob": logprob,
        "entropy": np.where(mask, rng.exponential(0.5, n), np.nan).astype(np.float32),
        "piece_len": np.array([len(piece) for piece in pieces], np.uint16),
        "piece_bytes": np.frombuffer(b"".join(pieces), np.uint8),
    }
    if train:
        in_response = np.arange(n) >= 24
        columns["train_logprob"] = np.where(in_response, np.where(mask, logprob, -1) + rng.uniform(-0.3, 0.3, n), np.nan)
        columns["advantage"] = np.where(in_response, (reward or 0.0) - 0.5, np.nan)
        columns["train_mask"] = mask.astype(np.uint8)
    starts = np.cumsum([0, *(length for _, length, _ in segments)])
    spans = [(int(starts[i]), int(starts[i + 1])) for i, (origin, _, _) in enumerate(segments) if origin == "sampled"]
    trajectory_id = f"{uid}_{sibling}"
    identity = {"id": trajectory_id, "partition": "train", "step": step, "uid": uid, "sibling": sibling, "attempt": 0}
    key = f"train/{step}/{trajectory_id}"
    ended = {"complete": True, "masked": False, "end_reason": "final_answer", "error": None} | {
        name: row.pop(name) for name in ("complete", "masked", "end_reason", "error") if name in row
    }
    header = {
        "kind": "sample",
        "key": key,
        "n": n,
        **identity,
        **ended,
        "score_s": 0.01,
        "total_s": 2.0 * turns,
        "t": 1_767_322_800.0,
        "reward": None
        if reward is None
        else {"value": reward, "components": {"correct": reward, "format": 0.25}, "info": {"answer": "42"}, "turns": []},
        "messages": [
            {"role": "system", "content": "You are a careful calculator."},
            {"role": "user", "content": f"What is 6 times 7, in case {uid}? Use the tool."},
        ],
        "ground_truth": "42",
        "turns": [turn(index, spans[index], last=index == turns - 1) for index in range(turns)],
        "segments": segments,
        "versions": [[3 if origin == "sampled" else None, length] for origin, length, _ in segments],
        "train": {"step": step, "update": 0, "recomputed": True} if train else None,
    }
    return Trajectory(
        {
            "key": key,
            "group": f"train/{step}/{uid}",
            **identity,
            **ended,
            "reward": reward,
            "turns": turns,
            "tokens": n,
            "prompt_tokens": 24,
            "sampled_tokens": turns * tokens,
            "tool_calls": turns - 1,
            "components": {"correct": reward, "format": 0.25},
            "tool_failures": {},
            "parse_errors": 0,
            "cut_turns": 0,
            "retries": 0,
            "versions": [3],
            "advantage": None if reward is None else reward - 0.5,
            "advantage_source": "train" if train else "group",
            "total_s": 2.0 * turns,
            "t": 1_767_322_800.0,
        }
        | row,
        header,
        pieces,
        columns,
    )


def turn(index: int, span: tuple[int, int], *, last: bool) -> dict[str, Any]:
    call = {
        "id": f"t{index:04d}c000",
        "name": "calculator",
        "arguments": {"expression": f"6 * {7 + index}", "note": "line one\nline two"},
        "status": "ok",
        "text": f"result of turn {index}: {6 * (7 + index)}",
        "reward": 0.0,
        "metrics": {"steps": 3},
        "attempts": 1,
        "queue_s": 0.1,
        "run_s": 0.4,
        "cut_tokens": 0,
        "on_error": "observe",
    }
    return {
        "index": index,
        "start": span[0],
        "end": span[1],
        "text": f"Turn {index}: I compute, then I answer.",
        "stop_reason": "stop",
        "weight_version": 3,
        "min_weight_version": None,
        "cached_tokens": 24 * index,
        "generate_s": 1.25,
        "tools_s": 0.0 if last else 0.5,
        "t": 1_767_322_801.25 + 2.0 * index,
        "parse_errors": [],
        "closed_by_template": False,
        "calls": [] if last else [call],
    }


def planted_run() -> MadeRun:
    """Two steps of groups of four, and one of each trouble: what `PLANTED` says, and no other."""
    rewards = [1.0, 0.0, 0.0, 1.0]
    items = []
    for step in (1, 2):
        for uid in "0123":
            for sibling in range(4):
                seed = 1000 * step + 10 * int(uid) + sibling
                same = 33 + 9 * sibling if uid == "0" else 24
                items.append(make(uid=uid, sibling=sibling, step=step, seed=seed, reward=rewards[sibling], same_until=same))
    run = MadeRun(items, can=["search"], commands={"fork": "agentloop fork runs/x {id} --step {step} --turn {turn}"})
    run.steps = [
        {"partition": "train", "step": 1, "arrived": 16, "expected": 16},
        {"partition": "train", "step": 2, "arrived": 15, "expected": 16},
    ]
    run.prompts = {item.row["group"]: f"What is 6 times 7, in case {item.row['uid']}? Use the tool." for item in items}

    def change(key: str, **values: Any) -> Trajectory:
        found = run[key]
        for name, value in values.items():
            if name in found.row:
                found.row[name] = value
            if name in found.header and name != "reward":
                found.header[name] = value
        return found

    for sibling in range(4):
        change(f"train/2/3_{sibling}", reward=0.5, advantage=0.0)
        run[f"train/2/3_{sibling}"].header["reward"]["value"] = 0.5
    change("train/1/1_0", end_reason="engine_failure", error="The engine could not answer: connection refused.")
    change("train/1/1_1", end_reason="token_limit", cut_turns=1)
    run["train/1/1_1"].header["turns"][-1]["stop_reason"] = "length"
    change("train/1/1_2", complete=False, end_reason=None)
    change("train/1/2_0", end_reason="parse_failure", parse_errors=1)
    run["train/1/2_0"].header["turns"][1]["parse_errors"] = ["the JSON of a call ends too early, at character 17"]
    change("train/1/2_1", versions=[3, 4])
    run["train/1/2_1"].header["versions"] = [
        [None, 24], [3, 60], [None, 19], [3, 20], ["mixed", 10], [4, 30], [None, 19], [4, 60],
    ]  # fmt: skip
    failing = change("train/1/2_2", tool_failures={"timeout": 1}, retries=2)
    failing.header["turns"][0]["calls"][0] |= {
        "status": "timeout",
        "attempts": 3,
        "text": "The tool took more than 5 s.",
        "cut_tokens": 120,
    }
    change("train/1/2_3", masked=True)
    no_train = run["train/2/0_1"]
    for name in ("train_logprob", "advantage", "train_mask", "entropy"):
        del no_train.columns[name]
    no_train.header["train"] = None
    no_train.row |= {"advantage": None, "advantage_source": None}
    return run


PLANTED = {
    "error": {"train/1/1_0"},
    "cut_off": {"train/1/1_1"},
    "incomplete": {"train/1/1_2"},
    "parse_failure": {"train/1/2_0"},
    "tool_failure": {"train/1/2_2"},
    "mixed_versions": {"train/1/2_1"},
    "zero_variance": {f"train/2/3_{sibling}" for sibling in range(4)},
    "masked": {"train/1/2_3"},
}


def big_run(siblings: int = 64, tokens: int = 32_768) -> MadeRun:
    """One group of long conversations."""
    turns = 8
    sampled = (tokens - 24 - 19 * (turns - 1)) // turns
    return MadeRun(
        [
            make(
                uid="0", sibling=i, seed=i, turns=turns, tokens=sampled, reward=float(i % 3 == 0), same_until=24 + 400 * (i % 5)
            )
            for i in range(siblings)
        ],
        steps=[{"partition": "train", "step": 1, "arrived": siblings, "expected": siblings}],
    )


def figures(tokens: int, mean_abs: float | None, **more: Any) -> dict[str, Any]:
    """Of `agentloop.consistency.figures.Figures`, what is shown."""
    some = {
        "mean": mean_abs,
        "mean_abs": mean_abs,
        "max_abs": mean_abs,
        "k3": mean_abs,
        "ratio_outside": 0.25,
        "correlation": 0.5,
    }
    none = {"tokens": tokens, "not_recorded": 0, "infinite": 0}
    return none | (some if mean_abs is not None else dict.fromkeys(some)) | more


def report(worst: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """As `agentloop.consistency.Consistency.to_dict`: of two steps of the trainer, and two turns."""
    turns = [{"name": "0", **figures(300, 0.125)}, {"name": "1", **figures(100, 0.75)}]
    steps = [
        {"name": "1", "step": 1, "update": 0, "turns": turns, **figures(200, 0.25)},
        {"name": "2.1", "step": 2, "update": 1, "turns": [{"name": "0", **figures(200, 0.5)}], **figures(200, 0.5)},
    ]
    bins = [{"name": "0-15", **figures(400, 0.375)}]
    by = {"step": steps, "turn": turns, "position": bins, "in_turn": bins}
    told = {"clip": [0.5, 2.0], "trajectories": 31, "not_recomputed": 0, "expected": 32, "arrived": 31, "missing": {"2": 1}}
    whole = {"all": figures(400, 0.375, not_recorded=3), "by": by, "worst_tokens": worst, "worst_turns": [], "findings": []}
    return {"version": 1, "sampled_tokens": 403, "turn_level": None} | told | whole | more


def worst_token(key: str, token: int | None, diff: float | None, **more: Any) -> dict[str, Any]:
    """One of `worst_tokens`."""
    partition, step, name = key.split("/")
    place = {
        "key": key,
        "id": name,
        "partition": partition,
        "step": int(step),
        "trained_step": int(step),
        "update": 0,
        "turn": 1,
    }
    sides = {"trainer": -9.0, "rollout": None if diff is None else -9.0 - diff, "diff": diff, "infinite": diff is None}
    return place | {"token": token, "token_id": 7, "text": " the"} | sides | more
