"""The ways of bringing weights to engines: a restart, a folder on disk, tensors in this process. (`sync_distributed` has the
one over process groups.)"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from agentloop.engines.base import Engine
from agentloop.errors import ConfigError, EngineError
from agentloop.waiting import to_the_end
from agentloop.weights.export import Bucket
from agentloop.weights.folder import HfFolder, write_folder
from agentloop.weights.sync_guard import GuardedEngine, Holds
from agentloop.weights.sync_stream import Stream

if TYPE_CHECKING:
    import torch

GIVE_UP_S = 30.0
"""Until an engine that was told to give up must have done so."""


class SendPlan(ABC):
    """One way of sending."""

    name: str

    @abstractmethod
    async def send(self, stream: Stream, engines: Sequence[GuardedEngine], version: int) -> None:
        """Bring every bucket to every engine. On return all hold the new weights (`Holds.NEW`) and say `version`.

        Raises `EngineError` or `ConfigError` otherwise, and leaves in each engine's `holds` what it holds then: `Holds.UNKNOWN`
        from the moment at which an engine's weights may be neither the old nor the new ones. The engines answer nobody
        meanwhile, and have aborted what they had."""

    async def landed(self) -> None:  # noqa: B027 - most plans have nothing to do then
        """The sync has passed, its check included."""

    async def close(self) -> None:  # noqa: B027
        """Let go of what is kept between syncs."""


class TensorsPlan(SendPlan):
    """Hot update of engines in this process (or on this host, where the engine hands GPU memory on by itself):
    `Engine.update_weights` with a stream. All engines take a bucket before the next one goes out, and the end of the stream
    reaches them only when the source has come to its end and every engine has taken everything: an engine that stages what it
    gets (the local one) keeps its old weights whole if anything fails before."""

    name = "tensors"

    async def send(self, stream: Stream, engines: Sequence[GuardedEngine], version: int) -> None:
        readers = [_Reader(engine, version) for engine in engines]
        try:
            async for bucket in stream:
                await _all_take(readers, bucket)
            await _all_take(readers, None)
            for reader in readers:
                await reader.task
                reader.guard.holds = Holds.NEW
        except BaseException as error:
            for reader in readers:
                reader.give_up(error)
            await to_the_end(asyncio.wait([reader.task for reader in readers], timeout=GIVE_UP_S))
            for reader in readers:
                if not reader.task.done():
                    reader.guard.holds = Holds.UNKNOWN
                    reader.task.cancel()
                elif not reader.task.cancelled() and reader.task.exception() is None:
                    reader.guard.holds = Holds.NEW
            raise


class _Reader:
    """One engine's end of the stream."""

    def __init__(self, guard: GuardedEngine, version: int) -> None:
        self.guard = guard
        self._bucket: Bucket | None = None
        self._given = asyncio.Event()
        self._taken = asyncio.Event()
        self._gave_up: BaseException | None = None
        self._all = False
        self.task = asyncio.ensure_future(guard.engine.update_weights(self._tensors(), version))
        self.task.add_done_callback(lambda _: self._taken.set())

    def give(self, bucket: Bucket | None) -> None:
        """Hand a bucket on; None: that was all."""
        self._taken.clear()
        self._bucket = bucket
        self._given.set()

    async def taken(self) -> None:
        """Wait until the engine has taken it. Raises the engine's error."""
        await self._taken.wait()
        if self.task.done() and not (self._all and self.task.exception() is None):
            error = self.task.exception()
            why = "it took some of them only" if error is None else str(error) or type(error).__name__
            raise EngineError(f"engine '{self.guard.name}' did not take the weights: {why}")

    def give_up(self, error: BaseException) -> None:
        self._gave_up = error
        self._given.set()

    async def _tensors(self) -> AsyncIterator[tuple[str, torch.Tensor]]:
        while True:
            await self._given.wait()
            if self._gave_up is not None:
                raise EngineError(f"the sync was given up: {str(self._gave_up) or type(self._gave_up).__name__}")
            self._given.clear()
            bucket, self._bucket = self._bucket, None
            if bucket is None:
                self._all = True
                return
            for named in bucket.tensors:
                yield named
            del bucket
            self._taken.set()


async def _all_take(readers: Sequence[_Reader], bucket: Bucket | None) -> None:
    for reader in readers:
        if reader.task.done():
            await reader.taken()
        reader.give(bucket)
    for reader in readers:
        await reader.taken()


@runtime_checkable
class LoadsFolders(Protocol):
    """An engine that loads a checkpoint by itself."""

    async def update_weights_from_disk(self, path: str, version: int) -> None: ...


class _Folders:
    """The folders that versions are written to, in one of the manager's own: `version-12`. Only the newest that landed stays
    (servers that come back load it again), and what a killed trainer left half-written goes at the next sync."""

    def __init__(self, folder: str | Path, config: Mapping[str, Any], beside: str | Path | None) -> None:
        self._home, self._config, self._beside = Path(folder), config, beside
        self._new: Path | None = None

    async def write(self, stream: Stream, version: int) -> Path:
        """Write all buckets; the folder is whole or not there. Raises `ConfigError` where the disk refuses."""
        target = self._home / f"version-{version}"
        loop = asyncio.get_running_loop()

        def write() -> None:
            self._sweep(target)
            written = write_folder(target, stream.blocking(loop), self._config, beside=self._beside)
            if HfFolder(target).names() != stream.sent.keys() and stream.sent:
                raise ConfigError(f"{target}: does not hold the {written.tensors} tensors that were written")

        task = asyncio.ensure_future(asyncio.to_thread(write))
        try:
            await asyncio.shield(task)
        except BaseException:
            stream.stop()
            with contextlib.suppress(BaseException):
                await to_the_end(asyncio.wait({task}))
            await asyncio.to_thread(shutil.rmtree, target, True)
            raise
        self._new = target
        return target

    def _sweep(self, target: Path) -> None:
        """Make room: half-written folders, and one of this version whose sync did not land."""
        for left in [*self._home.glob(".version-*.partial"), target]:
            shutil.rmtree(left, ignore_errors=True)

    async def keep_newest(self) -> None:
        new = self._new
        if new is not None:
            for path in [path for path in self._home.glob("version-*") if path != new]:
                await asyncio.to_thread(shutil.rmtree, path, True)


class DiskPlan(SendPlan):
    """Hot update over a folder: written whole beside the old one, then loaded by each engine, by itself where it can (servers,
    which must see the folder under the same path), else tensor by tensor. Nothing reaches an engine before all of it is on
    disk, and readable."""

    name = "disk"

    def __init__(self, folder: str | Path, config: Mapping[str, Any], *, beside: str | Path | None = None) -> None:
        """`folder` is this plan's alone. `config`: the `config.json` of the exported weights (`hf_config`). `beside`: a model
        folder whose tokenizer is copied along."""
        self._folders = _Folders(folder, config, beside)

    async def send(self, stream: Stream, engines: Sequence[GuardedEngine], version: int) -> None:
        path = await self._folders.write(stream, version)
        for guard in engines:
            try:
                if isinstance(guard.engine, LoadsFolders):
                    await guard.engine.update_weights_from_disk(str(path), version)
                else:
                    await guard.engine.update_weights(_tensors_of(path), version)
            except EngineError as error:
                raise EngineError(f"engine '{guard.name}' did not take the weights: {error}") from error
            except asyncio.CancelledError:
                guard.holds = Holds.UNKNOWN
                raise
            guard.holds = Holds.NEW

    async def landed(self) -> None:
        await self._folders.keep_newest()


class RestartPlan(SendPlan):
    """The fallback: write a checkpoint, close each engine, start a new one from it. Slow, and free of everything that an
    update in place can do wrong."""

    name = "restart"

    def __init__(
        self,
        folder: str | Path,
        config: Mapping[str, Any],
        start: Callable[[Path, int], Awaitable[Engine]],
        *,
        beside: str | Path | None = None,
    ) -> None:
        """`start(folder, version)` starts an engine from a model folder, for example `LocalEngine.load` in a thread. The other
        arguments are as for `DiskPlan`."""
        self._folders = _Folders(folder, config, beside)
        self._start = start

    async def send(self, stream: Stream, engines: Sequence[GuardedEngine], version: int) -> None:
        path = await self._folders.write(stream, version)
        for guard in engines:
            guard.holds = Holds.UNKNOWN  # from here on there is no old engine to go back to
            await guard.engine.close()
            try:
                guard.engine = await self._start(path, version)
            except (EngineError, ConfigError) as error:
                raise EngineError(f"engine '{guard.name}' did not start again: {error}") from error
            guard.holds = Holds.NEW

    async def landed(self) -> None:
        await self._folders.keep_newest()


def _tensors_of(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """What lies in a folder, file by file in the order in which it was written."""
    from safetensors import safe_open

    for file in sorted(path.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                yield name, opened.get_tensor(name)
