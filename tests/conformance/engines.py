"""The engines that `test_engines.py` puts through its behaviours. An engine joins with one entry in `KINDS`."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agentloop.engines.base import Engine, Sampling
from agentloop.engines.local import LocalEngine
from agentloop.engines.scripted import ScriptedEngine, ScriptedTurn
from tests.conformance import sglang_server

MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "model"
"""0.88 M parameters, trained; context 1024."""
VOCABULARY = 687
CONTEXT = 1024
END = 682
"""The model's end-of-turn token, which ends a generation in some engines beside the stop tokens that a request names."""
LONG = 400
"""Tokens of a generation that is still running when a test gets to it."""

Weights = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Kind:
    """One engine under test, and in what it may differ from the others. Every engine serves `MODEL`, unless `samples` is off,
    starts with weight version 0, and ends a generation for its length alone where the request names no stop tokens."""

    start: Callable[[], AbstractAsyncContextManager[Engine]]
    """Starts an engine and closes it in the end, which a test may have done already."""
    unavailable: Callable[[], str | None] = lambda: None
    """Why it cannot be had here: the tests are skipped with this sentence."""
    running: Callable[[Any], Awaitable[int]] | None = None
    """Requests that the engine holds, waiting ones included, as the one tells who does the work."""
    gpu: bool = False
    shared: bool = False
    """Starting takes long: one engine serves all tests, with its own weights put back between them."""
    samples: bool = True
    """It has a model, so temperature, seeds, stop tokens and weights mean something."""
    seeds: bool = True
    """A seed gives the same tokens again."""
    keeps_on: bool = True
    """A request goes on while weights are updated. Off: it is aborted, and the caller resumes it."""
    scores_at: tuple[float, ...] = (0.5, 1.0, 1.7)
    """Temperatures at which it can score."""
    tolerance: float = 1e-4
    """How far a sampled log-probability may be from that of `score` and from that of transformers in float32."""
    cache: bool = True
    """`cached_tokens` says what was reused."""


@functools.cache
def reference(seed: int | None = None) -> Any:
    """The model in transformers, on the CPU in float32: as trained, or with every matrix shuffled by `seed`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(parameter[:, torch.randperm(parameter.shape[1], generator=generator)])
    return model


def weights(seed: int | None = None) -> Weights:
    """Weights for `update_weights`, by their names in the checkpoint."""
    return [(name, parameter.detach()) for name, parameter in reference(seed).named_parameters()]


@torch.inference_mode()
def plain_log_probs(ids: Sequence[int], start: int, *, seed: int | None = None, temperature: float = 1.0) -> list[float]:
    """What transformers says of `ids[start:]`, in one forward without any cache."""
    tokens = torch.tensor([list(ids)])
    logits = reference(seed)(input_ids=tokens, use_cache=False).logits[0, start - 1 : -1].float() / temperature
    return torch.log_softmax(logits, dim=-1).gather(1, tokens[0, start:, None])[:, 0].tolist()


async def running_local(engine: LocalEngine) -> int:
    return engine.running + engine.waiting


async def running_scripted(engine: ScriptedEngine) -> int:
    return engine.in_flight


@asynccontextmanager
async def scripted() -> AsyncIterator[Engine]:
    def script(ids: Sequence[int], sampling: Sampling, trajectory_id: str) -> ScriptedTurn:
        delay = 2.0 if sampling.max_tokens >= LONG else 0.0
        return ScriptedTurn([i % VOCABULARY for i in range(sampling.max_tokens + 1)], delay_s=delay)

    engine = ScriptedEngine(script)
    yield engine
    await engine.close()


@asynccontextmanager
async def local(device: str = "cpu") -> AsyncIterator[Engine]:
    engine = LocalEngine.load(str(MODEL), device=device, max_slots=8, stop_token_ids=())
    yield engine
    await engine.close()


def no_cuda() -> str | None:
    return None if torch.cuda.is_available() else "there is no GPU here"


def no_sglang() -> str | None:
    if importlib.util.find_spec("sglang") is None:
        return "SGLang is not installed here"
    return no_cuda()


SGLANG: dict[str, Any] = {
    "dtype": "bfloat16",
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_piecewise_cuda_graph": True,
    "enable_memory_saver": True,
    "enable_weights_cpu_backup": True,
    "mem_fraction_static": 0.2,
    "max_total_tokens": 1 << 18,
}
"""What both SGLang engines are started with: kernels that need no FlashAttention and no compiler. Not float32, which would be
better for comparisons: not all of SGLang's kernels take it."""
SGLANG_TOLERANCE = 0.5
"""bfloat16 against transformers in float32, with rounded weights; the mean must stay below a fifth of it."""


def command_line(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings as arguments of `sglang.launch_server`."""
    flags: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [flag, str(value)]
    return tuple(flags)


SGLANG_SERVER = (*command_line(SGLANG), "--log-level", "warning")


@asynccontextmanager
async def sglang() -> AsyncIterator[Engine]:
    from agentloop.engines.sglang import SGLangEngine

    engine = SGLangEngine.load(str(MODEL), settings=SGLANG, ignore_eos=True)
    yield engine
    await engine.close()


async def running_sglang(engine: Any) -> int:
    return int(engine.in_flight + await engine.running())


KINDS: dict[str, Kind] = {
    "scripted": Kind(scripted, running=running_scripted, samples=False),
    "local": Kind(local, running=running_local),
    "local_cuda": Kind(lambda: local("cuda"), unavailable=no_cuda, running=running_local, gpu=True, tolerance=2e-3),
}


KINDS["sglang_server"] = Kind(
    lambda: sglang_server.over_local(MODEL), running=sglang_server.running, keeps_on=False, scores_at=(1.0,)
)
IN_PROCESS = Kind(
    sglang,
    unavailable=no_sglang,
    running=running_sglang,
    gpu=True,
    shared=True,
    seeds=False,
    keeps_on=False,
    scores_at=(1.0,),
    tolerance=SGLANG_TOLERANCE,
)
KINDS["sglang"] = IN_PROCESS
KINDS["sglang_server_real"] = replace(
    IN_PROCESS, start=lambda: sglang_server.over_sglang(MODEL, SGLANG_SERVER), running=sglang_server.running
)


def parameters() -> list[Any]:
    """The kinds as parameters of a fixture; those that need a GPU carry the marker, and the time that a start takes."""
    marks = (pytest.mark.gpu, pytest.mark.timeout(600))
    return [pytest.param(name, marks=marks if kind.gpu else ()) for name, kind in KINDS.items()]
