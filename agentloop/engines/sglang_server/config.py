"""The settings of the engine `sglang_server`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from agentloop.config import Strict

UpdateMode = Literal["abort", "retract", "in_place"]


class SGLangServerConfig(Strict):
    """Where the servers are, and how long to wait for what. Times are seconds."""

    urls: tuple[str, ...] = Field(min_length=1)
    """Replicas of one model: SGLang servers, or routers in front of them (`http://host:port`). One may be given as a string."""
    api_key: SecretStr | None = None
    """What the servers were started with as `--api-key`."""
    admin_api_key: SecretStr | None = None
    """What they were started with as `--admin-api-key`; without it `api_key` is used for everything."""

    connect_timeout_s: float = Field(5.0, gt=0)
    answer_timeout_s: float = Field(600.0, gt=0)
    """One whole answer, the server's queue included. A server that takes longer counts as hung: the request is aborted there
    and sent elsewhere."""
    control_timeout_s: float = Field(600.0, gt=0)
    """Updating weights, freeing and taking memory."""
    abort_timeout_s: float = Field(8.0, gt=0)
    """Until an aborted request must have ended on its server; one that has not is left behind, and aborted again when the
    server answers."""
    unavailable_s: float = Field(60.0, gt=0)
    """How long a request waits while no replica can take it, before it fails."""
    resends: int = Field(3, ge=0)
    """How often one request that was lost with its server, or that a server failed, is sent again. It bounds what a request
    that kills servers can do."""

    probe_interval_s: float = Field(5.0, gt=0)
    """Between two health checks of a replica, and so how soon one that came back is used again."""
    probe_timeout_s: float = Field(10.0, gt=0)
    """For an answer of the HTTP process (`/model_info`)."""
    health_timeout_s: float = Field(30.0, gt=0)
    """For `/health`, which generates a token: SGLang itself takes 1 s at least and gives up after 20 s."""
    failures_to_eject: int = Field(3, ge=1)
    """Failures in a row after which a replica gets no more requests, and those that it has go elsewhere. A refused connection
    ejects at once."""

    max_connections: int = Field(4096, ge=1)
    """Requests on the way at a time, all replicas together; further ones wait here. Half of the process's limit of open files
    (`ulimit -n`) if that is less."""
    update_mode: UpdateMode = "abort"
    """What happens to requests that are decoding when weights are updated. `abort`: they end with the tokens so far, under
    the old version, and the loop goes on from them under the new one: every token has an exact version, and the prefix cache
    is flushed. `retract` and `in_place`: they go on in the server (recomputed, or on their old keys and values) and are marked
    as mixed; the prefix cache cannot be flushed then, so later turns ask with a new cache key and compute their input anew."""
    weights_dir: Path | None = None
    """A folder that this process and all servers see under this path: `update_weights` writes the tensors there."""
    routed_experts: bool = False
    """Ask for the experts that each token was routed to; the servers need `--enable-return-routed-experts`."""
    ignore_eos: bool = False
    """Let the model's own end-of-sequence token end nothing, where a request names no stop tokens: for measurements."""
    vocab_size: int | None = Field(None, ge=1)
    """Of the model. SGLang checks no token id, and one outside of the vocabulary kills the server. By default read from the
    server's `config.json`, if this process sees that path; otherwise only negative ids are refused."""

    @field_validator("urls", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("urls")
    @classmethod
    def _addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        clean = tuple(url.rstrip("/") for url in urls)
        for url in clean:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"'{url}' is not an address such as http://host:30000")
        if len(set(clean)) < len(clean):
            twice = next(url for url in clean if clean.count(url) > 1)
            raise ValueError(f"'{twice}' is named twice")
        return clean
