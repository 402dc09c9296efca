"""Weights on their way to servers over a shared folder."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentloop.engines.base import Weights
from agentloop.engines.sglang_weights import Names
from agentloop.engines.sglang_weights import shapes as shapes
from agentloop.errors import EngineError
from agentloop.iterate import each

SHARD_BYTES = 4 << 30
"""Of one file; so much is in memory at a time beside the weights themselves."""


class Folder:
    """A folder of ours in the shared one, with a folder in it for each version that is still needed."""

    def __init__(self, shared: Path | None) -> None:
        self._shared = shared
        self._own: Path | None = None

    async def write(
        self,
        weights: Weights,
        version: int,
        known: Mapping[str, list[int]] | None,
    ) -> Path:
        """Write safetensors files. Raises `EngineError` for names and shapes that are not in `known`, before a server sees
        anything of them."""
        from safetensors import SafetensorError

        if self._shared is None:
            raise EngineError("the setting 'weights_dir' is missing: update_weights hands tensors over in a folder")
        try:
            if self._own is None:
                self._own = _new_folder("agentloop-weights-", self._shared)
            folder = _new_folder(f"{version}-", self._own)
        except OSError as error:
            raise EngineError(f"weights_dir: {error}") from error
        try:
            shard: dict[str, Any] = {}
            held, files, names = 0, 0, Names(known)
            async for name, tensor in each(weights):
                wanted = names.take(name, tensor)
                if wanted is None:
                    continue
                shard[wanted] = tensor.detach().to("cpu", copy=True).contiguous()
                held += tensor.nbytes
                await asyncio.sleep(0)
                if held >= SHARD_BYTES:
                    await _save(shard, folder / f"model-{files:05}.safetensors")
                    shard, held, files = {}, 0, files + 1
            if shard:
                await _save(shard, folder / f"model-{files:05}.safetensors")
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, (OSError, SafetensorError)):
                raise EngineError(f"the weights could not be written to {folder}: {error}") from error
            raise
        return folder

    def keep_only(self, folder: Path) -> None:
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def clear(self) -> None:
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)


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
