"""Tools and their policies, from YAML or from Python."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import io
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from agentloop.config import load_yaml
from agentloop.errors import ConfigError, nearest
from agentloop.tools.attempt import bounded
from agentloop.tools.base import ToolLike, ToolSchema, ToolSet
from agentloop.tools.calls import RELEASE_TIMEOUT_S, Entry, RegistrySession, make_entry, method_kwargs
from agentloop.tools.cut import TextCodec
from agentloop.tools.function import FunctionTool, as_tool, load_function_file
from agentloop.tools.policy import CircuitBreaker, RateLimit, ToolPolicy
from agentloop.tools.session import ToolSession, ToolSessions
from agentloop.trajectory import Sample
from agentloop.waiting import to_the_end

logger = logging.getLogger(__name__)

SHIPPED = {
    "calculator": "agentloop.tools.calculator.Calculator",
    "file": "agentloop.tools.file.File",
    "python": "agentloop.tools.python.Python",
    "http_tool": "agentloop.tools.http_tool.HttpTool",
    "mcp": "agentloop.tools.mcp.McpServer",
    "search": "agentloop.tools.search.Search",
    "shell": "agentloop.tools.shell.Shell",
    "submit": "agentloop.tools.submit.Submit",
    "sympy_math": "agentloop.tools.sympy_math.SympyMath",
}
"""Short class names for the tools that come with agentloop."""

_ENTRY_KEYS = ("class_name", "function", "config", "tool_schema")
_POLICY_KEYS = tuple(ToolPolicy.model_fields)


class ToolRegistry(ToolSessions):
    """The tools of a run, in order, each with its policy. One registry serves every trajectory of a process."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        """Use `from_yaml`, `load` or `from_tools`. `ConfigError` if two tools have one name."""
        self._entries: dict[str, Entry] = {}
        self._codec: TextCodec | None = None
        for entry in entries:
            if entry.name in self._entries:
                raise ConfigError(f"two tools are called '{entry.name}'; a name must be unique")
            self._entries[entry.name] = entry

    # -- making one -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_yaml(cls, path: str | Path) -> ToolRegistry:
        """From a tools file. `ConfigError` says what is wrong first; `agentloop tools lint` says everything."""
        return cls.load(path)

    @classmethod
    def load(cls, tool_config_path: str | Path | None = None, function_tool_path: str | Path | None = None) -> ToolRegistry:
        """From a tools file, a file of functions (`load_function_file`), or both: verl's two settings."""
        entries: list[Entry] = []
        if tool_config_path:
            entries, problems = read_tools(tool_config_path)
            if problems:
                more = f" (and {len(problems) - 1} more: `agentloop tools lint` lists them)" if len(problems) > 1 else ""
                raise ConfigError(problems[0] + more)
        if function_tool_path:
            entries += [make_entry(tool, ToolPolicy()) for tool in load_function_file(function_tool_path)]
        return cls(entries)

    @classmethod
    def from_tools(
        cls, tools: Iterable[Any], policies: Mapping[str, ToolPolicy | Mapping[str, Any]] | None = None
    ) -> ToolRegistry:
        """From tools (ours or verl's) and functions; `policies` by tool name, the keys as in YAML."""
        made = [tool for thing in tools for tool in (thing.tools if isinstance(thing, ToolSet) else [as_tool(thing)])]
        policies = dict(policies or {})
        for name in policies:
            if name not in {tool.name for tool in made}:
                raise ConfigError(f"policies: there is no tool '{name}'; {nearest(name, [tool.name for tool in made])}")
        entries = []
        for tool in made:
            policy = policies.get(tool.name, ToolPolicy())
            if not isinstance(policy, ToolPolicy):
                parsed, problems = _policy(policy, _POLICY_KEYS)
                if problems:
                    raise ConfigError(f"policies: tool '{tool.name}': {problems[0]}")
                policy = parsed
            entries.append(make_entry(tool, policy))
        return cls(entries)

    def bind(self, codec: TextCodec) -> ToolRegistry:
        """Count tokens with this codec (a `Renderer`), as `max_response_tokens` needs. Returns the registry itself."""
        self._codec = codec
        return self

    async def close(self) -> None:
        """Let go of what the tools hold for the whole process (a sandbox, a server's process), each with its own guard, and to
        the end, even if whoever waits is cancelled meanwhile. Once no trajectory is under way; a tool that is used again
        starts again."""

        async def close(entry: Entry) -> None:
            try:
                await bounded(entry.tool.close(), RELEASE_TIMEOUT_S, f"close of tool '{entry.name}'")  # type: ignore[attr-defined]
            except Exception:
                logger.warning("tool '%s': close failed", entry.name, exc_info=True)

        closing = [close(entry) for entry in self if inspect.iscoroutinefunction(getattr(entry.tool, "close", None))]
        await to_the_end(asyncio.gather(*closing))

    # -- what is in it --------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    @property
    def tools(self) -> list[ToolLike]:
        """The tools themselves, as verl's loops want them."""
        return [entry.tool for entry in self]

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """OpenAI function schemas, in order."""
        return [entry.schema for entry in self]

    # -- one trajectory -------------------------------------------------------------------------------------------------

    def session(self, sample: Sample, trajectory_id: str) -> ToolSession:
        """As `ToolSessions.session`. Also a `ConfigError`: a `tools_kwargs` key that a tool does not take, and
        `max_response_tokens` without `bind`."""
        selected, kwargs = self.select(sample.tools, sample.tools_kwargs)
        for entry in selected.values():
            if entry.policy.max_response_tokens is not None and self._codec is None:
                raise ConfigError(
                    f"tool '{entry.name}' has max_response_tokens, and no renderer to count tokens with; call bind(renderer)"
                )
        return RegistrySession(selected, kwargs, trajectory_id, self._codec)

    def select(
        self, selection: Iterable[str] | None, tools_kwargs: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Entry], dict[str, dict[str, dict[str, Any]]]]:
        """A row's tools (`None`: all), in the registry's order, and by tool and method what to pass. `ConfigError` for a name
        or a key that is not there, and for what a method needs and does not get."""
        names = self._entries if selection is None else tuple(selection)
        for name in names:
            self._known(name, "tool_selection")
        for name in tools_kwargs:
            self._known(name, "tools_kwargs")
        selected = {name: entry for name, entry in self._entries.items() if name in names}
        kwargs = {
            name: method_kwargs(entry, tools_kwargs.get(name) or {}, f"tools_kwargs: tool '{name}'")
            for name, entry in selected.items()
        }
        return selected, kwargs

    def _known(self, name: str, where: str) -> None:
        if name not in self._entries:
            raise ConfigError(f"{where}: there is no tool '{name}'; {nearest(name, self._entries)}")


# -- reading a file -----------------------------------------------------------------------------------------------------


def read_tools(path: str | Path) -> tuple[list[Entry], list[str]]:
    """The tools of a file and everything that is wrong with it, each as one sentence.

    Raises `ConfigError` only where there is no list of tools to go through.
    """
    path = Path(path)
    data = load_yaml(path)
    problems = [f"{path}: unknown key '{key}'; {nearest(key, ['tools'])}" for key in data if key != "tools"]
    if "tools" not in data:
        raise ConfigError(problems[0] if problems else f"{path}: key 'tools' is missing")
    if not isinstance(data["tools"], list):
        raise ConfigError(f"{path}: key 'tools' must be a list of tools, got {data['tools']!r}")
    entries: list[Entry] = []
    seen: dict[str, int] = {}
    for number, raw in enumerate(data["tools"], start=1):
        read, found = _read_entry(raw, path)
        label = f"{path}: tool {_label(raw, number)}"
        problems += [f"{label}: {problem}" for problem in found]
        for entry in read:
            if entry.name in seen:
                problems.append(f"{label}: the name '{entry.name}' is taken by tool {seen[entry.name]}; a name must be unique")
                continue
            seen[entry.name] = number
            entries.append(entry)
    return entries, problems


def _label(raw: Any, number: int) -> str:
    if isinstance(raw, Mapping):
        schema = raw.get("tool_schema")
        function = schema.get("function") if isinstance(schema, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        name = name or raw.get("class_name") or raw.get("function")
        if isinstance(name, str):
            return f"'{name}'"
    return str(number)


def _read_entry(raw: Any, path: Path) -> tuple[list[Entry], list[str]]:
    """The tools of one entry (several of a `ToolSet`, none if something is wrong), and what is wrong."""
    if not isinstance(raw, Mapping):
        return [], [f"expected a mapping, got {raw!r}"]
    keys = (*_ENTRY_KEYS, *_POLICY_KEYS)
    problems = [f"unknown key '{key}'; {nearest(str(key), keys)}" for key in raw if key not in keys]
    policy, wrong = _policy({key: raw[key] for key in _POLICY_KEYS if key in raw}, _POLICY_KEYS)
    problems += wrong
    try:
        made = _make(raw, path.resolve().parent)
        tools = made.tools if isinstance(made, ToolSet) else [made]
        return [make_entry(tool, policy) for tool in tools], problems
    except ConfigError as error:
        return [], [*problems, str(error)]


def _policy(data: Mapping[str, Any], known: Iterable[str]) -> tuple[ToolPolicy, list[str]]:
    """The policy, or the default one with all that is wrong."""
    try:
        return ToolPolicy.model_validate(dict(data)), []
    except ValidationError as error:
        problems = []
        # Misspelt keys first: what they were meant for is reported as missing.
        for first in sorted(error.errors(), key=lambda found: found["type"] != "extra_forbidden"):
            key = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                options = _fields_of(str(first["loc"][0])) if len(first["loc"]) > 1 else known
                problems.append(f"unknown key '{key}'; {nearest(str(first['loc'][-1]), options)}")
            elif first["type"] == "literal_error" and isinstance(first["input"], str):
                options = ("observe", "retry", "drop_sample", "resample")
                problems.append(f"key '{key}' cannot be '{first['input']}'; {nearest(first['input'], options)}")
            elif first["type"] == "missing":
                problems.append(f"key '{key}' is missing")
            elif first["type"] == "model_type":
                problems.append(f"key '{key}': expected a mapping, got {first['input']!r}")
            else:
                message = first["msg"].removeprefix("Value error, ")
                problems.append(f"key '{key}': {message[:1].lower()}{message[1:]}, got {first['input']!r}")
        return ToolPolicy(), problems


def _fields_of(key: str) -> Iterable[str]:
    """The keys inside a policy's mapping."""
    return (CircuitBreaker if key == "circuit_breaker" else RateLimit).model_fields


def _make(raw: Mapping[str, Any], folder: Path) -> Any:
    """The tool, or the set of tools, of one entry."""
    class_name, function = raw.get("class_name"), raw.get("function")
    if (class_name is None) == (function is None):
        raise ConfigError("give either 'class_name' or 'function'" + ("" if class_name is None else ", not both"))
    schema = raw.get("tool_schema")
    if schema is not None:
        schema = ToolSchema.of(schema)
    config = raw.get("config")
    config = {} if config is None else config
    if not isinstance(config, Mapping):
        raise ConfigError(f"key 'config' must be a mapping, got {config!r}")
    kind = config.get("type", "native")
    if kind != "native":
        raise ConfigError(f"key 'config.type' cannot be {kind!r}; only 'native' is known")
    if function is not None:
        if set(config) - {"type"}:
            raise ConfigError(f"key 'config.{next(iter(set(config) - {'type'}))}': a function takes no config")
        found = _import(function, "function", folder)
        if schema is None:
            return as_tool(found)
        return FunctionTool(getattr(found, "function", None) or getattr(found, "fn", found), schema=schema)
    cls = _import(SHIPPED.get(str(class_name), class_name), "class_name", folder)
    if isinstance(cls, type) and issubclass(cls, ToolSet) and schema is not None:
        raise ConfigError(f"key 'tool_schema': {class_name} makes several tools and has their schemas itself")
    if not isinstance(cls, type) or not (hasattr(cls, "execute") or issubclass(cls, ToolSet)):
        raise ConfigError(f"key 'class_name': {class_name} is not a tool class")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):  # verl's BaseTool prints its schema
            return cls(config=dict(config), tool_schema=schema)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{class_name} cannot be made from its config: {type(error).__name__}: {error}") from error


def _import(spec: Any, key: str, folder: Path) -> Any:
    """The object that `pkg.mod.Name` or `pkg.mod:Name` names; modules beside the tools file come first."""
    if not isinstance(spec, str):
        raise ConfigError(f"key '{key}' must be a string, got {spec!r}")
    module_name, _, name = spec.rpartition(":" if ":" in spec else ".")
    if not module_name or not name:
        hint = nearest(spec, SHIPPED) if key == "class_name" else "write 'package.module:function'"
        raise ConfigError(f"key '{key}': '{spec}' has no module; {hint}")
    module = _import_module(module_name, spec, key, folder)
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            public = [known for known in vars(value) if not known.startswith("_")]
            raise ConfigError(f"key '{key}': {module_name} has no '{part}'; {nearest(part, public)}")
        value = getattr(value, part)
    return value


def _import_module(module_name: str, spec: str, key: str, folder: Path) -> ModuleType:
    top = module_name.partition(".")[0]
    loaded = sys.modules.get(top)
    beside = (folder / f"{top}.py").is_file() or (folder / top).is_dir()
    if loaded is not None and beside and top not in sys.stdlib_module_names:
        origin = getattr(loaded, "__file__", None)
        if origin is not None and folder not in Path(origin).resolve().parents and (folder / f"{top}.py").is_file():
            logger.warning("%s: module '%s' beside the tools file replaces the one from %s", folder, top, origin)
            for known in [known for known in sys.modules if known == top or known.startswith(f"{top}.")]:
                del sys.modules[known]
    place = str(folder)
    sys.path.insert(0, place)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and module_name.startswith(error.name):
            hint = _nearest_module(error.name, folder)
            raise ConfigError(f"key '{key}': cannot import '{spec}': there is no module '{error.name}'{hint}") from error
        raise ConfigError(f"key '{key}': cannot import '{spec}': {type(error).__name__}: {error}") from error
    finally:
        # From now on after everything else, for what the module imports later.
        sys.path.remove(place)
        if place not in sys.path:
            sys.path.append(place)


def _nearest_module(name: str, folder: Path) -> str:
    beside = [path.stem for path in folder.glob("*.py")]
    hint = nearest(name, beside)
    return f"; {hint}" if hint.startswith("did you mean") else ""
