"""A run's record, read for the audit: everything that is there, whether it fits together or not."""

from __future__ import annotations

import math
import mmap
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agentloop.audit.report import Finding
from agentloop.audit.subject import Part, Pieces, Subject
from agentloop.journal.format import (
    EVENTS_SUFFIX,
    PIECES,
    TOKENS_SUFFIX,
    JournalError,
    Place,
    TokenFrame,
    decode_frame,
    load_line,
    parse_file_name,
    sibling_path,
)
from agentloop.journal.pieces import PieceReader
from agentloop.journal.recorded import ORIGINS
from agentloop.trajectory import CallRecord, CallStatus, Reward, Sample, StopReason, ToolCall, Turn

Events = list[Mapping[str, Any]]
_PLACES = {origin.value: place for place, origin in enumerate(ORIGINS)}


@dataclass
class Step:
    """One partition and step of a run."""

    place: Place
    subjects: list[Subject] = field(default_factory=list)
    found: list[Finding] = field(default_factory=list)
    """About trajectories that cannot be looked at any closer."""


def read_step(run_dir: Path, place: Place, loop: Mapping[str, Any]) -> Step:
    """The trajectories of the highest generation, as `agentloop.journal.Run` has them: of several with one id the complete
    one, of two complete ones the later."""
    step = Step(place)
    by_generation: dict[int, list[Path]] = {}
    for path in sorted((run_dir / place.folder).glob("*" + EVENTS_SUFFIX)):
        name = parse_file_name(path.name)
        if name is not None:
            by_generation.setdefault(name.generation, []).append(path)
    for generation in sorted(by_generation, reverse=True):
        chosen: dict[str, tuple[Events, Path]] = {}
        pieces: dict[Path, list[tuple[int, int]]] = {path: [] for path in by_generation[generation]}
        for path in by_generation[generation]:
            for events in _trajectories(path, step, pieces[path]):
                key = str(events[0]["id"])
                if key in chosen:
                    other = chosen[key][0]
                    if _complete(other) and _complete(events):
                        message = f"two trajectories of this step have the id ({chosen[key][1].name} and {path.name})"
                        step.found.append(_about(step, key, "identity", message))
                    if (_complete(other), other[0].get("t", 0)) > (_complete(events), events[0].get("t", 0)):
                        continue
                chosen[key] = (events, path)
        if chosen:
            _build_all(step, chosen, pieces, loop)
            break
    return step


def _trajectories(path: Path, step: Step, pieces: list[tuple[int, int]]) -> Iterator[Events]:
    """The events of each trajectory in a file, in the order in which these began; one that was begun anew comes twice if it
    had ended before. `pieces`: gets the places of the events that tell the texts of tokens."""
    open_: dict[str, Events] = {}
    ended: list[Events] = []
    end = 0
    for line in path.read_bytes().split(b"\n")[:-1]:  # after the last newline there is nothing, or a torn line
        start, end = end, end + len(line) + 1
        if not line.strip():
            continue
        try:
            event = load_line(line)
            kind, key = event["type"], event.get("id")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # as a writer that was killed leaves it; `Run.verify` tells of these
        if kind == PIECES:
            pieces.append((start, end - start))
        if kind == "traj_start":
            if _complete(open_.get(key, [])):
                ended.append(open_[key])
            open_[key] = [event]
        elif key in open_:
            open_[key].append(event)
        elif key is not None:
            step.found.append(
                _about(step, str(key), "record", f"an event '{kind}' has no beginning of its trajectory before it")
            )
            open_[key] = []
    yield from ended
    yield from (events for events in open_.values() if events)


def _complete(events: Events) -> bool:
    return bool(events) and events[-1]["type"] == "traj_end"


def _about(step: Step, key: str, invariant: str, message: str) -> Finding:
    return Finding(invariant, message, trajectory=key, partition=step.place.partition, step=step.place.step)


def _build_all(
    step: Step,
    chosen: Mapping[str, tuple[Events, Path]],
    pieces: Mapping[Path, list[tuple[int, int]]],
    loop: Mapping[str, Any],
) -> None:
    """Subjects of one generation's events; each token file is mapped once."""
    by_file: dict[Path, list[Events]] = {}
    for events, path in chosen.values():
        by_file.setdefault(path, []).append(events)
    for path, trajectories in by_file.items():
        tokens = sibling_path(path, TOKENS_SUFFIX)
        try:
            with tokens.open("rb") as file:
                size = tokens.stat().st_size
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            texts = PieceReader(path)
            texts.read(pieces[path])
        except (OSError, JournalError) as error:
            message = str(error) if isinstance(error, JournalError) else f"{tokens}: {error.strerror}"
            step.found.append(Finding("record", message, partition=step.place.partition, step=step.place.step))
            continue
        for events in trajectories:
            try:
                step.subjects.append(_build(step, events, data, tokens.name, texts, loop))
            except JournalError as error:
                step.found.append(_about(step, str(events[0]["id"]), "record", str(error)))
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                message = f"an event is missing or damaged: {error!r}"
                step.found.append(_about(step, str(events[0]["id"]), "record", message))
    step.subjects.sort(key=lambda subject: (subject.uid, subject.sibling, subject.attempt))


def _build(step: Step, events: Events, data: Any, tokens: str, pieces: PieceReader, loop: Mapping[str, Any]) -> Subject:
    """`data`: the content of the token file, whose name is `tokens`."""
    start = events[0]
    end = events[-1] if _complete(events) else None
    calls: dict[int, list[CallRecord]] = {}
    turns: list[Turn] = []
    texts: list[str | None] = []
    parts: list[Part] = []
    frames: list[TokenFrame] = []
    reward: Reward | None = None
    odd: list[tuple[str, str, int | None]] = []  # invariant, message, token
    position = 0
    for event in events:
        kind = event["type"]
        first, claimed = position, int(event.get("start", position))
        for origin, count in event.get("segments") or ():
            owner = int(event.get("turn", -1))
            parts.append(Part(_PLACES[origin], position, position + count, owner, claimed + position - first))
            position += count
        if event.get("tok"):
            frame = _frame(event["tok"], data, tokens)
            frames.append(frame)
            if len(frame.ids) != position - first:
                message = f"{tokens}: {len(frame.ids)} tokens are stored for an event '{kind}' of {position - first}"
                raise JournalError(message)
        elif position > first:
            raise JournalError(f"an event '{kind}' of {position - first} tokens does not say where they are")
        if kind == "turn":
            turns.append(_turn(event))
            texts.append(event.get("text"))
        elif kind == "tool":
            calls.setdefault(event["turn"], []).append(_call(event))
        elif kind == "reward":
            reward = _reward(event)
    for turn in turns:
        turn.calls = calls.get(turn.index, [])
    if end is not None:
        odd += _settle(turns, end)
    ids = _joined([frame.ids for frame in frames], np.uint32)
    spoken = _spoken(frames, ids, pieces)
    sample = {**start["sample"], "tools": None if start["sample"]["tools"] is None else tuple(start["sample"]["tools"])}
    subject = Subject(
        id=str(start["id"]),
        uid=str(sample["uid"]),
        sibling=int(start["sibling"]),
        attempt=int(start["attempt"]),
        step=step.place.step,
        partition=step.place.partition,
        sample=Sample(**sample),
        ids=ids,
        log_probs=_joined([_values(frame) for frame in frames], np.float32),
        parts=parts,
        turns=turns,
        reward=reward,
        masked=bool(end["masked"]) if end else False,
        end_reason=end["end_reason"] if end else None,
        state=end["state"] if end else None,
        complete=end is not None,
        sampling=start.get("sampling"),
        pieces=spoken,
        texts=texts,
        mask_claim=end.get("mask") if end else None,
        version_claim=end.get("weight_versions") if end else None,
        loop=loop,
    )
    subject.found += [subject.finding(invariant, message, token) for invariant, message, token in odd]
    if end is not None:
        crc = zlib.crc32(np.ascontiguousarray(subject.ids, "<u4").tobytes())
        if end["tokens"] != len(subject):
            message = f"it has {len(subject)} tokens, and had {end['tokens']} when it ended"
            subject.found.append(subject.finding("record", message, min(len(subject), int(end["tokens"]))))
        elif end["crc"] != crc:
            subject.found.append(subject.finding("record", "its tokens are not those that were counted when it ended"))
    return subject


def _frame(ref: Mapping[str, int], data: Any, tokens: str) -> TokenFrame:
    where = f"{tokens}, offset {ref['off']}"
    return decode_frame(bytes(data[ref["off"] : ref["off"] + ref["len"]]), ref["crc"], where)


def _values(frame: TokenFrame) -> Any:
    return np.full(len(frame.ids), np.nan, np.float32) if frame.log_probs is None else frame.log_probs


def _spoken(frames: Sequence[TokenFrame], ids: Any, pieces: PieceReader) -> Pieces | None:
    """The bytes of the tokens: looked up by their ids, or each token's own, as old frames have them."""
    if not all(frame.has_text for frame in frames):
        return None
    if all(frame.piece_lens is None for frame in frames):
        return Pieces(*pieces.lookup(ids))
    found = [(f.piece_lens, f.piece_bytes) if f.piece_lens is not None else pieces.lookup(f.ids) for f in frames]
    return Pieces(_joined([lens for lens, _ in found], np.uint16), b"".join(text for _, text in found), told=True)


def _joined(arrays: list[Any], dtype: Any) -> Any:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype)


def _settle(turns: Sequence[Turn], end: Mapping[str, Any]) -> list[tuple[str, str, int | None]]:
    """Take in what the end says of the turns; where it says something else than they did."""
    odd: list[tuple[str, str, int | None]] = []
    settled = end["turns"]
    if len(settled) != len(turns):
        token = min(turns[-1].end, end["tokens"]) if turns else None
        odd.append(("turns", f"{len(turns)} turns are recorded, and there were {len(settled)} when it ended", token))
    by_index = dict(enumerate(settled))
    for turn in turns:
        last = by_index.get(turn.index)
        if last is None:
            continue
        if (last["start"], last["end"]) != (turn.start, turn.end):
            message = f"turn {turn.index} was tokens {turn.start}:{turn.end}, and {last['start']}:{last['end']} when it ended"
            odd.append(
                (
                    "prefix",
                    message,
                    min(turn.start, last["start"]) if last["start"] != turn.start else min(turn.end, last["end"]),
                )
            )
        runs = tuple((version, count) for version, count in last.get("versions", turn.versions))
        if last.get("weight_version", turn.weight_version) != turn.weight_version or runs != turn.versions:
            odd.append(("weight_versions", f"the versions of turn {turn.index} were others when it ended", turn.start))
        known = turn.calls
        turn.calls = [known[place] for place in last["calls"] if place < len(known)]
        if len(turn.calls) < len(last["calls"]):
            odd.append(("observation", f"a call of turn {turn.index} is not recorded", turn.end))
        turn.closed_by_template, turn.parse_errors = last["closed_by_template"], last["parse_errors"]
    return odd


def _turn(event: Mapping[str, Any]) -> Turn:
    turn = Turn(
        index=event["turn"],
        start=event["start"],
        end=event["end"],
        stop_reason=StopReason(event["stop_reason"]),
        weight_version=event["weight_version"],
        min_weight_version=event["min_weight_version"],
        cached_tokens=event["cached_tokens"],
        max_tokens=event.get("max_tokens"),
        seed=event.get("seed"),
        prompt_crc=event.get("prompt_crc"),
    )
    if "versions" in event:
        turn.version_runs = tuple((version, count) for version, count in event["versions"])
    return turn


def _call(event: Mapping[str, Any]) -> CallRecord:
    return CallRecord(ToolCall(**event["call"]), CallStatus(event["status"]), event["text"], reward=_number(event["reward"]))


def _reward(event: Mapping[str, Any]) -> Reward:
    components = {name: _number(value) for name, value in event["components"].items()}
    return Reward(_number(event["value"]), components, event["info"], tuple(_number(value) for value in event.get("turns", ())))


def _number(value: Any) -> float:
    return math.nan if value is None else value
