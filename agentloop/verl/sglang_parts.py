"""`actor_rollout_ref.rollout.name=sglang_async`: what it adds to verl's SGLang server, apart from SGLang itself.

Read in SGLang 0.5.12 and in verl 0.9.1's `SGLangHttpServer.generate`, which keeps of an answer its tokens, log-probabilities,
finish type and routed experts, and drops the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np

from agentloop.engines import sglang_protocol as protocol
from agentloop.engines.base import Generation
from agentloop.errors import ConfigError, EngineError
from agentloop.verl.gate import Gate

SGLANG_ASYNC = "sglang_async"
VERSION = "0.5.12"
"""Of SGLang: what this was written against."""
PLACES = ("generate_request", "abort_request", "rid_to_state")
"""What is used of SGLang's tokenizer manager."""
ABORT_AGAIN_S = 0.5
"""SGLang forgets an abort of a request that is between two of its queues, so an abort is repeated until it had effect."""


def refuse_unsupported(rollout: Mapping[str, Any], *, cpu: bool) -> None:
    """`ConfigError` for settings of verl that this rollout cannot serve."""
    if cpu:
        raise ConfigError(f"rollout.name={SGLANG_ASYNC} needs a GPU; leave it out with platform: cpu")
    if rollout.get("pipeline_model_parallel_size", 1) != 1:  # which verl refuses by the name `sglang` alone
        raise ConfigError(
            f"rollout.name={SGLANG_ASYNC} has no pipeline parallelism in verl; "
            "set actor_rollout_ref.rollout.pipeline_model_parallel_size=1"
        )


def check_places(manager: Any, version: str) -> None:
    """`ConfigError` if this SGLang is not built as expected."""
    missing = [name for name in PLACES if not hasattr(manager, name)]
    if missing:
        raise ConfigError(
            f"rollout.name={SGLANG_ASYNC} needs '{missing[0]}' of SGLang's tokenizer manager, which SGLang {version} does not "
            f"have (it is written for {VERSION}); install that version, or set actor_rollout_ref.rollout.name=sglang"
        )


class Tap:
    """SGLang's tokenizer manager, as verl's server sees it; keeps the last answer to each request until it is taken."""

    def __init__(self, manager: Any, experts_shape: tuple[int, int] | None = None) -> None:
        """`experts_shape`: (layers, experts a token) where routed experts are asked for."""
        self._manager = manager
        self._experts_shape = experts_shape
        self._answers: dict[str, Mapping[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    async def generate_request(self, request: Any, http_request: Any = None) -> AsyncIterator[Mapping[str, Any]]:
        """To its end before anything is handed on: verl takes the first item and lets go of the generator, which holds a lock
        that SGLang's pause waits for."""
        answer: Any = None
        try:
            async for answer in self._manager.generate_request(request, http_request):  # noqa: B007
                pass
        except Exception:
            self._manager.rid_to_state.pop(request.rid, None)
            raise
        # SGLang forgets to, of requests that were aborted in its queue. Before the answer has come it must stay.
        self._manager.rid_to_state.pop(request.rid, None)
        if answer is None:
            raise EngineError("SGLang ended a request without an answer")
        self._answers[request.rid] = answer
        encoded = answer["meta_info"].get("routed_experts")
        if isinstance(encoded, str):
            import torch

            # verl calls `.numpy()` on it (async_sglang_server.py:673), and SGLang 0.5.12 answers a string.
            experts = np.array(protocol.routed_experts(encoded, self._experts_shape))
            answer["meta_info"]["routed_experts"] = torch.from_numpy(experts)
        yield answer

    def drop(self, rid: str) -> None:
        self._answers.pop(rid, None)

    def taken(self, rid: str, *, log_probs: bool) -> Generation:
        """The answer to `rid`, checked. `EngineError` for one that cannot be trusted, see `sglang_protocol.generation`."""
        answer = self._answers.pop(rid)
        meta = {key: value for key, value in answer["meta_info"].items() if key != "routed_experts"}
        return protocol.generation({**answer, "meta_info": meta}, log_probs=log_probs)


class _Request:
    """One request, from when it came to when it is answered."""

    def __init__(self) -> None:
        self.rid = protocol.new_request_id()
        self.aborted = False
        self.answered = asyncio.Event()


class Additions:
    """Over verl's `SGLangHttpServer`, which comes after it in a class's bases."""

    tokenizer_manager: Any
    global_steps: int | None
    """verl's: the trainer's step whose weights serve now."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begin()

    def _begin(self) -> None:
        self._gate = Gate()
        self._requests: dict[str, _Request] = {}

    async def generate(
        self,
        prompt_ids: Any,
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: Any = None,
        video_data: Any = None,
        trajectory_id: str | None = None,
    ) -> Any:
        """verl's `TokenOutput`, with in `extra_fields`: the versions of the weights at the beginning and at the end, both
        `None` for an answer without tokens, and the input's tokens that were in the prefix cache."""
        request = _Request()
        key = trajectory_id or request_id
        self._requests[key] = request
        log_probs = bool(sampling_params.get("logprobs", False))
        try:
            if not await self._gate.passed() or request.aborted:
                return self._nothing()
            began = self.global_steps
            # By an id of ours: SGLang aborts every request whose id begins with the one that it is told, so all have one
            # length; verl's are trajectories' under `full_determinism`.
            output = await super().generate(  # type: ignore[misc]
                prompt_ids, sampling_params, request.rid, image_data=image_data, video_data=video_data
            )
            generation = self.tokenizer_manager.taken(request.rid, log_probs=log_probs)
        finally:
            self.tokenizer_manager.drop(request.rid)
            request.answered.set()
            if self._requests.get(key) is request:
                del self._requests[key]
        # verl drops all tokens where SGLang answered one log-probability more than tokens, as an abort can make it do.
        output.token_ids, output.log_probs = generation.ids, generation.log_probs
        if not generation.ids:
            began = output.extra_fields["global_steps"] = None
        output.extra_fields["min_global_steps"] = began
        output.extra_fields["max_global_steps"] = output.extra_fields["global_steps"]
        output.extra_fields["num_cached_tokens"] = generation.cached_tokens
        return output

    @staticmethod
    def _nothing() -> Any:
        from verl.workers.rollout.replica import TokenOutput

        return TokenOutput(token_ids=[], log_probs=[], stop_reason="aborted", extra_fields={"global_steps": None})

    async def abort_trajectory(self, trajectory_id: str) -> bool:
        """End the running request of one trajectory, and come back when SGLang has; False if none was running."""
        request = self._requests.get(trajectory_id)
        if request is None:
            return False
        request.aborted = True
        while not request.answered.is_set():
            self.tokenizer_manager.abort_request(request.rid)
            try:
                await asyncio.wait_for(request.answered.wait(), ABORT_AGAIN_S)
            except TimeoutError:
                continue
        return True

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """verl's, and it may reject: later requests then come back «aborted» at once, to be sent elsewhere."""
        self._gate.shut(reject=reject_request)
        await super().abort_all_requests()  # type: ignore[misc]

    async def resume_generation(self) -> None:
        await super().resume_generation()  # type: ignore[misc]
        self._gate.open()
