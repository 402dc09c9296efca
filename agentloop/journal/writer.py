"""`JournalWriter`: writes down what the loop tells, without ever making it wait."""

from __future__ import annotations

import atexit
import functools
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import zstandard

from agentloop.errors import ConfigError
from agentloop.journal.format import WRITER_NAME, FileName, Place
from agentloop.journal.meta import next_generation, write_run
from agentloop.journal.pieces import PieceBytes
from agentloop.journal.stepfile import LEVEL, StepFile
from agentloop.trajectory import CallRecord, CallStatus, Origin, Sample, Segment, Trajectory, Turn

log = logging.getLogger(__name__)

QUEUE_LIMIT = 16_384
"""Events that may wait to be written. A trajectory makes about three a turn."""
OPEN_FILES = 8
"""Steps whose files are kept open at a time."""
TOGETHER = 64
"""Events that are written together at most, if they wait."""
GATHER_S = 0.1
"""How long the thread waits for more when one event comes alone, other than a trajectory's end. Where tools are slow, events
come one by one, and each time that the thread wakes it takes the interpreter from the event loop and writes to two files:
0.4 ms of processor time an event, and 0.2 ms with this (900 events, 100 a second)."""
KEPT_STEPS = 64
"""Steps of which the rows are kept in memory; of older ones only which trajectories are still open."""


M = TypeVar("M", bound=Callable[..., None])


def _never_raises(method: M) -> M:
    """What a recorder promises: an error of ours loses the trajectory's record, never the trajectory."""

    @functools.wraps(method)
    def guarded(self: JournalWriter, trajectory: Trajectory, *args: Any) -> None:
        try:
            method(self, trajectory, *args)
        except Exception as error:
            self._give_up(trajectory, error)

    return cast(M, guarded)


@dataclass(slots=True)
class _Told:
    """What has been handed to the thread of one live trajectory."""

    id: str
    place: Place
    segments: int = 0
    calls: list[list[CallRecord]] = field(default_factory=list)
    """By turn, in the order of the events."""
    lost: bool = False
    """An event found the queue full: the rest of the trajectory is left out, so that the record has no hole."""


class _Event(NamedTuple):
    """Everything that the thread needs; nothing in it changes any more."""

    place: Place
    body: dict[str, Any]
    segments: tuple[Segment, ...] = ()
    everything: tuple[Segment, ...] = ()
    """With `traj_end`: all segments, for the run lengths."""
    entropies: Sequence[float] | None = None
    """With `turn`: of its tokens."""


class JournalWriter:
    """A `Recorder` that writes a run's journal (`docs/journal.md`) from a thread of its own.

    The methods of `Recorder` take references to what cannot change, copy what can, and return; they may be called from any
    thread. Converting, compressing and writing happen in the writer's thread, in the order of the calls. An event is with
    the operating system as soon as the thread has taken it and waited for others (`GATHER_S`), so a killed process loses what
    was queued, and of trajectories that have not ended the last tenth of a second.

    What cannot be written (a full disk, a full queue) is logged as an error once for each kind and counted in `errors`;
    the rollout goes on, and the trajectories that it concerns are in the record as incomplete or not at all.

    `decode` gives the bytes of a token id (`token_bytes(tokenizer)`); without it the record has ids and no text. `meta`,
    given by one writer of a run, becomes `run.json`: `seed`, `config`, `model`, `tools` (schemas) and whatever else
    describes the run. `generation` is what `next_generation` gave to whoever starts the writers; a lone writer may leave
    it out. Raises `ConfigError` if `run_dir` cannot be written.
    """

    def __init__(
        self,
        run_dir: str | Path,
        writer: str = "w0",
        *,
        generation: int | None = None,
        decode: PieceBytes | None = None,
        meta: Mapping[str, Any] | None = None,
        queue_limit: int = QUEUE_LIMIT,
    ) -> None:
        if not WRITER_NAME.match(writer):
            raise ConfigError(f"journal writer '{writer}': a name has only letters, digits, '-' and '_'")
        self.run_dir = Path(run_dir)
        self.generation = next_generation(self.run_dir) if generation is None else generation
        if meta is not None:
            write_run(self.run_dir, self.generation, meta)
        self.errors = 0
        """Events that could not be written or led to an error."""
        self._name = FileName(writer, self.generation)
        self._reported: set[str] = set()
        self._told: weakref.WeakKeyDictionary[Trajectory, _Told] = weakref.WeakKeyDictionary()
        self._queue: queue.SimpleQueue[_Event | threading.Event | None] = queue.SimpleQueue()
        self._at_once = threading.Event()
        """A trajectory has ended, or somebody waits for what was told so far."""
        self._queue_limit = queue_limit
        self._decode = decode
        self._compressor = zstandard.ZstdCompressor(level=LEVEL)
        self._files: dict[Place, StepFile] = {}
        """Least recently used first. Touched by the thread alone, as the two above."""
        self._left_open: dict[Place, set[str]] = {}
        """The trajectories that had not ended in steps that are not in `_files` any more. By the thread alone too."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"journal-{self._name.stem}", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    # -- Recorder ---------------------------------------------------------------------------------------------------

    @_never_raises
    def trajectory_start(self, trajectory: Trajectory) -> None:
        place = Place("val" if trajectory.validate else "train", trajectory.step)
        self._told[trajectory] = told = _Told(trajectory.id, place)
        body = {"sibling": trajectory.sibling, "attempt": trajectory.attempt, "sample": _sample(trajectory.sample)}
        if trajectory.sampling is not None:
            body["sampling"] = trajectory.sampling
        self._put(told, "traj_start", body, self._untold(told, trajectory))

    @_never_raises
    def turn(self, trajectory: Trajectory, turn: Turn) -> None:
        told = self._progress(trajectory)
        before = self._untold(told, trajectory, up_to=turn.start)
        if before:
            self._put(told, "observation", {"turn": turn.index - 1}, before)
        body = {
            "turn": turn.index,
            "start": turn.start,
            "end": turn.end,
            "stop_reason": turn.stop_reason,
            "weight_version": turn.weight_version,
            "min_weight_version": turn.min_weight_version,
            "versions": turn.versions,
            "cached_tokens": turn.cached_tokens,
            "generate_s": turn.generate_s,
            "max_tokens": turn.max_tokens,
            "seed": turn.seed,
            "prompt_crc": turn.prompt_crc,
        }
        self._put(told, "turn", body, self._untold(told, trajectory, up_to=turn.end), entropies=turn.entropies)

    @_never_raises
    def tool(self, trajectory: Trajectory, turn: Turn, record: CallRecord) -> None:
        told = self._progress(trajectory)
        while len(told.calls) <= turn.index:
            told.calls.append([])
        told.calls[turn.index].append(record)
        self._put(told, "tool", {"turn": turn.index} | _call(record))

    @_never_raises
    def observation(self, trajectory: Trajectory, turn: Turn) -> None:
        told = self._progress(trajectory)
        self._put(told, "observation", {"turn": turn.index}, self._untold(told, trajectory))

    @_never_raises
    def trajectory_end(self, trajectory: Trajectory) -> None:
        told = self._progress(trajectory)
        rest = self._untold(told, trajectory)
        if rest:
            self._put(told, "observation", {"turn": len(trajectory.turns) - 1}, rest)
        for turn in trajectory.turns:
            known = told.calls[turn.index] if turn.index < len(told.calls) else []
            for record in turn.calls:
                if not any(record is other for other in known):
                    self.tool(trajectory, turn, record)
        if trajectory.reward is not None:
            reward = trajectory.reward
            body = {"value": reward.value, "components": _copy(reward.components), "info": _copy(reward.info)}
            if reward.turns:
                body["turns"] = list(reward.turns)
            self._put(told, "reward", body)
        self._put(told, "traj_end", self._end(trajectory, told), everything=trajectory.segments)
        del self._told[trajectory]

    # -- waiting for it ---------------------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until what was told so far is written, with its index; `False` if that took longer than `timeout` seconds.

        Blocks: call it from a thread (`asyncio.to_thread`) where there is an event loop."""
        if self._closed:
            return not self._thread.is_alive()
        done = threading.Event()
        self._queue.put(done)
        self._at_once.set()
        return done.wait(timeout)

    def close(self, timeout: float | None = 60.0) -> None:
        """Write the rest and stop. Idempotent. After `timeout` seconds the rest is left to its fate, with an error."""
        if not self._closed:
            self._closed = True
            atexit.unregister(self.close)
            self._queue.put(None)
            self._at_once.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._report("close", f"{self._queue.qsize()} events were not written after {timeout} s")

    def __enter__(self) -> JournalWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the caller's side ------------------------------------------------------------------------------------------

    def _progress(self, trajectory: Trajectory) -> _Told:
        """A trajectory whose start was not told is started now."""
        told = self._told.get(trajectory)
        if told is None:
            self.trajectory_start(trajectory)
            told = self._told[trajectory]
        return told

    def _untold(self, told: _Told, trajectory: Trajectory, up_to: int | None = None) -> tuple[Segment, ...]:
        """The segments that no event has carried yet and that end at or before token `up_to`; the next event carries them."""
        every = trajectory.segments
        until = len(every)
        while up_to is not None and until > told.segments and every[until - 1].end > up_to:
            until -= 1
        untold = every[told.segments : until]
        told.segments = until
        return untold

    def _put(
        self,
        told: _Told,
        kind: str,
        body: dict[str, Any],
        segments: tuple[Segment, ...] = (),
        everything: tuple[Segment, ...] = (),
        entropies: Sequence[float] | None = None,
    ) -> None:
        if told.lost or self._closed or self._queue.qsize() >= self._queue_limit:
            told.lost = True
            why = "it is closed" if self._closed else f"{self._queue_limit} events wait already (is the disk too slow?)"
            self._report("queue", f"trajectory {told.id} is left incomplete in the record: {why}")
            return
        event = {"type": kind, "id": told.id, "t": time.time(), **body}
        self._queue.put(_Event(told.place, event, segments, everything, entropies))
        if kind == "traj_end":
            self._at_once.set()

    def _give_up(self, trajectory: Trajectory, error: Exception) -> None:
        if trajectory in self._told:
            self._told[trajectory].lost = True
        self._report("bug", f"trajectory {trajectory.id} is left incomplete in the record: {error!r}", trace=True)

    def _end(self, trajectory: Trajectory, told: _Told) -> dict[str, Any]:
        failures: dict[str, int] = {}
        for record in trajectory.calls:
            if record.status is not CallStatus.OK:
                failures[record.status] = failures.get(record.status, 0) + 1
        return {
            "end_reason": trajectory.end_reason,
            "state": trajectory.state,
            "error": trajectory.error,
            "masked": trajectory.masked,
            "score_s": trajectory.score_s,
            "total_s": trajectory.total_s,
            "tokens": len(trajectory),
            "crc": trajectory.rolling_hash,
            "tool_calls": sum(len(turn.calls) for turn in trajectory.turns),
            "tool_failures": failures,
            "turns": [_settled(turn, told) for turn in trajectory.turns],
        }

    def _report(self, kind: str, what: str, *, trace: bool = False) -> None:
        self.errors += 1
        if kind not in self._reported:
            self._reported.add(kind)
            log.error("journal %s, writer %s: %s; further such errors are only counted", self.run_dir, self._name.stem, what,
                      exc_info=trace)  # fmt: skip

    # -- the thread's side ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._at_once.clear()  # before `get`: what is put and set from here on is in the queue or ends the wait
            item = self._queue.get()
            waiting: list[_Event] = []
            if isinstance(item, _Event) and item.body["type"] != "traj_end" and self._queue.empty():
                self._at_once.wait(GATHER_S)
            while isinstance(item, _Event):
                waiting.append(item)
                if len(waiting) == TOGETHER or self._queue.empty():
                    break
                item = self._queue.get()
            self._take_all(waiting)
            if isinstance(item, _Event):
                continue
            for place, file in list(self._files.items()):
                self._rest(place, file, at_once=item is None)
            if item is None:
                return
            item.set()

    def _take_all(self, items: Sequence[_Event]) -> None:
        """Write what waits together. If that fails, one by one: what begins in here can still be written as a whole."""
        for place in {item.place for item in items}:
            here = [item for item in items if item.place == place]
            told = self._tell(place, [segment for item in here for segment in item.segments])
            for item in here:
                self._take(item, told)
            if not self._write(place):
                for item in here:
                    self._take(item)
                    self._write(place)

    def _tell(self, place: Place, segments: Sequence[Segment]) -> StepFile | None:
        """Take the texts of the tokens of all of them at once; into which file. `None`: it did not work, and whose fault that
        is will be found one by one."""
        try:
            file = self._file(place)
            if self._decode is not None:
                file.tell(segments, self._decode)
        except Exception:
            return None
        return file

    def _take(self, item: _Event, told: StepFile | None = None) -> None:
        """Take an event into its file: `told`, which has the texts of its tokens, or else with them."""
        kind, key = item.body["type"], item.body["id"]
        try:
            file = told or self._file(item.place)
            if kind == "traj_start":
                file.open_ids.add(key)
            elif key not in file.open_ids:
                self._report("lost", f"{item.place.folder}: trajectory {key} is left incomplete after an earlier error")
                return
            if kind == "traj_end":
                item.body.update(_run_lengths(item.everything, item.body["turns"]))
            if self._decode is not None and told is None:
                file.tell(item.segments, self._decode)
            file.add(item.body, item.segments, self._decode is not None, self._compressor, item.entropies)
            if kind == "traj_end":
                file.open_ids.discard(key)
        except OSError as error:
            self._drop(item.place, error)
        except Exception as error:
            if item.place in self._files:
                self._files[item.place].open_ids.discard(key)
            self._report("bug", f"{item.place.folder}: trajectory {key}: {error!r}", trace=True)

    def _write(self, place: Place) -> bool:
        """`False` if that failed."""
        try:
            if place in self._files:
                self._files[place].write()
        except OSError as error:
            self._drop(place, error)
            return False
        return True

    def _drop(self, place: Place, error: OSError) -> None:
        """The trajectories that are open there are lost; the next one that starts finds a new file, or this one's end."""
        broken = self._files.pop(place, None)
        if broken is not None:
            broken.close()
        self._report("disk", f"{place.folder}: {error}")

    def _file(self, place: Place) -> StepFile:
        file = self._files.pop(place, None)
        if file is None:
            file = StepFile(self.run_dir, place, self._name)
            left = self._left_open.pop(place, set())
            file.open_ids |= {row.id for row in file.rows if row.id in left and not row.complete} if left else left
        self._files[place] = file
        if len(self._files) > OPEN_FILES:
            for other, idle in list(self._files.items())[:-OPEN_FILES]:
                over = not idle.open_ids or len(self._files) > KEPT_STEPS
                self._rest(other, idle, at_once=over)
                if over and self._files.pop(other, None) is not None and idle.open_ids:
                    self._left_open[other] = idle.open_ids
        return file

    def _rest(self, place: Place, file: StepFile, *, at_once: bool) -> None:
        """Bring the index up to date and give the file handles back until the next event."""
        if not self._write(place):
            return
        try:
            file.save_index(at_once=at_once)
            file.close()
        except Exception as error:
            self._report("index", f"{place.folder}: {error!r}")


def _sample(sample: Sample) -> dict[str, Any]:
    """A sample is frozen and shared by its group; its parts are taken as they are."""
    return {
        "uid": sample.uid,
        "seed_key": sample.seed_key,
        "data_source": sample.data_source,
        "messages": sample.messages,
        "ground_truth": sample.ground_truth,
        "tools": sample.tools,
        "tools_kwargs": sample.tools_kwargs,
        "template_kwargs": sample.template_kwargs,
        "extra_info": sample.extra_info,
    }


def _call(record: CallRecord) -> dict[str, Any]:
    return {
        "call": {"name": record.call.name, "arguments": _copy(record.call.arguments), "id": record.call.id},
        "status": record.status,
        "text": record.text,
        "reward": record.reward,
        "metrics": _copy(record.metrics),
        "attempts": record.attempts,
        "queue_s": record.queue_s,
        "run_s": record.run_s,
        "cut_tokens": record.cut_tokens,
        "on_error": record.on_error,
    }


def _settled(turn: Turn, told: _Told) -> dict[str, Any]:
    """What of a turn is known for sure only when the trajectory has ended."""
    known = told.calls[turn.index] if turn.index < len(told.calls) else []
    return {
        "weight_version": turn.weight_version,
        "versions": turn.versions,
        "start": turn.start,
        "end": turn.end,
        "tools_s": turn.tools_s,
        "closed_by_template": turn.closed_by_template,
        "parse_errors": list(turn.parse_errors),
        "calls": [next(i for i, other in enumerate(known) if other is record) for record in turn.calls],
    }


def _run_lengths(segments: Sequence[Segment], turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mask and weight version of all tokens, the prompt's included, as `[value, count]`."""
    mask: list[list[Any]] = []
    versions: list[list[Any]] = []
    for segment in segments:
        sampled = segment.origin is Origin.SAMPLED
        own = turns[segment.turn]["versions"] if sampled else [(None, len(segment.ids))]
        for runs, pieces in ((mask, [(int(sampled), len(segment.ids))]), (versions, own)):
            for value, count in pieces:
                if runs and runs[-1][0] == value:
                    runs[-1][1] += count
                else:
                    runs.append([value, count])
    return {"mask": mask, "weight_versions": versions}


def _copy(value: Any) -> Any:
    """Containers anew, leaves as they are: what a tool or a reward handed out may still be changed by it."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value
