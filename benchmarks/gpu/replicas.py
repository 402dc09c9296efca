"""Several SGLang servers behind the engine `sglang_server`: the prefix cache with sticky placement, and a server that dies.

`python -m benchmarks.gpu.replicas [--replicas 2] [--trajectories 256]`, three to four minutes on an H200.

Servers of Qwen3-8B's shape with random weights, on as many GPUs as there are, replay the trace of
`benchmarks/gpu/throughput.py` with instant tools: once undisturbed, which gives the share of the tokens of the turns before
that the prefix caches served, and once while one server is killed, after which every trajectory must have ended as the trace
says. Exits with 3 where SGLang or a GPU is missing. `--engine local` runs the same over servers of the local engine on a CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from agentloop.engines.sglang_server import SGLangServerEngine
from agentloop.errors import AgentloopError, EngineError
from benchmarks.gpu.engine_support import Result, arguments, command, refused
from benchmarks.gpu.meter import MeteredEngine
from benchmarks.gpu.models import QWEN3_8B, TINY, random_model, write_model
from benchmarks.gpu.sides import Agentloop, response_length, reuse
from benchmarks.gpu.trace import instant, make_trace, shortened
from benchmarks.report import Aim

PORT = 21_000
START_S = 240.0
SERVER = [
    *("--load-format", "dummy", "--dtype", "bfloat16", "--attention-backend", "triton", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--disable-piecewise-cuda-graph", "--log-level", "warning"),
]
KILL_AFTER = 0.3
"""Of the time that the undisturbed pass took."""


def gpus() -> int:
    import torch

    return int(torch.cuda.device_count())


class Servers:
    """Processes of their own, each in its own process group."""

    def __init__(self, kind: str, model: Path, count: int, logs: Path) -> None:
        self.kind, self.model, self.logs = kind, model, logs
        self.urls = [f"http://127.0.0.1:{PORT + 100 * i}" for i in range(count)]
        self.processes: list[subprocess.Popen[bytes]] = []

    def command(self, number: int) -> list[str]:
        where = ["--model-path", str(self.model), "--port", str(PORT + 100 * number)]
        if self.kind == "local":
            return [sys.executable, "-m", "agentloop.engines.serve_local", *where, "--threads", "1"]
        device = number % gpus()
        # A server takes its share of what is free when it starts; on one GPU each must leave room for those after it.
        later = len(range(number, len(self.urls), gpus()))
        share = round(0.85 / later, 2) if later > 1 else 0.75
        more = ["--host", "127.0.0.1", "--base-gpu-id", str(device), "--mem-fraction-static", str(share), *SERVER]
        return [sys.executable, "-m", "sglang.launch_server", *where, *more]

    async def start(self, engine: SGLangServerEngine) -> None:
        """One after the other where they share a GPU. Raises `AgentloopError` if one does not come up."""
        at_once = len(self.urls) if self.kind == "local" else gpus()
        for first in range(0, len(self.urls), at_once):
            for number in range(first, min(first + at_once, len(self.urls))):
                self._launch(number)
            await self._up(engine)

    def _launch(self, number: int) -> None:
        with (self.logs / f"server-{number}.log").open("wb") as log:
            command = self.command(number)
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))

    async def _up(self, engine: SGLangServerEngine) -> None:
        late = perf_counter() + START_S
        while sum(replica.up for replica in engine.replicas) < len(self.processes):
            ended = [number for number, process in enumerate(self.processes) if process.poll() is not None]
            if ended or perf_counter() > late:
                number = ended[0] if ended else len(self.processes) - 1
                lines = (self.logs / f"server-{number}.log").read_text(errors="replace").splitlines()
                said = lines[-1] if lines else "it said nothing"
                raise AgentloopError(f"server {number} {'ended' if ended else 'is not up'}: {said}")
            await asyncio.sleep(0.5)
            with contextlib.suppress(EngineError):
                await engine.start()  # asks all of them

    def kill(self, number: int) -> None:
        process = self.processes[number]
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def close(self) -> None:
        for number in range(len(self.processes)):
            self.kill(number)


async def measure(args: argparse.Namespace, folder: Path, result: Result) -> None:
    model = folder / "model"
    write_model(model, QWEN3_8B if args.engine == "sglang" else TINY)
    if args.engine == "local":
        random_model(model).save_pretrained(model)
    trace = instant(make_trace(args.trajectories, seed=args.seed, scale=args.scale))
    sampled = sum(c.tokens for c in trace)
    result.note(
        replicas=args.replicas,
        gpus=gpus() if args.engine == "sglang" else 0,
        conversations=len(trace),
        sampled_tokens=sampled,
    )
    servers = Servers(args.engine, model, args.replicas, folder)
    engine = SGLangServerEngine({"urls": tuple(servers.urls), "ignore_eos": True, "probe_interval_s": 1.0})
    began = perf_counter()
    try:
        await servers.start(engine)
        result.note(start_s=round(perf_counter() - began, 1))
        ours = Agentloop(MeteredEngine(engine), model, folder / "journal", response_length(model, trace), "replicas")
        await ours.run(shortened(trace), 1)
        began, placed = perf_counter(), [replica.placed for replica in engine.replicas]
        trajectories = await ours.run(trace, 2)
        wall = perf_counter() - began
        undisturbed = {
            "wall_s": round(wall, 3),
            "tokens_per_s": round(sampled / wall, 1),
            "placed": [replica.placed - before for replica, before in zip(engine.replicas, placed, strict=True)],
            "prefix_cache": reuse(trajectories),
        }
        result.note(undisturbed=undisturbed)
        began, running = perf_counter(), asyncio.create_task(ours.run(trace, 3))
        await asyncio.sleep(KILL_AFTER * wall)
        lost = engine.replicas[-1].in_flight
        servers.kill(args.replicas - 1)
        trajectories = await running  # raises unless each went as the trace says
        killed = {
            "requests_lost": lost,
            "complete": len(trajectories),
            "wall_s": round(perf_counter() - began, 3),
            "replicas_up": sum(replica.up for replica in engine.replicas),
            "prefix_cache": reuse(trajectories),
        }
        result.note(one_killed=killed)
    finally:
        await engine.close()
        servers.close()


def aims(figures: Mapping[str, Any]) -> list[Aim]:
    found = []
    if "undisturbed" in figures:
        share = figures["undisturbed"]["prefix_cache"]["share"]
        found.append(Aim("cached tokens over the ideal, sticky placement", share, "at least 0.99", share >= 0.99))
    if "one_killed" in figures:
        missed = figures["conversations"] - figures["one_killed"]["complete"]
        found.append(Aim("trajectories lost with a server", missed, "0", missed == 0))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Several SGLang servers.")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--trajectories", type=int, default=256)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the trace's tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = arguments(parser, "replicas", argv)
    if args.replicas < 2:
        parser.error("--replicas must be at least 2: one of them is killed")
    if refused(args):
        return 3
    result = Result(args.name, aims, args.results, command=command("replicas"), engine=args.engine)
    with tempfile.TemporaryDirectory(prefix="replicas-") as folder:
        try:
            asyncio.run(measure(args, Path(folder), result))
        except AgentloopError as error:
            print(error, file=sys.stderr)
            return 1
    result.report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
