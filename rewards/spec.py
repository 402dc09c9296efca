"""A reward named in a configuration, and what rewards that hold others need from them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import OmegaConf
from pydantic import Field, field_validator

from agentloop.config import Strict
from agentloop.errors import ConfigError
from agentloop.rewards.base import RewardFunction
from agentloop.rewards.function import load_reward
from agentloop.trajectory import Reward


class RewardSpec(Strict):
    """A reward by name, as `load_reward` takes it."""

    reward: str
    """`package.module:name` or `path/to/file.py:name`."""
    kwargs: dict[str, Any] = Field(default_factory=dict)

    @field_validator("kwargs", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return plain(value)

    def load(self, where: str) -> RewardFunction:
        """Raises `ConfigError` that begins with `where`."""
        try:
            return load_reward(self.reward, self.kwargs)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error


def plain(value: Any) -> Any:
    """Settings without OmegaConf's containers, as verl hands them over."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def reads_trajectory(reward: Any) -> bool:
    """Whether `reward` needs turns, calls or token counts, and not just the text of the last turn: it says so by an attribute
    of this name."""
    return bool(getattr(reward, "reads_trajectory", False))


def bind_tokenizer(rewards: Iterable[Any], tokenizer: Any) -> None:
    """Hand the model's tokenizer to those of `rewards` that have a method `bind_tokenizer`."""
    for reward in rewards:
        bind = getattr(reward, "bind_tokenizer", None)
        if bind is not None:
            bind(tokenizer)


async def close_all(rewards: Iterable[Any]) -> None:
    """Close those of `rewards` that have a method `close`."""
    for reward in rewards:
        close = getattr(reward, "close", None)
        if close is not None:
            closing = close()
            if inspect.isawaitable(closing):
                await closing


def named(name: str, reward: Reward) -> tuple[dict[str, float], dict[str, Any]]:
    """The value and the components of a part, and its info, under the part's name: `name`, `name/component`."""
    components = {name: reward.value, **{f"{name}/{key}": value for key, value in reward.components.items()}}
    return components, {f"{name}/{key}": value for key, value in reward.info.items()}
