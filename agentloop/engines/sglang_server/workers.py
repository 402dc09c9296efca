"""What there is to know about one SGLang server, asked over HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentloop.engines.sglang_server.http import Http, ServerLost, ServerRefused

Experts = tuple[int, int]
UNNUMBERED = -1
"""Instead of a version: weights to which the server gave no number («default»)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may hold; `None` where it is not known."""

    context: int | None = None
    """Tokens of input and output together."""
    max_input: int | None = None
    vocabulary: int | None = None
    experts: Experts | None = None
    """(layers, experts a token) of a mixture of experts."""
    model_path: str | None = None
    """As the server was started with; a weight update changes what the server itself reports."""


async def limits(http: Http, url: str, timeout_s: float) -> Limits:
    """Ask a server (`/model_info`, `/v1/models`, `/server_info`) and read its model's `config.json` if it lies on a disk that
    this process sees. Raises `ServerLost` and `ServerRefused`."""
    info = await _model_info(http, url, timeout_s)
    models = await _optional(http, url, "/v1/models", timeout_s)
    server = await _optional(http, url, "/server_info", timeout_s)
    contexts = [card.get("max_model_len") for card in models.get("data", ()) if card.get("max_model_len")]
    most = server.get("max_req_input_len")
    path = info.get("model_path")
    config = _model_config(path)
    return Limits(
        context=contexts[0] if contexts else None,
        # The scheduler refuses inputs of this many tokens and more.
        max_input=None if most is None else most - 1,
        vocabulary=config.get("vocab_size"),
        experts=_experts(config),
        model_path=path,
    )


async def _model_info(http: Http, url: str, timeout_s: float) -> Mapping[str, Any]:
    info = await http.get(url, "/model_info", timeout_s=timeout_s)
    if not isinstance(info, Mapping) or "weight_version" not in info:
        raise ServerLost(url, f"/model_info answered what no SGLang server does: {str(info)[:80]}", status=200)
    return info


async def _optional(http: Http, url: str, path: str, timeout_s: float) -> Mapping[str, Any]:
    """The answer, or an empty one from a server that cannot tell."""
    try:
        answer = await http.get(url, path, timeout_s=timeout_s)
    except ServerRefused:
        return {}
    except ServerLost as error:
        if error.status is None:
            raise
        return {}
    return answer if isinstance(answer, Mapping) else {}


async def version(http: Http, url: str, timeout_s: float) -> str:
    """The weight version that a server reports."""
    return str((await _model_info(http, url, timeout_s))["weight_version"])


async def router_workers(http: Http, url: str, timeout_s: float) -> tuple[str, ...] | None:
    """The workers of a router; `None` if `url` is a server, which knows no such path."""
    try:
        answer = await http.get(url, "/workers", timeout_s=timeout_s, key="admin")
    except ServerRefused:
        return None
    if not isinstance(answer, Mapping) or not isinstance(answer.get("workers"), list):
        return None
    urls = tuple(str(worker["url"]).rstrip("/") for worker in answer["workers"] if worker.get("url"))
    if not urls:
        raise ServerLost(url, "the router has no workers")
    # With data parallelism a router may list one worker as url@rank for each rank.
    return tuple(dict.fromkeys(worker.partition("@")[0] for worker in urls))


def rank(raw: str | None) -> int:
    """For comparing weight versions: what has no number is older than everything that has one."""
    known = number(raw)
    return UNNUMBERED if known is None else known


def number(raw: str | None) -> int | None:
    """A weight version as a number; `None` for SGLang's own «default» and the like."""
    try:
        return None if raw is None else int(raw)
    except ValueError:
        return None


def _model_config(path: str | None) -> dict[str, Any]:
    if not path:
        return {}
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    assert isinstance(config, dict)
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def _experts(config: Mapping[str, Any]) -> Experts | None:
    layers, top_k = config.get("num_hidden_layers"), config.get("num_experts_per_tok")
    return (int(layers), int(top_k)) if layers and top_k else None
