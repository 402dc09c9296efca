"""What the viewer is told of a run: the Python side of the protocol in `docs/viewer.md`.

`Payload.answer` takes a request and gives a header and at most one buffer; hosts only carry them.
"""

from __future__ import annotations

import json
import math
import shlex
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from agentloop.errors import AgentloopError
from agentloop.journal.format import JournalError, Place, dump_json, load_line
from agentloop.journal.reader import Run
from agentloop.journal.recorded import MIXED_VERSION, NO_VERSION, Columns, RecordedTrajectory, Row
from agentloop.journal.train_side import TrainedTrajectory, TrainSide
from agentloop.replay.badges import Badges, group_key, groups
from agentloop.replay.growth import growth
from agentloop.replay.search import TextIndex
from agentloop.trajectory import MIXED, CallRecord, Turn

PROTOCOL = 1
PROMPT_CHARS = 200
"""Of the last user message, in the overview."""
SEARCH_S = 30.0
"""Of a notebook's kernel, which does nothing else meanwhile."""
_STD_EPSILON = 1e-6


Fork = Callable[[Row, int, int | None, str], Mapping[str, str]]
"""Forks a trajectory at a turn, with another answer to one of its calls (or, where that is `None`, with another prompt), and
gives what to tell of it: `text`, and the `command` that shows it."""


class Answer(NamedTuple):
    """An answer of the protocol."""

    header: Mapping[str, Any]
    buffer: bytes = b""

    def json(self) -> bytes:
        """The header as JSON that every host can carry: finite numbers, and U+FFFD for lone surrogates."""
        data = dump_json(self.header)
        return data if not data.startswith(b" ") else json.dumps(_well_formed(json.loads(data))).encode()

    def frame(self) -> bytes:
        """All in one piece: length of the header (u32), four zero bytes, the header, padding to a multiple of 8, the buffer."""
        header = self.json()
        return _FRAME.pack(len(header), 0) + header + b"\0" * (-len(header) % 8) + self.buffer


_FRAME = struct.Struct("<II")


def _well_formed(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {_well_formed(key): _well_formed(item) for key, item in value.items()}
    return [_well_formed(item) for item in value] if isinstance(value, list) else value


def error(message: str) -> Answer:
    return Answer({"kind": "error", "message": message})


def key_of(row: Row) -> str:
    """How the viewer names a trajectory."""
    return f"{row.partition}/{row.step}/{row.id}"


def told(row: Row, name: str, value: Any) -> Any:
    """`value`, or `None` if it stands for something (of `agentloop.journal.recorded.MISSING`) that was not recorded."""
    return None if name in row.missing else value


class Payload:
    """Answers the viewer's requests about a run, for any thread; who asks does not wait for forks and searches of others.

    `rows`: which trajectories there are to see, asked for again with every overview; all of the run by default. `live`: the run
    may still grow. `fork`: what makes a fork, `(row, turn, call, text)`; without it the viewer cannot ask for one.
    """

    def __init__(
        self,
        run: Run,
        rows: Callable[[], Iterable[Row]] | None = None,
        *,
        live: bool = True,
        search: bool = True,
        fork: Fork | None = None,
    ) -> None:
        self.run = run
        self._lock = threading.RLock()
        self._choose = run.trajectories if rows is None else rows
        self._fork = fork
        asked = {"search": search, "fork": fork is not None, "refresh": live, "changes": live}
        self._can = [name for name, holds in asked.items() if holds]
        self._badges = Badges()
        self._rows: dict[str, Row] = {}
        self._sides: dict[int, TrainSide] = {}
        self._advantages: dict[int, tuple[int, dict[str, float]]] = {}
        self._prompts: dict[str, str | None] = {}
        self._texts = TextIndex(lambda row: run.load(row, tokens=False))
        self._whole = rows is None
        self._compared: tuple[Any, dict[str, Any] | None] | None = None
        """What the last comparison of trainer and rollout was made of, and what it told."""
        self._comparing = threading.Lock()

    def answer(self, request: Any) -> Answer:
        """Never raises for a request that is wrong or a record that is damaged: that is an answer of kind `error`."""
        kind = request.get("kind") if isinstance(request, Mapping) else None
        try:
            if kind == "fork" and self._fork is not None:
                place = None if request.get("call") is None else int(request["call"])
                with self._lock:
                    row = self.row(str(request["key"]))
                return Answer({"kind": "fork", **self._fork(row, int(request["turn"]), place, str(request["text"]))})
            if kind == "changes" and "changes" in self._can:
                return Answer({"kind": "changes", **growth(self.run.path)._asdict()})
            if kind == "search" and "search" in self._can:
                return Answer(self.search(str(request["text"]), request.get("keys"), int(request.get("limit") or 100)))
            if kind == "consistency":
                return Answer({"kind": "consistency", "report": self.consistency()})
            with self._lock:
                if kind == "overview":
                    return Answer(self.overview())
                if kind == "sample":
                    return self.sample(self.row(str(request["key"])))
        except (AgentloopError, OSError) as wrong:
            # A page that is handed on does not tell of this machine's folders.
            path = str(self.run.path)
            return error(str(wrong) if "refresh" in self._can else str(wrong).replace(path, self.run.path.name))
        except (KeyError, TypeError, ValueError) as wrong:
            return error(f"a malformed request of kind {kind!r}: {wrong!r}")
        return error(f"a request of kind {kind!r} is not known here")

    # -- the overview -----------------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """The trajectories, as they are now."""
        with self._lock:
            rows = list(self._choose())
            self._rows = {key_of(row): row for row in rows}
            return rows

    def row(self, key: str) -> Row:
        if key not in self._rows:
            self.rows()
        if key not in self._rows:
            raise JournalError(f"no trajectory '{key}' in {self.run.path}")
        return self._rows[key]

    def overview(self) -> dict[str, Any]:
        stamp = growth(self.run.path).stamp if "changes" in self._can else None  # first, so that nothing is missed
        rows, meta = self.rows(), self.run.meta
        places = dict.fromkeys(Place(row.partition, row.step) for row in rows)
        self._sides = {step: self.run.train_side(step) for partition, step in places if partition == "train"}
        arrived = any(side.arrived for side in self._sides.values())
        return {
            "kind": "overview",
            "protocol": PROTOCOL,
            "run": {
                "name": self.run.path.resolve().name,
                "model": meta.get("model") if isinstance(meta.get("model"), str) else None,
                "created": meta.get("created"),
                "facts": _run_facts(meta),
            },
            "can": [*self._can, "consistency"] if arrived else self._can,
            "stamp": stamp,
            "special_ids": None,
            "commands": self._commands(),
            "steps": [self._step(place) for place in places],
            "groups": {key: {"prompt": self._prompt(row)} for key, row in {group_key(row): row for row in rows}.items()},
            "trajectories": self._columns(rows),
        }

    def _commands(self) -> dict[str, str]:
        """None for a page that is handed on: a folder's name is nobody else's business."""
        if "refresh" not in self._can:
            return {}
        run = shlex.quote(str(self.run.path))
        which = "--trajectory {id} --partition {partition} --step {step} --turn {turn}"
        return {"fork": f"agentloop fork {run} {which}"}

    def _step(self, place: Place) -> dict[str, Any]:
        side = self._sides.get(place.step) if place.partition == "train" else None
        known = side is not None and side.arrived > 0
        return {
            "partition": place.partition,
            "step": place.step,
            "arrived": side.arrived if side is not None and known else None,
            "expected": side.expected if side is not None and known else None,
        }

    def _columns(self, rows: list[Row]) -> dict[str, list[Any]]:
        facts = [self._badges.facts(row) for row in rows]
        advantages = self._all_advantages(rows)
        own = ("id", "partition", "step", "uid", "sibling", "attempt", "complete", "masked", "error", "data_source")
        columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in own}
        columns |= {
            name: [told(row, missing, getattr(row, name)) for row in rows]
            for name, missing in (("turns", "turns"), ("tokens", "tokens"), ("t", "t"),
                                  ("prompt_tokens", "tokens"), ("sampled_tokens", "tokens"), ("tool_calls", "tool_calls"))
        }  # fmt: skip
        return columns | {
            "key": [key_of(row) for row in rows],
            "end_reason": [_end_reason(row) for row in rows],
            "group": [group_key(row) for row in rows],
            "reward": [_finite(row.reward) for row in rows],
            "components": [dict(row.components) for row in rows],
            "tool_failures": [told(row, "tool_status", dict(row.tool_failures)) for row in rows],
            "parse_errors": [told(row, "tool_calls", known.parse_errors) for row, known in zip(rows, facts, strict=True)],
            "cut_turns": [told(row, "stop_reason", known.cut_turns) for row, known in zip(rows, facts, strict=True)],
            "retries": [told(row, "tool_calls", known.retries) for row, known in zip(rows, facts, strict=True)],
            "versions": [list(known.versions) for known in facts],
            "badges": self._badges.of_rows(rows),
            "advantage": [value for value, _ in advantages],
            "advantage_source": [source for _, source in advantages],
            "total_s": [told(row, "total_s", row.total_s) if row.complete else None for row in rows],
        }

    def _all_advantages(self, rows: list[Row]) -> list[tuple[float | None, str | None]]:
        """The trainer's where it arrived, else what GRPO will make of the group's rewards, once all of it has ended."""
        by_group = {key: _group_advantages(siblings) for key, siblings in groups(rows).items()}
        found: list[tuple[float | None, str | None]] = []
        for row in rows:
            trained = self._trained_advantages(row.step).get(row.id) if row.partition == "train" else None
            if trained is not None:
                found.append((trained, "train"))
            elif row.partition == "train" and (row.id in by_group[group_key(row)]):
                found.append((by_group[group_key(row)][row.id], "group"))
            else:
                found.append((None, None))
        return found

    def _trained_advantages(self, step: int) -> dict[str, float]:
        side = self._sides.get(step)
        if side is None or not side.arrived:
            return {}
        if self._advantages.get(step, (0, {}))[0] != side.arrived:
            try:
                means = {key: value for key, value in side.mean_advantages().items() if math.isfinite(value)}
            except JournalError:
                means = {}  # the samples of this step say what is wrong with it
            self._advantages[step] = (side.arrived, means)
        return self._advantages[step][1]

    def _prompt(self, row: Row) -> str | None:
        key = f"{row.generation}/{group_key(row)}"
        if key not in self._prompts:
            self._prompts[key] = _last_user_message(row)
        return self._prompts[key]

    # -- one trajectory ---------------------------------------------------------------------------------------------

    def sample(self, row: Row) -> Answer:
        """Header and columns of one trajectory. Raises `JournalError` if its record is damaged."""
        recorded = self.run.load(row)
        assert recorded.columns is not None
        trained = self._side(row).get(recorded) if row.partition == "train" else None
        buffer, columns = _packed(_columns(recorded.columns, trained, recorded.prompt_len))
        return Answer(_header(recorded, trained) | {"columns": columns}, buffer)

    def _side(self, row: Row) -> TrainSide:
        """As of the last overview, so that neighbours do not read the same file again; a late arrival is looked for."""
        side = self._sides.get(row.step)
        if side is None or row.id not in side.ids:
            side = self._sides[row.step] = self.run.train_side(row.step)
        return side

    # -- trainer against rollout ------------------------------------------------------------------------------------

    def consistency(self) -> dict[str, Any] | None:
        """`agentloop.consistency`'s report on the trajectories of the last overview, or `None` if nothing of their train side
        has arrived. Others are answered meanwhile. Raises `JournalError` if something that is needed is damaged."""
        from agentloop.consistency import consistency

        with self._comparing:
            with self._lock:
                if not self._rows:
                    self.overview()
                made_of = {step: (side.arrived, side.expected) for step, side in self._sides.items() if side.arrived}
                chosen = None if self._whole else set(self._rows)
            if self._compared is None or self._compared[0] != (made_of, chosen):
                run = Run(self.run.path)  # not ours, which others are reading by
                if not made_of:
                    report = None
                elif chosen is None:
                    report = consistency(run).to_dict()
                else:
                    sides = (trained for step in made_of for trained in run.train_side(step))
                    report = consistency([side for side in sides if key_of(side.recorded.row) in chosen]).to_dict()
                self._compared = (made_of, chosen), report
            return self._compared[1]

    # -- search -----------------------------------------------------------------------------------------------------

    def search(self, text: str, keys: Iterable[str] | None, limit: int) -> dict[str, Any]:
        """One hit a trajectory, of up to `limit` of them. Others are answered in between; after `SEARCH_S` seconds it is left
        at what was found, and `searched` tells how many were looked at. What was searched once is quick to search again."""
        until = time.monotonic() + SEARCH_S
        if not self._rows:
            self.rows()
        wanted = list(self._rows.values()) if keys is None else [self._rows[key] for key in keys if key in self._rows]
        hits: list[dict[str, Any]] = []
        searched = 0
        for row in wanted:
            if len(hits) >= limit or time.monotonic() > until:
                break
            searched += 1
            try:
                with self._lock:
                    hit = self._texts.first_hit(row, text)
            except JournalError:
                continue
            if hit is not None:
                hits.append({"key": key_of(row)} | hit)
        return {"kind": "search", "hits": hits, "searched": searched}


def _run_facts(meta: Mapping[str, Any]) -> dict[str, str | int | float]:
    """The scalars of `run.json` that a reader may want to see."""
    facts: dict[str, str | int | float] = {}
    for name in ("seed", "generation"):
        value = meta.get(name)
        if isinstance(value, str | int | float):
            facts[name] = value
    packages = meta.get("packages")
    if isinstance(packages, Mapping):
        facts |= {str(name): str(version) for name, version in packages.items() if version}
    return facts


def _last_user_message(row: Row) -> str | None:
    try:
        with row.file.open("rb") as file:
            offset, length = row.lines[0]
            file.seek(offset)
            messages = load_line(file.read(length))["sample"]["messages"]
        asked = [message for message in messages if message.get("role") == "user"] or messages
        content = asked[-1]["content"]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    if not isinstance(content, str):
        content = dump_json(content).decode()
    return content[:PROMPT_CHARS]


def _group_advantages(siblings: list[Row]) -> dict[str, float]:
    """GRPO's, as verl computes it (`compute_grpo_outcome_advantage`): the reward less the group's mean, over its standard
    deviation (of n - 1) + 1e-6; a lone one keeps its reward. Empty while a sibling is still open."""
    if not all(row.complete for row in siblings):
        return {}
    rewards = {row.id: row.reward for row in siblings if not row.masked and row.reward is not None}
    if len(rewards) < 2:
        return dict(rewards)
    values: Any = np.array(list(rewards.values()), np.float64)
    mean, std = values.mean(), values.std(ddof=1)
    return {key: float((value - mean) / (std + _STD_EPSILON)) for key, value in rewards.items()}


def _header(recorded: RecordedTrajectory, trained: TrainedTrajectory | None) -> dict[str, Any]:
    row, reward, columns = recorded.row, recorded.reward, recorded.columns
    assert columns is not None
    own = ("id", "partition", "step", "uid", "sibling", "attempt", "complete", "masked", "error")
    return {
        "kind": "sample",
        "key": key_of(row),
        "n": len(columns),
        **{name: getattr(row, name) for name in own},
        "end_reason": _end_reason(row),
        "t": told(row, "t", row.t),
        "score_s": told(row, "total_s", row.score_s) if row.complete else None,
        "total_s": told(row, "total_s", row.total_s) if row.complete else None,
        "reward": None
        if reward is None
        else {"value": reward.value, "components": reward.components, "info": reward.info, "turns": list(reward.turns)},
        "messages": recorded.sample.messages,
        "ground_truth": recorded.sample.ground_truth,
        "turns": [
            _turn(row, turn, text, told(row, "t", t))
            for turn, text, t in zip(recorded.turns, recorded.texts, recorded.times, strict=True)
        ],
        "segments": [[origin.value, n, turn] for origin, n, turn in recorded.segments],
        "versions": _version_runs(columns.weight_version),
        "train": None
        if trained is None
        else {"step": trained.trained_step, "update": trained.update, "recomputed": trained.recomputed},
    }


def _turn(row: Row, turn: Turn, text: str | None, t: float | None) -> dict[str, Any]:
    return {
        "index": turn.index,
        "start": turn.start,
        "end": turn.end,
        "text": text,
        "stop_reason": told(row, "stop_reason", turn.stop_reason),
        "weight_version": turn.weight_version,
        "min_weight_version": turn.min_weight_version,
        "cached_tokens": told(row, "tokens", turn.cached_tokens),
        "generate_s": told(row, "generate_s", turn.generate_s),
        "tools_s": told(row, "tool_s", turn.tools_s) if row.complete else None,  # known when it has ended
        "t": t,
        "parse_errors": turn.parse_errors,
        "closed_by_template": told(row, "stop_reason", turn.closed_by_template),
        "calls": [_call(row, record) for record in turn.calls],
    }


def _call(row: Row, record: CallRecord) -> dict[str, Any]:
    return {
        "id": record.call.id,
        "name": record.call.name,
        "arguments": record.call.arguments,
        "status": told(row, "tool_status", record.status),
        "text": record.text,
        "reward": record.reward,
        "metrics": record.metrics,
        "attempts": record.attempts,
        "queue_s": told(row, "tool_s", record.queue_s),
        "run_s": told(row, "tool_s", record.run_s),
        "cut_tokens": record.cut_tokens,
        "on_error": record.on_error,
    }


def _version_runs(versions: Any) -> list[list[Any]]:
    """The column as `[version, count]`: `null` where not sampled or not told."""
    if not len(versions):
        return []
    starts = np.concatenate([[0], np.flatnonzero(np.diff(versions)) + 1])
    counts = np.diff(np.concatenate([starts, [len(versions)]]))
    names = {NO_VERSION: None, MIXED_VERSION: MIXED}
    return [[names.get(v, v), n] for v, n in zip(versions[starts].tolist(), counts.tolist(), strict=True)]


def _columns(columns: Columns, trained: TrainedTrajectory | None, prompt_len: int) -> list[tuple[str, str, Any]]:
    """Name, type and values of each column."""
    packed: list[tuple[str, str, Any]] = [("ids", "u32", columns.ids), ("logprob", "f32", columns.log_probs)]
    if columns.entropies is not None:
        packed.append(("entropy", "f32", columns.entropies))
    if columns.piece_lens is not None:
        packed.append(("piece_len", "u16", columns.piece_lens))
        packed.append(("piece_bytes", "u8", np.frombuffer(columns.piece_bytes, np.uint8)))
    if trained is not None:
        packed.append(("train_logprob", "f32", _after_prompt(trained.old_log_probs, prompt_len, np.nan)))
        packed.append(("advantage", "f32", _after_prompt(trained.advantages, prompt_len, np.nan)))
        packed.append(("train_mask", "u8", _after_prompt(trained.response_mask, prompt_len, 0)))
        if trained.rollout_is_weights is not None:
            packed.append(("is_weight", "f32", _after_prompt(trained.rollout_is_weights, prompt_len, np.nan)))
    return packed


def _after_prompt(values: Any, prompt_len: int, prompt: float) -> Any:
    return np.concatenate([np.full(prompt_len, prompt, values.dtype), values])


_DTYPES = {"u32": "<u4", "f32": "<f4", "u16": "<u2", "u8": "|u1"}


def _packed(columns: Iterable[tuple[str, str, Any]]) -> tuple[bytes, list[dict[str, Any]]]:
    """The columns in one buffer, each at a multiple of 8, and where they are."""
    parts: list[bytes] = []
    places: list[dict[str, Any]] = []
    offset = 0
    for name, dtype, values in columns:
        data = values.astype(_DTYPES[dtype], copy=False).tobytes()
        data += b"\0" * (-len(data) % 8)
        places.append({"name": name, "dtype": dtype, "offset": offset, "length": len(values)})
        parts.append(data)
        offset += len(data)
    return b"".join(parts), places


def _end_reason(row: Row) -> str | None:
    """`None` is a failure of the program, to the viewer."""
    return "not recorded" if "end_reason" in row.missing else row.end_reason


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
