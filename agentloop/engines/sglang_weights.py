"""Weights on their way into SGLang: which names it takes, and what must go in one call."""

from __future__ import annotations

import difflib
import re
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from agentloop.engines.base import Weights
from agentloop.errors import EngineError
from agentloop.iterate import each

if TYPE_CHECKING:
    import torch

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LAYER = re.compile(r".*?\blayers\.\d+\b")
HALVES = ("q_a_proj", "kv_a_proj_with_mqa")
"""SGLang fuses these two of a layer's latent attention (DeepSeek) in a buffer that lives for one call; if they come in two,
both are lost and nothing says so (`models/deepseek_common/deepseek_weight_loader.py`)."""


def shapes(model_path: str | None) -> dict[str, list[int]] | None:
    """Names and shapes of a checkpoint's tensors, from the headers of its safetensors files; `None` if this process does not
    see it."""
    from safetensors import safe_open

    files = sorted(Path(model_path).glob("*.safetensors")) if model_path else []
    if not files:
        return None
    found: dict[str, list[int]] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            found.update({name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()})  # noqa: SIM118
    return found


class Names:
    """Which names and shapes the model takes: those of the checkpoint that it was started from.

    SGLang itself skips a name that it does not know, logs it and reports success. With no checkpoint to look at (`known` is
    `None`) every name passes.
    """

    def __init__(self, known: Mapping[str, list[int]] | None) -> None:
        self._known = known
        self._tied = known is not None and HEAD not in known and EMBEDDING in known
        self._one: torch.Tensor | None = None

    def take(self, name: str, tensor: torch.Tensor) -> str | None:
        """The name under which SGLang gets the tensor; `None` if it has it already under the other name of a tied pair.
        Raises `EngineError`. One object serves one update."""
        known = self._known
        if known is None:
            return name
        wanted = EMBEDDING if name == HEAD and self._tied else name
        if wanted not in known:
            raise EngineError(f"the model has no weight '{name}': {_hint(name, known)}")
        if list(tensor.shape) != known[wanted]:
            raise EngineError(f"the weight '{name}' has shape {known[wanted]} and was given {[*tensor.shape]}")
        if self._tied and wanted == EMBEDDING:
            if self._one is not None:
                if not bool((self._one == tensor.to(self._one)).all()):
                    raise EngineError(f"'{HEAD}' and '{EMBEDDING}' are one tensor in this model and were given two values")
                return None
            self._one = tensor.detach().clone()
        return wanted


async def buckets(
    weights: Weights, names: Names, place: Callable[[torch.Tensor], torch.Tensor], limit: int
) -> AsyncIterator[list[tuple[str, torch.Tensor]]]:
    """The weights in pieces of about `limit` bytes that split no layer. `place` copies a tensor to where it is handed over
    from; the source may use its buffers again. Raises `EngineError` for what SGLang would lose in silence."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size, layer = 0, ""
    async for name, tensor in each(weights):
        wanted = names.take(name, tensor)
        if wanted is None:
            continue
        match = LAYER.match(wanted)
        own = match[0] if match else ""
        if size >= limit and own != layer:
            yield _whole(bucket)
            bucket, size = [], 0
        layer = own
        bucket.append((wanted, place(tensor)))
        size += tensor.nbytes
    if bucket:
        yield _whole(bucket)


def _whole(bucket: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    first, second = HALVES
    have = {name for name, _ in bucket}
    for name in have:
        mate = name.replace(first, second)
        if mate != name and mate not in have:
            raise EngineError(f"'{name}' came without '{mate}': SGLang loses both unless they come together; sort by layer")
    return bucket


def _hint(name: str, known: Mapping[str, list[int]]) -> str:
    if re.search(r"\.experts\.(gate_up_proj|down_proj)$", name) and any(".experts.0." in other for other in known):
        return "SGLang takes one weight for each expert (experts.0.gate_proj.weight, …), not transformers' fused ones"
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"none of its {len(known)} is called like it"
