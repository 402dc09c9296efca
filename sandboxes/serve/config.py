"""How a sandbox is offered."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass

from agentloop.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ServeConfig:
    host: str = "127.0.0.1"
    port: int = 8080
    token: str | None = None
    """What clients must send as bearer token; needed on any address that others can reach."""
    max_concurrency: int | None = None
    """Runs at once; `None`: as many as there are CPUs."""
    queue: int = 64
    """Runs that may wait for one of these."""
    max_sessions: int = 64
    session_idle_s: float = 1800.0
    grace_s: float = 30.0
    """Seconds that runs may finish in when it is told to stop."""

    def check(self) -> None:
        """Raises `ConfigError` where anyone on the network could run code here."""
        if self.token is None and not _is_loopback(self.host):
            hint = "give --token-file, or listen on 127.0.0.1"
            raise ConfigError(f"--host {self.host}: others can reach this address, and without a token run code here; {hint}")

    @property
    def places(self) -> int:
        return self.max_concurrency or os.cpu_count() or 1


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
