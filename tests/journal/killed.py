"""Writers that are killed with SIGKILL at random bytes: `python -m tests.journal.killed FOLDER SEED TIMES`.

A child writes conversations with two writers, some left open, and a trainer's updates. What it has finished (told and flushed,
or returned) it says through a pipe, and it is killed once the files have grown to a random size, or after a random time. The
parent then reads what is left. It forks, since imports cost more than all of that.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from agentloop.journal import JournalWriter, NullRecorder, Run
from agentloop.journal.train_side import TrainerRow, write_update
from agentloop.trajectory import Trajectory
from tests.journal.conversations import conversation, decode, facts

A_STEP = 24
"""Conversations of a step."""
LARGEST = 1_500_000
"""Bytes after which the last child is killed, about 25 steps."""


def told(recorder: Any, seed: int) -> Trajectory:
    return conversation(recorder, seed, step=seed // A_STEP, turns=4, tokens=random.Random(seed).choice([20, 200, 2000]))


@cache
def expected(seed: int) -> dict[str, Any]:
    return facts(told(NullRecorder(), seed))


def trainer_row(trajectory: Trajectory, seed: int) -> TrainerRow:
    n = trajectory.response_len
    columns = {"old_log_probs": np.arange(n) + seed, "advantages": np.full(n, seed / 7), "response_mask": np.ones(n)}
    return TrainerRow(trajectory.step, trajectory.sample.uid, trajectory.sibling, trajectory.response_ids, columns)


def write(folder: Path, said: int) -> None:
    """Until killed."""
    writers = [
        JournalWriter(folder, f"w{i}", generation=1, decode=decode, meta={"seed": 1} if i == 0 else None) for i in range(2)
    ]
    of_step: list[TrainerRow] = []
    for seed in range(10**6):
        of_step.append(trainer_row(told(writers[seed % 2], seed), seed))
        conversation(writers[seed % 2], seed, uid=f"open{seed}", step=seed // A_STEP, stop_after="tool")
        if seed % 6 == 5:
            for writer in writers:
                writer.flush()
            os.write(said, f"written {seed}\n".encode())
        if seed % A_STEP == A_STEP - 1:
            step = seed // A_STEP
            write_update(folder, of_step, step=step, update=0, generation=1)
            os.write(said, f"trained {step}\n".encode())
            of_step.clear()


def check(folder: Path, promises: list[str]) -> int:
    """Everything that a journal promises after a kill; how many trajectories were torn off."""
    run = Run(folder)
    assert {problem.kind for problem in run.verify()} <= {"torn_tail"}, run.verify()
    rows = list(run.trajectories())
    complete = {int(row.uid[1:]): row for row in rows if row.complete}
    assert len(complete) == sum(row.complete for row in rows), "nothing is there twice"
    written = max([int(line.split()[1]) for line in promises if line.startswith("written")], default=-1)
    assert set(range(written + 1)) <= set(complete), "what was finished is there"
    assert {row.writer for row in complete.values()} <= {"w0", "w1"}
    for seed, row in complete.items():
        assert facts(run.load(row).to_trajectory()) == expected(seed), "what is there as finished is right"
    for row in rows:
        if not row.complete:
            recorded = run.load(row)
            assert (row.end_reason, recorded.columns is not None) == (None, True)
            if not row.uid.startswith("open"):
                ids = recorded.input_ids
                assert ids == expected(int(row.uid[1:]))["input_ids"][: len(ids)], "of one that was torn off its beginning"
    trained = {int(line.split()[1]) for line in promises if line.startswith("trained")}
    for step in range(max(trained, default=-1) + 2):
        side = run.train_side(step)
        assert side.arrived == (A_STEP if step in trained else side.arrived)
        for found in side:
            seed = int(found.recorded.row.uid[1:])
            assert found.old_log_probs.tolist() == (np.arange(len(found.old_log_probs)) + seed).tolist()
            assert set(found.advantages.tolist()) == {float(np.float32(seed / 7))}
    for path in folder.rglob("*.index.jsonl"):
        path.unlink()
    assert list(Run(folder).trajectories()) == rows, "the index adds nothing"
    run.rebuild_indexes()
    assert list(Run(folder).trajectories()) == rows
    return sum(not row.complete and not row.uid.startswith("open") for row in rows)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".part"))


def main(folder: Path, seed: int, times: int) -> None:
    rng = random.Random(seed)
    torn = 0
    for point in range(times):
        place = folder / str(point)
        place.mkdir(parents=True)
        reading, said = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write(place, said)
            finally:
                os._exit(1)
        os.close(said)
        if rng.random() < 0.2:
            time.sleep(rng.random() * 0.2)
        else:
            enough, patience = rng.random() ** 2 * LARGEST, time.monotonic() + 30
            while _size(place) < enough and time.monotonic() < patience:
                time.sleep(rng.random() * 0.003)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child ended by itself"
        with os.fdopen(reading) as pipe:
            promises = pipe.read().splitlines()
        if (place / "run.json").exists():
            torn += check(place, promises)
    print(torn, flush=True)


def _size(folder: Path) -> int:
    try:
        return size(folder)
    except FileNotFoundError:  # renamed between listing and asking
        return 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
