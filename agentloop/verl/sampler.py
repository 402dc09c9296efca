"""verl's replay buffers with a shorter wait between two looks (20 ms for 2 s), and with the rollouts' metrics.

`verl/trainer/ppo/v1/replay_buffer.py:144` fixes `poll_interval=2.0` and no setting reaches it; with small models most of a
step is that wait. Chosen by `trainer.v1.sampler.custom_sampler.{path=pkg://agentloop.verl.sampler,name=QuickReplayBuffer}`
(`QuickReplayBufferAsync` for the asynchronous trainers). `trainer.v1.sampler.sampler_kwargs.poll_interval` sets another wait.

verl hands a custom sampler neither `algorithm.filter_groups` nor `sync_refill_failed_groups` (`trainer_base.py:165`), so
runs that use those must keep verl's own.
"""

from __future__ import annotations

import logging
from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from agentloop.verl.metrics import GroupMetrics

POLL_INTERVAL_S = 0.02


def _poll_interval(sampler_kwargs: Any) -> float:
    return float((sampler_kwargs or {}).get("poll_interval", POLL_INTERVAL_S))


class QuickReplayBuffer(GroupMetrics, ReplayBuffer):  # type: ignore[misc]
    """For `trainer.v1.trainer_mode=sync`."""

    def __init__(self, *, sampler_kwargs: Any = None, **kwargs: Any) -> None:
        super().__init__(sampler_kwargs=sampler_kwargs, poll_interval=_poll_interval(sampler_kwargs), **kwargs)


class QuickReplayBufferAsync(GroupMetrics, ReplayBufferAsync):  # type: ignore[misc]
    """For `colocate_async` and `separate_async`."""

    def __init__(self, *, sampler_kwargs: Any = None, **kwargs: Any) -> None:
        if kwargs.get("trainer_mode") == "separate_async":
            # With `hybrid_engine=false` trainer_separate_async.py:168 calls `logger.info(…, flush=True)`, which is a TypeError
            # where that level is on, and verl turns it on. This runs before, in the same process.
            logging.getLogger("verl.trainer.ppo.v1.trainer_separate_async").setLevel(logging.WARNING)
        super().__init__(sampler_kwargs=sampler_kwargs, poll_interval=_poll_interval(sampler_kwargs), **kwargs)
