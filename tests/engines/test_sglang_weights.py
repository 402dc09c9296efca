"""Which weights are handed to SGLang, under which names, and in which pieces; and which settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from agentloop.engines.sglang import SGLangEngine
from agentloop.engines.sglang_config import check_settings
from agentloop.engines.sglang_weights import EMBEDDING, HEAD, Names, buckets
from agentloop.errors import ConfigError, EngineError

KNOWN = {
    EMBEDDING: [4, 2],
    **{f"model.layers.{i}.{name}.weight": [2, 2] for i in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")},
}


def model(known: dict[str, list[int]] = KNOWN) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.full(shape, float(i))) for i, (name, shape) in enumerate(known.items())]


async def pieces(
    weights: Iterable[tuple[str, torch.Tensor]], known: dict[str, list[int]] | None = KNOWN, limit: int = 1
) -> list[list[str]]:
    made = buckets(weights, Names(known), torch.clone, limit)
    return [[name for name, _ in piece] async for piece in made]


async def test_pieces_never_split_a_layer() -> None:
    names = [name for name, _ in model()]
    assert await pieces(model()) == [names[:1], names[1:3], names[3:5], names[5:7]]
    assert await pieces(model(), limit=40) == [names[:3], names[3:7]]  # 32 bytes, and 32 for each layer
    assert await pieces(model(), limit=1 << 20) == [names]
    assert await pieces([]) == []


async def test_the_source_may_use_its_buffer_again() -> None:
    def source() -> Iterable[tuple[str, torch.Tensor]]:
        buffer = torch.zeros(2, 2)
        for i, name in enumerate(list(KNOWN)[1:]):
            yield name, buffer.fill_(float(i))

    made = [piece async for piece in buckets(source(), Names(KNOWN), torch.clone, 1 << 20)]
    assert [float(tensor[0, 0]) for _, tensor in made[0]] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.mlp.up_projj.weight", [2, 2], "did you mean 'model.layers.0.mlp.up_proj.weight'"),
        ("model.layers.0.mlp.up_proj.weight", [2, 3], r"has shape \[2, 2\] and was given \[2, 3\]"),
    ],
)
async def test_names_and_shapes_are_those_of_the_checkpoint(name: str, shape: list[int], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        await pieces([(name, torch.zeros(shape))])
    assert await pieces([(name, torch.zeros(shape))], known=None) == [[name]]


async def test_fused_experts_are_refused_by_what_they_are() -> None:
    """SGLang would skip them, log it, and report success."""
    known = {"model.layers.0.mlp.experts.0.gate_proj.weight": [2, 2]}
    with pytest.raises(EngineError, match="one weight for each expert"):
        await pieces([("model.layers.0.mlp.experts.gate_up_proj", torch.zeros(1, 4, 2))], known)


async def test_tied_tensors_go_once_and_must_agree() -> None:
    ones = torch.ones(4, 2)
    assert await pieces([(HEAD, ones)]) == [[EMBEDDING]]
    assert await pieces([(EMBEDDING, ones), (HEAD, ones)]) == [[EMBEDDING]]
    with pytest.raises(EngineError, match="were given two values"):
        await pieces([(EMBEDDING, ones), (HEAD, 2 * ones)])
    assert await pieces([(HEAD, ones)], {EMBEDDING: [4, 2], HEAD: [4, 2]}) == [[HEAD]]


async def test_halves_that_sglang_would_lose_are_refused() -> None:
    def name(layer: int, part: str) -> str:
        return f"model.layers.{layer}.self_attn.{part}.weight"

    known = {name(i, part): [2, 2] for i in range(2) for part in ("q_a_proj", "kv_a_proj_with_mqa")}
    assert await pieces(model(known), known) == [list(known)[:2], list(known)[2:]]
    by_kind = sorted(model(known), key=lambda item: item[0].split(".")[4])
    with pytest.raises(EngineError, match="sort by layer"):
        await pieces(by_kind, known)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_backnd": "triton"}, "no setting 'attention_backnd'; did you mean 'attention_backend'"),
        ({"qqqqq": 1}, "fields of sglang.srt.server_args.ServerArgs"),
        ({"model_path": "x"}, "'model_path' cannot be set here"),
        ({"nnodes": 2}, "use the engine 'sglang_server'"),
    ],
)
def test_settings_are_sglangs_own(settings: dict[str, Any], message: str) -> None:
    known = ["attention_backend", "mem_fraction_static", "model_path", "nnodes", "tp_size"]
    with pytest.raises(ConfigError, match=message):
        check_settings(settings, known, "sglang.settings")
    check_settings({"attention_backend": "triton", "nnodes": 1}, known, "sglang.settings")


def test_wrong_input_is_one_sentence_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"sglang: unknown key 'modelpath'; did you mean 'model_path'"):
        SGLangEngine({"modelpath": "x"})
    if importlib.util.find_spec("sglang") is None:
        with pytest.raises(ConfigError, match="the engine 'sglang' needs SGLang"):
            SGLangEngine.load("x")
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
    with pytest.raises(ConfigError, match="unset it"):
        SGLangEngine.load("x")
