"""Trajectories to the padded batch, beside verl's own post-processing of the same conversations, in one run.

`python -m benchmarks.batch_assembly [--rows 512] [--tokens 16384]`

Both sides start from what their loop ends with: ours from ledgers, verl's from `AgentLoopOutput`s, which are built before
the clock starts. verl's time is that of `AgentLoopWorker._agent_loop_postprocess` for every row and `_postprocess` for the
batch, in chunks of 64 rows, so that both fit into a few GiB; its work is per row, so that the chunks take nothing from it.
The first chunk of both is compared value by value.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from time import perf_counter
from types import SimpleNamespace
from typing import Any

from agentloop.batch import to_dataproto
from agentloop.trajectory import EndReason, Origin, Reward, Sample, StopReason, Trajectory, Turn
from benchmarks.report import Aim, report

CHUNK = 64
TURNS = 16
PROMPT = 1024


def ledger(row: int, tokens: int) -> Trajectory:
    """A conversation of `tokens` tokens: a prompt, then turns of sampled tokens, each followed by a shorter answer."""
    rng = random.Random(row)
    sample = Sample(messages=[{"role": "user", "content": "?"}], uid=str(row // 8))
    trajectory = Trajectory(sample, sibling=row % 8)
    ids = [rng.randrange(3, 150_000) for _ in range(tokens)]
    trajectory.append_prompt(ids[:PROMPT])
    per_turn = (tokens - PROMPT) // TURNS
    for index in range(TURNS):
        start = len(trajectory)
        end = tokens if index == TURNS - 1 else start + per_turn
        sampled = (end - start) * 3 // 4
        turn = Turn(index, start, start + sampled, StopReason.STOP, weight_version=1, min_weight_version=1)
        log_probs = [-rng.random() for _ in range(sampled)]
        trajectory.append_sampled(ids[start : start + sampled], log_probs, turn)
        trajectory.append(Origin.TEMPLATE, ids[start + sampled : start + sampled + 4])
        trajectory.append(Origin.OBSERVATION, ids[start + sampled + 4 : end])
    trajectory.end_reason = EndReason.FINAL_ANSWER
    trajectory.reward = Reward(rng.random())
    return trajectory


def verl_worker(prompt_length: int, response_length: int) -> Any:
    """verl's worker, with what its post-processing reads, and a real tokenizer to pad with."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    worker = AgentLoopWorker.__new__(AgentLoopWorker)
    worker.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    worker.processor = None
    worker.mm_processor_kwargs = {}
    worker.rollout_config = SimpleNamespace(prompt_length=prompt_length, response_length=response_length)
    worker.reward_loop_worker_handles = None
    worker.distillation_enabled = False
    return worker


def verl_output(trajectory: Trajectory) -> Any:
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput

    assert trajectory.reward is not None
    return AgentLoopOutput(
        prompt_ids=trajectory.prompt_ids,
        response_ids=trajectory.response_ids,
        response_mask=trajectory.response_mask,
        response_logprobs=trajectory.rollout_log_probs,
        reward_score=trajectory.reward.value,
        num_turns=2 * TURNS + 1,
        metrics=AgentLoopMetrics(),
    )


async def verl_batch(worker: Any, outputs: list[Any]) -> Any:
    return worker._postprocess([await worker._agent_loop_postprocess(output, False, raw_prompt=[]) for output in outputs])


def verl_seconds(worker: Any, trajectories: list[Trajectory]) -> tuple[float, Any]:
    """Seconds for all rows, and the first chunk's batch."""
    seconds, first = 0.0, None
    for begin in range(0, len(trajectories), CHUNK):
        outputs = [verl_output(trajectory) for trajectory in trajectories[begin : begin + CHUNK]]
        started = perf_counter()
        batch = asyncio.run(verl_batch(worker, outputs))
        seconds += perf_counter() - started
        first = first or batch
    return seconds, first


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16_384)
    arguments = parser.parse_args()
    rows, tokens = arguments.rows, arguments.tokens
    trajectories = [ledger(row, tokens) for row in range(rows)]
    sizes = {"prompt_length": PROMPT, "response_length": tokens - PROMPT}
    worker = verl_worker(**sizes)

    to_dataproto(trajectories[:2], **sizes, pad_token_id=0)
    asyncio.run(verl_batch(worker, [verl_output(trajectories[0])]))
    ours: list[float] = []
    batch: Any = None
    for _ in range(3):
        batch = None
        started = perf_counter()
        batch = to_dataproto(trajectories, **sizes, pad_token_id=0)
        ours.append(perf_counter() - started)
    theirs, first = verl_seconds(worker, trajectories)
    for name in first.batch.keys():  # noqa: SIM118  a TensorDict iterates over rows
        if not batch.batch[name][: len(first)].equal(first.batch[name]):
            sys.exit(f"'{name}' differs from verl's")

    ratio = theirs / min(ours)
    figures = {
        "rows": rows,
        "tokens_per_row": tokens,
        "turns_per_row": TURNS,
        "agentloop_s": round(min(ours), 3),
        "verl_s": round(theirs, 3),
        "verl_chunk_rows": CHUNK,
        "agentloop_rows_per_s": round(rows / min(ours), 1),
        "verl_rows_per_s": round(rows / theirs, 1),
        "speedup": round(ratio, 2),
    }
    report("batch_assembly", figures, [Aim("times as fast as verl", round(ratio, 2), "at least 5", ratio >= 5)])


if __name__ == "__main__":
    main()
