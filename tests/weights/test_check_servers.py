"""The canary on SGLang servers, which tell only what changed: over HTTP, against servers over the local engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agentloop.engines.local import LocalEngine
from agentloop.engines.serve_local import LocalServer
from agentloop.engines.sglang_server import SGLangServerEngine
from agentloop.errors import EngineError
from agentloop.weights.check import Canary
from agentloop.weights.check_transformers import published, reference
from tests.weights.canary_support import VOCABULARY, engine_of, sums, texts, train, trainer


@pytest.fixture
async def replicas(tmp_path: Path) -> AsyncIterator[tuple[SGLangServerEngine, list[LocalEngine]]]:
    """One engine over two servers, each with the first weights of `trainer("qwen3_moe")`."""
    locals_ = [engine_of(trainer("qwen3_moe")) for _ in range(2)]
    servers = [LocalServer(local, weight_version="0") for local in locals_]
    urls = [await server.start() for server in servers]
    engine = SGLangServerEngine({"urls": urls, "weights_dir": tmp_path, "vocab_size": VOCABULARY})
    yield engine, locals_
    await engine.close()
    await asyncio.gather(*(server.close() for server in servers))


async def test_a_replica_that_kept_an_old_tensor_is_found(replicas: tuple[SGLangServerEngine, list[LocalEngine]]) -> None:
    """Whichever of the two is asked for scores."""
    engine, (_, second) = replicas
    model = trainer("qwen3_moe")
    canary = Canary(texts(4, 32), reference(model), tolerance="bfloat16_moe")
    with pytest.raises(EngineError, match="tells no checksums of weights under their published names"):
        await engine.weight_checksums()
    for version in (1, 2):
        train(model, 0.0001, seed=version)
        await engine.update_weights(published(model), version)
        report = await canary.check(engine, version, sums(model))
        assert report.ok, report.message
        assert report.compared_by == (None if version == 1 else "fingerprints")
    name = "model.layers.2.self_attn.q_norm.weight"
    old = dict(published(model))[name].clone()
    train(model, 0.0001, seed=3)
    await engine.update_weights(published(model), 3)
    await second.update_weights([(name, old)], 3)
    report = await canary.check(engine, 3, sums(model))
    assert not report.ok
    assert report.margin < 1
    assert (report.layer, report.tensors) == (2, (name,))
    assert f"in layer 2 1 tensor was sent anew and did not change ({name})" in report.message
