"""The settings of the loop, and how YAML is read.

Every key is checked: an unknown one is a `ConfigError` that names the file, the key and the nearest right spelling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from yaml import MarkedYAMLError, YAMLError

from agentloop.errors import ConfigError, nearest
from agentloop.trajectory import EndReason

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """A settings model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would read `max_turns: yes` as 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = {annotation, *get_args(annotation)}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("Input should be a number")
        return value


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
    in it are not run, but those of a tool that takes the answer (`submit`). Off: calls of the last turn are run and answered,
    and the trajectory ends as `turn_limit`."""
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
    penalty: float = Field(0.0, allow_inf_nan=False)
    """The reward where `on_cutoff` says `penalty`."""
    max_resamples: int = Field(1, ge=0)
    """How often a trajectory whose tool policy is `resample` is started anew before it counts as `tool_failure`."""
    on_cutoff: OnCutoff = OnCutoff()
    deadlines: Deadlines = Deadlines()


def load_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML mapping with `key=value` overrides merged in, interpolations resolved. `ConfigError` if the file is missing,
    malformed or no mapping, if an override has no `=`, or if a value is left at `???`. An empty file is an empty mapping."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        loaded = _mapping(path)
        merged = OmegaConf.merge(loaded, *(_override(override) for override in overrides))
        data = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_yaml_sentence(error)}") from error
    except OmegaConfBaseException as error:
        key = f"key '{error.full_key}': " if error.full_key else ""
        raise ConfigError(f"{path}: {key}{str(error).splitlines()[0]}") from error
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply, or an anchor holds itself") from error
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def _mapping(path: Path) -> DictConfig:
    # PyYAML's parser, before OmegaConf's load: that one turns a text at the top into a mapping, and fails on a number.
    top = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    empty = top is None or top.tag == "tag:yaml.org,2002:null"
    if not (empty or isinstance(top, yaml.MappingNode)):
        found = "list" if isinstance(top, yaml.SequenceNode) else "single value"
        raise ConfigError(f"{path}: expected a mapping at the top, found a {found}")
    loaded = OmegaConf.create({}) if empty else OmegaConf.load(path)
    assert isinstance(loaded, DictConfig)
    return loaded


def _override(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override '{override}': expected key=value")
    try:
        return OmegaConf.from_dotlist([override])
    except (YAMLError, OmegaConfBaseException) as error:
        sentence = _yaml_sentence(error) if isinstance(error, YAMLError) else str(error).splitlines()[0]
        raise ConfigError(f"override '{override}': {sentence}") from error


def _yaml_sentence(error: YAMLError) -> str:
    """What is wrong and in which line, without PyYAML's excerpt."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
    return " ".join(str(error).split())


def validate(model: type[M], data: Mapping[str, Any], where: str) -> M:
    """`data` as a `model`. The first thing that is wrong becomes a `ConfigError` that begins with `where`: an unknown key
    before all else, since a misspelt key is also a missing one."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {_shown(data)}")
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        errors = error.errors()
        first = next((item for item in errors if item["type"] == "extra_forbidden"), errors[0])
        location = first["loc"]
        key = ".".join(str(part) for part in location)
        if first["type"] == "extra_forbidden":
            hint = nearest(str(location[-1]), _fields_at(model, location[:-1]))
            raise ConfigError(f"{where}: unknown key '{key}'; {hint}") from error
        if first["type"] == "missing":
            raise ConfigError(f"{where}: key '{key}' is missing") from error
        if first["type"] in ("model_type", "dict_type"):
            message = "expected a mapping"
        else:
            message = first["msg"].removeprefix("Value error, ")
            message = message[:1].lower() + message[1:]
        if not key:
            raise ConfigError(f"{where}: {message}") from error
        raise ConfigError(f"{where}: key '{key}': {message}, got {_shown(first['input'])}") from error


def _shown(value: Any) -> str:
    """`repr`, short enough for a sentence."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Names of the fields at a place inside `model`. A part of `location` that is no field is a list's index, a mapping's
    key or a union's member: it stays in the same models."""
    models = [model]
    for part in location:
        inside = [field.annotation for m in models for name, field in m.model_fields.items() if name == part]
        if inside:
            models = [found for annotation in inside for found in _models_in(annotation)]
    return [name for m in models for name in m.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation such as `list[Inner] | None` mentions."""
    if isinstance(annotation, type) and not get_args(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]
