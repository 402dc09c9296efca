"""Rewards of ours inside verl: as a reward function under verl's manager, and as a reward manager of its own."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from agentloop.batch import to_rows
from agentloop.errors import ConfigError
from agentloop.trajectory import CallStatus, EndReason, Trajectory
from agentloop.verl.reward import VerlReward
from tests.verl.support import verl_config

Build = Callable[..., Trajectory]

SOURCE = """
from agentloop.trajectory import Reward

class Seen:
    reads_trajectory = True

    async def __call__(self, trajectory, sample, text):
        assert trajectory.turns and sample is trajectory.sample
        return Reward(len(trajectory.turns) / 4, {"tokens": trajectory.sampled_len, "score": 9.0},
                      {"text": text, "end": trajectory.end_reason, "none": None}, (0.25,) * len(trajectory.turns))

class TextOnly:
    async def __call__(self, trajectory, sample, text):
        return Reward(float(text == sample.ground_truth), {"index": sample.extra_info["index"]}, {"text": text})

class Broken:
    async def __call__(self, trajectory, sample, text):
        return Reward(float("nan"))
"""

TOOL_USE = "agentloop.rewards.tool_use:ToolUseReward"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rewards_of_a_user.py"
    path.write_text(SOURCE)
    return path


def manager(tokenizer: Any, how: str, reward: str | None, **kwargs: Any) -> Any:
    """verl's own loading, by its configuration."""
    from verl.trainer.ppo.reward import load_reward_manager

    if how == "function":
        prefix = "reward.custom_reward_function"
        given = {f"{prefix}.path": "pkg://agentloop.verl.reward_function", f"{prefix}.name": "compute_score"}
        prefix += ".reward_kwargs"
    else:
        prefix = "reward.reward_kwargs"
        given = {
            "reward.reward_manager.source": "importlib",
            "reward.reward_manager.name": "AgentloopRewardManager",
            "reward.reward_manager.module.path": "pkg://agentloop.verl.reward_manager",
        }
    if reward is not None:
        given[f"{prefix}.reward"] = reward
    return load_reward_manager(verl_config(**given, **{f"{prefix}.{key}": value for key, value in kwargs.items()}), tokenizer)


async def scored(verls: Any, trajectory: Trajectory, text: str = "7") -> Any:
    """As in a run: the request goes to another process, and what comes back becomes the trajectory's reward."""

    async def compute_score(data: Any) -> Any:
        return await verls.run_single(pickle.loads(pickle.dumps(data)))

    handle = SimpleNamespace(compute_score=SimpleNamespace(remote=compute_score))
    return await VerlReward([handle])(trajectory, trajectory.sample, text)


@pytest.mark.parametrize("how", ["function", "manager"])
async def test_a_reward_sees_the_trajectory_in_our_rollouts(build: Build, tokenizer: Any, source: Path, how: str) -> None:
    trajectory = build(turns=((5, 3), (4, 0)))
    trajectory.turns[0].engine_data = {"stays here": lambda: 0}  # cannot be pickled
    reward = await scored(manager(tokenizer, how, f"'{source}:Seen'"), trajectory, "the text")
    assert reward.value == 0.5
    assert reward.turns == (0.25, 0.25)
    assert reward.info == {"score": 0.5, "text": "the text", "end": "final_answer", "none": "", "tokens": 9}
    assert reward.components == {"score": 0.5, "tokens": 9.0}
    trajectory.reward = reward
    fields, _ = to_rows(trajectory)
    # Turns end at 4 and 13; the value's rest (nothing) is with the last.
    assert fields["rm_scores"].nonzero().flatten().tolist() == [4, 13]
    assert "agentloop" not in fields["extra_fields"]
    assert "agentloop_turn_rewards" not in fields["extra_fields"]["reward_extra_info"]


@pytest.mark.parametrize("how", ["function", "manager"])
async def test_a_shipped_reward_with_its_settings(build: Build, tokenizer: Any, how: str) -> None:
    trajectory = build(turns=((5, 3), (4, 0)))
    trajectory.turns[0].calls[0] = (
        trajectory.turns[0].calls[0].__class__(trajectory.turns[0].calls[0].call, CallStatus.ERROR, "no")
    )
    trajectory.end_reason = EndReason.TURN_LIMIT
    reward = await scored(manager(tokenizer, how, TOOL_USE, **{"kwargs.error": -0.5}), trajectory)
    assert (reward.value, reward.turns, reward.components["error"]) == (-0.5, (-0.5, 0.0), -0.5)


@pytest.mark.parametrize("how", ["function", "manager"])
async def test_a_composite_from_a_file(build: Build, tokenizer: Any, tmp_path: Path, how: str) -> None:
    (tmp_path / "reward.yaml").write_text(f"""
reward: agentloop.rewards.composite:CompositeReward
kwargs:
  parts:
    answer: {{reward: "agentloop.rewards.boxed:BoxedNumber"}}
    tools: {{reward: "{TOOL_USE}", kwargs: {{call: 0.5}}, weight: 0.5}}
""")
    reward = await scored(manager(tokenizer, how, None, file=str(tmp_path / "reward.yaml")), build(), r"\boxed{7}")
    assert reward.value == 1.25
    assert reward.components == {"score": 1.25, "answer": 1.0, "answer/correct": 1.0, "tools": 0.5, "tools/call": 0.5}
    assert reward.info["answer/verdict"] == "correct"


def verl_row(tokenizer: Any, answer: str, *, num_turns: int = 2, mask: list[int] | None = None) -> Any:
    """A row as verl's own agent loops and its trainer hand it over, padded."""
    from tensordict import TensorDict
    from verl.protocol import DataProto

    prompt, response = tokenizer.encode("question"), [*tokenizer.encode(answer), tokenizer.eos_token_id]
    ids = [0, 0, *prompt, *response, 0]
    attention = [0, 0] + [1] * (len(prompt) + len(response)) + [0]
    tensors = {"prompts": torch.tensor([ids[: len(prompt) + 2]]), "responses": torch.tensor([ids[len(prompt) + 2 :]]),
               "attention_mask": torch.tensor([attention]), "input_ids": torch.tensor([ids])}  # fmt: skip
    if mask is not None:
        tensors["response_mask"] = torch.tensor([mask + [0] * (len(response) + 1 - len(mask))])
    columns = {"data_source": "tests", "reward_model": {"ground_truth": "7"}, "extra_info": {"index": 3},
               "raw_prompt": [{"role": "user", "content": "question"}], "__num_turns__": num_turns}  # fmt: skip
    objects = {}
    for name, value in columns.items():
        objects[name] = np.empty(1, dtype=object)
        objects[name][0] = value
    return DataProto(batch=TensorDict(tensors, batch_size=1), non_tensor_batch=objects)


@pytest.mark.parametrize("how", ["function", "manager"])
async def test_in_verls_own_loops_a_reward_of_text_works(tokenizer: Any, source: Path, how: str) -> None:
    verls = manager(tokenizer, how, f"'{source}:TextOnly'")
    assert (await verls.run_single(verl_row(tokenizer, "7")))["reward_score"] == 1.0
    result = await verls.run_single(verl_row(tokenizer, "8"))
    assert result == {"reward_score": 0.0, "reward_extra_info": {"score": 0.0, "text": "8", "index": 3}}


async def test_in_verls_own_loops_a_single_turn_is_a_whole_trajectory_for_the_manager(tokenizer: Any, source: Path) -> None:
    verls = manager(tokenizer, "manager", f"'{source}:Seen'")
    result = await verls.run_single(verl_row(tokenizer, "7"))
    assert result["reward_score"] == 0.25
    assert result["reward_extra_info"]["tokens"] == len(tokenizer.encode("7")) + 1
    assert "agentloop_turn_rewards" not in result["reward_extra_info"]


async def test_what_needs_more_than_verl_hands_over_raises(tokenizer: Any) -> None:
    verls = manager(tokenizer, "manager", TOOL_USE, **{"kwargs.error": -0.5})
    for row in (verl_row(tokenizer, "7", num_turns=4), verl_row(tokenizer, "7 and 8", mask=[1, 0, 1, 1])):
        with pytest.raises(ConfigError, match="ToolUseReward: it needs the trajectory's turns and calls"):
            await verls.run_single(row)
    with pytest.raises(ConfigError, match="ToolUseReward: it needs the trajectory's turns and calls"):
        await manager(tokenizer, "function", TOOL_USE, **{"kwargs.error": -0.5}).run_single(verl_row(tokenizer, "7"))


@pytest.mark.parametrize("how", ["function", "manager"])
async def test_what_is_no_finite_number_raises(build: Build, tokenizer: Any, source: Path, how: str) -> None:
    with pytest.raises(ValueError, match="the reward's value is nan"):
        await scored(manager(tokenizer, how, f"'{source}:Broken'"), build())


async def test_the_format_reward_gets_the_models_tokenizer(build: Build, tokenizer: Any) -> None:
    settings = {"kwargs.pattern": "'(?s).*'", "kwargs.turns": "all"}
    verls = manager(tokenizer, "manager", "agentloop.rewards.format:FormatReward", **settings)
    assert (await scored(verls, build())).value == 1.0


async def test_settings_are_checked(build: Build, tokenizer: Any, source: Path) -> None:
    for how, where in [("manager", "reward.reward_kwargs"), ("function", "reward.custom_reward_function.reward_kwargs")]:
        for reward, kwargs, message in [
            (None, {}, "key 'reward' is missing"),
            (TOOL_USE, {"kwargs.eror": -1}, "reward tool_use: unknown key 'eror'; did you mean 'error'"),
            (f"'{source}:Sen'", {}, "did you mean 'Seen'"),
            (TOOL_USE, {"file": "reward.yaml"}, f"{where}: give 'file', or 'reward' and 'kwargs', not both"),
            (None, {"file": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        ]:
            with pytest.raises(ConfigError, match=message):
                await scored(manager(tokenizer, how, reward, **kwargs), build())
    with pytest.raises(ConfigError, match="unknown key 'rewad'; did you mean 'reward'"):
        manager(tokenizer, "manager", None, rewad=TOOL_USE)
    with pytest.raises(ConfigError, match="unknown key 'kwarg'; did you mean 'kwargs'"):
        await scored(manager(tokenizer, "function", TOOL_USE, **{"kwarg.error": -1}), build())


def test_it_is_in_verls_registry() -> None:
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

    from agentloop.verl.reward_manager import AgentloopRewardManager

    assert get_reward_manager_cls("agentloop") is AgentloopRewardManager


FUNCTION = {"path": "pkg://agentloop.verl.reward_function", "name": "compute_score"}
RECORDED = {"reward": TOOL_USE, "kwargs": {"error": -0.1}}


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ({**FUNCTION, "reward_kwargs.reward": TOOL_USE, "reward_kwargs.kwargs.error": -0.1}, RECORDED),
        ({**FUNCTION, "reward_kwargs.file": "reward.yaml"}, RECORDED),
        (
            {"path": "pkg://my.rewards", "name": "score", "reward_kwargs.a": 1},
            {"reward": "my.rewards:score", "kwargs": {"a": 1}},
        ),
        ({"path": "my/rewards.py"}, {"reward": "my/rewards.py:compute_score", "kwargs": {}}),
    ],
)
def test_a_run_records_the_reward_that_can_be_called_again(
    given: dict[str, Any], recorded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentloop.rewards import load_reward
    from agentloop.verl.settings import read_settings
    from agentloop.verl.worker import run_meta

    monkeypatch.chdir(tmp_path)
    Path("reward.yaml").write_text(f"reward: {TOOL_USE}\nkwargs: {{error: -0.1}}\n")
    config = verl_config(**{f"reward.custom_reward_function.{key}": value for key, value in given.items()})
    reward = run_meta(config, read_settings(config))["setup"]["reward"]
    assert reward == recorded
    if recorded == RECORDED:
        assert type(load_reward(reward["reward"], reward["kwargs"])).__name__ == "ToolUseReward"
