"""One engine for several processes, over a Unix socket: what agentloop's worker and verl's workers ask alike.

verl's own way from its workers to an engine is a call of a Ray actor, which costs each request more than this. Both sides
are given this one, so that they differ in their loops alone.
"""

from __future__ import annotations

import asyncio
import pickle
from array import array
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from agentloop.engines.base import Engine, Generation, Sampling
from agentloop.errors import AgentloopError, EngineError
from agentloop.trajectory import StopReason

LENGTH = 4


async def read(reader: asyncio.StreamReader) -> tuple[Any, ...]:
    """The next message. Raises `asyncio.IncompleteReadError` when the other side has gone."""
    size = int.from_bytes(await reader.readexactly(LENGTH), "little")
    message: tuple[Any, ...] = pickle.loads(await reader.readexactly(size))
    return message


def write(writer: asyncio.StreamWriter, *message: Any) -> None:
    packed = pickle.dumps(message, protocol=5)
    writer.write(len(packed).to_bytes(LENGTH, "little") + packed)


class RemoteEngine(Engine):
    """The engine at the other end of the socket, as a worker has it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._asked: dict[int, asyncio.Future[Generation]] = {}
        self._number = 0

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, trajectory_id: str) -> Generation:
        self._number += 1
        number = self._number
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        write(self._writer, "ask", number, array("I", ids), sampling.max_tokens, sampling.temperature, trajectory_id)
        return await future

    async def release(self, trajectory_id: str) -> None:
        write(self._writer, "release", trajectory_id)

    def answered(self, number: int, ids: array[int], log_probs: array[float], cached: int, error: str | None) -> None:
        future = self._asked.pop(number)
        if error is not None:
            future.set_exception(EngineError(error))
        else:
            future.set_result(Generation(ids.tolist(), log_probs.tolist(), StopReason.STOP, 0, 0, cached))


class Worker:
    """A worker process, as the process of the engine sees it."""

    def __init__(self, kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, engine: Engine) -> None:
        self.kind = kind
        self._reader, self._writer, self._engine = reader, writer, engine
        self._done: asyncio.Future[dict[str, Any]] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, work: dict[str, Any]) -> dict[str, Any]:
        """Hand work over and wait for its result. Raises `AgentloopError` with what went wrong there."""
        self._done = asyncio.get_running_loop().create_future()
        write(self._writer, "run", work)
        result = await self._done
        if "error" in result:
            raise AgentloopError(f"a worker of {self.kind} failed: {result['error']}")
        return result

    async def serve(self) -> None:
        """Answer its requests until it has gone."""
        try:
            while True:
                message = await read(self._reader)
                if message[0] == "ask":
                    task = asyncio.create_task(self._answer(*message[1:]))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                elif message[0] == "release":
                    await self._engine.release(message[1])
                elif self._done is not None:
                    self._done.set_result(message[1])
        except (asyncio.IncompleteReadError, ConnectionError):
            if self._done is not None and not self._done.done():
                self._done.set_result({"error": "the process ended"})

    async def _answer(self, number: int, ids: array[int], tokens: int, temperature: float, trajectory_id: str) -> None:
        try:
            got = await self._engine.generate(
                ids.tolist(), Sampling(tokens, temperature=temperature), trajectory_id=trajectory_id
            )
            reply = (array("I", got.ids), array("d", got.log_probs or ()), got.cached_tokens, None)
        except EngineError as error:
            reply = (array("I"), array("d"), 0, str(error))  # type: ignore[assignment]
        write(self._writer, "answer", number, *reply)


class Workers:
    """Waits for worker processes at a socket."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.ready: dict[str, list[Worker]] = {}
        self._changed = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._served: set[asyncio.Task[Any]] = set()

    async def listen(self, path: Path) -> None:
        self._server = await asyncio.start_unix_server(self._came, str(path))

    async def _came(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._served.add(task)
        self._writers.append(writer)
        _, kind = await read(reader)
        worker = Worker(kind, reader, writer, self._engine)
        async with self._changed:
            self.ready.setdefault(kind, []).append(worker)
            self._changed.notify_all()
        await worker.serve()

    async def wait(self, kind: str, count: int, timeout_s: float) -> list[Worker]:
        """The first `count` workers of a kind. Raises `TimeoutError`."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: len(self.ready.get(kind, ())) >= count)
        return self.ready[kind][:count]

    async def close(self) -> None:
        """Workers end when their connection does."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self._served, return_exceptions=True)


async def work_for(
    path: Path, kind: str, make: Callable[[Engine], Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]]
) -> None:
    """Be a worker: connect to the socket at `path`, and run what is handed over until the other side has gone. `make` gives
    the function for it, and is called with the engine before the worker says that it is ready."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    engine = RemoteEngine(writer)
    run = make(engine)
    write(writer, "ready", kind)

    async def finish(work: dict[str, Any]) -> None:
        try:
            result = await run(work)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        write(writer, "done", result)

    tasks: set[asyncio.Task[None]] = set()
    while True:
        try:
            message = await read(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        if message[0] == "answer":
            engine.answered(*message[1:])
        else:
            task = asyncio.create_task(finish(message[1]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
