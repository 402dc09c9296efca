"""Plain Python functions as tools."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, overload

from pydantic import ValidationError

from agentloop.errors import ConfigError
from agentloop.tools.base import BaseTool, InvalidArguments, ToolSchema
from agentloop.tools.schema import arguments_model, clash, of_model, parse_docstring
from agentloop.tools.threads import run_blocking


class FunctionTool(BaseTool):
    """A function that the model can call; stateless.

    The schema comes from the signature's type hints and the docstring (Google style). Arguments reach the function as the
    types that it names: a pydantic model as that model, `Literal` checked. A sync function runs in a thread of its own.
    It may return whatever `to_answer` takes. The object can still be called as the function it wraps.
    """

    def __init__(self, function: Callable[..., Any], *, name: str | None = None, schema: Any = None) -> None:
        """`schema` replaces the derived one; `ConfigError` if it clashes with the signature."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ConfigError(f"{function.__qualname__} is a generator; a tool returns its answer, it does not yield it")
        self.function = function
        self._arguments = arguments_model(function, hints_required=schema is None)
        derived = of_model(self._arguments)
        if schema is None:
            description, _ = parse_docstring(inspect.getdoc(function) or "")
            body = {"name": name or function.__name__, "description": description, "parameters": derived}
            schema = {"type": "function", "function": body}
        else:
            schema = ToolSchema.of(schema)
            if problem := clash(schema, derived):
                raise ConfigError(f"the schema clashes with the signature of {function.__qualname__}: {problem}")
        super().__init__(tool_schema=schema)
        if name is not None:
            self.tool_schema.function.name = self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> Any:
        try:
            checked = self._arguments.model_validate(parameters)
        except ValidationError as error:
            raise InvalidArguments("; ".join(_sentence(problem) for problem in error.errors()[:3])) from error
        values = {
            str(field.alias): getattr(checked, key)
            for key, field in type(checked).model_fields.items()
            if key in checked.model_fields_set
        }
        if inspect.iscoroutinefunction(self.function):
            return await self.function(**values)
        return await run_blocking(self.function, **values)


def _sentence(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    return f"argument '{where}': {problem['msg'].lower()}"


@overload
def tool(function: Callable[..., Any], /) -> FunctionTool: ...
@overload
def tool(*, name: str | None = None, schema: Any = None) -> Callable[[Callable[..., Any]], FunctionTool]: ...
def tool(
    function: Callable[..., Any] | None = None, /, *, name: str | None = None, schema: Any = None
) -> FunctionTool | Callable[[Callable[..., Any]], FunctionTool]:
    """Make a function a tool: `@tool`, or `@tool(name="search")`."""
    if function is not None:
        return FunctionTool(function)
    return lambda function: FunctionTool(function, name=name, schema=schema)


def as_tool(thing: Any) -> Any:
    """A tool from a tool, from a function, or from verl's `FunctionTool`; `ConfigError` for anything else."""
    if isinstance(thing, type):
        raise ConfigError(f"{thing.__qualname__} is a class; give an instance, or name it under 'class_name'")
    if hasattr(thing, "execute") and hasattr(thing, "tool_schema"):
        return thing
    if callable(getattr(thing, "fn", None)) and hasattr(thing, "tool_schema"):  # verl.tools.function_tool.FunctionTool
        return FunctionTool(thing.fn, name=thing.name, schema=thing.tool_schema)
    if inspect.isroutine(thing):
        return FunctionTool(thing)
    raise ConfigError(f"{thing!r} is neither a tool nor a function")


def load_function_file(path: str | Path) -> list[Any]:
    """The tools of a Python file: functions under `@tool`, and those under verl's `@function_tool` (verl's
    `function_tool_path`). The file is run once a process. `ConfigError` if it is missing, fails or has no tools."""
    path = Path(path).resolve()
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    # The name that verl gives the module, so that a file which verl loads too is run once.
    name = "_verl_function_tools_" + str(path).replace("/", "_").replace(".", "_")
    found: list[Any] = []
    try:
        if "verl.tools" in path.read_text(encoding="utf-8"):
            from verl.tools.function_tool import load_function_tools_from_path

            found += load_function_tools_from_path(str(path))
            module = sys.modules[name]
        else:
            module = sys.modules.get(name) or _run(path, name)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path}: cannot be loaded: {type(error).__name__}: {error}") from error
    found += [value for value in vars(module).values() if isinstance(value, BaseTool)]
    if not found:
        raise ConfigError(f"{path}: no function has the decorator @tool (or verl's @function_tool)")
    return [as_tool(thing) for thing in found]


def _run(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
