"""The settings of the kind `remote`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr, field_validator

from agentloop.config import Strict
from agentloop.errors import ConfigError
from agentloop.sandboxes.base import Limits


class RemoteConfig(Strict):
    """Where the services are, and what is done when one of them fails."""

    endpoints: tuple[str, ...] = Field(min_length=1)
    """Base addresses, such as `http://node7:8080`: agentloop's own service (`agentloop sandbox serve`) or SandboxFusion."""
    token: SecretStr | None = None
    """Bearer token for all of them."""
    token_file: Path | None = None
    """A file that holds it instead."""
    max_concurrency: int = Field(64, ge=1)
    """Requests of this process at once. What a node or a cluster may do at once is the services' own admission limit."""
    connect_timeout_s: float = Field(5.0, gt=0)
    overhead_s: float = Field(30.0, gt=0)
    """Seconds that a request may take beyond its run's own timeout: the service's queue, transport and retries."""
    compile_timeout_s: float = Field(10.0, gt=0)
    """For languages that are compiled."""
    max_attempts: int = Field(4, ge=1)
    """Times that a request is sent. Retried is only what cannot have run: no connection, 429, and 503 with Retry-After."""
    idempotent: bool = False
    """Running code twice does no harm: then also retry what was sent and never answered, and 5xx. Sessions never are."""
    failures_to_eject: int = Field(3, ge=1)
    """Failures in a row after which an endpoint gets no more requests until it answers a probe. One where nothing listens is
    ejected at once."""
    probe_interval_s: float = Field(2.0, gt=0)
    probe_timeout_s: float = Field(5.0, gt=0)
    languages: tuple[str, ...] = ("python", "sh", "bash")
    """What the services run."""
    limits: Limits = Limits()
    """SandboxFusion is told of `timeout_s` and `memory_mb` only; agentloop's service of all."""

    @field_validator("endpoints")
    @classmethod
    def _addresses(cls, endpoints: tuple[str, ...]) -> tuple[str, ...]:
        for url in endpoints:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"'{url}' is no address: expected http://host:port")
        if len(set(endpoints)) < len(endpoints):
            raise ValueError("an address is named twice")
        return tuple(url.rstrip("/").removesuffix("/run_code") for url in endpoints)

    def bearer(self) -> str | None:
        """The token, wherever it is kept. Raises `ConfigError` if its file cannot be read."""
        if self.token_file is None:
            return self.token.get_secret_value() if self.token is not None else None
        try:
            return self.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"sandbox: key 'token_file': {self.token_file} cannot be read: {error}") from error
