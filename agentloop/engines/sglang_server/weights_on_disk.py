"""Weights on their way to servers over a shared folder."""

from __future__ import annotations

import asyncio
import difflib
import shutil
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentloop.errors import EngineError

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 4 << 30
"""Of one file; so much is in memory at a time beside the weights themselves."""


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


class Folder:
    """A folder of ours in the shared one, with a folder in it for each version that is still needed."""

    def __init__(self, shared: Path | None) -> None:
        self._shared = shared
        self._own: Path | None = None

    async def write(
        self,
        weights: Iterable[tuple[str, torch.Tensor]] | AsyncIterable[tuple[str, torch.Tensor]],
        version: int,
        known: Mapping[str, list[int]] | None,
    ) -> Path:
        """Write safetensors files. Raises `EngineError` for a name or a shape that is not in `known`, before anything of it
        is given to a server."""
        if self._shared is None:
            raise EngineError("the setting 'weights_dir' is missing: update_weights hands tensors over in a folder")
        if self._own is None:
            self._own = _new_folder("agentloop-weights-", self._shared)
        folder = _new_folder(f"{version}-", self._own)
        try:
            shard: dict[str, Any] = {}
            held, files = 0, 0
            async for name, tensor in _iterate(weights):
                if known is not None:
                    _check(name, list(tensor.shape), known)
                shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
                held += shard[name].nbytes
                if held >= SHARD_BYTES:
                    await _save(shard, folder / f"model-{files:05}.safetensors")
                    shard, held, files = {}, 0, files + 1
            if shard:
                await _save(shard, folder / f"model-{files:05}.safetensors")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    def keep_only(self, folder: Path) -> None:
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def clear(self) -> None:
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)


def _check(name: str, shape: list[int], known: Mapping[str, list[int]]) -> None:
    if name not in known and name == "lm_head.weight" and "model.embed_tokens.weight" in known:
        return  # tied: checkpoints keep one of the two
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"none of its {len(known)} is called like it"
        raise EngineError(f"the model has no weight '{name}': {hint}")
    if shape != known[name]:
        raise EngineError(f"the weight '{name}' has shape {known[name]} and was given {shape}")


def _new_folder(prefix: str, parent: Path) -> Path:
    """One that servers of other users can read."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    folder.chmod(0o755)
    return folder


async def _save(shard: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    def save() -> None:
        save_file(shard, str(path))
        path.chmod(0o644)

    await asyncio.to_thread(save)


async def _iterate(
    weights: Iterable[tuple[str, torch.Tensor]] | AsyncIterable[tuple[str, torch.Tensor]],
) -> AsyncIterator[tuple[str, torch.Tensor]]:
    if isinstance(weights, AsyncIterable):
        async for item in weights:
            yield item
    else:
        for item in weights:
            yield item
            await asyncio.sleep(0)
