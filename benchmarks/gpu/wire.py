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
from typing import Any, cast

from agentloop.engines.base import Engine, Generation, Sampling
from agentloop.errors import AgentloopError, EngineError
from agentloop.trajectory import StopReason

LENGTH = 4


class Line(asyncio.Protocol):
    """Messages in both directions: each its length and a pickled tuple. `heard` gets every one, and `None` at the end."""

    def __init__(self, heard: Callable[[Line, tuple[Any, ...] | None], None]) -> None:
        self._heard = heard
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= LENGTH:
            end = at + LENGTH + int.from_bytes(self._buffer[at : at + LENGTH], "little")
            if len(self._buffer) < end:
                break
            message = pickle.loads(memoryview(self._buffer)[at + LENGTH : end].tobytes())
            at = end
            self._heard(self, message)
        del self._buffer[:at]

    def connection_lost(self, error: Exception | None) -> None:
        self._heard(self, None)

    def say(self, *message: Any) -> None:
        packed = pickle.dumps(message, protocol=5)
        assert self._transport is not None
        self._transport.write(len(packed).to_bytes(LENGTH, "little") + packed)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class RemoteEngine(Engine):
    """The engine at the other end of the line, as a worker has it."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._asked: dict[int, asyncio.Future[Generation]] = {}
        self._number = 0

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, trajectory_id: str) -> Generation:
        self._number += 1
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._asked[self._number] = future
        number = self._number
        self._line.say("ask", number, array("I", ids), sampling.max_tokens, sampling.temperature, trajectory_id)
        try:
            return await future
        except asyncio.CancelledError:
            self._asked.pop(number, None)
            self._line.say("cancel", number)
            raise

    async def release(self, trajectory_id: str) -> None:
        self._line.say("release", trajectory_id)

    def answered(self, number: int, ids: array[int], log_probs: array[float], cached: int, error: str | None) -> None:
        future = self._asked.pop(number, None)
        if future is None or future.done():  # cancelled while the answer was on its way
            return
        if error is not None:
            future.set_exception(EngineError(error))
        else:
            future.set_result(Generation(ids.tolist(), log_probs.tolist(), StopReason.STOP, 0, 0, cached))


class Worker:
    """A worker process, as the process of the engine sees it."""

    def __init__(self, kind: str, line: Line, engine: Engine) -> None:
        self.kind = kind
        self._line, self._engine = line, engine
        self._done: asyncio.Future[dict[str, Any]] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked: dict[int, asyncio.Task[None]] = {}

    async def run(self, work: dict[str, Any]) -> dict[str, Any]:
        """Hand work over and wait for its result. Raises `AgentloopError` with what went wrong there."""
        self._done = asyncio.get_running_loop().create_future()
        self._line.say("run", work)
        result = await self._done
        if "error" in result:
            raise AgentloopError(f"a worker of {self.kind} failed: {result['error']}")
        return result

    def heard(self, message: tuple[Any, ...] | None) -> None:
        if message is None or message[0] == "done":
            if self._done is not None and not self._done.done():
                self._done.set_result({"error": "the process ended"} if message is None else message[1])
            return
        if message[0] == "cancel":
            if (asked := self._asked.get(message[1])) is not None:
                asked.cancel()
            return
        answering = self._answer(*message[1:]) if message[0] == "ask" else self._engine.release(message[1])
        task = asyncio.create_task(answering)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if message[0] == "ask":
            number = message[1]
            self._asked[number] = task
            task.add_done_callback(lambda _: self._asked.pop(number, None))

    async def _answer(self, number: int, ids: array[int], tokens: int, temperature: float, trajectory_id: str) -> None:
        asked = Sampling(tokens, temperature=temperature)
        try:
            got = await self._engine.generate(ids.tolist(), asked, trajectory_id=trajectory_id)
        except EngineError as error:
            self._line.say("answer", number, array("I"), array("d"), 0, str(error))
        else:
            self._line.say("answer", number, array("I", got.ids), array("d", got.log_probs or ()), got.cached_tokens, None)


class Workers:
    """Waits for worker processes at a socket."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ready: dict[str, list[Worker]] = {}
        self._by_line: dict[Line, Worker] = {}
        self._came = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def listen(self, path: Path) -> None:
        self._server = await asyncio.get_running_loop().create_unix_server(lambda: Line(self._heard), str(path))

    def _heard(self, line: Line, message: tuple[Any, ...] | None) -> None:
        if line in self._by_line:
            self._by_line[line].heard(message)
        elif message is not None:  # the first one says what it is
            worker = self._by_line[line] = Worker(message[1], line, self._engine)
            self._ready.setdefault(worker.kind, []).append(worker)
            self._came.set()

    async def wait(self, kind: str, count: int, timeout_s: float) -> list[Worker]:
        """The first `count` workers of a kind. Raises `TimeoutError`."""
        async with asyncio.timeout(timeout_s):
            while len(self._ready.get(kind, ())) < count:
                self._came.clear()
                await self._came.wait()
        return self._ready[kind][:count]

    def close(self) -> None:
        """Workers end when their line does."""
        if self._server is not None:
            self._server.close()
        for line in self._by_line:
            line.close()


async def work_for(
    path: Path, kind: str, make: Callable[[Engine], Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]]
) -> None:
    """Be a worker: connect to the socket at `path`, and run what is handed over until the other side has gone. `make` gives
    the function for it, and is called with the engine before the worker says that it is ready."""
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    tasks: set[asyncio.Task[None]] = set()

    async def finish(work: dict[str, Any]) -> None:
        try:
            result = await run(work)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        line.say("done", result)

    def heard(line: Line, message: tuple[Any, ...] | None) -> None:
        if message is None:
            over.set_result(None)
        elif message[0] == "answer":
            engine.answered(*message[1:])
        else:
            task = asyncio.create_task(finish(message[1]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    _, line = await loop.create_unix_connection(lambda: Line(heard), str(path))
    engine = RemoteEngine(line)
    run = make(engine)
    line.say("ready", kind)
    await over
