"""The settings of the engine `sglang`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field

from agentloop.config import Strict
from agentloop.errors import ConfigError, nearest

UpdateMode = Literal["abort", "retract", "in_place"]

OURS = {
    "model_path": "it is a setting of its own, beside 'settings'",
    "weight_version": "it is a setting of its own, beside 'settings'",
    "custom_sigquit_handler": "the engine sets it, so that a process of SGLang that dies does not end this one",
}
"""SGLang's settings that are not the user's to give."""
ONLY: dict[str, tuple[Any, ...]] = {
    "tokenizer_worker_num": (1,),
    "nnodes": (1,),
    "is_embedding": (False,),
    "disaggregation_mode": ("null",),
}
"""SGLang's settings that only a server can have otherwise: start one, and use the engine `sglang_server`."""


class SGLangConfig(Strict):
    """What to serve, and how."""

    model_path: str
    """A folder, or a hub name."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """SGLang's own, by the names of its `ServerArgs` (`attention_backend`, `mem_fraction_static`, `tp_size`, …)."""
    weight_version: int = 0
    """Of the weights in `model_path`."""
    update_mode: UpdateMode = "abort"
    """What happens to requests that are decoding when weights are updated. `abort`: they end with the tokens so far, under
    the old version, and the loop goes on from them under the new one: every token has an exact version. `retract` and
    `in_place`: they go on (recomputed, or on their old keys and values), and are marked as mixed."""
    update_bucket_mib: int = Field(512, ge=1)
    """Weights are handed over in pieces of about this size, which are on the GPU twice for a moment. A layer is never split:
    one that is larger is a piece of its own."""
    ignore_eos: bool = False
    """Let the model's own end-of-sequence tokens end nothing, where a request names no stop tokens: for measurements."""
    flush_timeout_s: float = Field(120.0, gt=0)
    """Until SGLang must be idle, after its requests were aborted, before weights are changed or memory is freed."""


def check_settings(settings: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise `ConfigError` for a setting that SGLang does not know or that this engine cannot serve."""
    names = set(known)
    for name, value in settings.items():
        if name in OURS:
            raise ConfigError(f"{where}: '{name}' cannot be set here: {OURS[name]}")
        if name not in names:
            raise ConfigError(f"{where}: SGLang has no setting '{name}'; {_hint(name, names)}")
        if name in ONLY and value not in ONLY[name]:
            raise ConfigError(f"{where}: with {name}={value} SGLang needs a server; use the engine 'sglang_server'")


def _hint(name: str, names: set[str]) -> str:
    """The nearest spelling; SGLang has hundreds of settings, so never a list of them all."""
    hint = nearest(name, names - set(OURS))
    return hint if hint.startswith("did") else "its settings are the fields of sglang.srt.server_args.ServerArgs"
