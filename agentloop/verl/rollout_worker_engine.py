"""The engine that one rank hosts: its start, in the right environment, and an event loop of its own to live in."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, TypeVar

from agentloop.engines.base import Engine
from agentloop.errors import ConfigError, EngineError
from agentloop.verl.rollout_worker_places import Place, Seat, engine_environment, environment
from agentloop.verl.rollout_worker_settings import SGLANG, WorkerSettings

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
START_S = 1800.0
"""Until the nodes of one engine must be up; hundreds of gigabytes are read meanwhile."""
STOP_S = 10.0


class LoopThread:
    """An event loop in a thread. Ray calls a worker's methods one after the other, in the process's main thread (where SGLang
    must be started); what they wait for runs here, and goes on between two calls."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="agentloop-rollout-worker", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def start_engine(settings: WorkerSettings, seat: Seat) -> Engine:
    """The engine of a group on one node. Blocks until the model is loaded; call it from the main thread."""
    with environment(engine_environment(seat.devices, os.environ)):
        if settings.engine == SGLANG:
            from agentloop.engines.sglang import SGLangEngine

            return SGLangEngine(settings.sglang())
        from agentloop.engines.local import LocalEngine

        return LocalEngine.load(settings.model_path, device="cpu", **settings.arguments)


# -- an engine over several nodes ---------------------------------------------------------------------------------------------


def free_port() -> int:
    """A port of this node that is free now."""
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def node_command(settings: WorkerSettings, seat: Seat, *, meet: str, port: int) -> list[str]:
    """SGLang's server as one node of an engine runs it. `meet`: `address:port` at which the nodes find each other. Requests are
    answered on the first node, at `port`; a rank's process cannot hold such an engine itself."""
    arguments = {**settings.arguments, "nnodes": seat.nodes, "node_rank": seat.node_rank, "dist_init_addr": meet}
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", settings.model_path]
    command += ["--host", "0.0.0.0", "--port", str(port), "--log-level", str(arguments.pop("log_level", "warning"))]
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            command.append(option)
        elif isinstance(value, Mapping):
            command += [option, json.dumps(value)]
        elif isinstance(value, list | tuple):
            command += [option, *map(str, value)]
        elif value is not False and value is not None:
            command += [option, str(value)]
    return command


def start_node(settings: WorkerSettings, seat: Seat, *, meet: str, port: int) -> subprocess.Popen[bytes]:
    """This node's part of an engine over several nodes. It ends with this process (Linux)."""
    wanted = {**os.environ, **engine_environment(seat.devices, os.environ)}
    variables = {name: value for name, value in wanted.items() if value is not None}
    parent = os.getpid()
    command = [sys.executable, "-c", _UNTIL_PARENT_ENDS, str(parent), *node_command(settings, seat, meet=meet, port=port)]
    return subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, start_new_session=True)


_UNTIL_PARENT_ENDS = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG outlives exec
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def server_engine(address: str, port: int, process: subprocess.Popen[bytes], loop: LoopThread) -> Engine:
    """A client of the server on this node, once it is up. `EngineError` if it ends or is not up within `START_S`."""
    from agentloop.engines.sglang_server import SGLangServerEngine

    engine = SGLangServerEngine({"urls": (f"http://{address}:{port}",)})
    late = monotonic() + START_S
    while True:
        try:
            loop.run(engine.start())
            return engine
        except EngineError as error:
            if process.poll() is not None:
                raise EngineError(f"SGLang did not start on {address}: it ended with status {process.returncode}") from error
            if monotonic() > late:
                raise EngineError(f"SGLang did not start on {address} within {START_S:g} s: {error}") from error
            sleep(1.0)


def stop_node(process: subprocess.Popen[bytes]) -> None:
    """End a node's server with all that it started."""
    import psutil

    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.terminate()
        except psutil.NoSuchProcess:
            continue
    for member in psutil.wait_procs(family, timeout=STOP_S)[1]:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def meeting_point(settings: WorkerSettings, places: list[Place], seat: Seat) -> str:
    """`address:port` at which an engine's nodes find each other: the configured one, or the leader's."""
    if settings.dist_init_addr is not None:
        return settings.dist_init_addr
    leader = places[seat.leader]
    return f"[{leader.address}]:{leader.port}" if ":" in leader.address else f"{leader.address}:{leader.port}"


# -- weights ------------------------------------------------------------------------------------------------------------------


def tensors_of(source: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Named tensors from a checkpoint's folder, or from buckets in Ray's object store, one after the other."""
    if isinstance(source, str):
        yield from _of_folder(Path(source))
        return
    import ray

    for reference in source:
        yield from ray.get(reference).tensors()


def _of_folder(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise EngineError(f"{index}: not an index of a checkpoint: {error}") from error
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder}: no checkpoint in safetensors is there")
    for name in files:
        try:
            with safe_open(str(folder / name), framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - it is no mapping
                    yield key, opened.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise EngineError(f"{folder / name}: cannot be read: {error}") from error
