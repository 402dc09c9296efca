"""A rollout that is killed with SIGKILL and started again, over and over: `python -m tests.journal.rollouts FOLDER SEED TIMES`.

A real loop with the scripted engine, tools and a renderer, eight trajectories at a time, four groups a step. A start begins
after the last step that an earlier one finished, as a trainer resumes from its checkpoint. The parent forks (imports cost more
than a rollout), kills, and reads what is left.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from agentloop.chat import HermesParser, load_renderer
from agentloop.config import LoopConfig
from agentloop.engines.base import Sampling
from agentloop.engines.scripted import ScriptedEngine, ScriptedTurn
from agentloop.journal import JournalWriter, NullRecorder, Run, token_bytes
from agentloop.journal.base import Recorder
from agentloop.loop import AgentLoop
from agentloop.rollout import Rollout
from agentloop.tools import ToolRegistry
from agentloop.trajectory import Reward, Sample, Trajectory
from tests.journal import conversations

MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "model"
GROUPS, SIBLINGS = 4, 4


def fetch(key: str) -> str:
    """Look something up.

    Args:
        key: what to look up
    """
    return f"value of {key} " * random.Random(key).randint(1, 200)


def facts(trajectory: Trajectory) -> dict[str, Any]:
    """What of a trajectory is the same each time it is run."""
    told = conversations.facts(trajectory)
    calls = [(record.call, record.status, record.text, record.cut_tokens) for record in trajectory.calls]
    turns = [(turn.start, turn.end, turn.stop_reason, turn.parse_errors) for turn in trajectory.turns]
    return {**told, "turns": turns, "calls": calls, "times": None}


class Parts:
    """What all starts share."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
        self.decode = token_bytes(self.tokenizer)
        self.expected: dict[int, dict[str, dict[str, Any]]] = {}

    def rollout(self, recorder: Recorder) -> Rollout:
        renderer = load_renderer(self.tokenizer)

        def turn(ids: Any, sampling: Sampling, trajectory_id: str) -> ScriptedTurn:
            rng = random.Random(f"{trajectory_id}/{len(ids)}")
            name = rng.choice(["fetch", "fetch", "fetch", "gone"])
            text = f'<tool_call>\n{{"name": "{name}", "arguments": {{"key": "{rng.random()}"}}}}\n</tool_call>'
            if rng.random() < 0.25:
                text = "done"
            if rng.random() < 0.03:
                return ScriptedTurn(error="planted")
            said = self.tokenizer.encode(text + "<|im_end|>", add_special_tokens=False)
            return ScriptedTurn(ids=said, log_probs=[-rng.random() for _ in said], delay_s=rng.random() * 0.004)

        async def reward(trajectory: Trajectory, sample: Sample, text: str) -> Reward:
            return Reward(float(len(trajectory) % 7), {"length": float(len(trajectory))})

        loop = AgentLoop(
            ScriptedEngine(turn, record="nothing"),
            renderer,
            HermesParser(renderer),
            tools=ToolRegistry.from_tools([fetch]),
            reward=reward,
            config=LoopConfig(max_turns=6, max_response_tokens=4000),
            recorder=recorder,
        )
        return Rollout(loop, max_concurrency=8)

    async def step(self, rollout: Rollout, step: int) -> list[Trajectory]:
        """Deterministic but for the order in which things happen."""
        samples = [Sample(messages=[{"role": "user", "content": f"{step}.{i}"}], uid=f"s{step}g{i}") for i in range(GROUPS)]
        return [t for group in await rollout.run(samples, SIBLINGS, step=step) for t in group]

    def facts(self, step: int) -> dict[str, dict[str, Any]]:
        """What a step must be like in the record, by id."""
        if step not in self.expected:
            told = asyncio.run(self.step(self.rollout(NullRecorder()), step))
            self.expected[step] = {t.id: facts(t) for t in told}
        return self.expected[step]

    def start(self, folder: Path, first: int) -> None:
        """Roll from step `first` on, until killed."""
        writer = JournalWriter(folder, decode=self.decode, meta={"seed": 1})
        rollout = self.rollout(writer)

        async def forever() -> None:
            step = first
            while True:
                await self.step(rollout, step)
                await asyncio.to_thread(writer.flush)
                (folder / "finished.new").write_text(str(step))
                os.replace(folder / "finished.new", folder / "finished")  # whole, whenever it is killed
                step += 1

        asyncio.run(forever())


def check(parts: Parts, folder: Path) -> tuple[int, int]:
    """Everything that a journal promises after a kill; numbers of complete and of unfinished trajectories."""
    run = Run(folder)
    assert {problem.kind for problem in run.verify()} <= {"torn_tail"}, run.verify()
    finished = int((folder / "finished").read_text()) if (folder / "finished").exists() else 0
    seen: dict[tuple[int, str], Any] = {}
    for row in run.trajectories():
        assert (row.step, row.id) not in seen, "nothing is counted twice"
        seen[row.step, row.id] = row
        recorded, expected = run.load(row), parts.facts(row.step)[row.id]
        if row.complete:
            assert facts(recorded.to_trajectory()) == expected
        else:
            assert row.end_reason is None
            assert recorded.reward in (None, expected["reward"]), "its reward may have been written, and its end not"
            ids = recorded.input_ids
            assert ids == expected["input_ids"][: len(ids)], "what is there of an unfinished one is its beginning"
            recorded.to_trajectory().check()
    for step in range(1, finished + 1):
        there = {key for at, key in seen if at == step}
        assert there == set(parts.facts(step)), f"step {step} was finished"
        assert all(seen[step, key].complete for key in there)
    complete = sum(row.complete for row in seen.values())
    for path in folder.rglob("*.index.jsonl"):
        path.unlink()
    without = {(row.step, row.id): row for row in Run(folder).trajectories()}
    assert without == seen, "the index adds nothing"
    return complete, len(seen) - complete


def main(folder: Path, seed: int, times: int) -> None:
    parts, rng = Parts(), random.Random(seed)
    unfinished = 0
    for _ in range(times):
        path = folder / "finished"
        first = int(path.read_text()) + 1 if path.exists() else 1
        files, patience = len(list(folder.glob("train/*/*.traj.jsonl"))), time.monotonic() + 20
        child = os.fork()
        if child == 0:
            try:
                parts.start(folder, first)
            finally:
                os._exit(1)
        if rng.random() < 0.9:  # else it is killed while it starts
            while len(list(folder.glob("train/*/*.traj.jsonl"))) == files and time.monotonic() < patience:
                time.sleep(0.002)
        time.sleep(rng.random() * 0.3)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child ended by itself"
        if (folder / "starts").exists() and any(folder.glob("train/*/*.jsonl")):
            unfinished += check(parts, folder)[1]
    print(unfinished, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
