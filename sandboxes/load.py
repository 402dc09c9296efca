"""Sandboxes by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, cast

from agentloop.config import validate
from agentloop.errors import ConfigError, nearest
from agentloop.sandboxes.base import Sandbox

KINDS = {
    "process": "agentloop.sandboxes.process:ProcessSandbox",
    "bubblewrap": "agentloop.sandboxes.bubblewrap:BubblewrapSandbox",
    "docker": "agentloop.sandboxes.docker:DockerSandbox",
    "remote": "agentloop.sandboxes.remote:RemoteSandbox",
}
"""Kind to class. A class has a `Config` (a `Strict` model with `limits: Limits`) and is made with one."""


def load_sandbox(config: str | Mapping[str, Any] = "process", *, where: str = "sandbox") -> Sandbox:
    """The sandbox that `config` describes: a kind, or a mapping with `kind` and that kind's settings. Starts nothing.

    Raises `ConfigError` naming `where` (the file and key it came from), the key and the nearest right spelling.
    """
    settings = {"kind": config} if isinstance(config, str) else dict(config)
    if "kind" not in settings:
        raise ConfigError(f"{where}: key 'kind' is missing; known are: {', '.join(sorted(KINDS))}")
    kind = settings.pop("kind")
    if kind not in KINDS:
        raise ConfigError(f"{where}: there is no sandbox of kind {kind!r}; {nearest(str(kind), KINDS)}")
    module, _, name = KINDS[kind].partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{where}: kind '{kind}' needs the package '{error.name}', which is not installed") from error
    return cast(Sandbox, found(validate(found.Config, settings, where)))
