"""How good a model is at the task: `python -m examples.quickstart.evaluate MODEL_FOLDER`.

Held-out accuracy, by depth, and what went wrong where it was wrong. The conversations run through agentloop's own loop and
local engine, with the settings of the training run's validation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from agentloop.chat import load_parser, load_renderer
from agentloop.config import LoopConfig, load_yaml, validate
from agentloop.engines.base import Sampling
from agentloop.engines.local import LocalEngine
from agentloop.errors import ConfigError
from agentloop.loop import AgentLoop
from agentloop.rewards.base import RewardFunction
from agentloop.rewards.function import FunctionReward
from agentloop.rewards.spec import close_all
from agentloop.rollout import Rollout
from agentloop.tools.registry import ToolRegistry
from agentloop.trajectory import CallStatus, EndReason, Sample, Trajectory
from agentloop.verl.check import check_model
from examples.quickstart.conversation import messages
from examples.quickstart.make_data import HELD_OUT_ROWS, held_out, positive, write
from examples.quickstart.reward import compute_score
from examples.quickstart.task import Problem

HERE = Path(__file__).parent
MODEL = HERE / "model"
CONFIG = HERE / "quickstart.yaml"

ToolMode = Literal["right", "wrong", "none"]
TOOLS: dict[ToolMode, Path | None] = {"right": HERE / "tools.yaml", "wrong": HERE / "tools_wrong.yaml", "none": None}


@dataclass(frozen=True, slots=True)
class Report:
    """Figures over all trajectories of an evaluation."""

    trajectories: int
    accuracy: float
    any_of_n: float
    """Share of the problems that one of their siblings solved: pass@n."""
    by_depth: dict[int, float]
    failures: dict[str, int]
    """The wrong ones by `failure_kind`."""
    mean_turns: float
    mean_calls: float


class Task(Protocol):
    """A problem, as far as evaluation and training need to know it."""

    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> int: ...
    @property
    def depth(self) -> int: ...


P = TypeVar("P", bound=Task)


@dataclass(frozen=True, kw_only=True)
class Example(Generic[P]):
    """What one example has of its own; everything else `evaluate` and `run` do alike for all of them."""

    name: str
    goal: str
    """What its model learns, for the picture's title: «a tiny model learns to …»."""
    config: Path
    """What `agentloop train` is given."""
    model: Path
    """The folder of the starting model."""
    tools: Mapping[ToolMode, Path | None]
    reward: Callable[[], RewardFunction]
    """Loads the reward that the training run has."""
    messages: Callable[[str], list[dict[str, Any]]]
    """The conversation's opening, from a question."""
    held_out: Callable[[int], list[P]]
    """So many held-out problems: always the same ones."""
    write: Callable[[Path, int], tuple[Path, Path]]
    """Write the train and the held-out file of a seed into a folder."""
    failure_kind: Callable[[P, Trajectory], str | None]
    """In one word what went wrong first; `None` if the answer is right."""
    depth: str
    """What the depth of a problem counts: «call needed»; an s is put behind the first word where there are more."""


def failure_kind(problem: Problem, trajectory: Trajectory) -> str | None:
    """In one word what went wrong first; `None` if the answer is right."""
    if trajectory.reward is not None and trajectory.reward.value == 1.0:
        return None
    records = [record for turn in trajectory.turns for record in turn.calls]
    if any(turn.parse_errors for turn in trajectory.turns):
        return "malformed_call"
    if any(record.status is not CallStatus.OK for record in records):
        return "refused_call"
    if trajectory.end_reason is not EndReason.FINAL_ANSWER:
        return str(trajectory.end_reason)
    if not records:
        return "guessed"
    wanted = Counter(step.expression for step in problem.steps)
    made = Counter(str(record.call.arguments.get("expression")) for record in records)
    if made - wanted:
        return "wrong_call"
    return "stopped_early" if wanted - made else "wrong_answer"


QUICKSTART = Example(
    name="quickstart",
    goal="use a calculator",
    config=CONFIG,
    model=MODEL,
    tools=TOOLS,
    reward=lambda: FunctionReward(compute_score),
    messages=messages,
    held_out=held_out,
    write=lambda folder, seed: write(folder, seed=seed),
    failure_kind=failure_kind,
    depth="call needed",
)


def summarise(
    problems: Sequence[P], groups: Sequence[Sequence[Trajectory]], failure_kind: Callable[[P, Trajectory], str | None]
) -> Report:
    """The figures of a group of siblings for every problem."""
    pairs = [(problem, trajectory) for problem, group in zip(problems, groups, strict=True) for trajectory in group]
    kinds = [failure_kind(problem, trajectory) for problem, trajectory in pairs]
    right: dict[int, list[bool]] = {}
    for (problem, _), kind in zip(pairs, kinds, strict=True):
        right.setdefault(problem.depth, []).append(kind is None)
    solved = [any(failure_kind(problem, one) is None for one in group) for problem, group in zip(problems, groups, strict=True)]
    return Report(
        trajectories=len(pairs),
        accuracy=kinds.count(None) / len(pairs),
        any_of_n=sum(solved) / len(solved),
        by_depth={depth: sum(hits) / len(hits) for depth, hits in sorted(right.items())},
        failures=dict(Counter(kind for kind in kinds if kind is not None).most_common()),
        mean_turns=sum(len(trajectory.turns) for _, trajectory in pairs) / len(pairs),
        mean_calls=sum(len(turn.calls) for _, trajectory in pairs for turn in trajectory.turns) / len(pairs),
    )


def loop_config(path: Path = CONFIG) -> LoopConfig:
    """The loop's settings in the training run."""
    run = load_yaml(path)
    data = run["verl"]["data"]
    limits = {"max_prompt_tokens": data["max_prompt_length"], "max_response_tokens": data["max_response_length"]}
    return validate(LoopConfig, {**limits, **run["agentloop"]["loop"]}, f"{path}: agentloop.loop")


async def roll_out(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[P],
    *,
    example: Example[P],
    tool: ToolMode = "right",
    temperature: float = 0.0,
    n: int = 1,
    seed: int = 0,
    threads: int | None = None,
) -> list[list[Trajectory]]:
    """`n` trajectories for every problem. `model` belongs to the engine from now on (see `LocalEngine`)."""
    renderer = load_renderer(tokenizer)
    path = example.tools[tool]
    engine = LocalEngine(model, tokenizer=tokenizer, threads=threads)
    tools = None if path is None else ToolRegistry.from_yaml(path).bind(renderer)
    reward, config = example.reward(), loop_config(example.config)
    loop = AgentLoop(engine, renderer, load_parser("hermes", renderer), tools=tools, reward=reward, config=config, seed=seed)
    samples = [
        Sample(example.messages(problem.question), uid=str(index), data_source=example.name, ground_truth=str(problem.answer))
        for index, problem in enumerate(problems)
    ]
    sampling = Sampling(max_tokens=config.max_response_tokens, temperature=temperature, log_probs=False)
    try:
        return await Rollout(loop).run(samples, n, sampling=sampling, validate=True)
    finally:
        await engine.close()
        if tools is not None:
            await tools.close()
        await close_all([reward])


def evaluate(folder: Path, problems: Sequence[Problem], **kwargs: Any) -> Report:
    """How good the model in `folder` is at the quickstart's problems; further arguments are those of `measure`."""
    return measure(QUICKSTART, folder, problems, **kwargs)


def measure(example: Example[P], folder: Path, problems: Sequence[P], **kwargs: Any) -> Report:
    """Load the model in `folder` and measure it; further arguments are `roll_out`'s. `ConfigError` if it holds no model."""
    if not folder.is_dir():
        raise ConfigError(f"model: '{folder}' is no model folder")
    check_model(folder, "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="sdpa")
    groups = asyncio.run(roll_out(model, tokenizer, problems, example=example, **kwargs))
    return summarise(problems, groups, example.failure_kind)


def depth_label(example: Example[Any], depth: int) -> str:
    counted, *others = example.depth.split()
    return " ".join([str(depth), counted if depth == 1 else f"{counted}s", *others])


def show(report: Report, title: str, example: Example[Any] = QUICKSTART) -> None:
    table = Table("figure", "value", title=title, title_justify="left")
    table.add_row("accuracy", f"{report.accuracy:.3f} of {report.trajectories}")
    for depth, accuracy in report.by_depth.items():
        table.add_row(f"  {depth_label(example, depth)}", f"{accuracy:.3f}")
    table.add_row("problems solved at least once", f"{report.any_of_n:.3f}")
    table.add_row("mean turns", f"{report.mean_turns:.2f}")
    table.add_row("mean calls", f"{report.mean_calls:.2f}")
    for kind, count in report.failures.items():
        table.add_row(f"  {kind}", str(count))
    Console().print(table)


def main(example: Example[Any] = QUICKSTART) -> None:
    parser = argparse.ArgumentParser(description=f"Measure a model on the held-out problems of {example.name}.")
    parser.add_argument("model", type=Path, nargs="?", default=example.model)
    parser.add_argument("--tool", choices=list(example.tools), default="right", help="the tool, one that is wrong, or none")
    parser.add_argument("--problems", type=positive, default=HELD_OUT_ROWS)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--n", type=positive, default=1, help="trajectories for every problem")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    try:
        report = measure(
            example,
            args.model,
            example.held_out(args.problems),
            tool=args.tool,
            temperature=args.temperature,
            n=args.n,
            threads=args.threads,
        )
    except ConfigError as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps(asdict(report)))
    else:
        show(report, f"{args.model}, tool: {args.tool}", example)


if __name__ == "__main__":
    main()
