"""A trainer with live Megatron shards of a tiny model, engines that serve it, and a check of what they serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agentloop.engines.base import Engine, Sampling
from agentloop.engines.local import LocalEngine
from agentloop.errors import EngineError
from agentloop.weights import (
    HfTensors,
    Item,
    Layout,
    ModelShape,
    Shard,
    ShardSource,
    hf_config,
    shape_of,
    to_shard,
)
from agentloop.weights.checksum import checksum
from tests.weights.models import MODELS, TOKENS, hf_model

LAYOUT = Layout(tp=2, pp=2, ep=2)
SMALL_BUCKET = 40_000


def config_of(name: str) -> dict[str, Any]:
    """The model's `config.json`, without multi-token prediction, which transformers does not serve."""
    kind, config = MODELS[name]
    return hf_config(config | {"model_type": kind, "architectures": [type(hf_model(name)).__name__]}, dtype=None, mtp=False)


def published(model: Any) -> dict[str, torch.Tensor]:
    """A transformers model's tensors under the names of checkpoints: its experts one by one."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        start, _, kind = name.rpartition(".")
        if start.endswith(".experts") and kind == "gate_up_proj":
            for number, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                tensors |= {f"{start}.{number}.gate_proj.weight": gate, f"{start}.{number}.up_proj.weight": up}
        elif start.endswith(".experts") and kind == "down_proj":
            tensors |= {f"{start}.{number}.down_proj.weight": expert for number, expert in enumerate(tensor)}
        else:
            tensors[name] = tensor
    return tensors


class Trainer:
    """Live shards of a job with tensor, pipeline and expert parallelism, in one process."""

    def __init__(self, name: str = "deepseek") -> None:
        self.name = name
        self.config = config_of(name)
        self.shape: ModelShape = shape_of(self.config)
        weights = HfTensors(published(hf_model(name)))
        self.shards = [
            Shard(at, {key: tensor.clone() for key, tensor in to_shard(weights, LAYOUT, at, self.shape).items()})
            for at in LAYOUT.chunks(moe=bool(self.shape.experts))
        ]

    def source(self) -> ShardSource:
        return ShardSource(self.shards, LAYOUT, self.shape)

    def step(self) -> None:
        """Every weight becomes another one, as after an optimizer step; copies of a piece stay copies."""
        for shard in self.shards:
            for tensor in shard.tensors.values():
                tensor.mul_(1.01)

    def tensors(self) -> dict[str, torch.Tensor]:
        from agentloop.weights import export

        return {name: tensor.clone() for bucket in export(self.source()) for name, tensor in bucket.tensors}

    def checksums(self) -> dict[str, int]:
        return {name: checksum(tensor) for name, tensor in self.tensors().items()}


def engine_of(name: str = "deepseek") -> LocalEngine:
    return LocalEngine(hf_model(name), max_slots=4, stop_token_ids=())


async def start_local(folder: Path, version: int) -> Engine:
    return LocalEngine.load(str(folder), max_slots=4, stop_token_ids=(), weight_version=version)


def served(engine: Any) -> dict[str, int]:
    """Checksums of what a local engine serves, under published names."""
    return {name: checksum(tensor) for name, tensor in published(engine._model).items()}


async def answers(engine: Engine, key: str = "a") -> int | None:
    """Have a rollout answered; the version that it was answered with."""
    answer = await engine.generate(TOKENS[0][:4], Sampling(2), trajectory_id=key)
    await engine.release(key)
    assert len(answer.ids) == 2
    return answer.weight_version


@dataclass
class Report:
    ok: bool
    message: str


class ExactCheck:
    """What serves is what was sent, by checksum; refuses as often as it is told to."""

    def __init__(self) -> None:
        self.refuse = 0
        self.checked: list[int] = []

    async def expected(self) -> None:
        """Nothing is asked of the trainer."""

    async def check(self, engine: Engine, version: int, sent: Mapping[str, int] | None, *, expected: None) -> Report:
        assert isinstance(engine, LocalEngine)
        assert sent
        self.checked.append(version)
        has = served(engine)
        off = sorted(name for name in {*sent, *has} if sent.get(name) != has.get(name))
        if self.refuse:
            self.refuse -= 1
            off.append("layer 2 is off")
        return Report(not off, f"{len(off)} tensors differ: {', '.join(off[:3])}")


class FailingSource:
    """A source that fails at one of its tensors, and counts its reads."""

    def __init__(self, source: ShardSource, at: int, error: Exception) -> None:
        self.shape, self.items, self.origin = source.shape, source.items, source.origin
        self._source, self._at, self._error = source, at, error
        self.reads: list[str] = []

    def read(self, item: Item) -> torch.Tensor | None:
        self.reads.append(item.name)
        if len(self.reads) == self._at:
            raise self._error
        return self._source.read(item)


class Breaking(Engine):
    """A local engine that dies in an update after so many tensors: with its old weights whole, or with some of each, as
    SGLang's, which then says that it does not serve."""

    def __init__(self, engine: LocalEngine, after: int, *, mixes: bool) -> None:
        self.inner, self.after, self.mixes = engine, after, mixes
        self.broken = False

    @property
    def weight_version(self) -> int:
        return self.inner.weight_version

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, trajectory_id: str) -> Any:
        if self.broken:
            raise EngineError("the engine cannot answer: the last update of its weights failed")
        return await self.inner.generate(ids, sampling, trajectory_id=trajectory_id)

    async def release(self, trajectory_id: str) -> None:
        await self.inner.release(trajectory_id)

    async def update_weights(self, weights: Any, version: int) -> None:
        from agentloop.iterate import each

        async def some() -> Any:
            count = 0
            async for named in each(weights):
                if count == self.after:
                    self.broken = self.mixes
                    raise EngineError("a process of the engine died")
                yield named
                count += 1

        await self.inner.update_weights(some(), version)
        self.broken = False

    async def close(self) -> None:
        await self.inner.close()
