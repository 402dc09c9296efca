"""What a plan is asked: the model, the cluster, the lengths, and as much of the layout as is already decided.

A file in YAML, or a model's `config.json` alone, with `key=value` over either. What is left out of `trainer` and `rollout` is
searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field
from yaml import YAMLError

from agentloop.config import Strict, load_yaml, validate
from agentloop.errors import ConfigError, nearest
from agentloop.plan.shape import ModelShape, read_shape


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: memory that a process sees, in GiB, and what it moves in one direction, in GB/s (10^9 bytes)."""

    memory_gib: float
    nvlink_gb_s: float
    network_gb_s: float
    """Its share of the node's network: one 400 Gbit/s card a GPU for Hopper."""


GPUS = {
    "a100": Gpu(79.2, 300.0, 25.0),
    "h100": Gpu(79.2, 450.0, 50.0),
    "h200": Gpu(139.8, 450.0, 50.0),
    "b200": Gpu(178.4, 900.0, 50.0),
}
"""NVIDIA's data sheets for the bandwidths (half of what they say for NVLink, which is both directions together), and
`torch.cuda.mem_get_info` on an empty GPU for the memory."""


class Cluster(Strict):
    gpus: int = Field(8, ge=1)
    gpus_per_node: int = Field(8, ge=1)
    gpu: str = "h100"
    """One of `GPUS`; what follows replaces its figures."""
    memory_gib: float | None = Field(None, gt=0)
    nvlink_gb_s: float | None = Field(None, gt=0)
    network_gb_s: float | None = Field(None, gt=0)
    overhead_gib: float = Field(4.0, ge=0)
    """Of each GPU for what is no tensor of ours: CUDA's context, NCCL's buffers, CUDA graphs, fragments."""
    load_gb_s: float = Field(140.0, gt=0)
    """How fast an engine copies new weights into place. The default is measured: see `benchmarks/results/gpu_weights.json`,
    16.4 GB of Qwen3-8B's weights on one H200 in 0.115 s."""
    load_expert_ms: float = Field(0.13, ge=0)
    """What each weight of a routed expert takes beside its bytes: an engine puts them into its fused ones one by one. Measured
    in the same place: `benchmarks/results/gpu_deepseek.json`, 0.13 to 0.16 ms, on an engine that holds all experts; ranks
    under expert parallelism look at all names too, and may be quicker."""


class Lengths(Strict):
    prompt: int = Field(2048, ge=1)
    response: int = Field(8192, ge=1)


class TrainerPlan(Strict):
    """Megatron-core. Sizes that are `None` are searched."""

    gpus: int | None = Field(None, ge=1)
    """Default: all of them if colocated, else half."""
    tensor: int | None = Field(None, ge=1)
    pipeline: int | None = Field(None, ge=1)
    expert: int | None = Field(None, ge=1)
    expert_tensor: int = Field(1, ge=1)
    context: int = Field(1, ge=1)
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Tokens of one micro-batch, all context-parallel ranks together. Default: one sequence of prompt and response."""
    recompute: Literal["none", "full"] = "full"
    """`full`: only each layer's input is kept for the backward pass."""
    gradients: Literal["float32", "bfloat16"] = "float32"
    distributed_optimizer: bool = True
    optimizer_on_cpu: bool = False
    """Master weights and moments live in the host's memory."""
    offload: bool = True
    """While the rollout runs on the same GPUs, everything of the trainer is in the host's memory (verl's `param_offload`,
    `grad_offload`, `optimizer_offload`)."""
    mtp: bool = False
    """Train the checkpoint's multi-token prediction layers too."""


class RolloutPlan(Strict):
    """SGLang. Sizes that are `None` are searched."""

    gpus: int | None = Field(None, ge=1)
    tensor: int | None = Field(None, ge=1)
    """`tensor_model_parallel_size`: over how many ranks one attention is cut."""
    data: int | None = Field(None, ge=1)
    """`data_parallel_size`: attention replicas inside one engine (DP attention)."""
    expert: int | None = Field(None, ge=1)
    """1 cuts every expert over all ranks of the engine, `tensor` x `data` gives each rank whole experts; the memory is the
    same."""
    weights: Literal["bfloat16", "fp8"] = "bfloat16"
    kv: Literal["bfloat16", "fp8"] = "bfloat16"
    sequences: int = Field(64, ge=1)
    """That must fit into one engine's cache at a time, at full length."""
    mem_fraction: float | None = Field(None, gt=0, lt=1)
    """`gpu_memory_utilization`; default: what is left after `cluster.overhead_gib`, at most 0.9."""


class Sync(Strict):
    bucket_mib: int = Field(2048, ge=1)
    overlap: bool = True
    """Gathering, sending and loading go on at the same time, in buckets."""


class PlanConfig(Strict):
    model: Any = None
    """A `config.json`, a folder with one, or its content."""
    cluster: Cluster = Cluster()
    lengths: Lengths = Lengths()
    placement: Literal["colocated", "separate"] = "colocated"
    """Trainer and rollout take turns on the same GPUs, or have their own."""
    trainer: TrainerPlan = TrainerPlan()
    rollout: RolloutPlan = RolloutPlan()
    sync: Sync = Sync()


@dataclass(frozen=True)
class Question:
    """A plan's input, checked and complete but for the layout."""

    shape: ModelShape
    config: PlanConfig
    memory: float
    """Bytes of one GPU."""
    nvlink: float
    """Bytes a second, one direction."""
    network: float
    trainer_gpus: int
    rollout_gpus: int

    @property
    def usable(self) -> float:
        return self.memory - self.config.cluster.overhead_gib * 2**30

    @property
    def sequence(self) -> int:
        return self.config.lengths.prompt + self.config.lengths.response


def read_plan(path: str | Path, overrides: Sequence[str] = ()) -> Question:
    """From a plan's YAML, whose `model` is relative to it, or from a model's `config.json` or folder. Raises `ConfigError`."""
    path = Path(path)
    where = str(path)
    if path.is_dir() or path.suffix == ".json":
        given = _over({"model": None}, overrides)
        if given["model"] is None:
            given["model"] = str(path)
    else:
        given = load_yaml(path, overrides)
        model = given.get("model")
        if isinstance(model, str) and not any(text.partition("=")[0].strip() == "model" for text in overrides):
            given["model"] = str((path.parent / model) if not Path(model).is_absolute() else Path(model))
    return question(given, where)


def _over(base: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override '{override}': expected key=value")
    try:
        merged: Any = OmegaConf.to_container(OmegaConf.merge(base, OmegaConf.from_dotlist(list(overrides))), resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {' '.join(overrides)}: {' '.join(str(error).split())}") from error
    return {str(key): value for key, value in merged.items()}


def question(given: dict[str, Any], where: str = "plan") -> Question:
    """From a mapping. Raises `ConfigError`."""
    config = validate(PlanConfig, given, where)
    if config.model is None:
        raise ConfigError(f"{where}: key 'model' is missing: a config.json of Hugging Face, or a folder with one")
    shape = read_shape(config.model)
    cluster = config.cluster
    if cluster.gpu not in GPUS:
        raise ConfigError(f"{where}: key 'cluster.gpu': no GPU '{cluster.gpu}'; {nearest(cluster.gpu, GPUS)}")
    if cluster.gpus > cluster.gpus_per_node and cluster.gpus % cluster.gpus_per_node:
        raise ConfigError(f"{where}: {cluster.gpus} GPUs do not make whole nodes of {cluster.gpus_per_node}")
    gpu = GPUS[cluster.gpu]
    trainer, rollout = config.trainer.gpus, config.rollout.gpus
    if config.placement == "colocated":
        trainer, rollout = trainer or cluster.gpus, rollout or cluster.gpus
        if max(trainer, rollout) > cluster.gpus:
            raise ConfigError(f"{where}: trainer and rollout take {trainer} and {rollout} GPUs of {cluster.gpus}")
    else:
        trainer = trainer or (cluster.gpus - rollout if rollout else cluster.gpus - cluster.gpus // 2)
        rollout = rollout or cluster.gpus - trainer
        if trainer + rollout > cluster.gpus or min(trainer, rollout) < 1:
            raise ConfigError(
                f"{where}: trainer and rollout take {trainer} and {rollout} GPUs of their own, and there are {cluster.gpus}"
            )
    if shape.positions < (length := config.lengths.prompt + config.lengths.response):
        raise ConfigError(
            f"{where}: prompt and response together are {length} tokens, and the model's max_position_embeddings is "
            f"{shape.positions}"
        )
    return Question(
        shape=shape,
        config=config,
        memory=(cluster.memory_gib or gpu.memory_gib) * 2**30,
        nvlink=(cluster.nvlink_gb_s or gpu.nvlink_gb_s) * 1e9,
        network=(cluster.network_gb_s or gpu.network_gb_s) * 1e9,
        trainer_gpus=trainer,
        rollout_gpus=rollout,
    )
