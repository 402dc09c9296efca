"""Settings whose value stands in an environment variable, and keeping such values out of what a tool says."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from pydantic import field_validator

from agentloop.config import Strict
from agentloop.errors import ConfigError, nearest

HIDDEN = "[secret]"


class FromEnvironment(Strict):
    """`{env: NAME}`: the value of an environment variable; `{env: NAME, format: "Bearer {}"}` puts text around it."""

    env: str
    format: str = "{}"

    @field_validator("format")
    @classmethod
    def _one_place(cls, value: str) -> str:
        if value.count("{}") != 1:
            raise ValueError("expected one '{}', where the value goes")
        return value


Setting = str | FromEnvironment


def resolve(settings: Mapping[str, Setting], where: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The settings' values, and those of them that came from the environment: what must not be shown.

    Raises `ConfigError` for a variable that is not set.
    """
    values: dict[str, str] = {}
    hidden: list[str] = []
    for key, setting in settings.items():
        if isinstance(setting, str):
            values[key] = setting
            continue
        found = os.environ.get(setting.env)
        if not found:
            hint = nearest(setting.env, os.environ)
            hint = f"; {hint}" if hint.startswith("did you mean") else ""
            raise ConfigError(f"{where}.{key}: the environment variable '{setting.env}' is not set{hint}")
        values[key] = setting.format.replace("{}", found)
        hidden.append(found)
    return values, tuple(hidden)


def redact(text: str, hidden: Iterable[str], *, cut: bool = False) -> str:
    """`text` with each of the hidden values as «[secret]»; of a text that was `cut`, also the beginning of one at its end."""
    longest_first = sorted(hidden, key=len, reverse=True)
    for value in longest_first:
        text = text.replace(value, HIDDEN)
    for value in longest_first if cut else ():
        for length in range(len(value) - 1, 2, -1):
            if text.endswith(value[:length]):
                return text[:-length] + HIDDEN
    return text
