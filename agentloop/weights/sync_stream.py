"""One export on its way to engines: converted in a thread, one bucket ahead of what is sent, and walked to its end whatever
happens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from agentloop.errors import AgentloopError, EngineError
from agentloop.waiting import to_the_end
from agentloop.weights.checksum import checksum
from agentloop.weights.export import Bucket, export
from agentloop.weights.mapping import Item
from agentloop.weights.source import Source

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Stream:
    """The buckets of one export, for one reader.

    While a bucket is sent the next one is made, so two are in memory at most, beside the tensor that is being converted.
    Tensors may be views of the trainer's live weights: they are sent or copied before the sync returns, and the trainer must
    not step meanwhile.

    `finish` reads the source to its end, also after an error: where the source is gathered, the other ranks wait for each of
    its reads. A tensor that could not be converted is passed over and the ones after it are read and dropped.
    """

    def __init__(
        self,
        make: Callable[[], Source],
        *,
        bucket_bytes: int,
        dtype: torch.dtype | None = None,
        fp8: bool = False,
        checksums: bool = True,
        collective: bool = False,
    ) -> None:
        """`collective`: other ranks walk the same export, so it is walked here too if something fails before its first
        bucket is asked for."""
        self.sent: dict[str, int] = {}
        """Checksum of every tensor that was handed on, by its Hugging Face name."""
        self.buckets = self.tensors = self.nbytes = 0
        self.convert_s = 0.0
        """In the thread: gathering, converting, check sums."""
        self._make = make
        self._options: dict[str, Any] = {"bucket_bytes": bucket_bytes, "dtype": dtype, "fp8": fp8}
        self._checksums = checksums
        self._collective = collective
        self._source: _Walked | None = None
        self._export: Iterator[Bucket] | None = None
        self._thread = ThreadPoolExecutor(1, "agentloop-weights", initializer=_on_the_same_gpu())
        self._ahead: asyncio.Future[Bucket | None] | None = None
        self._failed: BaseException | None = None
        self._ended = False
        self._stopped = False

    def __aiter__(self) -> AsyncIterator[Bucket]:
        return self._each()

    async def _each(self) -> AsyncIterator[Bucket]:
        while (bucket := await self.next()) is not None:
            yield bucket

    async def next(self) -> Bucket | None:
        """The next bucket, None after the last. Raises what the source raises; after `stop`, `EngineError`."""
        if self._stopped:
            raise EngineError("the sync was given up")
        if self._ended:
            return None
        if self._ahead is None:
            self._ahead = self._in_thread(self._convert)
        bucket = await asyncio.shield(self._ahead)
        self._ended = bucket is None
        self._ahead = None if bucket is None or self._stopped else self._in_thread(self._convert)
        return bucket

    def blocking(self, loop: asyncio.AbstractEventLoop) -> Iterator[Bucket]:
        """The buckets for a thread that is not the loop's."""
        while (bucket := asyncio.run_coroutine_threadsafe(self.next(), loop).result()) is not None:
            yield bucket

    def stop(self) -> None:
        """Hand nothing on any more."""
        self._stopped = True

    async def finish(self) -> None:
        """Read the source to its end, and let go of it. Does not raise what the source raises, and is not cut short by a
        cancellation."""
        self.stop()
        await to_the_end(self._finish())

    async def _finish(self) -> None:
        if self._ahead is not None:
            await asyncio.wait({self._ahead})
            self._ahead.exception()
        elif self._collective and self._export is None and not self._ended:
            with contextlib.suppress(AgentloopError, RuntimeError, OSError):
                self._source = await self._in_thread(lambda: _Walked(self._make()))
        if self._source is not None and not self._ended:
            await self._in_thread(self._source.walk_on)
        self._ended = True
        self._thread.shutdown(wait=False)
        self._export = self._source = self._ahead = None

    def call(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Run a function in the stream's thread, in which the trainer's process group is used."""
        return self._in_thread(function)

    def _in_thread(self, function: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _convert(self) -> Bucket | None:
        started = perf_counter()
        if self._export is None:
            self._source = _Walked(self._make())
            self._export = export(self._source, **self._options)
        bucket = next(self._export, None)
        if bucket is not None:
            self.buckets, self.tensors = self.buckets + 1, self.tensors + len(bucket.tensors)
            self.nbytes += bucket.nbytes
            if self._checksums:
                self.sent |= {name: checksum(tensor) for name, tensor in bucket.tensors}
        self.convert_s += perf_counter() - started
        return bucket


class _Walked:
    """A source that knows how far it was read."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.shape, self.items, self.origin = source.shape, source.items, source.origin
        self._read = 0

    def read(self, item: Item) -> torch.Tensor | None:
        self._read += 1
        return self._source.read(item)

    def walk_on(self) -> None:
        """Read what was not read yet, and drop it."""
        for item in self.items[self._read :]:
            self._read += 1
            try:
                self._source.read(item)
            except AgentloopError:  # a tensor that cannot be read; the others' ranks wait for the ones after it
                continue
            except (RuntimeError, OSError):  # a rank is gone, and whoever waits learns it from the process group
                return


def _on_the_same_gpu() -> Callable[[], None]:
    """The current GPU is a thread's own: the stream's thread takes that of the thread that makes it."""
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)
