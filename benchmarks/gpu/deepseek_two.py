"""What `benchmarks/gpu/deepseek.py` measures on two GPUs: weights over NCCL from the trainer's process to an engine on the
other GPU, and an engine on both. Written against SGLang 0.5.12."""

from __future__ import annotations

import asyncio
import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from agentloop.engines.base import Sampling
from agentloop.engines.sglang import SGLangEngine
from agentloop.engines.sglang_weights import Names, buckets
from agentloop.engines.update_group import UpdateGroup, free_port
from benchmarks.gpu.deepseek_model import SHAPES, log_probs, per_expert, shift, trainer, write_folder
from benchmarks.gpu.engine_support import summary
from benchmarks.gpu.weights import furthest, prompt

GROUP, THREAD = "agentloop_weights", "benchmark-nccl"
BUCKET_BYTES = 512 << 20
UPDATES, SCORED = 3, 8
WAIT_S = 90.0
"""For the other side of NCCL: a call of it that nobody answers cannot be ended."""


async def aside(call: Callable[[], Any]) -> Any:
    """`call` in a thread that does not keep the program alive. Raises `TimeoutError` after `WAIT_S`."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def finish(result: Any, error: BaseException | None) -> None:
        if not done.done():
            done.set_result(result) if error is None else done.set_exception(error)

    def body() -> None:
        try:
            result, error = call(), None
        except Exception as raised:
            result, error = None, raised
        loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=body, name=THREAD, daemon=True).start()
    return await asyncio.wait_for(done, WAIT_S)


def stuck() -> bool:
    """Whether a call to NCCL is left that nobody answers, with which a program does not end."""
    return any(thread.name == THREAD for thread in threading.enumerate())


class Nccl:
    """This process as rank 0, an engine's schedulers as the others: what `DistributedPlan` is made of, without its manager."""

    def __init__(self, engine: SGLangEngine) -> None:
        self.member = engine.group_member()
        self.group: Any = None
        self.version = engine.weight_version

    async def open(self) -> None:
        port, ranks = free_port(), 1 + await self.member.ranks()
        where = ("127.0.0.1", port)

        def own() -> UpdateGroup:
            import torch

            torch.cuda.set_device(0)
            return UpdateGroup(*where, rank=0, ranks=ranks, name=GROUP, backend="nccl", timeout_s=WAIT_S)

        theirs = self.member.join(*where, first=1, ranks=ranks, name=GROUP, backend="nccl")
        self.group, _ = await asyncio.gather(aside(own), asyncio.wait_for(theirs, WAIT_S))

    async def update(self, weights: Any) -> tuple[float, int]:
        """Seconds, and calls. A layer is never split."""
        await self.member.begin()
        began, calls = perf_counter(), 0
        async for piece in buckets(weights, Names(None), lambda tensor: tensor.detach().contiguous(), BUCKET_BYTES):
            tensors = [tensor for _, tensor in piece]
            names, dtypes = [name for name, _ in piece], [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
            theirs = self.member.receive(names, dtypes, [list(tensor.shape) for tensor in tensors], name=GROUP)
            mine = aside(lambda tensors=tensors: self.group.broadcast(tensors))  # type: ignore[misc]
            await asyncio.gather(mine, asyncio.wait_for(theirs, WAIT_S))
            calls += 1
        self.version += 1
        await self.member.end(self.version)
        return perf_counter() - began, calls

    async def close(self) -> None:
        await asyncio.wait_for(self.member.leave(GROUP), WAIT_S)


def between(count: int = 1 << 30) -> float:
    """Bytes a second that are copied from the first GPU to the second; the best of five."""
    import torch

    best = 0.0
    source = torch.zeros(count, dtype=torch.bfloat16, device="cuda:0")
    target = torch.empty(count, dtype=torch.bfloat16, device="cuda:1")
    for _ in range(5):
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        began = perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        best = max(best, source.nbytes / (perf_counter() - began))
    del source, target
    torch.cuda.empty_cache()
    return best


async def scores(engine: Any) -> list[float]:
    return [value for number in range(SCORED) for value in await engine.score(prompt(64, 100 + number))]


def reference(model: Any) -> list[float]:
    return [value for number in range(SCORED) for value in log_probs(model, prompt(64, 100 + number))]


def apart(some: list[float], others: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(some, others, strict=True)]


async def over_nccl(folder: Path, size: str) -> dict[str, Any]:
    """The trainer on the first GPU, the engine on the second."""
    from benchmarks.gpu.deepseek import start

    config = SHAPES[size].config("bfloat16")
    write_folder(folder, config)
    model = trainer(config, "cuda:0")
    moved = sum(tensor.nbytes for tensor in model.state_dict().values())
    bandwidth = between()
    began = perf_counter()
    engine: Any = start("sglang", folder, "dummy", {"base_gpu_id": 1})
    found: dict[str, Any] = {"size": size, "bytes": moved, "copy_gb_per_s": round(bandwidth / 1e9, 1)}
    found["start_s"] = round(perf_counter() - began, 1)
    group = Nccl(engine)
    try:
        await engine.generate(prompt(64, 5), Sampling(8), trajectory_id="warm")
        began = perf_counter()
        await group.open()
        found["open_s"] = round(perf_counter() - began, 2)
        took, landed, every = [], [], []
        for number in range(UPDATES + 1):
            seconds, calls = await group.update(per_expert(model.state_dict().items()))
            took.append(round(seconds, 4))
            every.append(await scores(engine))
            landed.append(summary(apart(every[-1], reference(model))))
            shift(model, -1 if number % 2 else 1)
        usual = statistics.median(took[1:])  # NCCL makes its connections in the first
        found |= {
            "calls": calls,
            "update_s": took,
            "gb_per_s": round(moved / usual / 1e9, 1),
            "over_copy": round(usual / (moved / bandwidth), 1),
            "scores_moved": round(furthest(every[0], every[1]), 4),
            "scores_back": round(furthest(every[0], every[2]), 6),
            "against_transformers": landed,
        }
        began = perf_counter()
        await engine.update_weights(per_expert(model.state_dict().items()), group.version + 1)
        found["by_handles_s"] = round(perf_counter() - began, 4)  # copied to the engine's GPU first
        found["by_handles_against_transformers"] = summary(apart(await scores(engine), reference(model)))
        await group.close()
    finally:
        await engine.close()
    return found


async def tensor_parallel(folder: Path, size: str) -> dict[str, Any]:
    """One engine on both GPUs: its scores and its decoding against the trainer's model, and an update from the first GPU."""
    from benchmarks.gpu.deepseek import start

    config = SHAPES[size].config("bfloat16")
    write_folder(folder, config)
    model = trainer(config, "cuda:0")
    began = perf_counter()
    engine: Any = start("sglang", folder, "dummy", {"tp_size": 2})
    found: dict[str, Any] = {"size": size, "start_s": round(perf_counter() - began, 1)}
    try:
        await engine.generate(prompt(64, 5), Sampling(8), trajectory_id="warm")
        took, landed = [], []
        for number in range(UPDATES):
            began = perf_counter()
            await engine.update_weights(per_expert(model.state_dict().items()), number + 1)
            took.append(round(perf_counter() - began, 4))
            landed.append(summary(apart(await scores(engine), reference(model))))
            if number < UPDATES - 1:
                shift(model, -1 if number % 2 else 1)
        answers = await asyncio.gather(
            *(engine.generate(prompt(8 + i, i), Sampling(32), trajectory_id=f"tp{i}") for i in range(32))
        )
        decoded: list[float] = []
        for number, answer in enumerate(answers):
            ids = prompt(8 + number, number)
            decoded += apart(answer.log_probs, log_probs(model, ids + answer.ids, len(ids)))
        found |= {"update_s": took, "against_transformers": landed, "decode_against_transformers": summary(decoded)}
    finally:
        await engine.close()
    return found
