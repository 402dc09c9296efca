"""Many trajectories at once: groups of siblings, one concurrency limit, cancellation."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence

from agentloop.engines.base import Sampling
from agentloop.errors import ConfigError
from agentloop.loop import AgentLoop
from agentloop.trajectory import Sample, Trajectory


class Rollout:
    """Runs groups through one `AgentLoop`, at most `max_concurrency` trajectories at a time.

    A sibling that fails is a trajectory like the others (see its `end_reason`); it never takes the group down. Only a bug
    or wrong input raises, and only after the siblings have ended.
    """

    def __init__(self, loop: AgentLoop, *, max_concurrency: int = 256) -> None:
        self.loop = loop
        self._places = asyncio.Semaphore(max_concurrency)
        self._running: set[asyncio.Task[Trajectory]] = set()

    async def group(
        self,
        sample: Sample,
        n: int,
        *,
        sampling: Sampling | None = None,
        step: int = 0,
        validate: bool = False,
    ) -> list[Trajectory]:
        """The `n` siblings of one sample, in sibling order. Cancelling it cancels them and waits for their release."""
        tasks = [
            asyncio.create_task(self._one(sample, sibling, sampling, step, validate), name=f"{sample.uid}_{sibling}")
            for sibling in range(n)
        ]
        for task in tasks:
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        try:
            await asyncio.wait(tasks)
        finally:
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome in done:
            if isinstance(outcome, BaseException):
                raise outcome
        return [task.result() for task in tasks]

    async def run(
        self,
        samples: Sequence[Sample],
        n: int = 1,
        *,
        sampling: Sampling | None = None,
        step: int = 0,
        validate: bool = False,
    ) -> list[list[Trajectory]]:
        """A group for every sample, in the samples' order. The first group that raises cancels the others."""
        tasks = [
            asyncio.create_task(self.group(sample, n, sampling=sampling, step=step, validate=validate))
            for sample in _distinct(samples)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def stream(
        self,
        samples: Iterable[Sample],
        n: int = 1,
        *,
        sampling: Sampling | None = None,
        step: int = 0,
        validate: bool = False,
    ) -> AsyncIterator[list[Trajectory]]:
        """Groups as they end, whichever comes first. All samples are taken at once; leaving early cancels the rest."""
        tasks = {
            asyncio.create_task(self.group(sample, n, sampling=sampling, step=step, validate=validate))
            for sample in _distinct(samples)
        }
        try:
            while tasks:
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def cancel(self) -> int:
        """Cancel every trajectory that runs or waits, wait until each has released what it held, and say how many."""
        tasks = [task for task in self._running if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return len(tasks)

    async def _one(self, sample: Sample, sibling: int, sampling: Sampling | None, step: int, validate: bool) -> Trajectory:
        async with self._places:
            return await self.loop.run(sample, sampling=sampling, sibling=sibling, step=step, validate=validate)


def _distinct(samples: Iterable[Sample]) -> list[Sample]:
    """The samples. `ConfigError` if two have one `uid`: their trajectories could not be told apart, nor their records."""
    taken = list(samples)
    for uid, count in Counter(sample.uid for sample in taken).items():
        if count > 1:
            raise ConfigError(f"{count} samples of one rollout have the uid '{uid}'; give each its own, and siblings by n")
    return taken
