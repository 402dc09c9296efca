"""`replay`: a recorded run once more, through the real loop and without a model or a tool."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agentloop.cassette.tape import Cassette, CassetteMismatch, Decode, EndOfRecord, Tape, cassette_of, key_of
from agentloop.cassette.tools import CassetteReward, CassetteTools
from agentloop.config import LoopConfig
from agentloop.engines.base import Sampling
from agentloop.engines.cassette import CassetteEngine, Latency
from agentloop.errors import ConfigError
from agentloop.journal.base import NullRecorder, Recorder, Tee
from agentloop.journal.format import JournalError, dump_json
from agentloop.journal.reader import Run
from agentloop.journal.recorded import Row
from agentloop.loop import AgentLoop
from agentloop.trajectory import CallRecord, EndReason, Reward, Sample, Trajectory

Source = Literal["recorded", "live"]
_FOR_EVER_S = 1e6


@dataclass
class Replay:
    """What came of it."""

    groups: list[list[Trajectory]] = field(default_factory=list)
    """The groups whose siblings all are what was recorded, in the order of the record; siblings in theirs."""
    mismatches: list[CassetteMismatch] = field(default_factory=list)
    """Where the loop parted from the record: the first place of each trajectory."""
    cut: list[EndOfRecord] = field(default_factory=list)
    """Trajectories that were the same as far as the record goes, and ended by nothing in it: aborted, killed, late."""
    damaged: list[str] = field(default_factory=list)
    """Trajectories that cannot be played, one sentence each."""
    played: int = 0
    """Trajectories that were played to their end and are what was recorded."""

    @property
    def trajectories(self) -> list[Trajectory]:
        return [trajectory for group in self.groups for trajectory in group]

    def check(self) -> Replay:
        """Raise the first mismatch, if there is one."""
        if self.mismatches:
            raise self.mismatches[0]
        return self


async def replay(
    run: Cassette | Run | str | Path,
    loop: AgentLoop,
    *,
    partition: str | None = None,
    step: int | None = None,
    tools: Source = "recorded",
    reward: Source = "recorded",
    sampling: Sampling | None = None,
    samples: Iterable[Sample] = (),
    latency: Latency = 0.0,
    max_concurrency: int = 256,
    recorder: Recorder | None = None,
) -> Replay:
    """Play the trajectories of a run (of one partition, of one step) through `loop`, whose engine is not used.

    `loop` is what would run them today: its renderer, parser, tools, configuration and seed must lead to what was recorded.
    What it comes to is compared with the record, token by token: a trajectory that parts from it is in `mismatches` and does
    not stop the others. The trajectories in `groups` have the record's times, log-probabilities as float32, and make the same
    batch as those that were recorded.

    `tools="live"` calls the loop's tools instead of playing back what they answered, `reward="live"` its reward function; the
    trajectories are compared all the same but for the reward. `sampling` is for records that do not say how they were sampled.
    `samples`: rows that the loop gets instead of the recorded ones, by `uid`, since a record is without `Sample.fields`.
    `latency`: what to wait instead of the recorded seconds. `recorder` is told of everything.

    Raises `ConfigError` for a run, step or sample that does not fit; bugs pass through.
    """
    cassette = cassette_of(run)
    chains = _chains(cassette, partition, step)
    own = {sample.uid: sample for sample in samples}
    kept = _Kept()
    decode = _decode(loop)
    told = Tee(kept, recorder) if recorder is not None else kept
    engine = CassetteEngine(cassette, decode=decode, latency=latency)
    played_tools = loop.tools
    if loop.tools is not None and tools == "recorded":
        played_tools = CassetteTools(cassette, loop.tools, latency=latency, rewards=reward == "live")

    def loop_for(chain: Sequence[Row]) -> AgentLoop:
        config, function = _without_a_clock(loop.config, tools, reward), loop.reward
        if reward == "recorded":
            last = chain[-1]
            scored = last.reward is not None or (last.error or "").startswith("the reward failed")
            function = CassetteReward(cassette) if scored else None
            # A recorded reward has the tools' own in it.
            config = config.model_copy(update={"tool_rewards": "record"}) if scored else _unscored(config)
        return AgentLoop(
            engine,
            loop.renderer,
            loop.parser,
            tools=played_tools,
            reward=function,
            config=config,
            recorder=told,
            seed=loop.seed,
        )

    made = Replay()
    places = asyncio.Semaphore(max_concurrency)

    async def one(chain: Sequence[Row]) -> Trajectory | None:
        async with places:
            return await _one(chain, loop_for(chain), cassette, kept, made, decode, sampling, own, scores=reward == "recorded")

    try:
        async with asyncio.TaskGroup() as tasks:
            running = [(chain[0], tasks.create_task(one(chain))) for chain in chains]
    except BaseExceptionGroup as bugs:
        raise bugs.exceptions[0] from bugs
    groups: dict[tuple[str, int, str], list[tuple[int, Trajectory | None]]] = {}
    for row, task in running:
        groups.setdefault((row.partition, row.step, row.uid), []).append((row.sibling, task.result()))
    for group in groups.values():
        siblings = [trajectory for _, trajectory in sorted(group, key=lambda item: item[0]) if trajectory is not None]
        if len(siblings) == len(group):
            made.groups.append(siblings)
    order = {key: place for place, key in enumerate(cassette.rows)}
    made.mismatches.sort(key=lambda found: order.get(found.key, len(order)))
    made.cut.sort(key=lambda found: order[found.key])
    return made


async def _one(
    chain: Sequence[Row],
    loop: AgentLoop,
    cassette: Cassette,
    kept: _Kept,
    made: Replay,
    decode: Decode,
    sampling: Sampling | None,
    own: dict[str, Sample],
    *,
    scores: bool,
) -> Trajectory | None:
    """Play one trajectory with all its attempts; `None` if it is not to be counted."""
    try:
        tapes = [await cassette.tape(key_of(row)) for row in chain]
    except JournalError as error:
        made.damaged.append(str(error))
        return None
    if [row.attempt for row in chain] != list(range(len(chain))):
        made.damaged.append(f"trajectory {tapes[0].key}: of its attempts only {[row.attempt for row in chain]} are recorded")
        return None
    for tape in tapes:
        if tape.row.missing:
            made.damaged.append(f"trajectory {tape.key}: it was imported, and its source did not record {_listed(tape.row)}")
            return None
    first, last = tapes[0], tapes[-1]
    end: EndOfRecord | None = None
    try:
        await loop.run(
            _sample(first, own),
            sampling=recorded_sampling(first, loop, sampling),
            sibling=first.row.sibling,
            step=first.row.step,
            validate=first.row.partition == "val",
        )
    except EndOfRecord as error:
        end = error
    except CassetteMismatch as error:
        made.mismatches.append(error)
        return None
    finally:
        ran = {tape.key: kept.ended.pop(tape.key, None) for tape in tapes}
    for tape in tapes:
        if (differs := _compare(tape, ran[tape.key], decode, scores=scores)) is not None:
            made.mismatches.append(differs)
            return None
    if last.cut is not None:
        made.cut.append(end or EndOfRecord(last.key, len(last.turns), last.cut))
        # What the clock did can be told and not done again.
        return last.recorded.to_trajectory() if last.by_the_clock and (scores or last.row.masked) else None
    made.played += 1
    trajectory = ran[last.key]
    assert trajectory is not None
    return _with_the_records_times(trajectory, last)


class _Kept(NullRecorder):
    """Holds every attempt that ended until it was compared."""

    def __init__(self) -> None:
        self.ended: dict[str, Trajectory] = {}

    def trajectory_end(self, trajectory: Trajectory) -> None:
        part = "val" if trajectory.validate else "train"
        self.ended[f"{part}-{trajectory.step}-{trajectory.id}"] = trajectory


def _chains(cassette: Cassette, partition: str | None, step: int | None) -> list[list[Row]]:
    """The attempts at each trajectory, in the order of the record."""
    chains: dict[tuple[str, int, str, int], list[Row]] = {}
    for row in cassette.rows.values():
        if partition in (None, row.partition) and step in (None, row.step):
            chains.setdefault((row.partition, row.step, row.uid, row.sibling), []).append(row)
    if not chains:
        where = "".join([f" in step {step}" if step is not None else "", f" of {partition}" if partition else ""])
        raise ConfigError(f"{cassette.run.path}: nothing is recorded{where}")
    return [sorted(chain, key=lambda row: row.attempt) for chain in chains.values()]


def _decode(loop: AgentLoop) -> Decode:
    renderer = loop.renderer if not callable(loop.renderer) else loop.renderer({})
    return renderer.decode


def _without_a_clock(config: LoopConfig, tools: Source, reward: Source) -> LoopConfig:
    """What a deadline ended is known from the record; a busy machine is not to end anything else."""
    lifted = {"trajectory_s": _FOR_EVER_S, "generate_s": _FOR_EVER_S}
    lifted |= {"tools_s": _FOR_EVER_S} if tools == "recorded" else {}
    lifted |= {"score_s": _FOR_EVER_S} if reward == "recorded" else {}
    return config.model_copy(update={"deadlines": config.deadlines.model_copy(update=lifted)})


def _unscored(config: LoopConfig) -> LoopConfig:
    """For trajectories that were not scored by the loop: nothing gives them a reward of their own."""
    actions = config.on_cutoff.model_dump()
    scored = {reason: "score" for reason, action in actions.items() if action == "penalty"}
    return config.model_copy(update={"tool_rewards": "record", "on_cutoff": config.on_cutoff.model_copy(update=scored)})


def _listed(row: Row) -> str:
    return ", ".join(name.replace("_", " ") for name in row.missing)


def _sample(tape: Tape, own: dict[str, Sample]) -> Sample:
    """The recorded sample, or the caller's of the same uid."""
    recorded = tape.recorded.sample
    given = own.get(recorded.uid)
    if given is None:
        return recorded
    for name in (item.name for item in fields(Sample) if item.name != "fields"):
        if dump_json(getattr(given, name)) != dump_json(getattr(recorded, name)):
            raise ConfigError(f"samples: the one with the uid '{given.uid}' is not what was recorded: its {name} differs")
    return given


def recorded_sampling(tape: Tape, loop: AgentLoop, given: Sampling | None = None) -> Sampling:
    """How a trajectory was sampled, as it was handed to the loop: without the stop tokens that the loop adds. `given` where
    the record does not say."""
    told = tape.recorded.sampling
    if told is None:
        has = tape.recorded.rollout_log_probs is not None
        return given or Sampling(max_tokens=loop.config.max_response_tokens, log_probs=has)
    renderer = loop.renderer if not callable(loop.renderer) else loop.renderer(tape.recorded.sample.template_kwargs)
    known = {item.name for item in fields(Sampling)}
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in told.items() if name in known}
    sampling = Sampling(**values)
    own = renderer.stop_token_ids
    stops = sampling.stop_token_ids
    return replace(sampling, stop_token_ids=stops[len(own) :] if stops[: len(own)] == own else ())


# -- comparing ----------------------------------------------------------------------------------------------------------


def _compare(tape: Tape, trajectory: Trajectory | None, decode: Decode, *, scores: bool) -> CassetteMismatch | None:
    """The first thing in which a played trajectory is not what was recorded; of one that was cut, within what is there."""
    if trajectory is None:
        if tape.cut is not None and not len(tape.ids):
            return None
        message = "it was recorded, and the loop does not start it"
        return CassetteMismatch(tape.key, None, "trajectory", message)
    recorded, row = tape.recorded, tape.row
    now = trajectory.input_ids
    if tape.cut is not None:
        shorter = min(len(now), len(tape.ids))
        if now[:shorter] != tape.ids[:shorter].tolist():
            return tape.differs(None, now, decode)
        if len(trajectory.turns) < len(tape.turns):
            message = f"it ends after {len(trajectory.turns)} turns as {trajectory.end_reason}, and the record goes on"
            return CassetteMismatch(tape.key, len(trajectory.turns), "trajectory", message)
        return None
    if now != tape.ids.tolist():
        return tape.differs(_turn_at(tape, now), now, decode)
    segments = [(segment.origin, len(segment.ids), segment.turn) for segment in trajectory.segments]
    columns = recorded.columns
    assert columns is not None
    found: list[tuple[str, Any, Any]] = [("segments", recorded.segments, segments)]
    if (values := trajectory.rollout_log_probs) is not None or recorded.rollout_log_probs is not None:
        bits = None if values is None else np.asarray(values, np.float32).tolist()
        found.append(("rollout_log_probs", recorded.rollout_log_probs, bits))
    found += [
        ("end_reason", row.end_reason, trajectory.end_reason),
        ("error", row.error, trajectory.error),
        ("state", row.state, trajectory.state),
        ("masked", row.masked, trajectory.masked),
    ]
    if scores:
        found.append(("reward", _plain(recorded.reward), _plain(trajectory.reward)))
    for was, is_ in zip(recorded.turns, trajectory.turns, strict=True):
        here = f"turn {was.index}: "
        found += [
            (f"{here}stop_reason", was.stop_reason, is_.stop_reason),
            (f"{here}versions", was.versions, is_.versions),
            (f"{here}parse_errors", was.parse_errors, is_.parse_errors),
            (f"{here}calls", [_outcome(call) for call in was.calls], [_outcome(call) for call in is_.calls]),
        ]
    if not scores:  # what only scoring decides
        found = [item for item in found if item[0] not in ("error", "state", "masked")]
    for name, was, is_ in found:
        if was != is_:
            turn, _, what = name.rpartition(": ")
            place = int(turn.removeprefix("turn ")) if turn else None
            message = f"{what} is {_short(is_)}, and was {_short(was)} when it was recorded"
            return CassetteMismatch(tape.key, place, what, message, recorded=was, now=is_)
    return None


def _turn_at(tape: Tape, now: Sequence[int]) -> int | None:
    """The turn in which the tokens part; `None`: in the prompt."""
    shorter = min(len(now), len(tape.ids))
    at = next((i for i in range(shorter) if now[i] != tape.ids[i]), shorter)
    begun = [turn.index for turn in tape.turns if turn.start <= at]
    return begun[-1] if begun else None


def _outcome(record: CallRecord) -> tuple[Any, ...]:
    """What of a call the trajectory is made of; when it ran and for how long is not."""
    return (record.call.id, record.call.name, record.status, record.text, record.reward, record.cut_tokens)


def _plain(reward: Reward | None) -> Any:
    return None if reward is None else dump_json([reward.value, reward.components, reward.info, reward.turns])


def _short(value: Any) -> str:
    text = value.decode() if isinstance(value, bytes) else repr(value.value if isinstance(value, EndReason) else value)
    return text if len(text) <= 200 else f"{text[:199]}…"


def _with_the_records_times(trajectory: Trajectory, tape: Tape) -> Trajectory:
    """Seconds are of the rollout that was recorded, in the batch's metrics too."""
    for turn, was in zip(trajectory.turns, tape.turns, strict=True):
        turn.generate_s, turn.tools_s = was.generate_s, was.tools_s
    trajectory.score_s, trajectory.total_s = tape.row.score_s, tape.row.total_s
    return trajectory
