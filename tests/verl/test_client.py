"""verl's client as an engine: what is sent to each server, and what becomes of its answer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions

from agentloop.engines.base import Sampling
from agentloop.errors import EngineError
from agentloop.generate import generate
from agentloop.trajectory import StopReason
from agentloop.verl.client import VerlEngine


def output(ids: list[int], *, stop: str | None = "completed", log_probs: list[float] | None = None, **fields: Any) -> Any:
    return SimpleNamespace(
        token_ids=ids,
        log_probs=[-0.5] * len(ids) if log_probs is None else log_probs,
        routed_experts=fields.pop("routed_experts", None),
        num_preempted=fields.pop("num_preempted", None),
        stop_reason=stop,
        extra_fields=fields,
    )


class Client:
    """A client with verl's `generate` that answers from a list and, like SGLang's server, spoils what it was given."""

    def __init__(self, *answers: Any, name: str = "sglang") -> None:
        self.config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(name=name)))
        self.answers = list(answers)
        self.calls: list[dict[str, Any]] = []

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **extra: Any) -> Any:
        call = {"request_id": request_id, "prompt_ids": list(prompt_ids), "params": dict(sampling_params), **extra}
        self.calls.append(call)
        prompt_ids.append(-1)
        sampling_params.clear()
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


SAMPLING = Sampling(max_tokens=4, temperature=0.7, stop_token_ids=(9,), seed=11)


async def ask(client: Client, sampling: Sampling = SAMPLING) -> Any:
    return await VerlEngine(client).generate([1, 2, 3], sampling, trajectory_id="t0")


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("sglang", {"sampling_seed": 11}),
        ("vllm", {"seed": 11}),
        ("agentloop_local", {"seed": 11}),
        ("trtllm", {}),
        ("sglang_async", {"sampling_seed": 11}),
    ],
)
async def test_each_server_gets_the_keys_that_it_knows(name: str, seed: dict[str, int]) -> None:
    client = Client(output([5, 9]), name=name)
    await ask(client)
    assert client.calls[0]["params"] == {
        "max_tokens": 4,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "logprobs": True,
        "stop_token_ids": [9],
        **seed,
    }
    assert client.calls[0].get("trajectory_id") == ("t0" if name in ("agentloop_local", "sglang_async") else None)


async def test_a_server_cannot_change_the_callers_tokens() -> None:
    ids = [1, 2, 3]
    engine = VerlEngine(Client(output([5, 9]), output([6, 9])))
    first = await engine.generate(ids, SAMPLING, trajectory_id="t0")
    await engine.generate(ids, SAMPLING, trajectory_id="t0")
    assert ids == [1, 2, 3]
    assert first.ids == [5, 9]


@pytest.mark.parametrize(
    ("name", "ids", "expected"),
    [
        ("stop", [5, 9], StopReason.STOP),
        ("completed", [5, 9], StopReason.STOP),
        ("completed", [5, 6, 7, 8], StopReason.LENGTH),  # vLLM says so for a spent budget as well
        ("completed", [5, 6, 7, 9], StopReason.STOP),
        ("length", [5, 6, 7, 9], StopReason.STOP),  # the resuming client says so although the model closed its turn
        ("length", [5, 6, 7, 8], StopReason.LENGTH),
        (None, [5, 6, 7, 8], StopReason.LENGTH),
        (None, [5], StopReason.STOP),
        ("aborted", [5], StopReason.ABORTED),
        ("abort", [], StopReason.ABORTED),
    ],
)
async def test_stop_reasons(name: str | None, ids: list[int], expected: StopReason) -> None:
    assert (await ask(Client(output(ids, stop=name)))).stop_reason is expected


async def test_weight_versions_and_what_else_a_server_tells() -> None:
    experts = object()
    client = Client(
        output([9], global_steps=4, min_global_steps=3, max_global_steps=4, num_cached_tokens=2, num_preempted=1,
               routed_experts=experts, kv_transfer_params={"a": 1})
    )  # fmt: skip
    engine = VerlEngine(client)
    generation = await engine.generate([1], SAMPLING, trajectory_id="t0")
    assert (generation.min_weight_version, generation.weight_version, generation.cached_tokens) == (3, 4, 2)
    assert engine.weight_version == 4
    assert generation.data == {
        "routed_experts": experts,
        "num_preempted": 1,
        "extra_fields": {"kv_transfer_params": {"a": 1}},
    }


async def test_nothing_told_is_nothing_handed_on() -> None:
    generation = await ask(Client(output([9])))
    assert (generation.data, generation.weight_version, generation.cached_tokens) == (None, None, 0)


async def test_log_probs_only_if_asked_for() -> None:
    client = Client(output([9], log_probs=[]), output([9]))
    with pytest.raises(EngineError, match="1 tokens and 0 log-probabilities"):
        await ask(client)
    assert (await ask(client, Sampling(max_tokens=4, log_probs=False))).log_probs is None


@pytest.mark.parametrize("stop", ["stop", "length", None])
async def test_no_tokens_is_a_failure_of_the_server(stop: str | None) -> None:
    with pytest.raises(EngineError, match="no tokens"):
        await ask(Client(output([], stop=stop)))


async def test_what_ray_raises_is_an_engine_error_and_a_bug_is_not() -> None:
    with pytest.raises(EngineError, match="rollout server failed"):
        await ask(Client(ray.exceptions.RayActorError()))
    with pytest.raises(ZeroDivisionError):
        await ask(Client(ZeroDivisionError()))


class Held(Client):
    """A local server's client whose answer never comes."""

    def __init__(self) -> None:
        super().__init__(name="agentloop_local")
        self.told: list[tuple[str, str]] = []
        self.in_flight = 0

    async def generate(self, *_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()

    async def _acquire_server(self, request_id: str) -> tuple[str, Any]:
        self.in_flight += 1

        def method(name: str) -> Any:
            return SimpleNamespace(remote=lambda trajectory: self.told.append((name, trajectory)))

        return "s0", SimpleNamespace(
            abort_trajectory=method("abort_trajectory"), release_trajectory=method("release_trajectory")
        )

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        self.in_flight -= 1


async def test_cancelling_and_releasing_reach_the_local_server() -> None:
    client = Held()
    engine = VerlEngine(client)
    task = asyncio.create_task(engine.generate([1], SAMPLING, trajectory_id="t0"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.close()
    await engine.release("t1")
    assert client.told == [("abort_trajectory", "t0"), ("release_trajectory", "t1")]
    assert client.in_flight == 0


async def test_releasing_on_other_servers_does_nothing() -> None:
    await VerlEngine(Client(name="sglang")).release("t0")


class Legs:
    """A server as verl's client calls it: answers from a list, whose first are cut off by an update."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.seen: list[tuple[list[int], dict[str, Any]]] = []
        self.generate = self

    async def remote(self, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> Any:
        self.seen.append((list(prompt_ids), dict(sampling_params)))
        return self.answers.pop(0)


async def test_what_an_update_cuts_off_is_resumed_with_the_version_of_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient

    monkeypatch.setattr("agentloop.verl.client.RESEND_S", 0.0)
    nothing = output([], stop="aborted", global_steps=None)
    server = Legs(
        nothing, nothing, nothing, nothing, output([5, 6], stop="aborted", global_steps=3), output([9], global_steps=4)
    )  # fmt: skip

    class OneServer(FullyAsyncLLMServerClient):  # type: ignore[misc]
        async def _acquire_server(self, request_id: str, **_: Any) -> tuple[str, Any]:
            return "s0", server

        def _release_server(self, server_id: str, request_id: str | None = None) -> None:
            return None

    engine = VerlEngine(OneServer(Client().config))
    answer = await generate(engine, [1, 2], SAMPLING, "t0")
    assert (answer.ids, answer.stop_reason) == ([5, 6, 9], StopReason.STOP)
    assert answer.version_runs == ((3, 2), (4, 1))
    assert [ids for ids, _ in server.seen] == [[1, 2]] * 5 + [[1, 2, 5, 6]]
    first, last = server.seen[0][1], server.seen[-1][1]
    assert (first["max_tokens"], last["max_tokens"]) == (4, 2)
    assert first["sampling_seed"] != last["sampling_seed"]  # with the same one a server repeats its random numbers


async def test_a_client_with_a_generate_of_its_own_keeps_it() -> None:
    from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient

    class Own(FullyAsyncLLMServerClient):  # type: ignore[misc]
        async def generate(self, *_: Any, **__: Any) -> Any:
            return output([7, 9], global_steps=1)

    assert (await ask(Own(Client().config))).ids == [7, 9]
