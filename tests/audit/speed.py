"""How long an audit takes: `python -m tests.audit.speed [TRAJECTORIES] [TOKENS]`.

Trajectories of eight turns in groups of eight, written by the real writer, with texts; then the audit of the run, of its padded
batch alone, and of the batch against the run.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

from agentloop.audit import Report, audit_batch, audit_run
from agentloop.batch import to_dataproto
from agentloop.trajectory import (
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
from tests.audit.planted import write
from tests.audit.rollouts import WORDS, renderer_of

NAME = "qwen-like"
TURNS = 8


def conversation(uid: str, sibling: int, tokens: int) -> Trajectory:
    """About `tokens` tokens: half of them sampled, half what tools answered."""
    tokenizer, renderer = renderer_of(NAME)
    rng = random.Random(f"{uid}/{sibling}")
    words = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in WORDS]
    end = renderer.stop_token_ids[0]
    sample = Sample(messages=[{"role": "user", "content": f"question {uid}"}], uid=uid)
    trajectory = Trajectory(sample, sibling=sibling, step=1)
    trajectory.sampling = {"temperature": 1.0, "stop_token_ids": [end], "stop": [], "log_probs": True}
    trajectory.append_prompt(renderer.prompt(sample.messages))
    for index in range(TURNS):
        said = list(tokenizer.encode('{"name": "look_up", "arguments": {"key": "x"}}', add_special_tokens=False))
        while len(said) < tokens // (2 * TURNS) - 1:
            said += rng.choice(words)
        said.append(end)
        start = len(trajectory)
        turn = Turn(index, start, start + len(said), StopReason.STOP, 0, 0, prompt_crc=trajectory.rolling_hash)
        trajectory.append_sampled(said, [-rng.expovariate(1.0) for _ in said], turn)
        if index == TURNS - 1:
            break
        text = " ".join(rng.choice(WORDS) for _ in range(tokens // (8 * TURNS)))
        call = ToolCall("look_up", {"key": "x"}, f"t{index:04d}c000")
        turn.calls.append(CallRecord(call, CallStatus.OK, text))
        message = {"role": "tool", "name": "look_up", "tool_call_id": call.id, "content": text}
        for origin, ids in renderer.after_turn(said, [message]):
            trajectory.append(Origin(origin), ids)
    trajectory.reward, trajectory.state, trajectory.end_reason = Reward(rng.random()), State.DONE, EndReason.FINAL_ANSWER
    return trajectory


def main(count: int, tokens: int) -> None:
    told = [conversation(f"g{i // 8}", i % 8, tokens) for i in range(count)]
    total = sum(len(t) for t in told)
    print(f"{count} trajectories, {total / count:.0f} tokens each")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), NAME, told)
        widths = {"prompt_length": max(t.prompt_len for t in told), "response_length": max(t.response_len for t in told)}
        batch = to_dataproto(told, **widths, pad_token_id=0)
        audits: dict[str, Callable[[], Report]] = {
            "the run": lambda: audit_run(folder),
            "the batch alone": lambda: audit_batch(batch),
            "the batch against the run": lambda: audit_batch(batch, folder),
        }
        for what, audit in audits.items():
            began, worked = perf_counter(), process_time()
            report = audit()
            print(f"{what}: {perf_counter() - began:.2f} s, of which the processor worked {process_time() - worked:.2f} s")
            report.raise_if_any()


if __name__ == "__main__":
    main(*(int(argument) for argument in [*sys.argv[1:], "1000", "4096"][:2]))
