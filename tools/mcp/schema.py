"""A tool's schema from a server that is not trusted: bounded, and without what costs or reaches something when it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator

from agentloop.errors import ConfigError

MAX_SCHEMA_CHARS = 20_000
MAX_DESCRIPTION_CHARS = 4_000
_MAX_DEPTH = 30

# Regular expressions of a stranger would be run over what the model wrote; the rest says nothing to a model.
_LEFT_OUT = {"pattern", "patternProperties", "format", "$schema", "$id", "$anchor", "$dynamicAnchor", "$comment", "title"}
_OF_NAMES = {"properties", "$defs", "definitions", "dependentSchemas"}
_VALUES = {"default", "const", "enum", "examples", "required", "dependentRequired"}


def import_schema(name: str, description: str | None, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """An OpenAI function schema. `ConfigError` if the server's is too large, too deep, refers to other documents or is no
    JSON schema."""
    cleaned: dict[str, Any] = {"properties": {}, **_clean(dict(parameters), 0), "type": "object"}
    size = len(json.dumps(cleaned))
    if size > MAX_SCHEMA_CHARS:
        raise ConfigError(f"its schema has {size} characters, more than {MAX_SCHEMA_CHARS}; leave it out with 'exclude'")
    try:
        Draft202012Validator(cleaned).is_valid({})
    except RecursionError as error:
        raise ConfigError("its schema refers to itself without an end; leave it out with 'exclude'") from error
    except Exception as error:  # references that lead nowhere, types that are none
        raise ConfigError(f"its schema is wrong: {str(error).splitlines()[0]}; leave it out with 'exclude'") from error
    text = "".join(char for char in description or "" if char.isprintable() or char == "\n").strip()
    if len(text) > MAX_DESCRIPTION_CHARS:
        text = text[: MAX_DESCRIPTION_CHARS - 1] + "…"
    return {"type": "function", "function": {"name": name, "description": text, "parameters": cleaned}}


def _clean(node: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise ConfigError(f"its schema is nested more than {_MAX_DEPTH} deep; leave it out with 'exclude'")
    if isinstance(node, list):
        return [_clean(item, depth + 1) for item in node]
    if not isinstance(node, dict):
        return node
    out: dict[str, Any] = {}
    for key, value in node.items():
        if key in ("$ref", "$dynamicRef") and not (isinstance(value, str) and value.startswith("#")):
            raise ConfigError(f"its schema refers to another document ({value!r:.60}); leave it out with 'exclude'")
        if key in _LEFT_OUT:
            continue
        if key in _OF_NAMES and isinstance(value, dict):
            out[key] = {name: _clean(inner, depth + 1) for name, inner in value.items()}
        else:
            out[key] = value if key in _VALUES else _clean(value, depth + 1)
    return out
