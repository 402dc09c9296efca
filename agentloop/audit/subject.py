"""One trajectory as the audit sees it, wherever it comes from: a ledger in memory or a record on disk.

Nothing is refused here: what does not fit together is what the audit is for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentloop.audit.report import Finding
from agentloop.journal.recorded import ORIGINS
from agentloop.trajectory import Origin, Reward, Sample, Trajectory, Turn

PieceBytes = Callable[[int], bytes]
PROMPT, SAMPLED, OBSERVATION, TEMPLATE = (
    ORIGINS.index(origin) for origin in (Origin.PROMPT, Origin.SAMPLED, Origin.OBSERVATION, Origin.TEMPLATE)
)


@dataclass(frozen=True)
class Pieces:
    """The bytes of n tokens."""

    lens: NDArray[Any]
    """(n,)."""
    data: bytes
    told: bool = False
    """Each token's own, as old records have them; not looked up by its id."""

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each token's bytes begin, and where the last one's end, (n + 1,)."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lens, dtype=np.int64)])

    def text(self, start: int, end: int) -> str:
        """Of tokens `start:end`, with U+FFFD for what is not UTF-8."""
        return self.data[int(self.offsets[start]) : int(self.offsets[end])].decode("utf-8", "replace")

    def token_at(self, start: int, text: str, char: int) -> int:
        """The token that has character `char` of `text`, which is the text from token `start` on."""
        byte = int(self.offsets[start]) + len(text[:char].encode("utf-8", "replace"))
        return min(int(np.searchsorted(self.offsets, byte, side="right")) - 1, len(self.lens) - 1)


@dataclass(frozen=True, slots=True)
class Part:
    """A segment, as it was claimed."""

    origin: int
    """A place in `ORIGINS`."""
    start: int
    """Where its tokens really lie."""
    end: int
    turn: int
    claimed_start: int
    """Where they lie as the segment or its event has it."""


@dataclass
class Subject:
    """A trajectory. Arrays have one entry a token."""

    id: str
    uid: str
    sibling: int
    attempt: int
    step: int
    partition: str | None
    """`None` for a ledger in memory."""
    sample: Sample
    ids: NDArray[np.uint32]
    log_probs: NDArray[np.float32]
    """NaN where there is none."""
    parts: list[Part]
    turns: list[Turn]
    reward: Reward | None
    masked: bool
    end_reason: str | None
    state: str | None
    complete: bool = True
    sampling: Mapping[str, Any] | None = None
    pieces: Pieces | None = None
    texts: Sequence[str | None] = ()
    """What the record says was sampled in each turn."""
    mask_claim: Sequence[Sequence[int]] | None = None
    """`[[0 or 1, count], …]` as the record's end has it."""
    version_claim: Sequence[Sequence[Any]] | None = None
    loop: Mapping[str, Any] = field(default_factory=dict)
    """The run's `LoopConfig`, as far as it is known."""
    found: list[Finding] = field(default_factory=list)
    """What was found while it was loaded."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def origin(self) -> NDArray[np.uint8]:
        """A place in `ORIGINS`."""
        parts = self.parts
        return np.repeat(np.array([p.origin for p in parts], np.uint8), [p.end - p.start for p in parts])

    @cached_property
    def sampled(self) -> NDArray[np.bool_]:
        return self.origin == SAMPLED

    @cached_property
    def turn_of(self) -> NDArray[np.int64]:
        parts = self.parts
        return np.repeat(np.array([p.turn for p in parts], np.int64), [p.end - p.start for p in parts])

    @cached_property
    def prompt_len(self) -> int:
        return next((p.end - p.start for p in self.parts[:1] if p.origin == PROMPT), 0)

    @cached_property
    def stop_ids(self) -> tuple[int, ...] | None:
        """The tokens that end a turn; `None` if it is not known."""
        ids = (self.sampling or {}).get("stop_token_ids")
        return tuple(int(i) for i in ids) if ids else None

    @cached_property
    def template(self) -> str:
        """A key for the template's arguments: what is glue with one is not with another."""
        return json.dumps(self.sample.template_kwargs, sort_keys=True, default=str)

    def spans(self) -> Iterator[tuple[Turn, int, int]]:
        """Each turn that sampled something, with where its tokens are, limited to where there are tokens."""
        for turn in self.turns:
            start, end = max(turn.start, 0), min(turn.end, len(self))
            if end > start:
                yield turn, start, end

    def after(self, turn: Turn) -> tuple[int, int]:
        """Where what follows a turn's sampled tokens lies, up to the next turn or the end."""
        following = next((other.start for other in self.turns[turn.index + 1 :] if other.end > other.start), len(self))
        return min(turn.end, len(self)), min(following, len(self))

    def finding(self, invariant: str, message: str, token: int | None = None, **more: Any) -> Finding:
        """About this trajectory, and its token at `token` if there is one."""
        about: dict[str, Any] = {"trajectory": self.id, "step": self.step, "partition": self.partition}
        if token is not None:
            about["token"] = int(token)
            if 0 <= token < len(self):
                about["token_id"] = int(self.ids[token])
                about["turn"] = int(self.turn_of[token])
                if self.pieces is not None:
                    about["text"] = self.pieces.text(int(token), int(token) + 1)
        return Finding(invariant, message, **{**about, **more})


def from_trajectory(trajectory: Trajectory, decode: PieceBytes | None = None, loop: Mapping[str, Any] | None = None) -> Subject:
    """A ledger in memory. `decode` gives the bytes of a token id."""
    segments = trajectory.segments
    parts, position = [], 0
    for segment in segments:
        end = position + len(segment.ids)
        parts.append(Part(ORIGINS.index(segment.origin), position, end, segment.turn, segment.start))
        position = end
    ids = np.fromiter((i for segment in segments for i in segment.ids), np.int64, position)
    log_probs: NDArray[np.float32] = np.full(position, np.nan, np.float32)
    subject = Subject(
        id=trajectory.id,
        uid=trajectory.sample.uid,
        sibling=trajectory.sibling,
        attempt=trajectory.attempt,
        step=trajectory.step,
        partition=None,
        sample=trajectory.sample,
        ids=ids.astype(np.uint32),
        log_probs=log_probs,
        parts=parts,
        turns=list(trajectory.turns),
        reward=trajectory.reward,
        masked=trajectory.masked,
        end_reason=None if trajectory.end_reason is None else str(trajectory.end_reason),
        state=str(trajectory.state),
        sampling=trajectory.sampling,
        loop=loop or {},
    )
    for part, segment in zip(parts, segments, strict=True):
        packed = np.frombuffer(segment.packed, np.uint32)
        if len(packed) and not np.array_equal(packed, subject.ids[part.start : part.end]):
            at = first_difference(packed, subject.ids[part.start : part.end])
            message = "a segment's tokens are not those that were appended"
            wanted = f"token {int(packed[at])}" if at < len(packed) else None
            subject.found.append(subject.finding("prefix", message, min(part.start + at, position - 1), expected=wanted))
        values = segment.log_probs
        if values is None:
            continue
        if len(values) != part.end - part.start:
            at = part.start + min(len(values), part.end - part.start)
            message = f"there are {len(values)} log-probabilities for {part.end - part.start} tokens"
            subject.found.append(subject.finding("log_probs", message, at))
        count = min(len(values), part.end - part.start)
        log_probs[part.start : part.start + count] = np.array(values[:count], np.float32)
        missing = np.flatnonzero(np.isnan(log_probs[part.start : part.start + count]))
        if len(missing):  # which is how the absence of one is written here
            subject.found.append(subject.finding("log_probs", "its log-probability is NaN", part.start + int(missing[0])))
    # The list that engines are given, beside the segments.
    given = np.array(trajectory.input_ids, np.int64)
    if len(given) != len(ids) or (given != ids).any():
        at = first_difference(given, ids)
        wanted = str(int(ids[at])) if at < len(ids) else "no token"
        message = "the engine was given another history than the ledger has"
        subject.found.append(
            subject.finding("prefix", message, at, token_id=int(given[at]) if at < len(given) else None, expected=wanted)
        )
    if decode is not None:
        found = [decode(int(i)) for i in subject.ids]
        subject.pieces = Pieces(np.array([len(piece) for piece in found], np.int64), b"".join(found))
    return subject


def first_difference(a: NDArray[Any], b: NDArray[Any]) -> int:
    """The first place at which two sequences differ; the shorter one's length if one begins with the other."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n
