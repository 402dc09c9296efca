"""Rewards written as plain functions in verl's signature, and rewards by name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from agentloop.errors import ConfigError, nearest
from agentloop.rewards.base import RewardFunction
from agentloop.tools.threads import run_blocking
from agentloop.trajectory import Origin, Reward, Sample, Trajectory

_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
_OURS = ("trajectory", "sample", "text")


class FunctionReward:
    """A `compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs)` as verl calls it, as a reward.

    The function is called with keywords, answers a number or a mapping with `score`, and may be a coroutine function; a
    plain one runs in a thread of its own, so it may block but must be safe to run in several at once. `solution_str` is the
    text of the last turn. `extra_info` is a copy of the row's, with `num_turns` counted as verl counts it. A function that asks
    for more by a parameter named `trajectory` gets the whole one (verl does not pass it, so give it a default).
    """

    def __init__(self, function: Callable[..., Any], kwargs: Mapping[str, Any] | None = None, *, name: str = "") -> None:
        self.function = function
        self.kwargs = dict(kwargs or {})
        self.name = name or getattr(function, "__qualname__", type(function).__name__)
        parameters = inspect.signature(function).parameters
        self._wants_trajectory = "trajectory" in parameters
        given = {**dict.fromkeys(_VERL), **self.kwargs, **({"trajectory": None} if self._wants_trajectory else {})}
        _check_call(self.name, function, given)

    async def __call__(self, trajectory: Trajectory, sample: Sample, text: str) -> Reward:
        """Raises what the function raises, `TypeError` or `ValueError` if it answers no finite number."""
        arguments: dict[str, Any] = {
            **self.kwargs,
            "data_source": sample.data_source,
            "solution_str": text,
            "ground_truth": sample.ground_truth,
            "extra_info": {**sample.extra_info, "num_turns": _num_turns(trajectory)},
        }
        if self._wants_trajectory:
            arguments["trajectory"] = trajectory
        if inspect.iscoroutinefunction(self.function):
            result = await self.function(**arguments)
        else:
            result = await run_blocking(self.function, **arguments)  # one that hangs holds its own thread only
            if inspect.isawaitable(result):  # a partial or a callable object around a coroutine function
                result = await result
        return self._reward(result)

    def _reward(self, result: Any) -> Reward:
        if not isinstance(result, Mapping):
            value = self._number(result)
            return Reward(value, {"score": value})
        if "score" not in result:
            raise TypeError(f"reward {self.name} answered a mapping without 'score': {', '.join(map(str, result))}")
        value = self._number(result["score"])
        components: dict[str, float] = {}
        info: dict[str, Any] = {}
        for key, item in result.items():
            if key == "score":
                continue
            if isinstance(item, int | float) and math.isfinite(item):
                components[str(key)] = float(item)
            else:
                info[str(key)] = item
        return Reward(value, components or {"score": value}, info)

    def _number(self, value: Any) -> float:
        if value is None or isinstance(value, str):
            raise TypeError(f"reward {self.name} answered {value!r:.80}, expected a number or a mapping with 'score'")
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"reward {self.name} answered {number}, expected a finite number")
        return number


def _num_turns(trajectory: Trajectory) -> int:
    """The prompt as one, each generation, the answers to each (verl's `tool_agent_loop.py`, `num_turns=`)."""
    answered = {segment.turn for segment in trajectory.segments if segment.origin is Origin.OBSERVATION}
    return 1 + len(trajectory.turns) + len(answered)


def load_reward(spec: str, kwargs: Mapping[str, Any] | None = None) -> RewardFunction:
    """The reward that `spec` names: `package.module:name` or `path/to/file.py:name`. Raises `ConfigError`.

    `name` is a function in verl's signature (`kwargs` then go into every call), an async function or object called with
    `(trajectory, sample, text)`, or a class of such objects (`kwargs` then go to its constructor).
    """
    found = load_object(spec)
    name = spec.rpartition(":")[2]
    arguments = dict(kwargs or {})
    if inspect.isclass(found):
        _check_call(f"'{spec}'", found, arguments)
        found, arguments = found(**arguments), {}
    if not callable(found):
        raise ConfigError(f"reward '{spec}': '{name}' is a {type(found).__name__}, expected something to call")
    parameters = inspect.signature(found).parameters
    if all(key in parameters for key in _OURS):
        if arguments:
            raise ConfigError(f"reward '{spec}': '{name}' is no class, so it takes no arguments ({', '.join(arguments)})")
        return cast(RewardFunction, found)
    if "solution_str" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return FunctionReward(found, arguments, name=f"'{spec}'")
    raise ConfigError(
        f"reward '{spec}': it takes ({', '.join(parameters)}), expected ({', '.join(_VERL)}) or ({', '.join(_OURS)})"
    )


def load_object(spec: str) -> Any:
    """What `spec` names: `package.module:name` or `path/to/file.py:name`. Raises `ConfigError`."""
    target, _, name = spec.rpartition(":")
    if not target or not name:
        raise ConfigError(f"reward '{spec}': expected package.module:name or path/to/file.py:name")
    module = _load_file(spec, Path(target)) if target.endswith(".py") else _load_module(spec, target)
    return _attribute(spec, module, name)


def _check_call(name: str, function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """`ConfigError` unless `function` can be called with these keywords."""
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in given:
            if key not in parameters:
                raise ConfigError(f"reward {name}: it takes no argument '{key}'; {nearest(key, parameters)}")
    for key, parameter in parameters.items():
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if parameter.default is parameter.empty and not variadic and key not in given:
            raise ConfigError(f"reward {name}: its argument '{key}' is not given")


def _load_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        siblings = [item.name for item in path.parent.glob("*.py")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1)
        raise ConfigError(f"reward '{spec}': no such file" + (f"; did you mean '{close[0]}'?" if close else ""))
    # A name of its own for every path, registered, so that dataclasses and pickling inside the file work.
    key = f"agentloop_reward_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    if key in sys.modules:
        return sys.modules[key]
    description = importlib.util.spec_from_file_location(key, path)
    if description is None or description.loader is None:
        raise ConfigError(f"reward '{spec}': {path} is not a Python file")
    module = importlib.util.module_from_spec(description)
    sys.modules[key] = module
    try:
        description.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[key]
        raise ConfigError(f"reward '{spec}': {path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _load_module(spec: str, target: str) -> ModuleType:
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name is not None and (target == error.name or target.startswith(f"{error.name}.")):
            raise ConfigError(f"reward '{spec}': there is no module '{error.name}'{_near_module(error.name)}") from error
        raise ConfigError(f"reward '{spec}': {target} cannot be imported: {error}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"reward '{spec}': {target} cannot be imported: {type(error).__name__}: {error}") from error


def _near_module(name: str) -> str:
    """A hint among the modules beside the one that is missing, where the package above it is there."""
    parent, _, last = name.rpartition(".")
    package = sys.modules.get(parent)
    names = [
        p.stem for folder in getattr(package, "__path__", []) for p in Path(folder).iterdir() if not p.name.startswith("_")
    ]
    close = difflib.get_close_matches(last, names, n=1)
    return f"; did you mean '{parent}.{close[0]}'?" if close else ""


def _attribute(spec: str, module: ModuleType, name: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"reward '{spec}': there is no '{name}' in it; {nearest(name, own)}") from None
