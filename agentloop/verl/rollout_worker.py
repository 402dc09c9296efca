"""`SGLangRolloutWorker`: rollouts as a verl worker, for whoever steers a `RayWorkerGroup` and not verl's replica servers.

One rank per GPU. `tensor_model_parallel_size` x `data_parallel_size` ranks in a row are one engine; its first rank hosts it on
the devices of all of them and answers for the group, the others answer with nothing. Several such groups are data-parallel
replicas. A worker group goes through `init_model`, then any of `generate_sequences`, `compute_log_prob`, `update_weights`,
`sleep` and `wake`, then `shutdown`:

    pool = ResourcePoolManager({"rollout": [8]}, {Role.Rollout: "rollout"})
    group = RayWorkerGroup(pool.get_resource_pool(Role.Rollout), RayClassWithInitArgs(ray.remote(SGLangRolloutWorker), config))
    group.init_model()
    output = group.generate_sequences(prompts)

`docs/deepseek.md` says how this maps onto verl's replicas, and when to use which.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import ray
from verl.single_controller.base import Worker

from agentloop.engines.base import Engine, Sampling
from agentloop.errors import ConfigError, EngineError
from agentloop.trajectory import EndReason, Sample, StopReason, Trajectory, Turn
from agentloop.verl import rollout_worker_calls as calls
from agentloop.verl.rollout_worker_engine import (
    LoopThread,
    free_port,
    meeting_point,
    server_engine,
    start_engine,
    start_node,
    stop_node,
    tensors_of,
)
from agentloop.verl.rollout_worker_places import DEVICES, Place, Seat, seat
from agentloop.verl.rollout_worker_settings import SGLANG, WHERE, check_world, read_worker_settings, whole_config

if TYPE_CHECKING:
    from verl.protocol import DataProto

logger = logging.getLogger(__name__)

SCORES_AT_ONCE = 64
each_rank = calls.called(calls.all_ranks, calls.results)
by_rows = calls.called(calls.rows_to_leaders, calls.rows_of_leaders)


@dataclass(frozen=True, slots=True)
class Update:
    """What became of `update_weights` at one engine."""

    replica: int
    version: int
    """Of the weights that the engine has now."""
    error: str | None = None


class SGLangRolloutWorker(Worker):  # type: ignore[misc]
    """One rank. `config` is verl's whole configuration or its part `actor_rollout_ref`; wrong settings are a `ConfigError` in
    `init_model`, before a model is loaded. The engine is SGLang, or with `rollout.name=agentloop_local` the local one."""

    def __init__(self, config: Any, role: str = "rollout", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.role = role
        self._engine: Engine | None = None
        self._refusal: str | None = None
        """Why the engine must not answer, if so."""
        self._version = 0
        self._refused = False
        """The weights of this version are not to be trusted."""
        self._thread: LoopThread | None = None
        self._process: Any = None
        """This node's part of an engine over several nodes."""
        self._journal: Any = None
        self._loop: Any = None
        self._seat: Seat | None = None
        self._dp: tuple[int, bool] | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    @each_rank
    def where(self, starting: bool = False) -> Place:
        """Also checks the settings. `starting`: rank 0 claims the number of this start of the run for the journals of all."""
        settings = read_worker_settings(self.config)
        check_world(settings, self.world_size)
        generation = None
        if starting and self.rank == 0 and self._journals(settings.rollout.journal):
            from agentloop.journal import next_generation

            generation = next_generation(settings.rollout.run_dir)
        context = ray.get_runtime_context()
        address = ray.util.get_node_ip_address().strip("[]")
        return Place(self.rank, context.get_node_id(), address, free_port(), _device(settings.engine), os.getpid(), generation)

    @calls.called(calls.with_places, calls.started)
    def init_model(self, places: Sequence[Place]) -> None:
        """Start the engines. `places`, of all ranks, are gathered by the dispatch.

        Raises `ConfigError` for wrong settings, tools or templates, and for ranks that make no whole engines; `EngineError` if
        an engine does not start. Then nothing is left running in any rank."""
        if self._seat is not None:
            raise EngineError("init_model was called already")
        settings = read_worker_settings(self.config)
        check_world(settings, self.world_size)
        mine = seat(self.rank, settings.group, places)
        if settings.nodes is not None and settings.nodes != mine.nodes:
            raise ConfigError(
                f"{WHERE}.engine_kwargs.sglang.nnodes is {settings.nodes}, and an engine's ranks are on {mine.nodes} nodes"
            )
        if mine.nodes > 1 and settings.engine != SGLANG:
            raise ConfigError(f"{WHERE}: the local engine cannot span {mine.nodes} nodes")
        self.settings = settings
        if mine.leads:
            self._thread = LoopThread()
            self._prepare(mine, places[0].generation)
        if mine.nodes == 1:
            if mine.leads:
                self._engine = start_engine(settings, mine)
        elif mine.starts:
            self._start_over_nodes(mine, list(places))
        if self._loop is not None:
            self._loop.engine = self._engine
        self._refusal = self._random()
        self._seat = mine
        if self._dp is None:
            self._register_dispatch_collect_info(calls.MESH, dp_rank=mine.replica, is_collect=mine.leads)
        self._dp = (mine.replica, mine.leads)

    def _start_over_nodes(self, mine: Seat, places: list[Place]) -> None:
        """Every node's first rank starts SGLang's server there; the leader is its client."""
        port = free_port()
        self._process = start_node(self.settings, mine, meet=meeting_point(self.settings, places, mine), port=port)
        if mine.leads:
            assert self._thread is not None
            self._engine = server_engine(places[mine.leader].address, port, self._process, self._thread)

    def _prepare(self, mine: Seat, generation: int | None) -> None:
        """Tokenizer, template, tools and journal: what is wrong with them is known before a model is loaded."""
        from omegaconf import OmegaConf

        from agentloop.verl.worker import build_loop, run_meta, tokenizer_of

        settings = self.settings.rollout
        config = OmegaConf.create(whole_config(self.config))
        tokenizer, template = tokenizer_of(config)
        self._pad = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        recorder = None
        if generation is not None:
            from agentloop.journal import JournalWriter, token_bytes

            meta = run_meta(config, settings) if mine.replica == 0 else None
            decode = token_bytes(tokenizer)
            self._journal = JournalWriter(settings.run_dir, f"r{mine.replica}", generation=generation, decode=decode, meta=meta)
            recorder = self._journal
        self._loop = build_loop(None, settings, tokenizer, chat_template=template, recorder=recorder)

    def _journals(self, wanted: bool) -> bool:
        """A run is recorded where the configuration has a section `agentloop`, as for `AgentLoopManager`."""
        return wanted and "agentloop" in whole_config(self.config)

    @each_rank
    def is_ready(self) -> bool:
        return self._seat is not None

    @calls.called(calls.all_ranks, calls.closed)
    def close_engine(self) -> None:
        """End the engine and what belongs to it; the rank lives and may be started again."""
        if self._thread is not None:
            self._thread.run(self._close())
            self._thread.close()
        if self._process is not None:
            stop_node(self._process)
        self._engine = self._loop = self._journal = self._thread = self._process = self._seat = self._refusal = None
        self._version = 0

    async def _close(self) -> None:
        if self._loop is not None and self._loop.tools is not None:
            await self._loop.tools.close()
        if self._engine is not None:
            await self._engine.close()
        if self._journal is not None:
            await asyncio.to_thread(self._journal.close)

    @calls.called(calls.all_ranks, calls.ended)
    def shutdown(self) -> None:
        """End the engines, and then the actors, unless other workers of verl live in them. Dead ranks are no error."""
        self.close_engine()

    # -- rows ---------------------------------------------------------------------------------------------------------

    @by_rows
    def generate_sequences(self, prompts: DataProto | None) -> DataProto | None:
        """One trajectory a row, in order, as `agentloop.batch.to_dataproto` pads them. No rewards: the trainer scores.

        With a column `raw_prompt` (messages) the rows run through the agent loop: many turns with the tools of
        `rollout.multi_turn.tool_config_path`, one without. Rows with the same `uid` are siblings. Without that column the
        prompts are the tensors `input_ids` and `attention_mask` [B, P], padded left, continued as they are: a single turn.
        `meta_info`: `validate` takes `rollout.val_kwargs`; `do_sample=False` is greedy; `global_steps`.

        Raises `EngineError` if the engine is dead or must not answer, or if it failed every row.
        """
        if prompts is None:
            return None
        self._check_answers()
        started = perf_counter()
        trajectories = self._run(self._generate(prompts))
        lost = [t for t in trajectories if t.end_reason is EndReason.ENGINE_FAILURE]
        if len(lost) == len(trajectories):
            raise EngineError(f"the engine failed all {len(lost)} rows, the first with: {lost[0].error}")
        return self._padded(trajectories, perf_counter() - started)

    async def _generate(self, prompts: DataProto) -> list[Trajectory]:
        sampling, validate = self._sampling(prompts.meta_info), bool(prompts.meta_info.get("validate", False))
        step = int(prompts.meta_info.get("global_steps", 0))
        numbers = prompts.non_tensor_batch.get(calls.ROW, range(len(prompts)))
        siblings = prompts.non_tensor_batch.get(calls.SIBLING, [0] * len(prompts))
        uids = prompts.non_tensor_batch.get("uid", numbers)
        if "raw_prompt" in prompts.non_tensor_batch:
            samples = [self._sample(prompts, row, str(uids[row]), step, validate) for row in range(len(prompts))]
            work = [
                self._loop.run(sample, sampling=sampling, sibling=int(sibling), step=step, validate=validate)
                for sample, sibling in zip(samples, siblings, strict=True)
            ]
        elif self._loop.tools is not None:
            raise ConfigError("tools are configured, and the batch has no column 'raw_prompt' for a conversation to begin with")
        else:
            rows = _sequences(prompts, "input_ids", "attention_mask")
            work = [
                self._continue(ids, Trajectory(Sample([], uid=str(number)), step=step, validate=validate), sampling)
                for ids, number in zip(rows, numbers, strict=True)
            ]
        trajectories: list[Trajectory] = await _together(work, self.settings.rollout.max_concurrency)
        if self._journal is not None:
            await asyncio.to_thread(self._journal.flush, 30.0)
        return trajectories

    def _sample(self, prompts: DataProto, row: int, uid: str, step: int, validate: bool) -> Sample:
        """As `AgentLoopManager` makes it: the same row at the same step has the same seeds in every run."""
        from agentloop.data.rows import content_key, sample_from_row
        from agentloop.verl.settings import refuse_agent_names

        ours = (calls.ROW, calls.SIBLING, "__do_sample__")
        fields = {name: column[row] for name, column in prompts.non_tensor_batch.items() if name not in ours}
        refuse_agent_names([str(fields["agent_name"])] if fields.get("agent_name") is not None else [])
        sample = sample_from_row(fields, uid=uid, system_prompt=self.settings.rollout.system_prompt)
        when = "val" if validate else f"train/{step}"
        return replace(sample, seed_key=f"{when}/{fields.get('index', 0)}/{content_key(sample)}")

    async def _continue(self, ids: list[int], trajectory: Trajectory, sampling: Sampling) -> Trajectory:
        """One turn from a prompt that is tokens already. A failing engine is the trajectory's end, as in the agent loop."""
        from agentloop.generate import derive_seed, generate

        assert self._engine is not None
        settings = self.settings.rollout
        if not ids or len(ids) > settings.prompt_length:
            raise ConfigError(
                f"row {trajectory.sample.uid}: a prompt of {len(ids)} tokens; {WHERE}.prompt_length is {settings.prompt_length}"
            )
        trajectory.append_prompt(ids)
        when = "val" if trajectory.validate else f"train/{trajectory.step}"
        seed = derive_seed(settings.seed, f"{when}/{trajectory.sample.uid}", 0, 0, 0)
        started = perf_counter()
        try:
            async with asyncio.timeout(settings.loop.deadlines.generate_s):
                answer = await generate(self._engine, ids, replace(sampling, seed=seed), f"{when}-{trajectory.sample.uid}")
        except EngineError as error:
            trajectory.end_reason, trajectory.error, trajectory.masked = EndReason.ENGINE_FAILURE, str(error), True
            return trajectory
        except TimeoutError:
            told = f"no answer within {settings.loop.deadlines.generate_s:g} s"
            trajectory.end_reason, trajectory.error, trajectory.masked = EndReason.DEADLINE, told, True
            return trajectory
        finally:
            await self._engine.release(f"{when}-{trajectory.sample.uid}")
        turn = Turn(
            0,
            len(ids),
            len(ids) + len(answer.ids),
            answer.stop_reason,
            weight_version=answer.weight_version,
            min_weight_version=answer.min_weight_version,
            cached_tokens=answer.cached_tokens,
            generate_s=perf_counter() - started,
            engine_data=answer.data,
            version_runs=answer.version_runs,
            seed=seed,
        )
        trajectory.append_sampled(answer.ids, answer.log_probs, turn)
        ended = {StopReason.STOP: EndReason.FINAL_ANSWER, StopReason.LENGTH: EndReason.TOKEN_LIMIT}
        trajectory.end_reason = ended.get(answer.stop_reason, EndReason.ABORTED)
        trajectory.masked = not answer.ids
        return trajectory

    def _sampling(self, meta: Mapping[str, Any]) -> Sampling:
        settings = self.settings.rollout
        if meta.get("validate", False):
            return settings.val
        if not meta.get("do_sample", True):
            return replace(settings.train, temperature=0.0, top_p=1.0, top_k=-1)
        return settings.train

    def _padded(self, trajectories: Sequence[Trajectory], seconds: float) -> DataProto:
        from agentloop.batch import to_dataproto

        settings = self.settings.rollout
        output = to_dataproto(
            trajectories,
            prompt_length=settings.prompt_length,
            response_length=settings.response_length,
            pad_token_id=self._pad,
        )
        # Nobody has scored; where every row is a filler `to_dataproto` sees nothing unscored. The `uid` is the trainer's own.
        output.batch.pop("rm_scores", None)
        output.meta_info.pop("reward_extra_keys", None)
        del output.non_tensor_batch["uid"]
        output.meta_info.pop("metrics")
        output.meta_info["timing"] = {"generate_sequences": seconds}
        return output

    @by_rows
    def compute_log_prob(self, data: DataProto | None) -> DataProto | None:
        """`log_probs` float32 [B, R]: of every token of the responses given all before it, under the weights that serve now, 0
        at padding. `data`: `input_ids` and `attention_mask` [B, P + R], `responses` [B, R].

        Each sequence is scored whole in one forward, without the prefix cache. The temperature is `meta_info["temperature"]`,
        else `rollout.temperature`, and is told in the answer's `meta_info` with the `weight_version`. SGLang scores at 1 alone
        (its prefill ignores the temperature), so any other is a `ConfigError` there and never a silent 1."""
        if data is None:
            return None
        self._check_answers()
        import torch
        from tensordict import TensorDict
        from verl.protocol import DataProto

        temperature = float(data.meta_info.get("temperature", self.settings.rollout.train.temperature))
        if self.settings.engine == SGLANG and temperature != 1.0:
            raise ConfigError(
                f"the temperature is {temperature:g}, and SGLang's log-probabilities of given tokens ignore it: it has them "
                f"at 1 only; set {WHERE}.temperature=1, or let the trainer compute them"
            )
        if temperature <= 0:
            raise ConfigError(f"the temperature is {temperature:g}; to score it must be positive")
        rows = _sequences(data, "input_ids", "attention_mask", "responses")
        width = data.batch["responses"].shape[1]
        counts = data.batch["attention_mask"][:, -width:].sum(dim=1).tolist()
        for row, (ids, count) in enumerate(zip(rows, counts, strict=True)):
            if count >= len(ids):
                raise ConfigError(f"row {row} of {len(rows)}: its response has no prompt before it")
        scored = self._run(self._scores(rows, temperature))
        log_probs = torch.zeros((len(rows), width), dtype=torch.float32)
        for row, (values, count) in enumerate(zip(scored, counts, strict=True)):
            places = data.batch["attention_mask"][row, -width:].bool()
            log_probs[row, places] = torch.tensor(values[len(values) - int(count) :], dtype=torch.float32)
        batch = TensorDict({"log_probs": log_probs}, batch_size=len(rows))
        return DataProto(batch=batch, meta_info={"temperature": temperature, "weight_version": self._version})

    async def _scores(self, rows: Sequence[list[int]], temperature: float) -> list[list[float]]:
        assert self._engine is not None
        work = [self._engine.score(ids, temperature=temperature) for ids in rows]
        scores: list[list[float]] = await _together(work, SCORES_AT_ONCE)
        return scores

    # -- weights and memory -------------------------------------------------------------------------------------------

    @calls.called(calls.weights_to_all, calls.landed)
    def update_weights(self, source: Any, version: int | None = None) -> Update | None:
        """On the group: `update_weights(weights, version=None, bucket_mib=512) -> int`, the version that all engines serve now.

        `weights`: a folder with a checkpoint that every engine's node sees, or Hugging Face names and tensors (a mapping or an
        iterable). `version`: default one more than now; it must be more. From the first byte on no engine answers, until the
        weights have landed at all of them; then all have the new version. If they landed nowhere and the engines kept the old
        ones whole, these go on serving. If they landed at some, none answers until an update lands at all. Either way
        `EngineError` says so."""
        if self._engine is None:
            return None
        assert self._seat is not None
        before = self._engine.weight_version
        now = self._version if before is None else before
        target = self._version + 1 if version is None else int(version)
        if target < self._version or (target == self._version and not self._refused):
            told = f"the weights have version {self._version}, which an update to version {target} would not raise"
            return Update(self._seat.replica, now, told)
        self._refusal = f"an update of its weights to version {target} has not landed at every engine"
        try:
            self._run(self._take(source, target))
        except Exception as error:  # whatever a checkpoint or a network does
            after = self._engine.weight_version
            return Update(self._seat.replica, now if after is None else after, f"{error or type(error).__name__}")
        return Update(self._seat.replica, target)

    async def _take(self, source: Any, version: int) -> None:
        assert self._engine is not None
        if self._process is None:
            await self._engine.update_weights(tensors_of(source), version)
            return
        from agentloop.engines.sglang_server import SGLangServerEngine

        assert isinstance(self._engine, SGLangServerEngine)
        if not isinstance(source, str):
            raise EngineError("an engine over several nodes takes its weights from a folder that all of them see")
        await self._engine.update_weights_from_disk(source, version)

    @each_rank
    def serve(self, version: int) -> None:
        """All engines have the weights of `version`: answer again. Called at the end of `update_weights`."""
        if self._engine is not None:
            self._version, self._refused = version, False
            self._refusal = self._random()

    @each_rank
    def refuse(self, why: str) -> None:
        """Answer nothing until an update has landed, because of what was found wrong with the weights of the last one. That
        update may have the same version."""
        if self._engine is not None:
            self._refusal, self._refused = why, True

    @each_rank
    def sleep(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        """Free what `tags` name, in every engine; what runs is aborted. SGLang needs `rollout.free_cache_engine`."""
        if self._engine is not None:
            self._run(self._engine.sleep(tags))

    @each_rank
    def wake(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        """Take it again. SGLang's weights are then undefined, and it answers after the next `update_weights` only, unless
        `engine_kwargs.sglang.enable_weights_cpu_backup` is set."""
        if self._engine is not None:
            self._run(self._engine.wake(tags))

    @each_rank
    def weight_version(self) -> int | None:
        """By rank; `None` for those that host no engine."""
        return None if self._engine is None else self._version

    # -- small parts --------------------------------------------------------------------------------------------------

    def _run(self, work: Any) -> Any:
        assert self._thread is not None
        return self._thread.run(work)

    def _random(self) -> str | None:
        """Why an engine that was never given weights must not answer."""
        if self.settings.random_weights and self._version == 0:
            return f"{WHERE}.load_format is dummy, so its weights are random until update_weights"
        return None

    def _check_answers(self) -> None:
        if self._engine is None:
            raise EngineError("this rank hosts no engine" if self._seat is not None else "call init_model first")
        if self._refusal is not None:
            raise EngineError(f"the engine does not answer: {self._refusal}")


async def _together(work: Sequence[Coroutine[Any, Any, Any]], at_once: int) -> list[Any]:
    """The results in order, `at_once` at a time. The first that fails ends the others."""
    places = asyncio.Semaphore(at_once)

    async def one(what: Coroutine[Any, Any, Any]) -> Any:
        try:
            async with places:
                return await what
        finally:
            what.close()  # one that never ran

    tasks = [asyncio.create_task(one(what)) for what in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _device(engine: str) -> str | None:
    """This rank's GPU, as `CUDA_VISIBLE_DEVICES` names it. Ray sets that for each actor, unless it was told not to."""
    if engine != SGLANG:
        return None
    from verl.utils.ray_utils import ray_noset_visible_devices

    if ray_noset_visible_devices():
        found = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    else:
        found = [device for device in os.environ.get(DEVICES, "").split(",") if device.strip()]
    if len(found) != 1:
        raise ConfigError(
            f"a rank of the rollout worker has one GPU, and this one sees {len(found)}; take a resource pool with GPUs"
        )
    return str(found[0]).strip()


def _sequences(data: DataProto, *names: str) -> list[list[int]]:
    """The tokens of each row, without padding. `ConfigError` for a missing tensor."""
    present = set() if data.batch is None else set(data.batch.keys())
    for name in names:
        if name not in present:
            raise ConfigError(f"the batch has no tensor '{name}'; it has {', '.join(sorted(present)) or 'none'}")
    ids, mask = data.batch["input_ids"], data.batch["attention_mask"].bool()
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
