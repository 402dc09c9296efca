"""The journal beside other ways to keep the same trajectories: time to write, size, time to read one, time to list rewards.

`python -m benchmarks.journal [--trajectories 1000] [--turns 8] [--tokens 4096] [--formats journal,jsonl,…]`

Every format is given the same conversations, a few at a time: the others as lists of Python numbers (what an engine hands out)
and ready texts, the journal as the ledger, which packed ids and log-probabilities into bytes when they were appended. What
packing the log-probabilities takes there is told beside (`ledger_pack_cpu_s`), outside of the journal's clock. The clock of
each runs over its own work alone, and so does one of the processor's time, all threads together, which is what the formats are
compared by. The tokens are drawn from a Zipf distribution over a made-up vocabulary of the size of Qwen3's, the
log-probabilities are float32 as engines give them. The journal has to look the tokens' texts up by itself, inside its clock;
the others have them given.

Afterwards a real event loop tells a writer the same things while a timer measures how late it is woken: what the journal's
thread takes from the loop.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import shutil
import statistics
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import numpy as np

from agentloop.journal import JournalWriter, Run
from agentloop.journal.recorded import RecordedTrajectory
from agentloop.trajectory import (
    CallRecord,
    CallStatus,
    EndReason,
    Origin,
    Reward,
    Sample,
    Segment,
    State,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)
from benchmarks.journal_peers import PEERS, Clock, Peer, Record
from benchmarks.report import Aim, report

VOCABULARY = 151_936
"""Qwen3's."""
CHUNK = 25
"""Conversations that are in memory at a time."""
SAMPLED = 3 / 4
"""Of a turn's tokens; the rest is what the tool answers."""
READS = 50
AIMS = {"write_cpu_s": 18.0 / 1.08, "mb": 1068 / 259, "read_one_ms": 4.3 / 1.0, "list_rewards_ms": 2522 / 1.1}
"""What JSON lines of the standard library took over what JSON lines with a token file took, in the comparison that the format
was chosen by. That one wrote ready numpy columns, as the journal does here. A plain rival of the same kind (`jsonl_sidecar`)
begins with Python numbers."""
AT_MOST_MS = {"read_one_ms": 1.0, "list_rewards_ms": 1.1}
"""What it took there, on another machine; the rival beside tells what this one is like."""


@dataclass(frozen=True)
class Vocabulary:
    pieces: list[bytes]
    lens: Any
    """uint16, bytes of each."""
    weights: Any
    """Cumulative, float64."""

    @staticmethod
    def make(rng: np.random.Generator) -> Vocabulary:
        """Words of 1 to 10 letters, most of them with a space before; the often used ones are short, as in BPE."""
        letters = np.frombuffer(b"etaoinshrdlcumwfgypbvkjxqz", np.uint8)
        sizes = np.minimum(10, 1 + rng.poisson(1.0 + np.log10(np.arange(VOCABULARY) + 1)))
        ends = np.cumsum(sizes)
        text = letters[np.minimum(rng.geometric(0.12, ends[-1]) - 1, 25)].tobytes()
        spaces = rng.random(VOCABULARY) < 0.7
        spans = zip(ends.tolist(), sizes.tolist(), spaces.tolist(), strict=True)
        pieces = [b" " * space + text[end - size : end] for end, size, space in spans]
        weights = np.cumsum(1.0 / np.arange(1, VOCABULARY + 1))
        return Vocabulary(pieces, np.array([len(piece) for piece in pieces], np.uint16), weights / weights[-1])

    def draw(self, rng: np.random.Generator, n: int) -> list[int]:
        found: Any = np.searchsorted(self.weights, rng.random(n))
        return list(found.tolist())

    def text(self, ids: Sequence[int]) -> str:
        return b"".join([self.pieces[i] for i in ids]).decode()


def log_probs(rng: np.random.Generator, n: int) -> list[float]:
    """Most tokens are nearly certain, some are not."""
    values = -np.where(rng.random(n) < 0.6, rng.exponential(0.01, n), rng.exponential(1.2, n)).astype(np.float32)
    found: list[float] = values.tolist()
    return found


Parts = Sequence[tuple[list[int], list[float], list[int]]]
"""For each turn what is sampled, its log-probabilities, and what the tool answers."""


def tell(writer: Any, trajectory: Trajectory, parts: Parts, text: str) -> None:
    """A conversation as the loop tells it."""
    trajectory.append_prompt(parts[0][2])
    writer.trajectory_start(trajectory)
    for index, (sampled, values, answer) in enumerate(parts):
        turn = Turn(index, len(trajectory), len(trajectory) + len(sampled), StopReason.STOP, 3, 3, 0, 1.5)
        trajectory.append_sampled(sampled, values, turn)
        writer.turn(trajectory, turn)
        if index + 1 == len(parts):
            break
        call = ToolCall("python", {"code": "print(1)"}, f"t{index:04d}c000")
        turn.calls.append(CallRecord(call, CallStatus.OK, text, run_s=0.2))
        turn.tools_s = 0.2
        writer.tool(trajectory, turn, turn.calls[0])
        trajectory.append(Origin.OBSERVATION, answer)
        writer.observation(trajectory, turn)
    trajectory.reward = Reward(len(trajectory) % 7 / 7, {"correct": 1.0})
    trajectory.end_reason, trajectory.state = EndReason.FINAL_ANSWER, State.DONE
    writer.trajectory_end(trajectory)


class Source:
    """Conversations of `turns` turns of `tokens` tokens each, the same ones for every format."""

    def __init__(self, turns: int, tokens: int, seed: int = 0) -> None:
        self.turns, self.tokens = turns, tokens
        self.rng = np.random.default_rng(seed)
        self.vocabulary = Vocabulary.make(self.rng)

    def parts(self) -> Parts:
        sampled = int(self.tokens * SAMPLED)
        draw = self.vocabulary.draw
        return [
            (draw(self.rng, sampled), log_probs(self.rng, sampled), draw(self.rng, self.tokens - sampled))
            for _ in range(self.turns)
        ]

    def trajectory(self, number: int) -> Grown:
        messages = [{"role": "user", "content": f"question {number}"}]
        return Grown(Sample(messages, uid=f"u{number // 8}", ground_truth=str(number)), sibling=number % 8, step=1)

    def record(self, trajectory: Trajectory) -> Record:
        """The same for the other formats."""
        ids = list(trajectory.input_ids)
        values = [0.0] * trajectory.prompt_len + (trajectory.rollout_log_probs or [])
        assert trajectory.reward is not None
        return Record(
            id=trajectory.id,
            prompt=self.vocabulary.text(trajectory.prompt_ids),
            response=self.vocabulary.text(trajectory.response_ids),
            ids=ids,
            log_probs=values,
            mask=[0] * trajectory.prompt_len + trajectory.response_mask,
            piece_lens=self.vocabulary.lens[ids],
            reward=trajectory.reward.value,
            facts={
                "uid": trajectory.sample.uid,
                "step": trajectory.step,
                "gts": trajectory.sample.ground_truth,
                "messages": trajectory.sample.messages,
                "segments": [[segment.origin.value, len(segment.ids)] for segment in trajectory.segments],
                "turns": [[turn.start, turn.end, turn.stop_reason.value, turn.weight_version] for turn in trajectory.turns],
                "calls": [[r.call.name, r.call.arguments, r.status.value, r.run_s] for r in trajectory.calls],
                "end_reason": "final_answer",
            },
        )


def size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def median_ms(work: Callable[[], Any], times: int) -> float:
    """Of the processor's time, which other programs on the machine disturb less. All files are in the page cache."""
    taken = []
    for _ in range(times):
        began = process_time()
        work()
        taken.append(process_time() - began)
    return statistics.median(taken) * 1e3


def texts(recorded: RecordedTrajectory) -> bytes:
    """Of all tokens, which are looked up when they are asked for."""
    assert recorded.columns is not None
    return recorded.columns.piece_bytes


def write_all(folder: Path, source: Source, trajectories: int, peers: Sequence[Peer]) -> dict[str, float]:
    """Write all formats, chunk by chunk; what the journal took."""
    writer = JournalWriter(folder, decode=source.vocabulary.pieces.__getitem__, meta={})
    clock, caller, packing = Clock(), Clock(), Clock()
    for first in range(0, trajectories, CHUNK):
        told = []
        for number in range(first, min(first + CHUNK, trajectories)):
            parts, trajectory = source.parts(), source.trajectory(number)
            told.append((trajectory, filled(trajectory, parts, source.vocabulary.text(parts[0][2]))))
        records = [source.record(trajectory) for trajectory, _ in told]
        with packing:
            for segment in (segment for trajectory, _ in told for segment in trajectory._segments):
                if segment.log_probs is not None:
                    struct.pack(f"{len(segment.log_probs)}f", *segment.log_probs)
        gc.collect()
        with clock:
            with caller:
                for _, events in told:
                    for event in events:
                        event(writer)
            writer.flush()
        for peer in peers:
            with peer.clock:
                peer.write(records)
    with clock:
        writer.close()
    for peer in peers:
        with peer.clock:
            peer.close()
    assert writer.errors == 0
    return {
        "write_s": clock.wall_s,
        "write_cpu_s": clock.cpu_s,
        "caller_s": caller.wall_s,
        "ledger_pack_cpu_s": packing.cpu_s,
    }


class Grown(Trajectory):
    """A ledger that is filled outside the clock and shown to the journal as far as it was at each event."""

    shown = 0

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(self._segments[: self.shown])


def filled(trajectory: Grown, parts: Parts, text: str) -> list[Callable[[Any], None]]:
    """Fill the ledger; what the journal is told of it, in order."""
    events: list[Callable[[Any], None]] = []

    class Notes:
        def __getattr__(self, name: str) -> Callable[..., None]:
            def note(*arguments: Any) -> None:
                shown = len(trajectory._segments)

                def tell(writer: Any) -> None:
                    trajectory.shown = shown
                    getattr(writer, name)(*arguments)

                events.append(tell)

            return note

    tell(Notes(), trajectory, parts, text)
    return events


def quantile(values: Sequence[float], share: float) -> float:
    return round(sorted(values)[int(share * (len(values) - 1))], 3)


def late(folder: Path, source: Source, trajectories: int, rest_s: float) -> dict[str, float]:
    """How late a timer of an event loop fires, in ms, while a writer's thread works, and while it does not."""
    told = [filled(source.trajectory(n), source.parts(), "answer") for n in range(trajectories)]
    gc.collect()

    async def measure(writer: Any) -> tuple[list[float], list[float]]:
        delays: list[float] = []
        calls: list[float] = []
        done = False

        async def ticks() -> None:
            while not done:
                began = perf_counter()
                await asyncio.sleep(0.001)
                delays.append((perf_counter() - began - 0.001) * 1e3)

        ticking = asyncio.create_task(ticks())
        for events in told:
            for event in events:
                began = perf_counter()
                event(writer)
                calls.append((perf_counter() - began) * 1e3)
                await asyncio.sleep(rest_s)
        done = True
        await ticking
        return delays, calls

    class Nothing:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *arguments: None

    idle, _ = asyncio.run(measure(Nothing()))
    with JournalWriter(folder, decode=source.vocabulary.pieces.__getitem__) as writer:
        delays, calls = asyncio.run(measure(writer))
    shutil.rmtree(folder)
    return {
        "timer_late_p50_ms": quantile(delays, 0.5),
        "timer_late_p99_ms": quantile(delays, 0.99),
        "timer_late_max_ms": quantile(delays, 1.0),
        "timer_late_without_journal_p99_ms": quantile(idle, 0.99),
        "timer_late_without_journal_max_ms": quantile(idle, 1.0),
        "call_p99_ms": quantile(calls, 0.99),
        "call_max_ms": quantile(calls, 1.0),
    }


def measure(folder: Path, trajectories: int, turns: int, tokens: int, names: Sequence[str]) -> dict[str, Any]:
    source = Source(turns, tokens)
    peers = [PEERS[name](folder / name) for name in names]
    figures: dict[str, Any] = {"trajectories": trajectories, "turns": turns, "tokens_a_turn": tokens}
    mine = write_all(folder / "journal", source, trajectories, peers)

    rng = random.Random(0)
    rows = list(Run(folder / "journal").trajectories())
    assert len(rows) == trajectories
    run = Run(folder / "journal")
    mine["mb"] = size_mb(folder / "journal")
    mine["read_one_ms"] = median_ms(lambda: run.load(rng.choice(rows)), READS)
    mine["read_one_with_texts_ms"] = median_ms(lambda: texts(run.load(rng.choice(rows))), READS)
    mine["list_rewards_ms"] = median_ms(lambda: [row.reward for row in Run(folder / "journal").trajectories()], 9)
    formats = {"journal": mine}
    for peer in peers:
        clock = peer.clock
        formats[peer.name] = {"write_s": clock.wall_s, "write_cpu_s": clock.cpu_s, "mb": size_mb(peer.folder)}
        chosen = iter([rng.randrange(trajectories) for _ in range(READS)])
        formats[peer.name]["read_one_ms"] = median_ms(lambda peer=peer, chosen=chosen: peer.read(next(chosen)), READS)  # type: ignore[misc]
        formats[peer.name]["list_rewards_ms"] = median_ms(peer.rewards, 3)
        assert peer.rewards() == [row.reward for row in rows], peer.name
        assert list(peer.read(trajectories // 2)) == run.load(rows[trajectories // 2]).input_ids, peer.name
        shutil.rmtree(peer.folder)
    figures["formats"] = {name: {key: round(value, 4) for key, value in found.items()} for name, found in formats.items()}
    figures["event_loop"] = late(folder / "late", source, max(1, min(20, trajectories)), 0.002)
    return figures


def aims(figures: dict[str, Any]) -> list[Aim]:
    formats = figures["formats"]
    mine, plain = formats["journal"], formats.get("jsonl")
    found = []
    for key, ratio in AIMS.items() if plain else ():
        value = plain[key] / max(mine[key], 1e-9)
        found.append(Aim(f"{key}: JSON lines over the journal", value, f"at least {ratio:.4g}", value >= ratio))
    rival = formats.get("jsonl_sidecar")
    for key in ("write_cpu_s", "mb") if rival else ():
        value = rival[key] / max(mine[key], 1e-9)
        found.append(Aim(f"{key}: the plainest JSON lines with a token file over the journal", value, "at least 1", value >= 1))
    for key, most in AT_MOST_MS.items():
        found.append(Aim(f"{key}, ms of the processor", mine[key], f"at most {most}", mine[key] <= most))
    loop = figures["event_loop"]
    late_ms = loop["timer_late_p99_ms"]
    found.append(Aim("event loop: how late a timer fires beside the journal, p99, ms", late_ms, "at most 5", late_ms <= 5))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="The journal beside other formats.")
    parser.add_argument("--trajectories", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096, help="of each turn, a quarter of them the tool's")
    parser.add_argument("--formats", default=",".join(PEERS), help="the others to compare with")
    args = parser.parse_args()
    with TemporaryDirectory(prefix="agentloop-journal-") as folder:
        figures = measure(Path(folder), args.trajectories, args.turns, args.tokens, [n for n in args.formats.split(",") if n])
    report("journal", figures, aims(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
