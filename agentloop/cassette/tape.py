"""What a record answers: `Tape`, one trajectory's, and `Cassette`, a run's.

Everything is found by what it is for (trajectory, turn, call) and never by when it is asked for, so playback is the same in
whatever order the loop gets on. Whoever is asked for something else than the record says so: `CassetteMismatch` names the
trajectory, the turn, and the first token that differs.
"""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from agentloop.engines.base import Generation, Sampling
from agentloop.errors import AgentloopError, EngineError, nearest
from agentloop.journal.format import dump_json
from agentloop.journal.reader import Run
from agentloop.journal.recorded import ORIGINS, RecordedTrajectory, Row
from agentloop.trajectory import CallRecord, CallStatus, EndReason, Origin, ToolCall, Turn

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, control tokens visible."""

_SCORED_TOO_LATE = "scoring took longer than its deadline"
"""As the loop says it."""
_AROUND = 24
"""Tokens of text that are shown before and after one that differs."""


class CassetteMismatch(AgentloopError):
    """The loop asks for something else than was recorded, or came to something else."""

    def __init__(
        self,
        key: str,
        turn: int | None,
        what: str,
        message: str,
        *,
        token: int | None = None,
        recorded: Any = None,
        now: Any = None,
    ) -> None:
        place = key if turn is None else f"{key}, turn {turn}"
        super().__init__(f"trajectory {place}: {message}")
        self.key = key
        """Partition, step and id: `train-3-7_0`."""
        self.turn = turn
        """`None`: of the trajectory as a whole."""
        self.what = what
        """`tokens`, `sampling`, `call`, `trajectory`, or the field of the trajectory that differs."""
        self.token = token
        """The place of the first token that differs."""
        self.recorded = recorded
        self.now = now
        """What differs, on both sides; of tokens the ids (`None`: there is no token any more)."""


class EndOfRecord(AgentloopError):
    """The record ends here, and not because the conversation did: it was aborted, ran into a deadline, or was never
    written to its end."""

    def __init__(self, key: str, turn: int, why: str) -> None:
        super().__init__(f"trajectory {key}, turn {turn}: the record ends here: {why}")
        self.key, self.turn, self.why = key, turn, why


def key_of(row: Row) -> str:
    """The trajectory's name, unique in a run, as the loop gives it to engine and tools."""
    return f"{row.partition}-{row.step}-{row.id}"


@dataclass(frozen=True, eq=False)
class Tape:
    """One recorded trajectory, as answers."""

    key: str
    recorded: RecordedTrajectory
    ids: array[int]
    """All its tokens."""
    inherited: int = 0
    """So many turns a fork has from its parent, which may have had other limits: what was not run there is not run."""

    @classmethod
    def of(cls, recorded: RecordedTrajectory, inherited: int = 0) -> Tape:
        assert recorded.columns is not None
        return cls(key_of(recorded.row), recorded, array("I", recorded.columns.ids.tolist()), inherited)

    @property
    def row(self) -> Row:
        return self.recorded.row

    @property
    def turns(self) -> list[Turn]:
        return self.recorded.turns

    def prefix(self, turn: int) -> int:
        """Number of tokens that the engine got for `turn`."""
        return self.turns[turn].start if turn < len(self.turns) else len(self.ids)

    # -- the engine's answers -------------------------------------------------------------------------------------------

    def generation(self, turn: int) -> Generation:
        """What the engine answered in `turn`, as it was at its end: one that was aborted and went on is one answer."""
        columns, told = self.recorded.columns, self.turns[turn]
        assert columns is not None
        log_probs = columns.log_probs[told.start : told.end].tolist()
        return Generation(
            ids=self.ids[told.start : told.end].tolist(),
            log_probs=None if any(value != value for value in log_probs) else log_probs,
            stop_reason=told.stop_reason,
            weight_version=told.weight_version,
            min_weight_version=told.min_weight_version,
            cached_tokens=told.cached_tokens,
            version_runs=told.version_runs,
        )

    def end(self, turn: int) -> AgentloopError:
        """What to raise for `turn`, which has no answer in the record."""
        row = self.row
        if (why := self.cut) is not None:
            return EndOfRecord(self.key, turn, why)
        if row.end_reason == EndReason.ENGINE_FAILURE:
            return EngineError(row.error or "the engine failed")
        message = f"the engine is asked for it, and the record ended after {len(self.turns)} turns as {row.end_reason}"
        return CassetteMismatch(self.key, turn, "trajectory", message, recorded=row.end_reason)

    @property
    def by_the_clock(self) -> bool:
        """A deadline ended it: the trajectory was part of its batch, and only a clock could end it so again."""
        return self.row.complete and (self.row.end_reason == EndReason.DEADLINE or self.row.error == _SCORED_TOO_LATE)

    @property
    def cut(self) -> str | None:
        """Why the record ends, where no answer of the engine or of a tool was the cause."""
        row = self.row
        if not row.complete:
            return "it is incomplete: its writer was killed, or still runs"
        if row.end_reason is None:
            return f"it was ended by an error of the program: {row.error}"
        if self.by_the_clock or row.end_reason == EndReason.ABORTED:
            return f"{row.end_reason}: {row.error}"
        return None

    # -- the tools' answers ---------------------------------------------------------------------------------------------

    def answer(self, call: ToolCall) -> tuple[int, CallRecord] | None:
        """What `call` came to, and in which turn it was made; `None` if nothing is recorded under its id."""
        for turn, answers in enumerate(self.recorded.answers):
            if call.id in answers:
                return turn, answers[call.id]
        return None

    def played(self, call: ToolCall) -> CallRecord:
        """The answer to `call`. Raises `EndOfRecord`, or `CassetteMismatch` if it is another call than was recorded."""
        found = self.answer(call)
        if found is None:
            if self.cut is not None:
                raise EndOfRecord(self.key, len(self.turns) - 1, self.cut)
            raise CassetteMismatch(self.key, _turn_of(call), "call", f"{shown(call)} is called, which was not", now=call)
        turn, record = found
        self.check_call(turn, record, call)
        if record.status is CallStatus.CANCELLED:
            raise EndOfRecord(self.key, turn, self.cut or f"the call {shown(call)} was cancelled")
        if record.status is CallStatus.NOT_RUN and turn >= self.inherited:
            message = f"{shown(call)} is called, and was not: {record.text}"
            raise CassetteMismatch(self.key, turn, "call", message, recorded=record.text, now=call)
        return record

    def check_call(self, turn: int, record: CallRecord, call: ToolCall) -> None:
        """Raise `CassetteMismatch` if `call` is another one than `record` is of."""
        if record.call.name != call.name or dump_json(record.call.arguments) != dump_json(call.arguments):
            message = f"{shown(call)} is called, and {shown(record.call)} was"
            raise CassetteMismatch(self.key, turn, "call", message, recorded=record.call, now=call)

    def seen(self, turn: int, call: ToolCall) -> CallRecord | None:
        """What the model was shown of `call`: its answer, cut to fit as it was then."""
        return next((record for record in self.turns[turn].calls if record.call.id == call.id), None)

    # -- comparing ------------------------------------------------------------------------------------------------------

    def check_input(self, turn: int, ids: Sequence[int], decode: Decode | None) -> None:
        """Raise `CassetteMismatch` unless `ids` is what the engine got for `turn`; after the end of a record that was cut,
        unless it goes on from what is there."""
        known, asked = self.ids[: self.prefix(turn)], array("I", ids)
        beyond = turn >= len(self.turns) and self.cut is not None
        if known != (asked[: len(known)] if beyond else asked):
            raise self.differs(turn, asked, decode, upto=len(known))

    def check_sampling(self, turn: int, sampling: Sampling) -> None:
        """Raise `CassetteMismatch` if `turn` was sampled otherwise, as far as the record says how."""
        told = dict(self.recorded.sampling or {})
        told |= {"max_tokens": self.turns[turn].max_tokens, "seed": self.turns[turn].seed}
        asked = asdict(sampling)
        for name, value in told.items():
            if value is None or name not in asked:
                continue
            now = list(asked[name]) if isinstance(asked[name], tuple) else asked[name]
            if now != value:
                message = f"{name} is {now!r}, and was {value!r} when it was recorded"
                raise CassetteMismatch(self.key, turn, "sampling", message, recorded=value, now=now)

    def differs(
        self, turn: int | None, now: Sequence[int], decode: Decode | None, *, upto: int | None = None
    ) -> CassetteMismatch:
        """The mismatch of `now` and the recorded tokens (the first `upto` of them), which are not the same."""
        known = self.ids[:upto]
        shorter = min(len(known), len(now))
        at = next((i for i in range(shorter) if known[i] != now[i]), shorter)
        was, is_ = (known[at] if at < len(known) else None), (now[at] if at < len(now) else None)
        message = (
            f"the tokens part from the record at token {at}{self._where(at)}: "
            f"recorded {_named(was)} in {self._around(known, at, None)}, now {_named(is_)} in {self._around(now, at, decode)}"
        )
        return CassetteMismatch(self.key, turn, "tokens", message, token=at, recorded=was, now=is_)

    def _where(self, at: int) -> str:
        columns = self.recorded.columns
        assert columns is not None
        if at >= len(self.ids):
            return ", where the record ends"
        origin, turn = ORIGINS[int(columns.origin[at])], int(columns.turn[at])
        return " (prompt)" if origin is Origin.PROMPT else f" ({origin.value} of turn {turn})"

    def _around(self, ids: Sequence[int], at: int, decode: Decode | None) -> str:
        """Text with the token at `at` between ⟦ and ⟧. Without a tokenizer: as far as the record knows the tokens' text."""
        first, last = max(0, at - _AROUND), min(len(ids), at + _AROUND)
        if decode is not None:
            before, token, after = (decode(list(ids[a:b])) for a, b in ((first, at), (at, at + 1), (at + 1, last)))
        else:
            before, token, after = (
                "".join(self._piece(i) for i in ids[a:b]) for a, b in ((first, at), (at, at + 1), (at + 1, last))
            )
        lead, tail = ("…" if first else ""), ("…" if last < len(ids) else "")
        return repr(f"{lead}{before}⟦{token if at < len(ids) else 'end'}⟧{after}{tail}")

    def _piece(self, token: int) -> str:
        columns = self.recorded.columns
        assert columns is not None
        places = (columns.ids == token).nonzero()[0]
        text = columns.text(int(places[0]), int(places[0]) + 1) if len(places) else None
        return f"<{token}>" if text is None else text


def shown(call: ToolCall) -> str:
    text = f"{call.name}({dump_json(call.arguments).decode().strip()})"
    return text if len(text) <= 160 else f"{text[:159]}…"


def _named(token: int | None) -> str:
    return "nothing" if token is None else str(token)


def _turn_of(call: ToolCall) -> int | None:
    """From an id such as `t0001c000`."""
    digits = call.id[1:5]
    return int(digits) if call.id[:1] == "t" and digits.isdigit() else None


class Cassette:
    """A run, as the tapes of its trajectories. What is recorded later is not seen."""

    def __init__(self, run: Run | str | Path) -> None:
        """Raises `ConfigError` if there is no run."""
        self.run = run if isinstance(run, Run) else Run(run)
        self.rows = {key_of(row): row for row in self.run.trajectories()}
        """By name, in the order in which they started."""
        self._inherited = int((self.run.meta.get("fork") or {}).get("turn", 0))
        self._tapes: WeakValueDictionary[str, Tape] = WeakValueDictionary()
        self._reading = threading.Lock()
        """A `Run` is for one thread at a time."""

    async def tape(self, key: str) -> Tape:
        """The tape of one trajectory, kept as long as somebody holds it. Raises `CassetteMismatch` if the run has none of
        this name, `JournalError` if its record is damaged."""
        tape = self._tapes.get(key)
        if tape is None:
            if key not in self.rows:
                raise CassetteMismatch(
                    key, None, "trajectory", f"the record has none of this name; {nearest(key, self._few(key))}"
                )
            tape = self._tapes.setdefault(key, await asyncio.to_thread(self.read, key))
        return tape

    def read(self, key: str) -> Tape:
        """As `tape`, from the disk."""
        with self._reading:
            return Tape.of(self.run.load(self.rows[key]), self._inherited)

    def _few(self, key: str) -> list[str]:
        """Those of the same step first: a hint need not list a whole run."""
        place = key.rpartition("-")[0]
        return [name for name in self.rows if name.startswith(place)][:200] or list(self.rows)[:5]


def cassette_of(source: Cassette | Run | str | Path) -> Cassette:
    return source if isinstance(source, Cassette) else Cassette(source)
