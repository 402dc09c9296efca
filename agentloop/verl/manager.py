"""The rollout side of verl's trainers.

Chosen by `+actor_rollout_ref.rollout.agent.agent_loop_manager_class=agentloop.verl.AgentLoopManager`. verl calls
`AgentLoopManager.create` once and `generate_sequences` with each batch, in the trainer's process. With the V1 trainer that
call hands the groups out and returns; with the legacy one it comes back with the padded batch. Either way a group runs whole
on one worker, a Ray actor.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import ray
from omegaconf import open_dict
from tensordict import NonTensorData, NonTensorStack, TensorDict
from verl.experimental.agent_loop.agent_loop import AgentLoopManager as VerlAgentLoopManager
from verl.protocol import DataProto
from verl.trainer.distillation import is_distillation_enabled

from agentloop.batch import to_dataproto
from agentloop.data.rows import content_key, sample_from_row
from agentloop.errors import ConfigError
from agentloop.trajectory import Trajectory
from agentloop.verl.client import VerlEngine
from agentloop.verl.fleet import Fleet
from agentloop.verl.metrics import metrics
from agentloop.verl.settings import read_settings, refuse_agent_names
from agentloop.verl.train_side import add_row_keys
from agentloop.verl.turn_advantage import NAME as TURNS  # the import registers the estimator in the trainer's process
from agentloop.verl.worker import GroupRequest, RolloutWorker, build_loop, tokenizer_of

logger = logging.getLogger(__name__)


class RolloutActor(RolloutWorker):
    """A `RolloutWorker` as a Ray actor; it joins TransferQueue if the trainer uses it."""

    def __init__(self, *args: Any, use_queue: bool, **kwargs: Any) -> None:
        queue = None
        if use_queue:
            import transfer_queue

            transfer_queue.init()
            queue = transfer_queue
        super().__init__(*args, queue=queue, **kwargs)


_remote_actor: Any = ray.remote(RolloutActor)


class AgentLoopManager(VerlAgentLoopManager):  # type: ignore[misc]
    """Runs every rollout of a verl run through agentloop. `trainer.use_v1` says which of verl's trainers calls."""

    def __init__(
        self,
        config: Any,
        llm_client: Any,
        teacher_client: Any = None,
        reward_loop_worker_handles: Sequence[Any] | None = None,
    ) -> None:
        super().__init__(config, llm_client, teacher_client, reward_loop_worker_handles)
        if is_distillation_enabled(config.get("distillation")):
            raise ConfigError("distillation.enabled: agentloop does not compute a teacher's log-probabilities")
        self.settings = read_settings(config)
        tokenizer, chat_template = tokenizer_of(config)
        # The workers build the same; here a mistake in tools, template or parser is one sentence in the trainer's process.
        build_loop(VerlEngine(llm_client), self.settings, tokenizer, chat_template=chat_template)
        self.pad_token_id = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.use_v1 = bool(config.trainer.get("use_v1", True))
        if not self.use_v1:
            self._keep_fillers_out(config)
        if self._compared:
            from agentloop.verl.train_side import check_trainer

            check_trainer(config)
        self.fleet: Fleet

    @classmethod
    def create(cls, *args: Any, **kwargs: Any) -> AgentLoopManager:
        """As verl calls it; comes back when every worker is ready."""
        manager = cls(*args, **kwargs)
        manager._start_workers()
        return manager

    @property
    def _compared(self) -> bool:
        """Whether trainer and rollout are: where the trainer's values are taken anyway, and where a threshold asks for it."""
        return self.settings.train_side or bool(self.settings.consistency.limits)

    def _start_workers(self) -> None:
        generation = None
        if self.settings.journal:
            from agentloop.journal import next_generation

            generation = next_generation(self.settings.run_dir)
        if self._compared:
            from agentloop.verl.consistency import StepJudge
            from agentloop.verl.train_side import TrainSideWriter, install

            run_dir = self.settings.run_dir if generation is not None else None
            writer = TrainSideWriter(self.settings.run_dir, generation) if self.settings.train_side and generation else None
            install(self.config, writer, StepJudge(self.settings.consistency, run_dir, generation or 1))
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
        actors = []
        for index in range(self.settings.num_workers):
            on_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(nodes[index % len(nodes)], soft=True)
            actors.append(
                _remote_actor.options(scheduling_strategy=on_node).remote(
                    self.config,
                    self.settings,
                    self.llm_client,
                    self.reward_loop_worker_handles,
                    index=index,
                    generation=generation,
                    use_queue=self.use_v1,
                )
            )
        self.fleet = Fleet(actors, import_module("transfer_queue") if self.use_v1 else None)

    def generate_sequences(self, prompts: Any) -> Any:
        """V1: a `TensorDict` with a row for each group; returns `None` at once. Legacy: a `DataProto` with a row for each
        trajectory; returns one with the same number of rows in the same order."""
        if isinstance(prompts, TensorDict):
            self.fleet.submit(self._requests_of_groups(prompts))
            return None
        return self._generate(prompts)

    # -- V1 -------------------------------------------------------------------------------------------------------------

    def _requests_of_groups(self, prompts: TensorDict) -> list[GroupRequest]:
        validate = bool(prompts["validate"]) if "validate" in prompts.keys() else False  # noqa: SIM118
        step = int(prompts["global_steps"])
        default_n = self.settings.val_n if validate else self.settings.n
        requests = []
        for row in rows_of(prompts):
            n = int(row.pop("__rollout_n__", default_n))
            greedy = not bool(row.pop("__do_sample__", True)) and not validate
            row.pop("validate", None)
            requests.append(self._request(row, str(row["uid"]), n, step, validate, greedy))
        return requests

    def _request(self, row: dict[str, Any], uid: str, n: int, step: int, validate: bool, greedy: bool) -> GroupRequest:
        refuse_agent_names([str(row["agent_name"])] if row.get("agent_name") is not None else [])
        sample = sample_from_row(row, uid=uid, system_prompt=self.settings.system_prompt)
        # verl draws a uid anew for each step. The same row at the same step has the same seeds in every run; in validation
        # at every step, so that two validations differ by the weights alone.
        when = "val" if validate else f"train/{step}"
        key = f"{when}/{row.get('index', 0)}/{content_key(sample)}{'/greedy' if greedy else ''}"
        return GroupRequest(replace(sample, seed_key=key), n, step, validate, greedy)

    # -- legacy ---------------------------------------------------------------------------------------------------------

    def _generate(self, prompts: DataProto) -> DataProto:
        validate = bool(prompts.meta_info.get("validate", False))
        step = int(prompts.meta_info.get("global_steps", -1))
        requests, places = self._requests_of_rows(prompts, step, validate)
        groups, summaries = self.fleet.generate(requests)
        rows: list[Trajectory | None] = [None] * len(prompts)
        for group, positions in zip(groups, places, strict=True):
            for trajectory, position in zip(group, positions, strict=True):
                rows[position] = trajectory
        trajectories = [trajectory for trajectory in rows if trajectory is not None]
        if not validate and all(trajectory.masked for trajectory in trajectories):
            raise RuntimeError(
                f"step {step}: all {len(trajectories)} trajectories are masked, so there is nothing to train on; "
                f"the first ended as {trajectories[0].end_reason}: {trajectories[0].error}"
            )
        output = self._padded(trajectories, prompts)
        if not validate:
            add_row_keys(output, trajectories)
        timing = self._performance_metrics([output.meta_info.pop("metrics")], output)
        output.meta_info["timing"] = {**timing, **metrics(summaries)}
        return output

    def _requests_of_rows(self, prompts: DataProto, step: int, validate: bool) -> tuple[list[GroupRequest], list[list[int]]]:
        """The groups that the rows make up, and the places of each group's rows in the batch."""
        columns = prompts.non_tensor_batch
        do_sample = columns.get("__do_sample__")
        uids = columns.get("uid", np.arange(len(prompts)))
        places: dict[tuple[str, bool], list[int]] = {}
        for position in range(len(prompts)):
            greedy = do_sample is not None and not bool(do_sample[position]) and not validate
            # The journal must be able to tell ReMax's baseline from the siblings.
            uid = f"{uids[position]}-greedy" if greedy else str(uids[position])
            places.setdefault((uid, greedy), []).append(position)
        requests = []
        for (uid, greedy), positions in places.items():
            row = {name: column[positions[0]] for name, column in columns.items() if name != "__do_sample__"}
            requests.append(self._request(row, uid, len(positions), step, validate, greedy))
        return requests, list(places.values())

    def _padded(self, trajectories: Sequence[Trajectory], prompts: DataProto) -> DataProto:
        output = to_dataproto(
            trajectories,
            prompt_length=self.settings.prompt_length,
            response_length=self.settings.response_length,
            pad_token_id=self.pad_token_id,
        )
        # The trainer has its own `uid` and refuses another: see `agentloop.verl.advantage`.
        del output.non_tensor_batch["uid"]
        if self.reward_loop_worker_handles is None:  # as `_postprocess`: the columns that a reward model needs
            output.non_tensor_batch.update(prompts.non_tensor_batch)
        return output

    @staticmethod
    def _keep_fillers_out(config: Any) -> None:
        """Have the legacy trainer compute GRPO with the one difference that rows of masked trajectories are in no group."""
        estimator = config.algorithm.get("adv_estimator")
        if estimator == "grpo":
            from agentloop.verl.advantage import NAME

            with open_dict(config):
                config.algorithm.adv_estimator = NAME
            logger.warning("algorithm.adv_estimator: grpo becomes %s, which keeps masked trajectories out of groups", NAME)
        elif estimator != TURNS:  # which keeps them out itself
            logger.warning(
                "algorithm.adv_estimator=%s with the legacy trainer: masked trajectories count as reward 0 in their group's "
                "baseline; use grpo, or the V1 trainer",
                estimator,
            )


def rows_of(batch: TensorDict) -> list[dict[str, Any]]:
    """The rows of verl's batch, as `AgentLoopWorkerTQ.generate_sequences` takes them apart."""
    rows: list[dict[str, Any]] = [{} for _ in range(len(batch))]
    for name, column in batch.items():
        for place, row in enumerate(rows):
            # One value for all rows, or one each; what a checkpoint gave back is plain.
            value = column if isinstance(column, NonTensorData) else column[place]
            row[name] = value.data if isinstance(value, NonTensorData | NonTensorStack) else value
    return rows
