"""The engines under test, one kind after the other. All of a module's tests and engines share one event loop: some engines
belong to the loop that they are first used in, and take too long to start to be started for every test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from agentloop.engines.base import Engine
from agentloop.errors import EngineError
from tests.conformance.engines import KINDS, Kind, parameters, weights


class Shared:
    """The one engine of a kind that takes long to start; a new one if a test has closed it."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._engine: Engine | None = None
        self._stack = AsyncExitStack()

    async def engine(self) -> Engine:
        if self._engine is None:
            self._engine = await self._stack.enter_async_context(self._kind.start())
        return self._engine

    async def restore(self) -> None:
        """Undo what a test may have done."""
        assert self._engine is not None
        try:
            await self._engine.abort_all()
            await self._engine.resume()
            await self._engine.wake()
            if self._engine.weight_version != 0:
                await self._engine.update_weights(weights(), 0)
        except EngineError as error:
            if "closed" not in str(error):
                raise
            await self.stop()

    async def stop(self) -> None:
        self._engine = None
        await self._stack.aclose()


@pytest.fixture(scope="module", params=parameters())
def kind(request: pytest.FixtureRequest) -> Kind:
    kind = KINDS[request.param]
    if reason := kind.unavailable():
        pytest.skip(reason)
    return kind


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(kind: Kind) -> AsyncIterator[Shared]:
    shared = Shared(kind)
    yield shared
    await shared.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def engine(kind: Kind, shared: Shared) -> AsyncIterator[Engine]:
    if kind.shared:
        yield await shared.engine()
        await shared.restore()
    else:
        async with kind.start() as engine:
            yield engine


@pytest.fixture
def sampler(kind: Kind, engine: Engine) -> Engine:
    """The engine, of those that have a model."""
    if not kind.samples:
        pytest.skip("this engine has no model")
    return engine
