"""`fork`: a recorded conversation once more from one of its turns on, with something changed."""

from __future__ import annotations

import asyncio
import os
import shutil
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

from agentloop.cassette.replaying import recorded_sampling
from agentloop.cassette.tape import Decode, Tape, shown
from agentloop.chat.base import Message, Renderer
from agentloop.engines.base import Engine, Generation, Sampling
from agentloop.errors import ConfigError, nearest
from agentloop.journal.base import Recorder, Tee
from agentloop.journal.meta import read_run
from agentloop.journal.pieces import PieceBytes, token_bytes
from agentloop.journal.reader import Run
from agentloop.journal.recorded import RecordedTrajectory
from agentloop.journal.writer import JournalWriter
from agentloop.loop import AgentLoop
from agentloop.tools.session import ToolSession, ToolSessions
from agentloop.trajectory import CallRecord, CallStatus, Sample, StopReason, ToolCall, Trajectory

ToolState = Literal["record", "replay"]
FOLDER = "forks"
"""Below the run that is forked."""


@dataclass(frozen=True)
class Fork:
    """One fork of a conversation: `n` trajectories with one beginning, in a run of their own."""

    path: Path
    """The run that holds them."""
    partition: str
    step: int
    trajectory: str
    """Its parent: partition, step and id in the run that was forked."""
    turn: int
    """The first turn that the engine made anew, but for a change in the prompt or in a turn before it."""
    shared_tokens: int
    """So many tokens at the beginning are the parent's."""
    edit: Mapping[str, Any]
    """What was changed: `tool_result` with `call`, `prompt` or `message`; empty if nothing was."""
    tools: str
    ids: tuple[str, ...] = ()
    """The trajectories, in the run at `path`."""
    trajectories: list[Trajectory] = field(default_factory=list, repr=False, compare=False)
    """Filled by `fork`; `forks` leaves it empty."""
    differences: list[str] = field(default_factory=list, compare=False)
    """With `tools="replay"`: earlier calls that came to something else this time, one sentence each."""

    @property
    def run(self) -> Run:
        return Run(self.path)


async def fork(
    run: Run | str | Path,
    trajectory: str | RecordedTrajectory,
    *,
    loop: AgentLoop,
    turn: int | None = None,
    tool_result: str | None = None,
    call: int | str | None = None,
    message: str | None = None,
    prompt: str | Sequence[Message] | None = None,
    n: int = 1,
    tools: ToolState = "record",
    sampling: Sampling | None = None,
    seed: int = 0,
    step: int | None = None,
    partition: str | None = None,
    into: str | Path | None = None,
    recorder: Recorder | None = None,
) -> Fork:
    """Go on from turn `turn` of a recorded conversation with `loop`: its engine, tools and reward, and its configuration.

    - Without a change: turn `turn` is generated anew, and all that follows.
    - `tool_result`: a call of turn `turn` answered this instead; the next turn is the first new one. `call` says which one,
      where there are several: its place in the turn or its id.
    - `message`: the model wrote this in turn `turn`, tool calls and all; its calls are run. These tokens were not sampled and
      have no log-probabilities.
    - `prompt`: the last user message is this, or the messages are these; the conversation begins anew.

    Everything before that is the parent's token for token, with its log-probabilities and versions; `CassetteMismatch` if the
    loop renders another conversation than was recorded. `n` forks run side by side, with seeds of their own; another `seed`
    gives other ones. `sampling`: default as recorded.

    Tools are created anew and know nothing of the earlier calls: `tools="record"` answers those from the record and leaves it
    at that, `tools="replay"` runs them again first, in their order, to bring a sandbox to where it was. That does again what
    they do, in the world outside too; what they answer this time is not shown to the model, and told in `Fork.differences`.

    The forks are written to a run of their own, `into` (default: a new folder in `RUN/forks`), whose `run.json` names the
    parent in `fork`. Raises `ConfigError` for a trajectory, turn or call that is not there, or where the conversation ends
    before it.
    """
    opened = run if isinstance(run, Run) else Run(run)
    tape = await asyncio.to_thread(_tape, opened, trajectory, step, partition)
    edit = _Edit.of(tape, turn, tool_result=tool_result, call=call, message=message, prompt=prompt)
    if n < 1:
        raise ConfigError(f"fork: n is {n}; at least one trajectory")
    if tools not in get_args(ToolState):
        raise ConfigError(f"fork: tools cannot be '{tools}'; {nearest(tools, get_args(ToolState))}")
    sample = edit.sample(tape, seed)
    renderer = loop.renderer if not callable(loop.renderer) else loop.renderer(sample.template_kwargs)
    forced = None if edit.message is None else _spoken(renderer, edit.message)
    path, parent = await asyncio.to_thread(_place, opened.path, into)
    differences: list[str] = []
    name = f"fork-{uuid4().hex[:8]}"
    engine = _Engine(loop.engine, tape, edit, forced, renderer.decode, name)
    sessions = None if loop.tools is None else _Tools(loop.tools, tape, edit, tools, differences)
    told = {
        "run": parent,
        "partition": tape.row.partition,
        "step": tape.row.step,
        "trajectory": tape.row.id,
        "turn": edit.first_new,
        "shared_tokens": edit.shared(tape),
        "edit": edit.told(),
        "tools": tools,
        "n": n,
    }
    kept = ("seed", "model", "tools", "setup")
    meta = {key: value for key, value in read_run(opened.path).items() if key in kept}
    meta |= {"loop": loop.config.model_dump(mode="json"), "fork": told}
    writer = await asyncio.to_thread(JournalWriter, path, "w0", decode=_pieces(renderer), meta=meta)
    made = False
    try:
        forked = AgentLoop(
            engine,
            loop.renderer,
            loop.parser,
            tools=sessions,
            reward=loop.reward,
            config=loop.config,
            recorder=writer if recorder is None else Tee(writer, recorder),
            seed=loop.seed,
        )
        own = sampling or recorded_sampling(tape, loop)
        place: dict[str, Any] = {"step": tape.row.step, "validate": tape.row.partition == "val"}
        trajectories = await _together([forked.run(sample, sampling=own, sibling=i, **place) for i in range(n)])
        if not engine.reached:
            ended = trajectories[0]
            why = f"{ended.end_reason}{f' ({ended.error})' if ended.error else ''}"
            raise ConfigError(
                f"fork: trajectory {tape.row.id} ends after {len(ended.turns)} turns as {why}, before turn {edit.first_new}"
            )
        made = True
    finally:
        await asyncio.to_thread(writer.close)
        if not made and into is None:
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
    return _fork(path, told, tuple(ended.id for ended in trajectories), trajectories, differences)


def forks(run: Run | str | Path, trajectory: str | None = None) -> list[Fork]:
    """The forks of a run (of one of its trajectories), in the order in which they were made, from what lies in `RUN/forks`."""
    opened = run if isinstance(run, Run) else Run(run)
    folder = opened.path / FOLDER
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not (path / "run.json").is_file():
            continue
        told = read_run(path).get("fork")
        if told is not None and trajectory in (None, told["trajectory"]):
            found.append(_fork(path, told, tuple(row.id for row in Run(path).trajectories())))
    return found


def _fork(
    path: Path,
    told: Mapping[str, Any],
    ids: tuple[str, ...],
    trajectories: Sequence[Trajectory] = (),
    differences: Sequence[str] = (),
) -> Fork:
    taken = ("partition", "step", "trajectory", "turn", "shared_tokens", "edit", "tools")
    return Fork(
        path, **{key: told[key] for key in taken}, ids=ids, trajectories=list(trajectories), differences=list(differences)
    )


def _tape(run: Run, trajectory: str | RecordedTrajectory, step: int | None, partition: str | None) -> Tape:
    recorded = run.load(trajectory, step, partition) if isinstance(trajectory, str) else trajectory
    if recorded.columns is None:
        recorded = run.load(recorded.row)
    if "tokens" in recorded.row.missing:
        raise ConfigError(f"fork: trajectory {recorded.row.id} was imported, and its source did not record tokens")
    return Tape.of(recorded)


def _place(run: Path, into: str | Path | None) -> tuple[Path, str]:
    """Where the forks go, and the way from there to the run."""
    path = _new_folder(run / FOLDER) if into is None else Path(into)
    return path, os.path.relpath(run.resolve(), path.resolve())


def _new_folder(parent: Path) -> Path:
    """`0001`, `0002`, …, whoever else makes one at the same time."""
    try:
        parent.mkdir(exist_ok=True)
        number = 1 + max([0, *(int(path.name) for path in parent.iterdir() if path.name.isdigit())])
        while True:
            try:
                (parent / f"{number:04d}").mkdir()
                return parent / f"{number:04d}"
            except FileExistsError:
                number += 1
    except OSError as error:
        raise ConfigError(f"{parent}: forks cannot be written here: {error.strerror}; say where (into)") from error


async def _together(runs: Sequence[Any]) -> list[Trajectory]:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run) for run in runs]
    except BaseExceptionGroup as bugs:
        raise bugs.exceptions[0] from bugs
    return [task.result() for task in tasks]


# -- what is changed ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Edit:
    """A change, and how far the record goes before it."""

    turn: int
    """The turn that is changed or made anew."""
    result: CallRecord | None = None
    message: str | None = None
    prompt: str | list[Message] | None = None

    @classmethod
    def of(
        cls,
        tape: Tape,
        turn: int | None,
        *,
        tool_result: str | None,
        call: int | str | None,
        message: str | None,
        prompt: str | Sequence[Message] | None,
    ) -> _Edit:
        given = [
            name
            for name, value in (("tool_result", tool_result), ("message", message), ("prompt", prompt))
            if value is not None
        ]
        if len(given) > 1:
            raise ConfigError(f"fork: give one of {' and '.join(given)}")
        if call is not None and tool_result is None:
            raise ConfigError("fork: 'call' says which tool result is changed, and no tool_result is given")
        if prompt is not None:
            if turn:
                raise ConfigError(
                    f"fork: another prompt begins the conversation anew, which leaves no turn {turn} to go on from"
                )
            return cls(0, prompt=prompt if isinstance(prompt, str) else list(prompt))
        count = len(tape.turns)
        if turn is None:
            raise ConfigError(f"fork: say from which turn; trajectory {tape.row.id} has turns 0 to {count - 1}")
        last = count if not given else count - 1
        if not 0 <= turn <= last:
            beyond = f", and {count} goes on after its end" if not given else ""
            raise ConfigError(f"fork: there is no turn {turn}; trajectory {tape.row.id} has turns 0 to {count - 1}{beyond}")
        if tool_result is not None:
            return cls(turn, result=CallRecord(_call(tape, turn, call), CallStatus.OK, tool_result))
        return cls(turn, message=message)

    @property
    def first_new(self) -> int:
        """The first turn that the engine is asked for."""
        return self.turn + (self.result is not None or self.message is not None)

    @property
    def first_new_calls(self) -> int:
        """The first turn whose calls are run."""
        return self.turn + (self.result is not None)

    def shared(self, tape: Tape) -> int:
        """Tokens at the beginning that are the parent's."""
        if self.prompt is not None:
            return 0
        return tape.turns[self.turn].end if self.result is not None else tape.prefix(self.turn)

    def sample(self, tape: Tape, seed: int) -> Sample:
        """The parent's row, with a group and seeds of its own."""
        parent = tape.recorded.sample
        change: dict[str, Any] = {}
        if isinstance(self.prompt, str):
            messages = [dict(message) for message in parent.messages]
            asked = [message for message in messages if message["role"] == "user"]
            if not asked:
                raise ConfigError(f"fork: trajectory {tape.row.id} has no user message to change; give all messages")
            asked[-1]["content"] = self.prompt
            change["messages"] = messages
        elif self.prompt is not None:
            change["messages"] = self.prompt
        row = tape.row
        name = f"{row.id.replace('_', '-')}-turn{self.turn}"
        key = f"{parent.seed_key or parent.uid}/{row.sibling}/fork{self.turn}/{seed}"
        return replace(parent, uid=name, seed_key=key, **change)

    def told(self) -> dict[str, Any]:
        if self.result is not None:
            return {"tool_result": self.result.text, "call": self.result.call.id}
        if self.message is not None:
            return {"message": self.message}
        return {} if self.prompt is None else {"prompt": self.prompt}


def _call(tape: Tape, turn: int, which: int | str | None) -> ToolCall:
    """The call whose result is changed."""
    calls = [record.call for record in tape.turns[turn].calls]
    named = ", ".join(f"{place}: {shown(call)}" for place, call in enumerate(calls))
    if not calls:
        raise ConfigError(f"fork: turn {turn} of trajectory {tape.row.id} called no tool")
    if which is None:
        if len(calls) > 1:
            raise ConfigError(f"fork: turn {turn} has {len(calls)} calls; say which one by 'call': {named}")
        return calls[0]
    if isinstance(which, int) or which.isdigit():
        if int(which) < len(calls):
            return calls[int(which)]
    elif which in (ids := [call.id for call in calls]):
        return calls[ids.index(which)]
    raise ConfigError(f"fork: turn {turn} has no call '{which}'; its calls are {named}")


def _spoken(renderer: Renderer, text: str) -> list[int]:
    """Ids of a turn that somebody wrote for the model: control tokens in it count, and it is closed."""
    from agentloop.chat.generic import GenericRenderer
    from agentloop.chat.text import Run as TextRun

    if isinstance(renderer, GenericRenderer):
        ids = renderer.text.ids([TextRun(text, False)], first=False)
    else:
        ids = renderer.encode_text(text)
    return ids if ids and ids[-1] in renderer.stop_token_ids else [*ids, renderer.stop_token_ids[0]]


def _pieces(renderer: Renderer) -> PieceBytes:
    """The bytes of tokens, for the record."""
    tokenizer = getattr(getattr(renderer, "text", None), "tokenizer", None)
    return token_bytes(tokenizer) if tokenizer is not None else lambda token: renderer.decode([token]).encode()


# -- the parts of the loop ----------------------------------------------------------------------------------------------


class _Engine(Engine):
    """Plays the turns before the fork, and leaves the others to another engine."""

    def __init__(self, engine: Engine, tape: Tape, edit: _Edit, forced: list[int] | None, decode: Decode, name: str) -> None:
        self.engine, self.tape, self.edit, self.forced, self.decode, self.name = engine, tape, edit, forced, decode, name
        self.reached = False
        """Whether a trajectory came to its first new turn."""
        self._turns: dict[str, int] = {}

    @property
    def weight_version(self) -> int | None:
        return self.engine.weight_version

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, trajectory_id: str) -> Generation:
        turn, edit = self._turns.get(trajectory_id, 0), self.edit
        if turn < edit.first_new:
            self._turns[trajectory_id] = turn + 1
            self.tape.check_input(turn, ids, self.decode)
            await asyncio.sleep(0)
            if turn == edit.turn and self.forced is not None:
                return Generation(list(self.forced), None, StopReason.STOP)
            return self.tape.generation(turn)
        if not self.reached:
            self._check_prefix(ids)
            self.reached = True
        return await self.engine.generate(ids, sampling, trajectory_id=f"{self.name}-{trajectory_id}")

    def _check_prefix(self, ids: Sequence[int]) -> None:
        """What is shared is checked once more where the new part begins."""
        shared = self.edit.shared(self.tape)
        if self.tape.ids[:shared] != array("I", ids[:shared]):
            raise self.tape.differs(self.edit.first_new, ids, self.decode, upto=shared)

    async def release(self, trajectory_id: str) -> None:
        self._turns.pop(trajectory_id, None)
        await self.engine.release(f"{self.name}-{trajectory_id}")


class _Tools(ToolSessions):
    def __init__(self, tools: ToolSessions, tape: Tape, edit: _Edit, state: ToolState, differences: list[str]) -> None:
        self.tools, self.tape, self.edit, self.state, self.differences = tools, tape, edit, state, differences

    def session(self, sample: Sample, trajectory_id: str) -> ToolSession:
        return _Session(self, self.tools.session(sample, trajectory_id))


class _Session(ToolSession):
    """Earlier calls are answered from the record, the changed one as it was changed, and later ones by the tools."""

    def __init__(self, owner: _Tools, live: ToolSession) -> None:
        self._owner = owner
        self._live = live
        self._played: dict[str, float] = {}
        """By tool, the rewards of the calls that were not run."""

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return self._live.schemas

    @property
    def final(self) -> frozenset[str]:
        return self._live.final

    async def open(self) -> None:
        await self._live.open()

    async def call(self, call: ToolCall, *, deadline: float) -> CallRecord:
        owner, edit, tape = self._owner, self._owner.edit, self._owner.tape
        found = tape.answer(call)
        changed = edit.result if edit.result is not None and edit.result.call.id == call.id else None
        if found is None or found[1].status is CallStatus.CANCELLED or found[0] >= edit.first_new_calls:
            return changed or await self._live.call(call, deadline=deadline)
        turn, record = found
        tape.check_call(turn, record, call)
        if owner.state == "replay" and record.status is not CallStatus.NOT_RUN:
            again = await self._live.call(call, deadline=deadline)
            if (again.status, again.text) != (record.status, record.text):
                owner.differences.append(
                    f"turn {turn}: {shown(call)} came to {again.status.value} {_short(again.text)} this time, "
                    f"and to {record.status.value} {_short(record.text)} when it was recorded"
                )
        elif changed is None and record.reward:
            self._played[call.name] = self._played.get(call.name, 0.0) + record.reward
        # What is shared is shown as it was, under whatever limits the loop has now.
        return changed or (tape.seen(turn, call) if turn < edit.turn else None) or record

    async def rewards(self) -> dict[str, float]:
        total = await self._live.rewards()
        for name, value in self._played.items():
            total[f"tool/{name}"] = total.get(f"tool/{name}", 0.0) + value
        return {name: value for name, value in total.items() if value}

    async def close(self) -> None:
        await self._live.close()


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:79]}…")
