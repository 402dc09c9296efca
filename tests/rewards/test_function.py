"""Rewards as plain functions in verl's signature, and rewards by name."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentloop.errors import ConfigError
from agentloop.rewards import BoxedNumber, FunctionReward, load_reward
from agentloop.trajectory import Origin, Reward, Sample, StopReason, Trajectory, Turn

SAMPLE = Sample([{"role": "user", "content": "q"}], data_source="arith", ground_truth="5", extra_info={"index": 3})


def trajectory() -> Trajectory:
    """Two turns with an answer between them."""
    t = Trajectory(SAMPLE)
    t.append_prompt([1, 2])
    t.append_sampled([3], None, Turn(0, 2, 3, StopReason.STOP))
    t.append(Origin.OBSERVATION, [4])
    t.append_sampled([5], None, Turn(1, 4, 5, StopReason.STOP))
    return t


async def ask(function: Any, text: str = "5", **kwargs: Any) -> Reward:
    return await FunctionReward(function, kwargs)(trajectory(), SAMPLE, text)


async def test_a_function_in_verls_signature() -> None:
    seen: dict[str, Any] = {}

    def compute_score(
        data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, bonus: float = 0
    ) -> float:
        seen.update(extra_info, thread=threading.current_thread())
        assert (data_source, solution_str, ground_truth) == ("arith", "5", "5")
        return 1 + bonus

    reward = await ask(compute_score, bonus=0.5)
    assert reward == Reward(1.5, {"score": 1.5})
    assert seen["index"] == 3
    assert seen["num_turns"] == 4
    assert seen["thread"] is not threading.main_thread()
    assert SAMPLE.extra_info == {"index": 3}


async def test_the_function_cannot_change_the_sample() -> None:
    def compute_score(extra_info: dict[str, Any], **_: Any) -> float:
        extra_info["index"] = 99
        return 0.0

    await ask(compute_score)
    assert SAMPLE.extra_info == {"index": 3}


async def test_coroutine_functions_and_what_hides_them() -> None:
    async def compute_score(solution_str: str, scale: float = 1.0, **_: Any) -> float:
        await asyncio.sleep(0)
        return scale * float(solution_str)

    class Callable:
        async def __call__(self, solution_str: str, **_: Any) -> float:
            return float(solution_str)

    assert (await ask(compute_score)).value == 5
    assert (await ask(partial(compute_score, scale=2.0))).value == 10
    assert (await ask(Callable())).value == 5


async def test_mappings_give_components_and_info() -> None:
    reward = await ask(lambda **_: {"score": np.float32(0.5), "acc": True, "format": 0.25, "answer": "5", "odd": float("nan")})
    assert (reward.value, reward.components) == (0.5, {"acc": 1.0, "format": 0.25})
    assert reward.info["answer"] == "5"
    assert "odd" in reward.info
    assert (await ask(lambda **_: {"score": 1})).components == {"score": 1.0}


@pytest.mark.parametrize("answer", [True, 1, 1.0, np.float32(1), np.array(1)])
async def test_what_is_a_number(answer: Any) -> None:
    assert (await ask(lambda **_: answer)).value == 1.0


@pytest.mark.parametrize(
    ("answer", "error"),
    [(None, TypeError), ("1", TypeError), ({"acc": 1}, TypeError), ([], TypeError), (float("nan"), ValueError)],
)
async def test_what_is_no_reward_raises(answer: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        await ask(lambda **_: answer)


async def test_a_function_that_asks_for_the_trajectory_gets_it() -> None:
    def compute_score(solution_str: str, trajectory: Trajectory | None = None, **_: Any) -> float:
        assert trajectory is not None
        return float(len(trajectory.turns))

    assert (await ask(compute_score)).value == 2


async def test_what_the_function_raises_passes() -> None:
    with pytest.raises(ZeroDivisionError):
        await ask(lambda **_: 1 / 0)


async def test_functions_that_hang_hold_up_nothing_else() -> None:
    over = threading.Event()

    def hangs(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
        over.wait()
        return 0.0

    try:
        for _ in range(40):  # more than asyncio has threads of its own
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ask(hangs), 0.02)
        async with asyncio.timeout(5):
            assert (await ask(lambda *_, **__: 1.0)).value == 1.0
            assert await asyncio.to_thread(int, "3") == 3
    finally:
        over.set()


def test_a_function_that_cannot_be_called_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="takes no argument 'extra_info'"):
        FunctionReward(lambda data_source, solution_str, ground_truth: 1.0)
    with pytest.raises(ConfigError, match=r"takes no argument 'bonsu'; did you mean 'bonus'\?"):
        FunctionReward(lambda data_source, solution_str, ground_truth, extra_info, bonus=0: 1.0, {"bonsu": 1})
    with pytest.raises(ConfigError, match="its argument 'judge' is not given"):
        FunctionReward(lambda judge, **_: 1.0)


# -- load_reward -----------------------------------------------------------------------------------------------------

FILE = """
from dataclasses import dataclass

def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    return float(solution_str == ground_truth) + bonus

@dataclass
class Own:
    value: float = 1.0
    async def __call__(self, trajectory, sample, text):
        from agentloop.trajectory import Reward
        return Reward(self.value)

def other(a, b):
    return 0

constant = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_reward.py"
    path.write_text(FILE)
    return path


async def value(spec: str, kwargs: dict[str, Any] | None = None) -> float:
    return (await load_reward(spec, kwargs)(trajectory(), SAMPLE, "5")).value


async def test_rewards_from_a_file(file: Path) -> None:
    assert await value(f"{file}:compute_score") == 1.0
    assert await value(f"{file}:compute_score", {"bonus": 1}) == 2.0
    assert await value(f"{file}:Own", {"value": 3.0}) == 3.0


async def test_rewards_from_a_module() -> None:
    assert isinstance(load_reward("agentloop.rewards.boxed:BoxedNumber"), BoxedNumber)
    reward = await load_reward("agentloop.rewards.boxed:compute_score")(trajectory(), SAMPLE, r"\boxed{5}")
    assert (reward.value, reward.components, reward.info) == (1.0, {"correct": 1.0}, {"verdict": "correct"})


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("compute_score", "expected package.module:name or path/to/file.py:name"),
        ("{file}", "expected package.module:name"),
        ("{folder}/my_rewards.py:compute_score", "no such file; did you mean 'my_reward.py'?"),
        ("{folder}/gone/x.py:f", "no such file"),
        ("{file}:compute_scores", "there is no 'compute_scores' in it; did you mean 'compute_score'?"),
        ("{file}:constant", "'constant' is a int, expected something to call"),
        ("{file}:other", "it takes (a, b), expected (data_source, solution_str"),
        ("no_such_package.rewards:f", "there is no module 'no_such_package'"),
        ("agentloop.rewards.boxd:f", "there is no module 'agentloop.rewards.boxd'; did you mean 'agentloop.rewards.boxed'?"),
        ("agentloop.rewards.boxed:BoxNumber", "did you mean 'BoxedNumber'?"),
    ],
)
def test_what_is_wrong_with_a_name_is_one_sentence(spec: str, says: str, file: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_reward(spec.format(file=file, folder=file.parent))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_does_not_import(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module_at_all\n")
    before = set(sys.modules)
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError: No module named 'no_such_module_at_all'"):
        load_reward(f"{path}:f")
    path.write_text("def f(:\n")
    with pytest.raises(ConfigError, match="cannot be imported: SyntaxError"):
        load_reward(f"{path}:f")
    path.write_text("raise SystemExit(3)")
    with pytest.raises(ConfigError, match="cannot be imported: SystemExit: 3"):
        load_reward(f"{path}:f")
    assert set(sys.modules) == before


def test_arguments_of_a_class_are_checked(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"takes no argument 'valu'; did you mean 'value'\?"):
        load_reward(f"{file}:Own", {"valu": 1})


async def test_the_docs_examples_run(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    path = tmp_path / "documented.py"
    path.write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    reward = await load_reward(f"{path}:compute_score", {"bonus": 0.5})(trajectory(), SAMPLE, " 5 ")
    assert reward == Reward(1.5, {"exact": 1.0})
    assert await value(f"{path}:ShortAnswer", {"limit": 0}) == 0.0
    assert await value(f"{path}:ShortAnswer") == 1.0
