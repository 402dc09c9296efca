"""`rollout.name=sglang_async`: verl's own SGLang server with our additions, over a scripted tokenizer manager.

SGLang itself needs a GPU. Its modules are stood in for here by empty ones, so that verl's server can be imported: what verl
makes of an answer is verl's own code.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import importlib.util
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from agentloop.engines.base import Sampling
from agentloop.errors import ConfigError, EngineError
from agentloop.trajectory import StopReason
from agentloop.verl.client import VerlEngine
from agentloop.verl.sglang_parts import SGLANG_ASYNC, Tap, check_places

SAMPLING = Sampling(max_tokens=4, temperature=0.7, stop_token_ids=(9,), seed=11)


def test_without_sglang_it_is_refused_when_it_is_registered() -> None:
    if importlib.util.find_spec("sglang") is not None:
        pytest.skip("SGLang is installed")
    with pytest.raises(ConfigError, match="needs SGLang, which is not installed"):
        importlib.import_module("agentloop.verl.replica_sglang")


class Record:
    """A request of SGLang's: whatever it is made of."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class Hollow(MetaPathFinder, Loader):
    """Finds every module of SGLang, with every name in it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] == "sglang" else None

    def exec_module(self, module: ModuleType) -> None:
        def missing(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return Record

        module.__dict__.update(__getattr__=missing, __version__="0.5.12")


@pytest.fixture(scope="module")
def server_class() -> Iterator[Any]:
    before, finder = set(sys.modules), Hollow()
    sys.meta_path.insert(0, finder)
    yield importlib.import_module("agentloop.verl.sglang_server").AsyncSGLangServer
    sys.meta_path.remove(finder)
    for name in set(sys.modules) - before:
        if name.startswith(("sglang", "verl.workers.rollout.sglang_rollout", "agentloop.verl.sglang_server")):
            del sys.modules[name]


class Manager:
    """SGLang's tokenizer manager: each request is answered with `tokens`, when it is `free` to or with what it has when it is
    aborted."""

    def __init__(self, **meta: Any) -> None:
        self.rid_to_state: dict[str, asyncio.Event] = {}
        self.requests: list[Any] = []
        self.free = asyncio.Event()
        self.free.set()
        self.tokens = [5, 9]
        self.meta = {"finish_reason": {"type": "stop", "matched": 9}, "cached_tokens": 2, **meta}
        self.deaf = 0
        """Aborts that are forgotten."""
        self.closed = 0

    async def generate_request(self, request: Any, http_request: Any) -> AsyncIterator[dict[str, Any]]:
        self.requests.append(request)
        aborted = self.rid_to_state[request.rid] = asyncio.Event()
        waits = [asyncio.ensure_future(event.wait()) for event in (self.free, aborted)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        tokens, meta = self.tokens, dict(self.meta)
        if aborted.is_set():
            tokens, meta["finish_reason"] = tokens[:-1], {"type": "abort", "message": "Abort"}
        if request.return_logprob:
            meta["output_token_logprobs"] = [(-0.5, token, None) for token in [*tokens, 0]]  # one too many
        try:
            yield {"output_ids": tokens, "meta_info": meta}
        finally:
            self.closed += 1

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        self.deaf -= 1
        for known, aborted in self.rid_to_state.items():
            if self.deaf < 0 and (abort_all or known.startswith(rid)):
                aborted.set()

    async def pause_generation(self, request: Any) -> None:
        self.abort_request(abort_all=True)
        await until(lambda: self.closed == len(self.requests))

    async def continue_generation(self, request: Any) -> None:
        self.free.set()


@pytest.fixture
def make(server_class: Any) -> Any:
    def make(**meta: Any) -> Any:
        server = server_class.__new__(server_class)
        server.config = SimpleNamespace(
            max_model_len=100, prompt_length=50, response_length=50, enable_rollout_routing_replay="routed_experts" in meta,
            skip_tokenizer_init=True, mtp=None,
        )  # fmt: skip
        server.model_config = SimpleNamespace(lora_rank=0, lora={})
        server.global_steps, server.replica_rank, server.node_rank, server._disaggregation_role = 3, 0, 0, "null"
        server._begin()
        server.tokenizer_manager = Tap(Manager(**meta), (2, 1))
        return server

    return make


class Client:
    """verl's client with one server, which is called as a Ray actor is."""

    def __init__(self, server: Any) -> None:
        self.config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(name=SGLANG_ASYNC)))
        self.server = server
        self.calls: set[asyncio.Future[Any]] = set()

    def call(self, method: str, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        task: asyncio.Future[Any] = asyncio.ensure_future(getattr(self.server, method)(*args, **kwargs))
        self.calls.add(task)
        return task

    async def generate(self, request_id: str, *, prompt_ids: Any, sampling_params: Any, trajectory_id: str) -> Any:
        return await asyncio.shield(self.call("generate", prompt_ids, sampling_params, "some-id", trajectory_id=trajectory_id))

    async def _acquire_server(self, request_id: str) -> tuple[str, Any]:
        abort = SimpleNamespace(remote=lambda trajectory: self.call("abort_trajectory", trajectory))
        return "s0", SimpleNamespace(abort_trajectory=abort)

    def _release_server(self, server_id: str, request_id: str) -> None:
        return None


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError


async def sent(server: Any, count: int = 1) -> None:
    await until(lambda: len(server.tokenizer_manager.requests) == count)


async def test_what_verl_drops_arrives_in_the_engine(make: Any) -> None:
    server = make()
    engine = VerlEngine(Client(server))
    answer = await engine.generate([1, 2, 3], SAMPLING, trajectory_id="t0")
    assert (answer.ids, answer.log_probs, answer.stop_reason) == ([5, 9], [-0.5, -0.5], StopReason.STOP)
    assert (answer.min_weight_version, answer.weight_version, answer.cached_tokens) == (3, 3, 2)
    (request,) = server.tokenizer_manager.requests
    assert request.sampling_params["sampling_seed"] == 11
    assert (request.input_ids, len(request.rid)) == ([1, 2, 3], 32)
    assert server.tokenizer_manager.closed == 1  # SGLang's pause waits for it
    assert server.tokenizer_manager._answers == server.tokenizer_manager.rid_to_state == {}


async def test_a_span_during_which_the_weights_changed_is_marked(make: Any) -> None:
    server = make()
    server.tokenizer_manager.free.clear()
    running = asyncio.ensure_future(VerlEngine(Client(server)).generate([1], SAMPLING, trajectory_id="t0"))
    await sent(server)
    await server.set_global_steps(4)
    server.tokenizer_manager.free.set()
    answer = await running
    assert (answer.min_weight_version, answer.weight_version) == (3, 4)


async def test_an_update_aborts_what_runs_and_what_comes_then_has_the_new_version(make: Any) -> None:
    server = make()
    server.tokenizer_manager.free.clear()
    engine = VerlEngine(Client(server))
    running = asyncio.ensure_future(engine.generate([1], SAMPLING, trajectory_id="t0"))
    await sent(server)
    await server.abort_all_requests()
    late = asyncio.ensure_future(engine.generate([2], SAMPLING, trajectory_id="t1"))
    await asyncio.sleep(0)
    await server.set_global_steps(4)
    await server.resume_generation()
    cut, whole = await running, await late
    # One log-probability too many comes with an abort, for which verl drops the tokens as well.
    assert (cut.ids, cut.log_probs, cut.stop_reason, cut.weight_version) == ([5], [-0.5], StopReason.ABORTED, 3)
    assert (whole.min_weight_version, whole.weight_version) == (4, 4)


async def test_a_replica_that_leaves_rejects(make: Any) -> None:
    server = make()
    await server.abort_all_requests(reject_request=True)
    answer = await VerlEngine(Client(server)).generate([1], SAMPLING, trajectory_id="t0")
    assert (answer.ids, answer.stop_reason, answer.weight_version) == ([], StopReason.ABORTED, None)
    assert server.tokenizer_manager.requests == []


async def test_cancelling_ends_the_request_in_sglang(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentloop.verl.sglang_parts.ABORT_AGAIN_S", 0.01)
    server = make()
    manager = server.tokenizer_manager
    manager.free.clear()
    manager._manager.deaf = 2  # SGLang forgets an abort of a request that is between two queues
    client = Client(server)
    engine = VerlEngine(client)
    cancelled, other = (asyncio.ensure_future(engine.generate([1], SAMPLING, trajectory_id=name)) for name in ("t0", "t00"))
    await sent(server, 2)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    await engine.close()
    await engine.release("t0")
    await until(lambda: len(manager.rid_to_state) == 1)
    assert not other.done()
    manager.free.set()
    assert (await other).ids == [5, 9]
    assert await server.abort_trajectory("t0") is False
    assert server._requests == {}


async def test_routed_experts_survive_verls_own_handling(make: Any) -> None:
    experts: Any = np.arange(8, dtype=np.int32)
    server = make(routed_experts=base64.b64encode(experts.tobytes()).decode())
    answer = await VerlEngine(Client(server)).generate([1, 2, 3], SAMPLING, trajectory_id="t0")
    assert answer.data["routed_experts"].tolist() == experts.reshape(4, 2, 1).tolist()


@pytest.mark.parametrize(
    ("finish", "says"),
    [
        ({"type": "stop", "matched": "NaN happened"}, "not finite"),
        ({"type": "abort", "status_code": 429, "message": "full queue"}, "full queue"),
    ],
)
async def test_a_failure_that_sglang_reports_as_an_answer_is_one(make: Any, finish: Any, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        await make(finish_reason=finish).generate([1], {"logprobs": True, "max_tokens": 4}, "r0")


def test_another_sglang_is_told_of_in_one_sentence() -> None:
    check_places(Manager(), "0.5.12")
    with pytest.raises(ConfigError, match=r"'generate_request' .* SGLang 0\.9\.0 does not have .*rollout\.name=sglang"):
        check_places(object(), "0.9.0")
