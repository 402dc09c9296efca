"""One process that runs rollouts for verl: engine client, renderer, parser, tools, reward, journal, and the loop over them."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agentloop.batch import row_key, to_rows
from agentloop.config import LoopConfig, validate
from agentloop.engines.base import Sampling
from agentloop.errors import ConfigError
from agentloop.journal.base import Recorder, Tee
from agentloop.loop import AgentLoop
from agentloop.progress import Progress
from agentloop.rewards.spec import close_all
from agentloop.rollout import Rollout
from agentloop.trajectory import Sample, Trajectory
from agentloop.verl import reward_function
from agentloop.verl.metrics import SUMMARY, Summary, summarize
from agentloop.verl.settings import RolloutSettings

logger = logging.getLogger(__name__)

REPORT_AGAIN_S = (0.5, 2.0, 8.0)
"""Waits before a group's end is told again, if that failed."""
FLUSH_S = 30.0
"""How long a group's end waits for the journal."""


@dataclass(frozen=True)
class GroupRequest:
    """`n` siblings of one sample, asked for by one step of the trainer."""

    sample: Sample
    n: int
    step: int
    validate: bool
    greedy: bool = False
    """Temperature 0 whatever the settings say: the baseline rollout of ReMax."""

    @property
    def partition(self) -> str:
        return "val" if self.validate else "train"

    @property
    def quorum(self) -> int:
        """Rows that must be left for the group to count: a group of one is no baseline, unless it was meant to be."""
        return 1 if self.validate else min(2, self.n)


class RolloutWorker:
    """Runs groups, each of them whole. A Ray actor in a run (`agentloop.verl.manager`), and a plain object in tests."""

    def __init__(
        self,
        config: Any,
        settings: RolloutSettings,
        llm_client: Any,
        reward_handles: Sequence[Any] | None,
        *,
        index: int = 0,
        generation: int | None = None,
        queue: Any = None,
    ) -> None:
        """`config` is verl's. `queue` is TransferQueue's module for the V1 trainer, already initialised, or `None`."""
        from agentloop.verl.client import VerlEngine

        self.settings = settings
        self._queue = queue
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = 0
        """Groups whose trajectories have not all ended."""
        self._journal: Any = None
        tokenizer, chat_template = tokenizer_of(config)
        self.loop = build_loop(
            VerlEngine(llm_client),
            settings,
            tokenizer,
            chat_template=chat_template,
            reward_handles=reward_handles,
            recorder=self._recorder(config, tokenizer, index, generation),
        )
        self.rollout = Rollout(self.loop, max_concurrency=settings.max_concurrency)

    def _recorder(self, config: Any, tokenizer: Any, index: int, generation: int | None) -> Recorder:
        recorders: list[Recorder] = []
        if self.settings.journal:
            from agentloop.journal import JournalWriter, token_bytes

            self._journal = JournalWriter(
                self.settings.run_dir,
                f"w{index}",
                generation=generation,
                decode=token_bytes(tokenizer),
                meta=run_meta(config, self.settings) if index == 0 else None,
            )
            recorders.append(self._journal)
        if self.settings.progress:
            several = self.settings.num_workers > 1
            title = f"rollout worker {index}" if several else "rollout"
            recorders.append(Progress(title, every_s=10.0 * self.settings.num_workers))
        return Tee(*recorders)

    async def ready(self) -> int:
        """Answers once the worker has been built: whoever waits for it gets what went wrong there. Returns the process id."""
        return os.getpid()

    async def watch(self) -> None:
        """Never returns: this call fails when the process does."""
        await asyncio.Event().wait()

    # -- V1: rows go to TransferQueue as groups end ---------------------------------------------------------------------

    async def submit(self, requests: Sequence[GroupRequest]) -> set[str]:
        """Start groups and return at once, with the uids of all that have not ended."""
        self._running += len(requests)
        for request in requests:
            task = asyncio.create_task(self._group(request), name=request.sample.uid)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return {task.get_name() for task in self._tasks}

    async def _group(self, request: GroupRequest) -> None:
        """One group from `running` to `finished` or `failure`. Whatever happens in it stays in it."""
        uid, partition = request.sample.uid, request.partition
        tag: dict[str, Any] = {"status": "failure"}
        try:
            await self._queue.async_kv_put(key=uid, partition_id=partition, tag={"status": "running"})
            trajectories = await self.run(request)
            tag[SUMMARY] = summarize(trajectories)
            left = [trajectory for trajectory in trajectories if not trajectory.masked]
            if len(left) >= request.quorum:
                await self._put(left, partition)
                tag["status"] = "finished"
            else:
                logger.warning("%s", _too_few(request, trajectories))
        except (Exception, asyncio.CancelledError):
            # A cancelled group must be told of too: the trainer waits for every one.
            logger.exception("group %s of step %d failed", uid, request.step)
        self._running -= 1
        if not self._running:
            # The trainer may end the run as soon as it has its last group, and this process with it.
            await self.flush()
        for wait in (*REPORT_AGAIN_S, None):
            try:
                await self._queue.async_kv_put(key=uid, partition_id=partition, tag=tag)
                return
            except Exception:
                logger.exception("group %s of step %d ended as %s, which could not be told", uid, request.step, tag["status"])
                if wait is None:
                    raise
                await asyncio.sleep(wait)

    async def _put(self, trajectories: Sequence[Trajectory], partition: str) -> None:
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        rows = [to_rows(trajectory) for trajectory in trajectories]
        await self._queue.async_kv_batch_put(
            keys=[row_key(trajectory) for trajectory in trajectories],
            partition_id=partition,
            fields=list_of_dict_to_tensordict(
                [_for_verl(fields, t) for (fields, _), t in zip(rows, trajectories, strict=True)]
            ),
            tags=[tag for _, tag in rows],
        )

    # -- legacy: trajectories go back to the manager --------------------------------------------------------------------

    async def generate(self, requests: Sequence[GroupRequest]) -> tuple[list[list[Trajectory]], list[Summary]]:
        """Groups in order, and a summary of each. Raises what only a bug or wrong input raises."""
        groups = await asyncio.gather(*(self.run(request) for request in requests))
        await self.flush()
        return groups, [summarize(group) for group in groups]

    # -- both -----------------------------------------------------------------------------------------------------------

    async def run(self, request: GroupRequest) -> list[Trajectory]:
        sampling, n = self._sampling(request), request.n
        if request.validate or request.greedy:
            return await self.rollout.group(request.sample, n, sampling=sampling, step=request.step, validate=request.validate)
        of = math.ceil(n * self.settings.oversample_siblings)
        return await self.rollout.first(request.sample, n, of, sampling=sampling, step=request.step)

    def _sampling(self, request: GroupRequest) -> Sampling:
        if request.validate:
            return self.settings.val
        if request.greedy:  # as verl's `apply_greedy_sampling_params`
            return replace(self.settings.train, temperature=0.0, top_p=1.0, top_k=-1)
        return self.settings.train

    async def flush(self) -> None:
        """Wait until the journal is on disk."""
        if self._journal is not None:
            await asyncio.to_thread(self._journal.flush, FLUSH_S)

    async def close(self) -> None:
        await self.rollout.cancel()
        if self.loop.tools is not None:
            await self.loop.tools.close()
        await close_all([self.loop.reward])
        if self._journal is not None:
            await asyncio.to_thread(self._journal.close)


def build_loop(
    engine: Any,
    settings: RolloutSettings,
    tokenizer: Any,
    *,
    chat_template: str | None = None,
    reward_handles: Sequence[Any] | None = None,
    recorder: Recorder | None = None,
) -> AgentLoop:
    """The loop that `settings` describe. Without `reward_handles` trajectories end unscored, for a trainer that scores them."""
    from agentloop.chat.load import load_parser, load_renderer
    from agentloop.tools import ToolRegistry
    from agentloop.verl.reward import VerlReward

    def renderer(template_kwargs: Any) -> Any:
        return load_renderer(
            tokenizer,
            chat_template=chat_template,
            template_kwargs={**settings.template_kwargs, **template_kwargs},
            kind=settings.renderer or "auto",
        )

    first = renderer({})
    tools = None
    if settings.tools or settings.function_tools:
        tools = ToolRegistry.load(settings.tools, settings.function_tools).bind(first)
    return AgentLoop(
        engine,
        renderer,
        load_parser(settings.parser, first),
        tools=tools,
        reward=None if reward_handles is None else VerlReward(reward_handles),
        config=settings.loop if reward_handles is not None else _scored_by_the_trainer(settings.loop),
        recorder=recorder,
        seed=settings.seed,
    )


def tokenizer_of(config: Any) -> tuple[Any, str | None]:
    """verl's own tokenizer of the model, and the chat template that replaces the tokenizer's."""
    from verl.utils.config import omega_conf_to_dataclass

    model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    if model.processor is not None:
        raise ConfigError(f"{model.path}: the model takes images or audio, which agentloop does not support")
    return model.tokenizer, model.custom_chat_template


def run_meta(config: Any, settings: RolloutSettings) -> dict[str, Any]:
    """What `run.json` says of a run."""
    from omegaconf import OmegaConf

    schemas: list[Any] = []
    final: list[str] = []
    if settings.tools or settings.function_tools:
        from agentloop.tools import ToolRegistry

        registry = ToolRegistry.load(settings.tools, settings.function_tools)
        schemas, final = registry.schemas, [entry.name for entry in registry if entry.final]
    container: Any = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    return {
        "seed": settings.seed,
        "model": settings.model_path,
        "tools": schemas,
        "config": container,
        "loop": settings.loop.model_dump(mode="json"),
        "setup": {
            "tools": settings.tools,
            "function_tools": settings.function_tools,
            "final_tools": final,
            "parser": settings.parser,
            "renderer": settings.renderer,
            "template_kwargs": settings.template_kwargs,
            "chat_template": container["actor_rollout_ref"]["model"].get("custom_chat_template"),
            "reward": _reward_function(container),
        },
    }


def _reward_function(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`reward.custom_reward_function` as `agentloop.rewards.load_reward` takes it; `None` if there is none. Of our own function
    for verl it is the reward behind that."""
    told = (config.get("reward") or {}).get("custom_reward_function") or {}
    if not told.get("path"):
        return None
    path, kwargs = str(told["path"]).removeprefix("pkg://"), dict(told.get("reward_kwargs") or {})
    if path == reward_function.__name__:
        kwargs = {name: value for name, value in kwargs.items() if name in reward_function.RewardChoice.model_fields}
        return validate(reward_function.RewardChoice, kwargs, reward_function.WHERE).spec(reward_function.WHERE).model_dump()
    return {"reward": f"{path}:{told.get('name') or 'compute_score'}", "kwargs": kwargs}


def _for_verl(fields: dict[str, Any], trajectory: Trajectory) -> dict[str, Any]:
    """In validation verl averages each entry of `reward_extra_info` by data source: the place for how the rollout went."""
    if not trajectory.validate:
        return fields
    calls = list(trajectory.calls)
    went = {
        "agentloop/finished": float(trajectory.end_reason == "final_answer"),
        "agentloop/turns": float(len(trajectory.turns)),
        "agentloop/tool_calls": float(len(calls)),
        "agentloop/tool_failures": float(sum(record.status != "ok" for record in calls)),
    }
    extra = dict(fields["extra_fields"])
    extra["reward_extra_info"] = {**extra["reward_extra_info"], **went}
    return {**fields, "extra_fields": extra}


def _scored_by_the_trainer(loop: LoopConfig) -> LoopConfig:
    """Without what would give some trajectories a reward of ours: the rows of a batch are scored all or none."""
    actions = loop.on_cutoff.model_dump()
    scored = {reason: "score" for reason, action in actions.items() if action == "penalty"}
    if scored or loop.tool_rewards == "add":
        logger.warning("agentloop.loop: the trainer scores the batch itself, so tool_rewards=add and penalties have no effect")
    return loop.model_copy(update={"tool_rewards": "record", "on_cutoff": loop.on_cutoff.model_copy(update=scored)})


def _too_few(request: GroupRequest, trajectories: Sequence[Trajectory]) -> str:
    reasons = [f"{t.id}: {t.end_reason}{f' ({t.error})' if t.error else ''}" for t in trajectories if t.masked]
    return (
        f"group {request.sample.uid} of step {request.step} has {len(trajectories) - len(reasons)} of {request.n} "
        f"trajectories left, too few to train on; {'; '.join(reasons)}"
    )
