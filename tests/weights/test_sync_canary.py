"""The weight sync with the real canary: what it lets serve, and what it refuses by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agentloop.weights import MegatronSGLangShardingManager, TensorsPlan, WeightsRefused
from agentloop.weights.check import Canary, CanaryReport
from agentloop.weights.check_faults import FaultyEngine, faults
from agentloop.weights.check_transformers import published, reference
from tests.weights.canary_support import texts
from tests.weights.models import hf_model
from tests.weights.sync_support import SMALL_BUCKET, Trainer, answers, engine_of


def scored_by(trainer: Trainer) -> Any:
    """The trainer's log-probabilities, by transformers with the weights that its shards hold at that moment."""
    model = hf_model(trainer.name)
    score = reference(model)

    def now(sequences: Any) -> Any:
        held = trainer.tensors()
        with torch.no_grad():
            for name, tensor in published(model):
                tensor.copy_(held[name])
        return score(sequences)

    return now


@pytest.mark.parametrize("fault", ["experts_exchanged", "experts_skipped", "expert_bias_forgotten", "fused_pair_lost"])
async def test_rollouts_are_refused_with_the_layer_and_the_tensors_that_differ(fault: str) -> None:
    trainer, engine = Trainer(), FaultyEngine(engine_of())
    manager = MegatronSGLangShardingManager(
        {"one": engine},
        trainer.source,
        TensorsPlan(),
        bucket_bytes=SMALL_BUCKET,
        check=Canary(texts(4, 48), scored_by(trainer), tolerance="float32"),
    )
    for _ in range(2):
        trainer.step()
        report = await manager.sync()
        assert report is not None
        found = report.checks["one"]
        assert isinstance(found, CanaryReport)
        assert (found.ok, found.compared) == (True, report.tensors)
    engine.fault = next(each for each in faults(trainer.tensors()) if each.name == fault)
    trainer.step()
    with pytest.raises(
        WeightsRefused, match=r"engine 'one', version 3: version 3 is not what serves: .*layer.*no engine serves"
    ):
        await manager.sync()
    with pytest.raises(WeightsRefused, match="version 3 is not what serves"):
        await answers(manager.engine)
    engine.fault = None
    await manager.sync()
    assert await answers(manager.engine) == 3
    await engine.engine.close()
