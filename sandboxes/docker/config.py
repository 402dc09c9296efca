"""The settings of the kind `docker`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from agentloop.config import Strict
from agentloop.errors import nearest
from agentloop.sandboxes.base import Limits

DEFAULT_IMAGE = "agentloop-sandbox:latest"


LAYERS = (
    "process namespace",
    "network namespace",
    "read-only image",
    "own user",
    "no capabilities",
    "no new privileges",
    "seccomp",
    "cgroup memory",
    "cgroup pids",
    "cgroup cpu",
    "disk",
    "inodes",
    "open files",
    "memory events",
    "CPU time",
)
"""The lines of defence, as the driver in the container finds them."""


class DockerConfig(Strict):
    """Where the engine is, what runs in it, and how much at once."""

    host: str | None = None
    """The engine's address (`unix:///run/docker.sock`, `tcp://…`); `None`: `DOCKER_HOST`, then the default socket."""
    image: str = DEFAULT_IMAGE
    """Any image with `python3` (3.8 or newer) and `/bin/sh`. The default is made by `agentloop sandbox image`."""
    python: str = "python3"
    """The interpreter in the image."""
    preload: tuple[str, ...] = ()
    """Modules that are imported once per container, before any code; they must not start threads."""
    max_containers: int = Field(8, ge=1)
    """Sessions and stateless runs at once, in `scope`; more wait. Spares are not counted."""
    scope: Literal["node", "process"] = "node"
    """`node`: all processes of this user on this machine that use the same engine share `max_containers` (by lock files in
    the temporary folder); `process`: each has as many."""
    spares: int = Field(1, ge=0)
    """Started containers that this process keeps ready for sessions with the sandbox's own `limits`."""
    cpus: float = Field(1.0, gt=0)
    """CPUs that one container may use."""
    user: str = Field("65534:65534", pattern=r"^[1-9]\d*:[1-9]\d*$")
    """Numeric user and group in the container, neither of them root."""
    seccomp: Literal["agentloop", "engine"] = "agentloop"
    """Whose list of system calls: ours, which is stricter, or the engine's."""
    runtime: str | None = None
    """The engine's runtime, such as `runsc` (gVisor), if not its default."""
    require: tuple[str, ...] = LAYERS
    """Layers without which it refuses to start (`agentloop sandbox check docker` shows them); all of them by default."""
    start_timeout_s: float = Field(30.0, gt=0)
    """Seconds for making and starting one container, and for the engine's every other answer."""
    limits: Limits = Limits()
    """What a session may use unless it names limits of its own."""

    @field_validator("require")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in LAYERS:
                raise ValueError(f"there is no layer '{name}'; {nearest(name, LAYERS)}")
        return names
