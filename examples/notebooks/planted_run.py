"""A run with a planted problem, for `why_does_the_reward_fall.ipynb`: `python -m examples.notebooks.planted_run FOLDER`.

The quickstart's conversations go on for eight steps, without training: its problems, its calculator, its reward, and the model
that it ended with (or the one that it starts from, if it has not been run). From step 5 on one setting of the tools file is
different. Which one is what the notebook finds out, so it is not told here twice: see `CHANGED`.

What the trainer would compute is written down too: log-probabilities by the same weights, and GRPO's advantages.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, Qwen3ForCausalLM

from agentloop.chat import load_parser, load_renderer
from agentloop.engines.base import Engine, Sampling
from agentloop.engines.local import LocalEngine
from agentloop.journal import JournalWriter, token_bytes
from agentloop.journal.train_side import TrainerRow, write_update
from agentloop.loop import AgentLoop
from agentloop.rewards.function import FunctionReward
from agentloop.rollout import Rollout
from agentloop.tools.registry import ToolRegistry
from agentloop.trajectory import Sample, Trajectory
from examples.quickstart.calculator_tool import Calculator
from examples.quickstart.conversation import messages
from examples.quickstart.evaluate import MODEL, loop_config
from examples.quickstart.make_data import train_problems
from examples.quickstart.reward import compute_score
from examples.quickstart.task import Problem

QUICKSTART = Path("runs/quickstart")
STEPS = range(1, 9)
CHANGE_AT = 5
CHANGED = {"calculator": {"max_response_tokens": 3}}
"""The policy from step `CHANGE_AT` on: a well-meant limit. A digit is a token, so a result of four digits loses the last."""
GROUPS, SIBLINGS = 4, 8


def trained_model(quickstart: Path = QUICKSTART) -> Path:
    """The folder of the model that the quickstart ended with; the one that it starts from if it has not been run."""
    weights = (quickstart / "checkpoints").glob("global_step_*/actor/huggingface/model.safetensors")
    folders = sorted((path.parent for path in weights), key=lambda folder: int(folder.parts[-3].split("_")[-1]))
    return folders[-1] if folders else MODEL


def record(run_dir: Path, *, model: Path | None = None, seed: int = 0, groups: int = GROUPS, siblings: int = SIBLINGS) -> None:
    """Record the run anew; what was in `run_dir` is removed. Half a minute on two cores."""
    folder = model or trained_model()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    shutil.rmtree(run_dir, ignore_errors=True)
    problems = iter(train_problems(len(STEPS) * groups, seed))
    tools, reward = (os.path.relpath(MODEL.parent / name) for name in ("tools.yaml", "reward.py"))
    meta = {
        "seed": seed,
        "model": os.path.relpath(folder),
        "tools": ToolRegistry.load(tools).schemas,
        "config": {"siblings": siblings, "temperature": 1.0},
        "loop": loop_config().model_dump(mode="json"),
        "setup": {"tools": tools, "parser": "hermes", "reward": {"reward": f"{reward}:compute_score", "kwargs": {}}},
    }

    async def everything(writer: JournalWriter) -> None:
        model = Qwen3ForCausalLM.from_pretrained(folder)
        engine = LocalEngine(model, tokenizer=tokenizer, threads=1, entropies=True)
        try:
            for step in STEPS:
                chosen = [next(problems) for _ in range(groups)]
                policies = CHANGED if step >= CHANGE_AT else None
                told = await _roll_out(engine, tokenizer, chosen, step, siblings, policies, writer, seed)
                await _train_side(engine, run_dir, told, step, writer.generation)
        finally:
            await engine.close()

    with JournalWriter(run_dir, decode=token_bytes(tokenizer), meta=meta) as writer:
        asyncio.run(everything(writer))


async def _roll_out(
    engine: Engine,
    tokenizer: Any,
    problems: Sequence[Problem],
    step: int,
    siblings: int,
    policies: Any,
    recorder: JournalWriter,
    seed: int,
) -> list[list[Trajectory]]:
    renderer, config = load_renderer(tokenizer), loop_config()
    loop = AgentLoop(
        engine,
        renderer,
        load_parser("hermes", renderer),
        tools=ToolRegistry.from_tools([Calculator()], policies).bind(renderer),
        reward=FunctionReward(compute_score),
        config=config,
        seed=seed,
        recorder=recorder,
    )
    samples = [
        Sample(messages(problem.question), uid=f"s{step}p{index}", data_source="quickstart", ground_truth=str(problem.answer))
        for index, problem in enumerate(problems)
    ]
    return await Rollout(loop).run(samples, siblings, sampling=Sampling(max_tokens=config.max_response_tokens), step=step)


async def _train_side(engine: Engine, run_dir: Path, told: list[list[Trajectory]], step: int, generation: int) -> None:
    rows = []
    for group in told:
        rewards: Any = np.array([trajectory.reward.value if trajectory.reward else 0.0 for trajectory in group])
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        for trajectory, advantage in zip(group, advantages.tolist(), strict=True):
            log_probs = await engine.score(trajectory.input_ids)
            mask: Any = np.array(trajectory.response_mask, np.uint8)
            columns = {
                "old_log_probs": np.array(log_probs[trajectory.prompt_len - 1 :], np.float32),
                "advantages": mask * np.float32(advantage),
                "response_mask": mask,
            }
            ids = np.array(trajectory.response_ids)
            rows.append(TrainerRow(step, trajectory.sample.uid, trajectory.sibling, ids, columns))
    await asyncio.to_thread(write_update, run_dir, rows, step=step, update=0, generation=generation)


def main() -> None:
    parser = argparse.ArgumentParser(description="Record a run with a planted problem.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    record(given.folder, seed=given.seed)
    print(f"recorded in {given.folder}")


if __name__ == "__main__":
    main()
