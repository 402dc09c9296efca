"""Bytes and time of one weight sync, from Megatron's shards to every engine.

Three stages, in buckets: the shards of a tensor are **gathered** to the whole tensors that a checkpoint has, at every rank that
sends; they are **sent** to the engines' GPUs (nothing to do where trainer and engine share one); and **loaded**, each rank of
an engine copying its part into place. Gathering and sending are counted in two ways: `plain`, in which every GPU receives
every byte over its own link, which is what all-gathers and broadcasts over all ranks do at worst, and `by_node`, in which
a byte enters a node once and goes on over NVLink.
"""

from __future__ import annotations

from dataclasses import dataclass

from agentloop.plan.config import Question
from agentloop.plan.rollout import RolloutLayout
from agentloop.plan.trainer import TrainerLayout, gib


@dataclass(frozen=True)
class SyncPlan:
    bytes: int
    """Of the weights, once."""
    gather: tuple[float, float]
    """Seconds: plain, by node."""
    send: tuple[float, float]
    load: float
    """Seconds."""
    overlap: bool
    peak: float | None
    """Bytes of a GPU that trainer and engine share, while the sync runs: the trainer's bf16 weights, the engine's, and two
    buckets; the cache, the gradients and the optimizer are away."""

    def _seconds(self, way: int) -> float:
        stages = (self.gather[way], self.send[way], self.load)
        return max(stages) if self.overlap else sum(stages)

    @property
    def plain(self) -> float:
        return self._seconds(0)

    @property
    def by_node(self) -> float:
        return self._seconds(1)


def plan_sync(question: Question, trainer: TrainerLayout, rollout: RolloutLayout) -> SyncPlan:
    config = question.config
    total = question.shape.weight_bytes(config.rollout.weights)
    # The trainer's weights are bf16 while they are gathered; they are quantised before they are sent.
    gathered = question.shape.weight_bytes("bfloat16")
    ranks = trainer.tensor * trainer.pipeline * max(1, trainer.expert)
    alone = ranks == 1
    colocated = config.placement == "colocated"
    peak = None
    if colocated and trainer.impossible is None:
        peak = trainer.stages[trainer.fullest]["weights"] + rollout.weights + 2 * config.sync.bucket_mib * 2**20
    return SyncPlan(
        bytes=total,
        gather=(0.0, 0.0) if alone else _times(question, gathered, question.trainer_gpus),
        send=(0.0, 0.0) if colocated else _times(question, total, question.rollout_gpus, other_nodes=True),
        load=rollout.weights / (config.cluster.load_gb_s * 1e9)
        + question.shape.expert_tensors * config.cluster.load_expert_ms / 1e3,
        overlap=config.sync.overlap,
        peak=peak,
    )


def advice(question: Question, sync: SyncPlan) -> str | None:
    """What to change so that a sync fits; `None` if it does."""
    if sync.peak is None or sync.peak <= question.usable:
        return None
    return (
        f"a weight sync takes {gib(sync.peak)} of {gib(question.usable)} a GPU, weights of trainer and engine together; take "
        "larger engines (rollout.tensor, rollout.data) or cut the trainer further (trainer.pipeline)"
    )


def _times(question: Question, count: int, gpus: int, *, other_nodes: bool = False) -> tuple[float, float]:
    per_node = question.config.cluster.gpus_per_node
    here = gpus <= per_node and (not other_nodes or question.config.cluster.gpus <= per_node)
    if here:
        return count / question.nvlink, count / question.nvlink
    cards = min(per_node, gpus)
    return count / question.network, max(count / (question.network * cards), count / question.nvlink)
