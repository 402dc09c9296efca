"""From a call's arguments to the request that an operation describes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

from agentloop.tools.base import InvalidArguments
from agentloop.tools.http_tool.spec import FORM, TEXT, Operation, Parameter

_HEADER_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    url: str
    """Percent-encoded."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None


def build_request(
    operation: Operation, arguments: Mapping[str, Any], query: Mapping[str, str], headers: Mapping[str, str]
) -> Request:
    """The request; `query` and `headers` are the configuration's and go before the model's.

    Raises `InvalidArguments` for values that would change the path, or that no header can carry.
    """
    path = quote(operation.path, safe="/{}%:@!$&'()*+,;=~")
    pairs: list[tuple[str, str]] = []
    sent: dict[str, str] = {}
    fields: dict[str, Any] = {}
    whole: Any = None
    for parameter in operation.parameters:
        if parameter.argument not in arguments:
            if parameter.place == "path":
                raise InvalidArguments(f"argument '{parameter.argument}' is missing")
            continue
        value = arguments[parameter.argument]
        if parameter.place == "path":
            path = path.replace("{" + parameter.name + "}", _path_value(parameter, value))
        elif parameter.place == "query":
            pairs += _query_pairs(parameter, value)
        elif parameter.place == "header":
            sent[parameter.name] = _header_value(parameter, value)
        elif parameter.place == "field":
            fields[parameter.name] = value
        else:
            whole = value
    pairs = [(name, value) for name, value in pairs if name not in query] + list(query.items())
    url = operation.server + path + (f"?{urlencode(pairs, quote_via=quote)}" if pairs else "")
    body = _body(operation, fields, whole)
    if body is not None and operation.media_type is not None:
        sent["Content-Type"] = operation.media_type + ("; charset=utf-8" if operation.media_type == TEXT else "")
    ours = {name.lower() for name in headers}
    sent = {name: value for name, value in sent.items() if name.lower() not in ours}
    return Request(operation.method, url, {**sent, **headers}, body)


def _body(operation: Operation, fields: dict[str, Any], whole: Any) -> bytes | None:
    if operation.media_type is None or (whole is None and not fields):
        return None
    if operation.media_type == FORM:
        pairs = [
            (name, _scalar(item)) for name, value in fields.items() for item in (value if isinstance(value, list) else [value])
        ]
        return urlencode(pairs, errors="replace").encode()
    if operation.media_type == TEXT and isinstance(whole, str):
        return whole.encode(errors="replace")
    return json.dumps(fields if whole is None else whole).encode()


def _path_value(parameter: Parameter, value: Any) -> str:
    text = _joined(parameter, value, ",")
    if not text or {".", ".."} & set(re.split(r"[/\\]", text)):
        raise InvalidArguments(f"argument '{parameter.argument}' cannot be {text!r:.60}")
    return quote(text, safe="", errors="replace")


def _header_value(parameter: Parameter, value: Any) -> str:
    text = _joined(parameter, value, ",")
    if not _HEADER_VALUE.fullmatch(text):
        raise InvalidArguments(f"argument '{parameter.argument}' holds characters that a header cannot carry")
    return text


def _query_pairs(parameter: Parameter, value: Any) -> list[tuple[str, str]]:
    name = parameter.name
    if parameter.as_json:
        return [(name, json.dumps(value))]
    if isinstance(value, dict):
        if parameter.style == "deepObject":
            return [(f"{name}[{key}]", _scalar(item)) for key, item in value.items()]
        if parameter.explode:
            return [(str(key), _scalar(item)) for key, item in value.items()]
    elif isinstance(value, list) and parameter.explode:
        return [(name, _scalar(item)) for item in value]
    between = {"spaceDelimited": " ", "pipeDelimited": "|"}.get(parameter.style, ",")
    return [(name, _joined(parameter, value, between))]


def _joined(parameter: Parameter, value: Any, between: str) -> str:
    if parameter.as_json:
        return json.dumps(value)
    if isinstance(value, list):
        return between.join(_scalar(item) for item in value)
    if isinstance(value, dict):
        if parameter.explode:
            return between.join(f"{key}={_scalar(item)}" for key, item in value.items())
        return between.join(f"{key}{between}{_scalar(item)}" for key, item in value.items())
    return _scalar(value)


def _scalar(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode(errors="replace").decode()
