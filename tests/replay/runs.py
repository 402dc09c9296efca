"""Runs to look at, recorded in about a second by the real loop with the scripted engine: everything that a viewer must show.

`record_run(folder)` plays three steps of training, of four groups of four siblings each, and a step of validation, and
then writes a train side: of all of step 1, of half of step 2, of nothing of step 3. What is planted is in `BADGES` and in
what the function returns.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agentloop.chat import HermesParser, load_renderer
from agentloop.config import LoopConfig
from agentloop.engines.base import Engine, Sampling
from agentloop.engines.scripted import ScriptedEngine, ScriptedTurn
from agentloop.errors import ToolInfraError
from agentloop.journal import JournalWriter, token_bytes
from agentloop.journal.base import Recorder
from agentloop.journal.train_side import TrainerRow, write_update
from agentloop.loop import AgentLoop
from agentloop.rollout import Rollout
from agentloop.tools import ToolRegistry
from agentloop.tools.calculator import Calculator
from agentloop.trajectory import CallRecord, Reward, Sample, Trajectory, Turn

MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "model"
STEPS, SIBLINGS = (1, 2, 3), 4
GROUPS = ("even", "flat", "limits", "trouble")
BIG_DIFFERENCES = 5
"""Planted in the train side of `DIFFERENT`: larger than 0.5; all others are smaller than 0.1."""
DIFFERENT = (1, "even_0")

HOSTILE = (
    "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script></script><!-- ]]> \x1b[31mred\x1b[0m "
    "\x1b]0;title\x07 safe\u202egnp.exe\u2066 \u200f \x00 \ud800 {{7*7}} ${7*7} javascript:alert(1)\r\n"
    "<style>*{display:none}</style><svg onload=alert(1)> &lt;b&gt; ' \" ` \u2028"
)
"""What a tool says. A lone surrogate is legal in a Python string and not in UTF-8; the tools make U+FFFD of it."""
TEXT = "日本語のテキスト 🙂 👩‍👩‍👧 été\n    indented\n\ttab"
"""What a model says; its tokenizer has bytes for these, so characters are split over tokens."""

BADGES: dict[str, set[str]] = {
    "limits_0": {"cut_off"},
    "limits_1": {"cut_off"},
    "limits_2": {"tool_failure"},
    "trouble_0": {"error", "masked"},
    "trouble_1": {"parse_failure"},
    "trouble_2": {"mixed_versions"},
}
"""In every step, by id; all siblings of `flat` are `zero_variance`, and `trouble_3` of the last step is `incomplete`."""


def planted_badges(step: int, id: str) -> set[str]:
    """Of a training trajectory."""
    flat = {"zero_variance"} if id.startswith("flat") else set()
    killed = {"incomplete"} if (step, id) == (STEPS[-1], "trouble_3") else set()
    return BADGES.get(id, set()) | flat | killed


@dataclass
class Recorded:
    """A run and what is in it."""

    path: Path
    trajectories: dict[tuple[str, int, str], Trajectory] = field(default_factory=dict)
    """By partition, step and id."""
    big_differences: list[int] = field(default_factory=list)
    """Positions in the trajectory `DIFFERENT`, ascending."""


class Killed:
    """A recorder that is told nothing more of one trajectory after its first call, as if its writer had been killed."""

    def __init__(self, recorder: Recorder, victim: tuple[int, str]) -> None:
        self._recorder = recorder
        self._victim = victim
        self._dead = False

    def _alive(self, trajectory: Trajectory) -> bool:
        return not (self._dead and (trajectory.step, trajectory.id) == self._victim)

    def trajectory_start(self, trajectory: Trajectory) -> None:
        self._recorder.trajectory_start(trajectory)

    def turn(self, trajectory: Trajectory, turn: Turn) -> None:
        if self._alive(trajectory):
            self._recorder.turn(trajectory, turn)

    def tool(self, trajectory: Trajectory, turn: Turn, record: CallRecord) -> None:
        if self._alive(trajectory):
            self._recorder.tool(trajectory, turn, record)
        self._dead = self._dead or (trajectory.step, trajectory.id) == self._victim

    def observation(self, trajectory: Trajectory, turn: Turn) -> None:
        if self._alive(trajectory):
            self._recorder.observation(trajectory, turn)

    def trajectory_end(self, trajectory: Trajectory) -> None:
        if self._alive(trajectory):
            self._recorder.trajectory_end(trajectory)


class Flaky:
    """A tool whose first attempt of every call fails."""

    def __init__(self) -> None:
        self._tried: set[str] = set()

    def __call__(self, key: str) -> str:
        if key not in self._tried:
            self._tried.add(key)
            raise ToolInfraError("the index is being rebuilt")
        return f"value of {key}"


def read_page(path: str) -> str:
    """Read a page.

    Args:
        path: which one
    """
    return f"{path}: {HOSTILE}"


def _tools() -> ToolRegistry:
    flaky = Flaky()

    def look_up(key: str) -> str:
        """Look something up.

        Args:
            key: what to look up
        """
        return flaky(key)

    return ToolRegistry.from_tools([Calculator(), read_page, look_up], {"look_up": {"retries": 1}})


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def _key(step: int, sibling: int) -> str:
    return f'{{"key": "{step}.{sibling}"}}'


def calculate(expression: str) -> str:
    return call("calculator", f'{{"expression": "{expression}"}}')


def _script(uid: str, sibling: int, step: int) -> list[str | ScriptedTurn]:
    """What the model says, turn by turn. A `\\boxed{right}` is right."""
    sums = ["I add first. " + calculate("17 + 25"), "Then I double it. " + calculate("42 * 2")]
    right, wrong = "So it is \\boxed{right}.", "So it is \\boxed{wrong}."
    if uid == "even":
        return [*sums[: 1 + sibling % 2], right if sibling < step else wrong]
    if uid == "flat":
        return [f"{TEXT} {call('look_up', _key(step, sibling))}", f"{TEXT} {right}"]
    if uid == "limits":
        return {
            0: [calculate(f"{i} + 1") for i in range(9)],
            1: [sums[0], "and so on " * 400],
            2: [calculate("1 +* 2"), right],
            3: [calculate("1 + 1") + "\n" + calculate("2 + 2"), right],
        }[sibling]
    return {
        0: [sums[0], ScriptedTurn(error="the engine died (planted)")],
        1: ['<tool_call>\n{"name": "calculator", "arguments": {"expression"\n</tool_call>', right],
        2: [sums[0], wrong],
        3: [call("read_page", '{"path": "index.html"}'), wrong],
    }[sibling]


class _Play:
    """The scripted engine's function: which turn of whose script comes next."""

    def __init__(self, encode: Callable[[str], list[int]], step: int) -> None:
        self._encode = encode
        self._step = step
        self._played: dict[str, int] = {}

    def __call__(self, ids: Sequence[int], sampling: Sampling, trajectory_id: str) -> ScriptedTurn:
        match = re.search(r"([a-z]+)_(\d+)$", trajectory_id)
        assert match, trajectory_id
        uid, sibling = match[1], int(match[2])
        turn = self._played.get(trajectory_id, 0)
        self._played[trajectory_id] = turn + 1
        said = _script(uid, sibling, self._step)[turn]
        if isinstance(said, ScriptedTurn):
            return said
        ids = self._encode(said + "<|im_end|>")
        rng = random.Random(f"{trajectory_id}/{turn}")
        log_probs = [-rng.expovariate(3.0) for _ in ids]
        version = self._step - 1 + (turn if (uid, sibling) == ("trouble", 2) else 0)
        return ScriptedTurn(ids=ids, log_probs=log_probs, weight_version=version, delay_s=0.001 * rng.random())


async def _reward(trajectory: Trajectory, sample: Sample, text: str) -> Reward:
    right = float("\\boxed{right}" in text)
    return Reward(right, {"answer": right, "length": -0.001 * trajectory.sampled_len}, {"extracted": text[-30:]})


def load_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def make_loop(engine: Engine, renderer: Any, recorder: Recorder | None = None) -> AgentLoop:
    """The loop of these runs."""
    return AgentLoop(
        engine,
        renderer,
        HermesParser(renderer),
        tools=_tools().bind(renderer),
        reward=_reward,
        config=LoopConfig(max_turns=5, max_response_tokens=1500),
        recorder=recorder,
    )


def going_on(*texts: str) -> AgentLoop:
    """The loop of these runs, with a model that says this from now on."""
    tokenizer = load_tokenizer()
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    engine = ScriptedEngine([text + "<|im_end|>" for text in texts], encode=encode)
    return make_loop(engine, load_renderer(tokenizer))


def record_run(folder: Path) -> Recorded:
    """Record the run in `folder`, which is made."""
    tokenizer = load_tokenizer()
    renderer = load_renderer(tokenizer)
    recorded = Recorded(folder)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    async def roll(recorder: Recorder, step: int, *, validate: bool) -> None:
        loop = make_loop(ScriptedEngine(_Play(encode, step), record="nothing"), renderer, recorder)
        samples = [
            Sample(
                [{"role": "system", "content": "Use the tools."}, {"role": "user", "content": f"{uid}: {TEXT} <b>17</b>?"}],
                uid=uid,
                data_source="arithmetic",
                ground_truth={"answer": "right"},
                extra_info={"index": index, "huge": 2**70},
            )
            for index, uid in enumerate(GROUPS[:2] if validate else GROUPS)
        ]
        for group in await Rollout(loop).run(samples, 1 if validate else SIBLINGS, step=step, validate=validate):
            for trajectory in group:
                recorded.trajectories["val" if validate else "train", step, trajectory.id] = trajectory

    async def everything(recorder: Recorder) -> None:
        for step in STEPS:
            await roll(recorder, step, validate=False)
        await roll(recorder, STEPS[-1], validate=True)

    meta = {"seed": 1, "model": "quickstart", "config": {"algorithm": "grpo"}, "tools": []}
    log = logging.getLogger("agentloop.tools.attempt")
    log.disabled = True  # failures are planted
    try:
        with JournalWriter(folder, decode=token_bytes(tokenizer), meta=meta) as writer:
            asyncio.run(everything(Killed(writer, (STEPS[-1], "trouble_3"))))
    finally:
        log.disabled = False
    _write_train_side(recorded)
    return recorded


def _write_train_side(recorded: Recorded) -> None:
    rng = np.random.default_rng(0)
    for step, share in ((1, 1.0), (2, 0.5)):
        mine = [t for (partition, at, _), t in recorded.trajectories.items() if (partition, at) == ("train", step)]
        mine = [t for t in mine if not t.masked]
        rows = [_trainer_row(recorded, t, mine, rng) for t in mine[: int(len(mine) * share)]]
        write_update(recorded.path, rows, step=step, update=0, generation=1)


def _trainer_row(recorded: Recorded, trajectory: Trajectory, mine: list[Trajectory], rng: Any) -> TrainerRow:
    mask: Any = np.array(trajectory.response_mask)
    rollout: Any = np.array(trajectory.rollout_log_probs or np.zeros(len(mask)), np.float32)
    trainer = rollout + rng.uniform(-0.09, 0.09, len(mask)).astype(np.float32)
    if (trajectory.step, trajectory.id) == DIFFERENT:
        places = np.sort(rng.choice(np.flatnonzero(mask), BIG_DIFFERENCES, replace=False))
        trainer[places] = rollout[places] - 0.6 - 0.2 * np.arange(BIG_DIFFERENCES, dtype=np.float32)
        recorded.big_differences = [trajectory.prompt_len + int(place) for place in places]
    columns = {
        "old_log_probs": trainer,
        "advantages": mask * np.float32(group_advantage(trajectory, mine)),
        "response_mask": mask,
        "rollout_is_weights": np.exp(trainer - rollout),
    }
    return TrainerRow(trajectory.step, trajectory.sample.uid, trajectory.sibling, np.array(trajectory.response_ids), columns)


def group_advantage(trajectory: Trajectory, mine: list[Trajectory]) -> float:
    """GRPO's, as verl computes it: (reward - mean) / (standard deviation of n - 1 + 1e-6)."""
    rewards = [t.reward.value for t in mine if t.sample.uid == trajectory.sample.uid and t.reward is not None]
    assert trajectory.reward is not None
    return float((trajectory.reward.value - np.mean(rewards)) / (np.std(rewards, ddof=1) + 1e-6))
