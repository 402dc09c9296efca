"""JSON schemas: derived from functions and pydantic models, compared with signatures, checked against arguments."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_type_hints

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from pydantic import BaseModel, Field, create_model
from pydantic.errors import PydanticUserError

from agentloop.errors import ConfigError, nearest

Schema = dict[str, Any]

_MAX_PROBLEMS = 3  # of one call's arguments, in the text for the model
_MAX_MESSAGE = 200  # characters of one problem
_MAX_DEPTH = 100  # of the arguments; far from Python's own limit, which checking and copying them would meet


# -- deriving -----------------------------------------------------------------------------------------------------------


def of_model(model: type[BaseModel]) -> Schema:
    """The JSON schema of a pydantic model as a chat template should show it: no titles, no `$ref` where it can be helped,
    and `{"type": ["integer", "null"]}` for an optional integer."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    plain: Schema = _plain(schema, definitions, ())
    plain.setdefault("properties", {})
    if re.search(r"'\$ref': ", repr(plain)):  # a model that contains itself
        plain["$defs"] = {name: _plain(body, {}, ()) for name, body in definitions.items()}
    plain.pop("description", None)  # the model's docstring: the function's description says it
    return plain


def _plain(node: Any, definitions: Mapping[str, Any], inside: tuple[str, ...]) -> Any:
    if isinstance(node, list):
        return [_plain(item, definitions, inside) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        name = node["$ref"].rsplit("/", 1)[-1]
        if name not in definitions or name in inside:
            return node
        rest = {key: value for key, value in node.items() if key != "$ref"}
        return _plain({**definitions[name], **rest}, definitions, (*inside, name))
    out: Schema = {}
    for key, value in node.items():
        if key == "title" and isinstance(value, str):
            continue
        if key == "default" and value is None:
            continue
        if key == "properties":
            out[key] = {name: _plain(body, definitions, inside) for name, body in value.items()}
        elif key in ("default", "const", "enum", "examples"):
            out[key] = value
        else:
            out[key] = _plain(value, definitions, inside)
    options = out.get("anyOf")
    if options and len(options) == 2 and {"type": "null"} in options:
        other = options[0] if options[1] == {"type": "null"} else options[1]
        if isinstance(other.get("type"), str):
            del out["anyOf"]
            out = {**other, **out, "type": [other["type"], "null"]}
            if "enum" in out:
                out["enum"] = [*out["enum"], None]
    elif options and all(set(option) == {"type"} and isinstance(option["type"], str) for option in options):
        del out["anyOf"]
        out["type"] = [option["type"] for option in options]
    return out


def arguments_model(function: Callable[..., Any], *, hints_required: bool = True) -> type[BaseModel]:
    """A pydantic model of a function's parameters, described by their `Annotated` hints or the docstring's `Args:`.

    Raises `ConfigError` for a parameter without a type hint (unless `hints_required` is false: then it takes anything), for
    `*args`, `**kwargs` and positional-only parameters, and for a type that has no JSON schema.
    """
    label = str(getattr(function, "__qualname__", function))
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise ConfigError(f"a type hint of {label} cannot be resolved: {error}") from error
    _, described = parse_docstring(inspect.getdoc(function) or "")
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigError(f"parameter '{parameter}' of {label} cannot be a tool's argument; give it a name and a type hint")
        if name not in hints and hints_required:
            raise ConfigError(f"parameter '{name}' of {label} has no type hint")
        default = ... if parameter.default is parameter.empty else parameter.default
        hint = hints.get(name, Any)
        # An alias lets a parameter have any name: pydantic reserves some (a leading underscore, `model_…`, `schema`).
        field = Field(default, description=_annotated_description(hint) or described.get(name), alias=name)
        one: dict[str, Any] = {f"field_{len(fields)}": (hint, field)}
        try:
            create_model(label, **one).model_json_schema()
        except PydanticUserError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"the type hint of parameter '{name}' of {label} has no JSON schema: {reason}") from error
        fields |= one
    return create_model(f"{label} arguments", **fields)


def _annotated_description(hint: Any) -> str | None:
    """What `Annotated[…, "text"]` or `Annotated[…, Field(description="text")]` says of a parameter."""
    for metadata in getattr(hint, "__metadata__", ()):
        text = metadata if isinstance(metadata, str) else getattr(metadata, "description", None)
        if isinstance(text, str):
            return text
    return None


_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns|Return|Raises|Yields|Example|Examples|Note|Notes):\s*")
_ENTRY = re.compile(r"(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")


def parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """What comes before the first section, and the entries of `Args:`, of a Google-style docstring.

    Format: https://google.github.io/styleguide/pyguide.html#383-functions-and-methods
    """
    head: list[str] = []
    entries: dict[str, list[str]] = {}
    section = ""
    indent: int | None = None
    current: list[str] | None = None
    for line in inspect.cleandoc(text).splitlines():
        if match := _SECTION.fullmatch(line):
            section, current = match[1], None
        elif not section:
            head.append(line)
        elif section in ("Args", "Arguments", "Parameters") and line.strip():
            depth = len(line) - len(line.lstrip())
            indent = depth if indent is None else indent
            entry = _ENTRY.fullmatch(line.strip()) if depth <= indent else None
            if entry:
                current = entries.setdefault(entry[1], [entry[2]])
            elif current is not None:
                current.append(line.strip())
    return " ".join(" ".join(head).split()), {name: " ".join(lines).strip() for name, lines in entries.items()}


# -- written by hand ----------------------------------------------------------------------------------------------------

_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
_KEYWORDS = (
    *Draft202012Validator.VALIDATORS,
    *("type", "title", "description", "default", "examples", "deprecated", "$defs"),
    *("additionalItems", "definitions", "example", "id", "nullable"),  # of older drafts and of OpenAPI
)
_KEYS = {"tool_schema": ("type", "function"), "tool_schema.function": ("name", "description", "parameters", "strict", "return")}


def misspelt(schema: Any) -> str | None:
    """The first key of a written OpenAI function schema that is nearly a right one, or type that is none; `None` if all is
    well. Keys that resemble nothing are somebody's own."""
    if not isinstance(schema, Mapping):
        return None
    function = schema.get("function")
    places: list[tuple[str, Any, Sequence[str]]] = [("tool_schema", schema, _KEYS["tool_schema"])]
    places.append(("tool_schema.function", function, _KEYS["tool_schema.function"]))
    if isinstance(function, Mapping):
        places += _schemas("tool_schema.function.parameters", function.get("parameters"))
    for place, node, known in places:
        for key in node if isinstance(node, Mapping) else ():
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.75)
            if key not in known and close:
                return f"unknown key '{place}.{key}'; did you mean '{close[0]}'?"
        declared = node.get("type") if isinstance(node, Mapping) and known is _KEYWORDS else None
        for name in [declared] if isinstance(declared, str) else declared if isinstance(declared, list) else ():
            if name not in _TYPES:
                return f"key '{place}.type' cannot be {name!r}; {nearest(str(name), _TYPES)}"
    return None


def _schemas(place: str, node: Any) -> Iterator[tuple[str, Any, Sequence[str]]]:
    """A JSON schema and those of its properties and items, each with its place and the keywords that it may have."""
    if not isinstance(node, Mapping):
        return
    yield place, node, _KEYWORDS
    properties = node.get("properties")
    for name, body in properties.items() if isinstance(properties, Mapping) else ():
        yield from _schemas(f"{place}.properties.{name}", body)
    yield from _schemas(f"{place}.items", node.get("items"))


# -- comparing ----------------------------------------------------------------------------------------------------------


def clash(schema: Any, derived: Schema) -> str | None:
    """What is wrong with a written `schema` (a `ToolSchema`) given the parameters' `derived` one, or `None`.

    It clashes if it offers an argument that does not exist or a type that is not taken, or does not require one that has
    no default.
    """
    written: Schema = schema.to_dict()["function"].get("parameters", {})
    offered: Mapping[str, Any] = written.get("properties", {})
    taken: Mapping[str, Any] = derived["properties"]
    for name in offered:
        if name not in taken:
            return f"the schema offers '{name}', which the signature does not have; {nearest(name, taken)}"
    for name in derived.get("required", []):
        if name not in offered:
            return f"the signature needs '{name}', which the schema does not offer"
        if name not in written.get("required", []):
            return f"the signature needs '{name}', which the schema does not list under 'required'"
    for name, body in offered.items():
        wide, narrow = _types(body), _types(taken[name])
        extra = wide - narrow - ({"integer"} if "number" in narrow else set())
        if wide and narrow and extra:
            return f"the schema gives '{name}' the type '{sorted(extra)[0]}', the signature takes {', '.join(sorted(narrow))}"
    return None


def _types(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    declared = schema.get("type")
    if declared is None:
        options = [_types(option) for option in schema.get("anyOf", [])]
        return set().union(*options) if options and all(options) else set()
    return {declared} if isinstance(declared, str) else set(declared)


# -- checking -----------------------------------------------------------------------------------------------------------


class ArgumentCheck:
    """A tool's parameter schema, compiled once.

    An argument that the schema does not name is refused, unless the schema says `additionalProperties` itself: to a model
    that misspells an argument, being told beats being ignored.
    """

    def __init__(self, parameters: Schema) -> None:
        """Raises `ConfigError` if `parameters` is no valid JSON schema (draft 2020-12), or requires what it does not name."""
        try:
            Draft202012Validator.check_schema(parameters)
        except SchemaError as error:
            key = ".".join(["tool_schema.function.parameters", *map(str, error.absolute_path)])
            raise ConfigError(f"key '{key}': {error.message}") from error
        self._known = list(parameters.get("properties", {}))
        for name in parameters.get("required", []):
            if name not in self._known and not parameters.get("additionalProperties"):
                where = "key 'tool_schema.function.parameters.required'"
                raise ConfigError(f"{where}: there is no argument '{name}'; {nearest(name, self._known)}")
        self._validator = Draft202012Validator({"additionalProperties": False, **parameters})

    def __call__(self, arguments: Any) -> str | None:
        """What is wrong with the arguments, written for the model, or `None`."""
        if not isinstance(arguments, dict):
            return f"the arguments must be a JSON object, not {_kind(arguments)}"
        if _deeper_than(arguments, _MAX_DEPTH):
            return f"the arguments are nested more than {_MAX_DEPTH} deep"
        if self._validator.is_valid(arguments):
            return None
        problems: list[str] = []
        for error in self._validator.iter_errors(arguments):
            problems += self._problem(error, arguments)
        shown = problems[:_MAX_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        return "; ".join(shown)

    def _problem(self, error: ValidationError, arguments: Mapping[str, Any]) -> list[str]:
        where = ".".join(str(part) for part in error.absolute_path)
        if error.validator == "additionalProperties" and not where:
            if not self._known:
                return ["the tool takes no arguments"]
            unknown = [name for name in arguments if name not in self._known]
            return [f"there is no argument '{name[:60]}', {nearest(name[:60], self._known)}" for name in unknown]
        if error.validator == "required":  # one error for each that is missing: "'name' is a required property"
            missing = error.message.removesuffix(" is a required property").strip("'\"")
            return [f"argument '{f'{where}.' if where else ''}{missing}' is missing"]
        message = error.message if len(error.message) <= _MAX_MESSAGE else error.message[: _MAX_MESSAGE - 1] + "…"
        return [f"argument '{where}': {message}" if where else message]


def _deeper_than(value: Any, depth: int) -> bool:
    """Whether lists and mappings are nested more than `depth` deep, `value` included; without recursion."""
    level = [value]
    for _ in range(depth):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
        if not level:
            return False
    return any(isinstance(item, dict | list) for item in level)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
