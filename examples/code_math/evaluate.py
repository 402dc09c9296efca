"""How good a model is at the task: `python -m examples.code_math.evaluate MODEL_FOLDER`, with the quickstart's options."""

from __future__ import annotations

from pathlib import Path

from agentloop.config import load_yaml, validate
from agentloop.rewards.base import RewardFunction
from agentloop.rewards.spec import RewardSpec
from agentloop.trajectory import CallStatus, EndReason, Trajectory
from examples.code_math.conversation import TOOLS, messages
from examples.code_math.make_data import held_out, write
from examples.code_math.task import Problem
from examples.quickstart.evaluate import Example, main

HERE = Path(__file__).parent
MODEL = HERE / "model"
CONFIG = HERE / "code_math.yaml"
REWARD = HERE / "reward.yaml"


def load_reward() -> RewardFunction:
    """The reward that verl is given, too."""
    return validate(RewardSpec, load_yaml(REWARD), str(REWARD)).load(str(REWARD))


def failure_kind(problem: Problem, trajectory: Trajectory) -> str | None:
    """In one word what went wrong first; `None` if the answer is right."""
    if trajectory.reward is not None and trajectory.reward.value == 1.0:
        return None
    records = [record for turn in trajectory.turns for record in turn.calls]
    if any(turn.parse_errors for turn in trajectory.turns):
        return "malformed_call"
    if any(record.status is not CallStatus.OK for record in records):
        return "code_failed"
    if trajectory.end_reason is not EndReason.FINAL_ANSWER:
        return str(trajectory.end_reason)
    if not records:
        return "guessed"
    results = [record.text for record in records]
    if "[no output]" in results:
        return "no_result"
    return "wrong_answer" if str(problem.answer) in results else "wrong_code"


CODE_MATH = Example(
    name="code_math",
    goal="write Python",
    config=CONFIG,
    model=MODEL,
    tools={"right": TOOLS, "wrong": HERE / "tools_wrong.yaml", "none": None},
    reward=load_reward,
    messages=messages,
    held_out=held_out,
    write=write,
    failure_kind=failure_kind,
    depth="line of code",
)

if __name__ == "__main__":
    main(CODE_MATH)
