"""One trajectory as it was recorded: the conversation, the turns and the token columns."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

from agentloop.journal.format import FrameRef, JournalError, PackedFrame, open_frame, read_parts
from agentloop.journal.pieces import PieceReader
from agentloop.trajectory import (
    MIXED,
    CallRecord,
    CallStatus,
    EndReason,
    Origin,
    Reward,
    Sample,
    State,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)

ORIGINS = (Origin.PROMPT, Origin.SAMPLED, Origin.OBSERVATION, Origin.TEMPLATE)
"""The column `origin` holds places in this tuple."""
NO_VERSION = -1
"""In the column `weight_version`: not sampled, or the engine did not tell."""
MIXED_VERSION = -2
"""In the column `weight_version`: sampled while the weights changed, and nobody told at which token."""


class Row(NamedTuple):
    """What a listing tells of a trajectory; cheap to read."""

    id: str
    uid: str
    sibling: int
    attempt: int
    data_source: str
    t: float
    """When it started, in seconds since 1970."""
    complete: bool
    """It ended while the writer lived. An incomplete one is still running, or was killed, or could not be written."""
    end_reason: str | None
    """`None` if incomplete, or if it was ended by an error of the program (`error` tells)."""
    state: str | None
    error: str | None
    masked: bool
    reward: float | None
    components: Mapping[str, float]
    turns: int
    tokens: int
    """All: prompt, sampled, observations and glue."""
    prompt_tokens: int
    sampled_tokens: int
    tool_calls: int
    tool_failures: Mapping[str, int]
    """Calls whose status is not `ok`, by status."""
    score_s: float
    total_s: float
    missing: Sequence[str]
    """What an imported trajectory's source did not record, by the names of `MISSING`: there, a 0 here means nothing. Empty
    for what agentloop recorded itself."""
    places: str
    """Offset and length of each of its events in the file, `0 120 480 96 ...`."""

    partition: str
    step: int
    writer: str
    generation: int
    file: Path
    """The event file."""

    @property
    def lines(self) -> list[tuple[int, int]]:
        """Offset and length of each of its events in the file. Raises `ValueError` if the index is damaged."""
        numbers = [int(number) for number in self.places.split()]
        return list(zip(numbers[::2], numbers[1::2], strict=True))


SHARED_FIELDS = ("partition", "step", "writer", "generation", "file")
"""The last ones of a row: all rows of a file have the same."""
MISSING = ("t", "end_reason", "masked", "turns", "tokens", "tool_calls", "tool_status", "tool_s", "generate_s", "stop_reason",
           "log_probs", "weight_version", "total_s")  # fmt: skip
"""What a source may not have recorded. `tokens`: neither numbers nor ids; `turns`: what each turn wrote; `tool_status`: whether
calls failed; `tool_s`, `generate_s`, `total_s`: seconds."""


@dataclass(frozen=True)
class Columns:
    """The tokens of one trajectory, one array a property; all have `n` entries."""

    ids: Any
    """uint32."""
    origin: Any
    """uint8: a place in `ORIGINS`."""
    mask: Any
    """uint8: 1 where the token was sampled, that is trained."""
    log_probs: Any
    """float32: NaN where the token was not sampled or its log-probability was not asked for."""
    turn: Any
    """int16: the turn that the token belongs to; -1 is the prompt."""
    weight_version: Any
    """int64: of the weights that sampled the token; `MIXED_VERSION` and `NO_VERSION` where that is not known."""
    spoken: Callable[[], tuple[Any, bytes]] = field(repr=False)
    """Looks up `piece_lens` and `piece_bytes`; called when first asked for one of them."""
    entropies: Any = None
    """float32, in nats, kept to three digits: of the distribution that the token's log-probability is of; NaN where it was not
    sampled or the engine did not tell. `None` if it told none at all."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _spoken(self) -> tuple[Any, bytes]:
        return self.spoken()

    @property
    def piece_lens(self) -> Any:
        """uint16: bytes of text of each token; `None` if the writer had no tokenizer."""
        return self._spoken[0]

    @property
    def piece_bytes(self) -> bytes:
        """The bytes of all tokens, joined."""
        return self._spoken[1]

    @property
    def pieces(self) -> list[bytes] | None:
        """The bytes of each token; one may hold a part of a character."""
        if self.piece_lens is None:
            return None
        ends = np.cumsum(self.piece_lens, dtype=np.int64).tolist()
        return [self.piece_bytes[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def text(self, start: int = 0, end: int | None = None) -> str | None:
        """The text of tokens `start:end`, with U+FFFD for what is not UTF-8."""
        if self.piece_lens is None:
            return None
        before = int(self.piece_lens[:start].sum(dtype=np.int64))
        length = int(self.piece_lens[start:end].sum(dtype=np.int64))
        return self.piece_bytes[before : before + length].decode("utf-8", "replace")


@dataclass(frozen=True)
class RecordedTrajectory:
    """A trajectory read back. What the ledger derives (`input_ids`, `response_mask`, …) is derived here the same way."""

    row: Row
    sample: Sample
    """Without `fields`, which the journal does not keep."""
    turns: list[Turn]
    """With their calls in the order in which the model wrote them; without `engine_data`."""
    reward: Reward | None
    segments: list[tuple[Origin, int, int]]
    """Origin, number of tokens, turn."""
    times: list[float]
    """When each turn's generation was recorded, in seconds since 1970."""
    columns: Columns | None
    """`None` if it was loaded without tokens."""
    text_source: TextSource = field(repr=False, compare=False)
    answers: list[dict[str, CallRecord]] = field(default_factory=list)
    """For each turn what its calls came to, by call id, before the loop cut long answers to fit."""
    sampling: Mapping[str, Any] | None = None
    """How it was sampled, by the names of `Sampling`; `None` if the writer was not told."""

    @cached_property
    def texts(self) -> list[str | None]:
        """What the model wrote in each turn, control tokens included; `None` if the writer had no tokenizer, or the text is
        damaged. Read when first asked for."""
        return [self.text_source.text(turn.index) for turn in self.turns]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as OpenAI-style messages: the sample's, then each turn's text and what its tools answered.

        An assistant's `content` is what was sampled, tool-call markup included."""
        messages = list(self.sample.messages)
        for turn, text in zip(self.turns, self.texts, strict=True):
            messages.append({"role": "assistant", "content": text})
            messages += [
                {"role": "tool", "tool_call_id": record.call.id, "name": record.call.name, "content": record.text}
                for record in turn.calls
            ]
        return messages

    @property
    def prompt_len(self) -> int:
        return self.segments[0][1] if self.segments and self.segments[0][0] is Origin.PROMPT else 0

    @property
    def input_ids(self) -> list[int]:
        return [int(i) for i in self._tokens.ids.tolist()]

    @property
    def response_mask(self) -> list[int]:
        return [int(i) for i in self._tokens.mask[self.prompt_len :].tolist()]

    @property
    def rollout_log_probs(self) -> list[float] | None:
        """As the ledger's, rounded to float32."""
        columns = self._tokens
        values = np.where(columns.mask == 1, columns.log_probs, np.float32(0.0))[self.prompt_len :]
        return None if np.isnan(values).any() else [float(x) for x in values.tolist()]

    @property
    def turn_spans(self) -> list[tuple[int, int]]:
        return [(turn.start, turn.end) for turn in self.turns]

    def to_trajectory(self) -> Trajectory:
        """The ledger again, through its own appends. Log-probabilities are rounded to float32."""
        row, columns = self.row, self._tokens
        trajectory = Trajectory(self.sample, sibling=row.sibling, step=row.step, validate=row.partition == "val")
        trajectory.attempt = row.attempt
        trajectory.sampling = None if self.sampling is None else dict(self.sampling)
        waiting = list(self.turns)
        start = 0
        for origin, n, turn in self.segments:
            ids = columns.ids[start : start + n].tolist()
            values = columns.log_probs[start : start + n]
            while waiting and waiting[0].index < turn:  # empty generations have no segment
                trajectory.append_sampled([], None, waiting.pop(0))
            if origin is Origin.PROMPT:
                trajectory.append_prompt(ids)
            elif origin is Origin.SAMPLED:
                trajectory.append_sampled(ids, None if np.isnan(values).any() else values.tolist(), waiting.pop(0))
            else:
                if waiting and waiting[0].index == turn:
                    trajectory.append_sampled([], None, waiting.pop(0))
                trajectory.append(origin, ids)
            start += n
        for turn_left in waiting:
            trajectory.append_sampled([], None, turn_left)
        trajectory.reward, trajectory.masked, trajectory.error = self.reward, row.masked, row.error
        trajectory.end_reason = EndReason(row.end_reason) if row.end_reason else None
        trajectory.state = State(row.state) if row.state else State.PENDING
        trajectory.score_s, trajectory.total_s = row.score_s, row.total_s
        return trajectory

    @property
    def _tokens(self) -> Columns:
        if self.columns is None:
            raise ValueError(f"trajectory {self.row.id} was loaded without its tokens")
        return self.columns


def build(
    row: Row, events: Sequence[Mapping[str, Any]], token_file: Path, pieces: Callable[[], PieceReader], *, tokens: bool = True
) -> RecordedTrajectory:
    """Put the events of one trajectory together, with its tokens or without.

    Raises `JournalError` if a frame is damaged or missing, or the tokens are not those that the writer counted.
    """
    try:
        return _build(row, events, TokenFiles(token_file, pieces), tokens)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise JournalError(f"{row.file}: trajectory {row.id}: an event is missing or damaged: {error!r}") from error


def _build(row: Row, events: Sequence[Mapping[str, Any]], files: TokenFiles, tokens: bool) -> RecordedTrajectory:
    start = events[0]
    for kind, value in ((EndReason, row.end_reason), (State, row.state)):
        if value is not None:
            kind(value)
    turns: list[Turn] = []
    times: list[float] = []
    calls: dict[int, list[CallRecord]] = {}
    segments: list[tuple[Origin, int, int]] = []
    reward: Reward | None = None
    end: Mapping[str, Any] | None = None
    for event in events:
        kind = event["type"]
        segments += [(Origin(origin), n, event.get("turn", -1)) for origin, n in event.get("segments") or ()]
        if kind == "turn":
            turns.append(turn_of(event))
            times.append(event["t"])
        elif kind == "tool":
            calls.setdefault(event["turn"], []).append(call_of(event))
        elif kind == "reward":
            components = {name: _number(value) for name, value in event["components"].items()}
            turn_rewards = tuple(_number(value) for value in event.get("turns", ()))
            reward = Reward(_number(event["value"]), components, event["info"], turn_rewards)
        elif kind == "traj_end":
            end = event
    answers: list[dict[str, CallRecord]] = []
    for turn in turns:
        turn.calls = calls.get(turn.index, [])
        answers.append({record.call.id: record for record in reversed(turn.calls)})  # the first one of each id
        if end is not None and turn.index < len(end["turns"]):
            settled = end["turns"][turn.index]
            turn.calls = [turn.calls[place] for place in settled["calls"]]
            turn.tools_s, turn.closed_by_template = settled["tools_s"], settled["closed_by_template"]
            turn.parse_errors = settled["parse_errors"]
    columns = _columns(row, events, segments, turns, files) if tokens else None
    if columns is not None and columns.entropies is not None:
        for turn in turns:
            told = columns.entropies[turn.start : turn.end]
            turn.entropies = None if np.isnan(told).any() or not len(told) else told.tolist()
    if end is not None and len(events) - 1 != end.get("events", len(events) - 1):
        raise JournalError(f"{row.file}: trajectory {row.id}: it has {len(events) - 1} of {end['events']} events")
    if columns is not None and end is not None:
        found = (len(columns), zlib.crc32(columns.ids))
        if found != (end["tokens"], end["crc"]):
            raise JournalError(f"{row.file}: trajectory {row.id}: its tokens are not those that were counted when it ended")
    tools = start["sample"]["tools"]
    sample = Sample(**{**start["sample"], "tools": None if tools is None else tuple(tools)})
    texts = TextSource({event["turn"]: event for event in events if event["type"] == "turn"}, files)
    return RecordedTrajectory(row, sample, turns, reward, segments, times, columns, texts, answers, start.get("sampling"))


class Tokens(NamedTuple):
    """Of some events, in order; see `Columns`."""

    ids: Any
    log_probs: Any
    entropies: Any
    """float16, or `None`."""
    spoken: Callable[[], tuple[Any, bytes]]


@dataclass(frozen=True)
class TokenFiles:
    """What the tokens of an event file are read from."""

    tokens: Path
    pieces: Callable[[], PieceReader]
    """Called when texts are asked for; may raise `JournalError`."""

    def read(self, events: Iterable[Mapping[str, Any]]) -> Tokens:
        """The tokens of these events, in order. Raises `JournalError`, also if the text of one is missing."""
        refs = [FrameRef(**event["tok"]) for event in events if event.get("tok")]
        try:
            parts = read_parts(self.tokens, [(ref.off, ref.len) for ref in refs]) if refs else []
        except OSError as error:
            raise JournalError(f"{self.tokens}: {error.strerror}") from error
        unpack = zstandard.ZstdDecompressor()
        frames = [
            open_frame(part, ref.crc, f"{self.tokens}, offset {ref.off}", unpack) for part, ref in zip(parts, refs, strict=True)
        ]
        n = sum(frame.n for frame in frames)
        ids: Any = np.zeros(n, np.uint32)
        log_probs: Any = np.full(n, np.nan, np.float32)
        entropies: Any = np.full(n, np.nan, np.float16) if any(frame.entropies is not None for frame in frames) else None
        at = 0
        for frame in frames:
            place = slice(at, at := at + frame.n)
            frame.put(ids[place], log_probs[place], None if entropies is None else entropies[place])
        return Tokens(ids, log_probs, entropies, self._spoken(frames, ids))

    def _spoken(self, frames: Sequence[PackedFrame], ids: Any) -> Callable[[], tuple[Any, bytes]]:
        """Looks up lengths (uint16) and joined bytes of the tokens of some frames; `None` and nothing if one has no text."""
        if not all(frame.has_text for frame in frames):
            return lambda: (None, b"")
        pieces = self.pieces() if any(frame.old is None for frame in frames) else None
        if pieces is not None and all(frame.old is None for frame in frames):
            return partial(pieces.spell, pieces.places(ids))
        found: list[tuple[Any, bytes]] = []
        at = 0
        for frame in frames:
            place = slice(at, at := at + frame.n)
            if frame.old is not None:
                found.append((frame.old.piece_lens, frame.old.piece_bytes))
            elif pieces is not None:
                found.append(pieces.lookup(ids[place]))
        joined = _joined([lens for lens, _ in found], np.uint16), b"".join(text for _, text in found)
        return lambda: joined


@dataclass(frozen=True)
class TextSource:
    """Looks up what the model wrote, when asked."""

    turns: Mapping[int, Mapping[str, Any]]
    """The event of each turn."""
    files: TokenFiles

    def text(self, turn: int) -> str | None:
        event = self.turns[turn]
        if "text" in event:
            told: str | None = event["text"]
            return told
        try:
            return _text(*self.files.read([event]).spoken()) if event.get("tok") else None
        except (JournalError, TypeError):
            return None


def _text(lens: Any, text: bytes) -> str | None:
    return None if lens is None else text.decode("utf-8", "replace")


def _columns(
    row: Row,
    events: Sequence[Mapping[str, Any]],
    segments: Sequence[tuple[Origin, int, int]],
    turns: Sequence[Turn],
    files: TokenFiles,
) -> Columns:
    tokens = files.read(events)
    counts = [n for _, n, _ in segments]
    if sum(counts) != len(tokens.ids):
        raise JournalError(f"{files.tokens}: trajectory {row.id}: a frame's length is not its event's")
    origins: Any = np.repeat(np.array([ORIGINS.index(origin) for origin, _, _ in segments], np.uint8), counts)
    turn_at: Any = np.repeat(np.array([turn for _, _, turn in segments], np.int16), counts)
    mask = (origins == ORIGINS.index(Origin.SAMPLED)).astype(np.uint8)
    versions: Any = np.full(sum(counts), NO_VERSION, np.int64)
    for turn in turns:
        at = turn.start
        for version, count in turn.versions:
            versions[at : at + count] = MIXED_VERSION if version == MIXED else NO_VERSION if version is None else version
            at += count
    return Columns(
        ids=tokens.ids,
        origin=origins,
        mask=mask,
        log_probs=tokens.log_probs,
        turn=turn_at,
        weight_version=versions,
        spoken=tokens.spoken,
        entropies=None if tokens.entropies is None else tokens.entropies.astype(np.float32),
    )


def _joined(arrays: list[Any], dtype: Any) -> Any:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype)


def turn_of(event: Mapping[str, Any]) -> Turn:
    turn = Turn(
        index=event["turn"],
        start=event["start"],
        end=event["end"],
        stop_reason=StopReason(event["stop_reason"]),
        weight_version=event["weight_version"],
        min_weight_version=event["min_weight_version"],
        cached_tokens=event["cached_tokens"],
        generate_s=event["generate_s"],
        max_tokens=event.get("max_tokens"),
        seed=event.get("seed"),
        prompt_crc=event.get("prompt_crc"),
    )
    runs = tuple((version, count) for version, count in event.get("versions", ()))
    if runs != turn.versions:
        turn.version_runs = runs
    return turn


def call_of(event: Mapping[str, Any]) -> CallRecord:
    return CallRecord(
        call=ToolCall(**event["call"]),
        status=CallStatus(event["status"]),
        text=event["text"],
        reward=_number(event["reward"]),
        metrics=event["metrics"],
        attempts=event["attempts"],
        queue_s=event["queue_s"],
        run_s=event["run_s"],
        cut_tokens=event["cut_tokens"],
        on_error=event["on_error"],
    )


def _number(value: Any) -> float:
    """JSON has no form for a number that is not finite."""
    return math.nan if value is None else value
