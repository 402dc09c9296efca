"""One operation of an OpenAPI document (3.0 or 3.1): where it is, and which arguments it takes.

Source: OpenAPI 3.0.3 and 3.1.0, «Parameter Object» (styles), «Reference Object» (only references within the document are
followed), «Schema Object» (3.0's `nullable` and boolean `exclusiveMinimum` become what JSON Schema says for them).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from yarl import URL

from agentloop.errors import ConfigError, nearest

METHODS = ("get", "put", "post", "delete", "options", "head", "patch")
IGNORED_HEADERS = {"accept", "content-type", "authorization"}  # as OpenAPI says: other parts of the document describe them
FORBIDDEN_HEADERS = {
    "host",
    "cookie",
    "connection",
    "content-length",
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "accept-encoding",
    "proxy-authorization",
}
JSON, FORM, TEXT = "application/json", "application/x-www-form-urlencoded", "text/plain"

_STYLES = {
    "path": ("simple",),
    "header": ("simple",),
    "query": ("form", "spaceDelimited", "pipeDelimited", "deepObject"),
}
_SAYS_NOTHING = {"title", "example", "xml", "externalDocs", "discriminator", "deprecated", "readOnly", "writeOnly", "nullable"}
_MAX_DEPTH = 40
_MAX_PATTERN = 100


@dataclass(frozen=True, slots=True)
class Parameter:
    argument: str
    """How the model calls it: its name, with `_path`, `_query`, `_header` behind it where two have the same."""
    name: str
    place: str
    """`path`, `query`, `header`, `field` (of the body) or `body` (all of it)."""
    required: bool
    schema: dict[str, Any]
    style: str = "form"
    explode: bool = True
    as_json: bool = False
    """The value is written as JSON (a parameter with `content`)."""


@dataclass(frozen=True, slots=True)
class Operation:
    id: str
    method: str
    """In capitals."""
    server: str
    """`https://host[:port][/base]`, without a slash at the end."""
    path: str
    """With `{name}` for path parameters."""
    description: str
    parameters: tuple[Parameter, ...]
    media_type: str | None
    """Of the request's body."""

    def arguments_schema(self, hidden: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON schema of the arguments, without those that are `hidden`."""
        shown = [parameter for parameter in self.parameters if parameter.argument not in hidden]
        schema: dict[str, Any] = {"type": "object", "properties": {p.argument: p.schema for p in shown}}
        if required := [parameter.argument for parameter in shown if parameter.required]:
            schema["required"] = required
        return schema


def read_operation(path: Path, operation_id: str, server: str | None) -> Operation:
    """The operation with this `operationId`; `server` in place of the document's. `ConfigError` names the file."""
    document = _Document(path)
    raw_path, item, method, raw = document.find(operation_id)
    where = f"{path}: operation '{operation_id}'"
    parameters = [*document.parameters(item, raw, raw_path, where)]
    body, media_type = document.body(raw, where, {parameter.argument for parameter in parameters})
    text = "\n".join(part.strip() for part in (raw.get("summary"), raw.get("description")) if isinstance(part, str) and part)
    place = document.server(server, raw, item, where)
    return Operation(operation_id, method.upper(), place, raw_path, text, (*parameters, *body), media_type)


class _Document:
    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_file():
            raise ConfigError(f"config.spec: {path}: {'is a folder' if path.is_dir() else 'no such file'}")
        try:
            text = path.read_text(encoding="utf-8")
            loaded = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
        except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"config.spec: {path}: cannot be read: {' '.join(str(error).split())[:200]}") from error
        version = str(loaded.get("openapi", "")) if isinstance(loaded, dict) else ""
        if not re.match(r"3\.[01](\.|$)", version):
            found = f"openapi: {version}" if version else "no key 'openapi'"
            raise ConfigError(f"config.spec: {path}: expected an OpenAPI document of version 3.0 or 3.1, found {found}")
        self._root: dict[str, Any] = _plain(loaded)
        self._old = version.startswith("3.0")

    # -- where things are -----------------------------------------------------------------------------------------------

    def find(self, operation_id: str) -> tuple[str, dict[str, Any], str, dict[str, Any]]:
        """(path, path item, method, operation)."""
        known: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {}
        for path, raw in (self._root.get("paths") or {}).items():
            item = self._mapping(raw, f"{self._path}: paths.{path}")
            for method in METHODS:
                operation = item.get(method)
                if isinstance(operation, dict) and isinstance(operation.get("operationId"), str):
                    known.setdefault(operation["operationId"], (path, item, method, operation))
        if operation_id not in known:
            hint = nearest(operation_id, known) if known else "none of its operations has an operationId"
            raise ConfigError(f"config.operation: {self._path} has no operation '{operation_id}'; {hint}")
        return known[operation_id]

    def server(self, given: str | None, operation: Mapping[str, Any], item: Mapping[str, Any], where: str) -> str:
        url = given
        if url is None:
            for holder in (operation, item, self._root):
                if isinstance(servers := holder.get("servers"), list) and servers and isinstance(servers[0], dict):
                    url = str(servers[0].get("url", ""))
                    for name, variable in (servers[0].get("variables") or {}).items():
                        url = url.replace("{" + str(name) + "}", str(variable.get("default", "")))
                    break
        parts = urlsplit(url or "")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
            problem = f"its server '{url}' is no" if url else "it names no server with an"
            key = "config.server: expected" if given is not None else f"{where}: {problem}"
            raise ConfigError(
                f"{key} http:// or https:// URL" + ("; set config.server" if given is None else f", got '{given}'")
            )
        return str(URL(url or "")).rstrip("/")  # the host as URLs have it

    def _mapping(self, raw: Any, where: str) -> dict[str, Any]:
        """`raw`, or what it refers to."""
        for _ in range(_MAX_DEPTH):
            if not isinstance(raw, dict):
                raise ConfigError(f"{where}: expected a mapping, found {raw!r:.60}")
            if "$ref" not in raw:
                return raw
            raw = self._follow(raw["$ref"], where)
        raise ConfigError(f"{where}: its references lead in a circle")

    def _follow(self, reference: Any, where: str) -> Any:
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise ConfigError(f"{where}: '{reference}' lies outside of the document; only references within it are followed")
        found: Any = self._root
        for part in unquote(reference[1:]).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and part.isdigit() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, dict) and part in found:
                found = found[part]
            else:
                hint = nearest(part, found) if isinstance(found, dict) else "nothing is known here"
                raise ConfigError(f"{where}: there is no '{reference}'; {hint}")
        return found

    # -- arguments ------------------------------------------------------------------------------------------------------

    def parameters(self, item: dict[str, Any], operation: dict[str, Any], path: str, where: str) -> Iterator[Parameter]:
        merged: dict[tuple[str, str], dict[str, Any]] = {}
        for raw in [*(item.get("parameters") or []), *(operation.get("parameters") or [])]:
            parameter = self._mapping(raw, f"{where}: parameters")
            merged[str(parameter.get("name")), str(parameter.get("in"))] = parameter
        found: list[Parameter] = []
        for (name, place), raw in merged.items():
            here = f"{where}: parameter '{name}'"
            if place == "header" and name.lower() in IGNORED_HEADERS | FORBIDDEN_HEADERS:
                continue
            if place == "cookie" and not raw.get("required"):
                continue
            if place not in _STYLES:
                raise ConfigError(f"{here}: 'in: {place}' is not supported; {nearest(place, _STYLES)}")
            style = raw.get("style", _STYLES[place][0])
            if style not in _STYLES[place]:
                raise ConfigError(
                    f"{here}: 'style: {style}' is not supported in a {place}; {nearest(str(style), _STYLES[place])}"
                )
            content = raw.get("content")
            holder = next(iter(content.values()), {}) if isinstance(content, dict) else raw
            schema = _object(self._schema(holder.get("schema"), here))
            if isinstance(raw.get("description"), str):
                schema = {**schema, "description": raw["description"].strip()}
            explode = bool(raw.get("explode", style == "form"))
            required = bool(raw.get("required")) or place == "path"
            found.append(Parameter(name, name, place, required, schema, style, explode, as_json=isinstance(content, dict)))
        named = {parameter.name for parameter in found if parameter.place == "path"}
        for name in re.findall(r"\{([^{}]*)\}", path):
            if name not in named:
                raise ConfigError(f"{where}: path parameter '{name}' is not described; {nearest(name, named)}")
        names = [parameter.name for parameter in found]
        for p in found:
            argument = p.name if names.count(p.name) == 1 else f"{p.name}_{p.place}"
            yield Parameter(argument, p.name, p.place, p.required, p.schema, p.style, p.explode, p.as_json)

    def body(self, operation: dict[str, Any], where: str, taken: set[str]) -> tuple[list[Parameter], str | None]:
        """The body's fields as arguments, or the whole body as one."""
        if not operation.get("requestBody"):
            return [], None
        here = f"{where}: requestBody"
        body = self._mapping(operation["requestBody"], here)
        content = body.get("content") or {}
        types = {str(name).partition(";")[0].strip().lower(): name for name in content}
        kind = next((kind for kind in (JSON, FORM, TEXT) if kind in types), None)
        kind = kind or next((name for name in types if name.endswith("+json")), None)
        if kind is None:
            raise ConfigError(
                f"{here}: none of {', '.join(map(str, content)) or 'no types'} is supported; known are: {JSON}, {FORM}"
            )
        schema = _object(self._schema((content[types[kind]] or {}).get("schema"), here))
        required = bool(body.get("required"))
        fields = schema.get("properties") or {}
        flat = schema.get("type") == "object" and fields and not schema.get("additionalProperties")
        flat = flat and not taken & set(fields) and not {"oneOf", "anyOf", "allOf", "not"} & set(schema)
        if kind == FORM and not flat:
            raise ConfigError(f"{here}: a form must be an object with 'properties' of its own")
        if not flat:
            name = "body" if "body" not in taken else "request_body"
            return [Parameter(name, name, "body", required, schema)], kind
        needed = set(schema.get("required") or []) if required else set()
        return [Parameter(name, name, "field", name in needed, _object(inner)) for name, inner in fields.items()], kind

    def _schema(self, node: Any, where: str, inside: tuple[str, ...] = (), depth: int = 0) -> Any:
        """A schema without references: what refers to itself is open where it does."""
        if depth > _MAX_DEPTH:
            raise ConfigError(f"{where}: its schema is nested more than {_MAX_DEPTH} deep")
        if isinstance(node, list):
            return [self._schema(item, where, inside, depth + 1) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            reference = node["$ref"]
            if reference in inside:
                return {}
            rest = {} if self._old else {key: value for key, value in node.items() if key != "$ref"}
            target = self._follow(reference, where)
            merged = {**target, **rest} if isinstance(target, dict) else target
            return self._schema(merged, where, (*inside, reference), depth + 1)
        out: dict[str, Any] = {}
        for key, value in node.items():
            if key in _SAYS_NOTHING or str(key).startswith("x-"):
                continue
            if key in ("pattern", "patternProperties"):  # for the model to read; matching what it wrote could take for ever
                if key == "pattern" and "description" not in node and len(str(value)) <= _MAX_PATTERN:
                    out["description"] = f"matches {value}"
                continue
            if key == "properties" and isinstance(value, dict):
                inner = {name: self._schema(body, where, inside, depth + 1) for name, body in value.items()}
                out[key] = {name: body for name, body in inner.items() if not self._read_only(value[name])}
            elif key in ("default", "const", "enum", "examples", "required"):
                out[key] = value
            else:
                out[key] = self._schema(value, where, inside, depth + 1)
        if isinstance(out.get("required"), list) and "properties" in out:
            out["required"] = [name for name in out["required"] if name in out["properties"] or name not in node["properties"]]
        if self._old:
            _modernise(out, nullable=bool(node.get("nullable")))
        return out

    def _read_only(self, node: Any) -> bool:
        return isinstance(node, dict) and bool(self._mapping(node, str(self._path)).get("readOnly"))


def _modernise(schema: dict[str, Any], *, nullable: bool) -> None:
    """OpenAPI 3.0's own words as JSON Schema's."""
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(schema.get(exclusive), bool) and schema.pop(exclusive) and bound in schema:
            schema[exclusive] = schema.pop(bound)
    if nullable and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
        if "enum" in schema and None not in schema["enum"]:
            schema["enum"] = [*schema["enum"], None]


def _object(schema: Any) -> dict[str, Any]:
    """A schema that is no mapping (`true`) says nothing."""
    return schema if isinstance(schema, dict) else {}


def _plain(node: Any) -> Any:
    """YAML's keys as text, and its dates as they were written."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(item) for item in node]
    return node.isoformat() if isinstance(node, datetime.date) else node
