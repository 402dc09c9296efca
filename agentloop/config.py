"""The settings of the loop, and how YAML is read.

Every key is checked: an unknown one is a `ConfigError` that names the file, the key and the nearest right spelling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from yaml import YAMLError

from agentloop.errors import ConfigError, nearest
from agentloop.trajectory import EndReason

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """A settings model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Deadlines(Strict):
    """Wall-clock limits in seconds. Each covers everything in it: queue, start, run, retries, teardown."""

    trajectory_s: float = Field(600.0, gt=0)
    """From the prompt to the end of scoring."""
    generate_s: float = Field(300.0, gt=0)
    """One generation."""
    tools_s: float = Field(120.0, gt=0)
    """All tool calls of one turn."""
    score_s: float = Field(60.0, gt=0)
    release_s: float = Field(10.0, gt=0)
    """Releasing what one trajectory holds; what takes longer is reported and left behind."""


CutoffAction = Literal["score", "mask", "penalty"]


class OnCutoff(Strict):
    """What becomes of a trajectory that did not end with a final answer, by end reason.

    `score`: scored as it stands. `mask`: no gradient and not in the group's baseline. `penalty`: the reward is
    `LoopConfig.penalty`, without asking the reward function.
    """

    turn_limit: CutoffAction = "score"
    token_limit: CutoffAction = "score"
    parse_failure: CutoffAction = "score"
    deadline: CutoffAction = "mask"
    tool_failure: CutoffAction = "mask"
    engine_failure: CutoffAction = "mask"
    aborted: CutoffAction = "mask"

    def of(self, reason: EndReason) -> CutoffAction:
        return "score" if reason is EndReason.FINAL_ANSWER else getattr(self, reason.value)


class LoopConfig(Strict):
    """How one trajectory runs."""

    max_turns: int = Field(16, ge=1)
    """Generations a trajectory may have."""
    final_turn_without_tools: bool = False
    """The last of the `max_turns` is for the answer alone: the tool answers before it end with `final_turn_note`, and calls
    in it are not run. Off: calls of the last turn are run and answered, and the trajectory ends as `turn_limit`."""
    final_turn_note: str = "No further tool calls will be run. Give your final answer now."
    max_parallel_calls: int = Field(16, ge=1)
    """Calls of one turn that are run; the rest are answered «not run: limit»."""
    max_prompt_tokens: int = Field(4096, ge=1)
    """A longer prompt ends its trajectory as `token_limit` before anything is generated; it is never cut."""
    max_response_tokens: int = Field(8192, ge=1)
    """Everything after the prompt: sampled, observations and glue."""
    max_turn_tokens: int | None = Field(None, ge=1)
    """Sampled tokens of one turn."""
    answer_reserve_tokens: int = Field(16, ge=1)
    """Room that a tool's answer must leave for the model; a longer answer is cut in its middle, and says so."""
    on_parse_failure: Literal["observe", "end"] = "observe"
    """`observe`: tell the model what was wrong and go on; `end`: end as `parse_failure`."""
    max_parse_failures: int = Field(3, ge=1)
    """With `observe`: turns with a malformed call after which the trajectory ends as `parse_failure`."""
    tool_rewards: Literal["record", "add"] = "record"
    """The tools' own rewards are components of the reward (`tool/<name>`); `add` also adds them to its value."""
    penalty: float = 0.0
    """The reward where `on_cutoff` says `penalty`."""
    max_resamples: int = Field(1, ge=0)
    """How often a trajectory whose tool policy is `resample` is started anew before it counts as `tool_failure`."""
    on_cutoff: OnCutoff = OnCutoff()
    deadlines: Deadlines = Deadlines()


def load_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML mapping with `key=value` overrides merged in; `ConfigError` if it is missing, malformed or no mapping."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        loaded = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        data = OmegaConf.to_container(loaded, resolve=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, found a {type(data).__name__}")
    return {str(key): value for key, value in data.items()}


def validate(model: type[M], data: Mapping[str, Any], where: str) -> M:
    """`data` as a `model`. The first thing that is wrong becomes a `ConfigError` that begins with `where`."""
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        location = first["loc"]
        key = ".".join(str(part) for part in location)
        if first["type"] == "extra_forbidden":
            hint = nearest(str(location[-1]), _fields_at(model, location[:-1]))
            raise ConfigError(f"{where}: unknown key '{key}'; {hint}") from error
        if first["type"] == "missing":
            raise ConfigError(f"{where}: key '{key}' is missing") from error
        raise ConfigError(f"{where}: key '{key}': {first['msg'].lower()}, got {first['input']!r}") from error


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    for part in location:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
