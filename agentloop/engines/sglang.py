"""SGLang in this process: `sglang.Engine`, of which the tokenizer manager runs here and the model in processes of its own.

Written against SGLang 0.5.12. What its answers mean is in `sglang_protocol.py`; here are requests and their ends, weights and
memory. Places in its source (under `sglang/srt`) are named where they force something.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentloop.config import validate
from agentloop.engines import sglang_protocol as protocol
from agentloop.engines.base import Engine, Generation, Sampling, Weights
from agentloop.engines.sglang_config import SGLangConfig
from agentloop.engines.sglang_group import EngineMember
from agentloop.engines.sglang_process import end, launch, server_args
from agentloop.engines.sglang_weights import Names, buckets, shapes
from agentloop.errors import EngineError, nearest
from agentloop.trajectory import StopReason
from agentloop.waiting import to_the_end

logger = logging.getLogger(__name__)

TAGS = ("weights", "kv_cache", "cuda_graph")
ABORT_AGAIN_S = 0.5
"""SGLang forgets an abort of a request that is between two of its queues, so an abort is repeated until it had effect."""
WATCH_S = 1.0
"""Between two looks at whether SGLang's processes live."""


@dataclass(eq=False, slots=True)
class _Flight:
    """One request that SGLang has."""

    rid: str
    answer: asyncio.Future[Mapping[str, Any]]
    """What the caller waits for."""
    task: asyncio.Task[None]
    """Ends when SGLang has answered, whether or not somebody waits."""
    scoring: bool
    landing: asyncio.Task[None] | None = None
    """Aborts the request until it has ended."""


@dataclass(eq=False, slots=True)
class _Gate:
    """Holds new requests back, for as long as there is a reason."""

    reasons: set[str] = field(default_factory=set)
    waiting: set[asyncio.Future[bool]] = field(default_factory=set)

    async def passed(self, *, heeds: Sequence[str]) -> bool:
        """Wait until none of the reasons in `heeds` holds; False if the request was aborted meanwhile."""
        while self.reasons.intersection(heeds):
            future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self.waiting.add(future)
            try:
                if not await future:
                    return False
            finally:
                self.waiting.discard(future)
        return True

    def let(self, reason: str) -> None:
        self.reasons.discard(reason)
        self.wake(True)

    def wake(self, go_on: bool) -> None:
        for future in self.waiting:
            if not future.done():
                future.set_result(go_on)


class SGLangEngine(Engine):
    """Generates with `sglang.Engine`.

    Cancelling a `generate` aborts its request in SGLang; `running` tells what SGLang still has. A process of SGLang that dies
    fails the requests with `EngineError` and leaves this process alone. Stop strings need the tokenizer (no
    `skip_tokenizer_init`). A request's seed counts only with the setting `enable_deterministic_inference`; SGLang ignores it
    otherwise. Belongs to the event loop in which it is first used.
    """

    def __init__(self, config: SGLangConfig | Mapping[str, Any]) -> None:
        """Starts SGLang and loads the model, which takes half a minute and more, during which the thread is blocked.

        Raises `ConfigError` for settings that are wrong and where SGLang is not installed, `EngineError` if it does not start.
        """
        if not isinstance(config, SGLangConfig):
            config = validate(SGLangConfig, config, "sglang")
        protocol.check_environment(os.environ)
        self.config = config
        arguments = server_args(config)
        self._engine, self._processes = launch(arguments)
        self._manager = self._engine.tokenizer_manager
        self._arguments = arguments
        model = self._manager.model_config
        self._vocabulary = int(model.vocab_size)
        self._context = int(self._manager.context_len)
        self._max_input = int(self._manager.max_req_input_len) - 1  # one of that very length is refused (managers/utils.py)
        self._experts: tuple[int, int] | None = None
        if arguments.enable_return_routed_experts:
            text = model.hf_text_config
            self._experts = (int(text.num_hidden_layers), int(text.num_experts_per_tok))
        self._version = config.weight_version
        self._cache_key: str | None = None
        self._flights: set[_Flight] = set()
        self._gate = _Gate()
        self._changing = asyncio.Lock()
        self._asleep: set[str] = set()
        self._broken: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._down: asyncio.Future[str] | None = None
        self._background: list[asyncio.Task[None]] = []
        self._closed = False

    @classmethod
    def load(cls, model_path: str, **config: Any) -> SGLangEngine:
        """`SGLangEngine.load(path, settings={"attention_backend": "triton"}, ignore_eos=True)`; see `SGLangConfig`."""
        return cls({"model_path": model_path, **config})

    @property
    def weight_version(self) -> int:
        return self._version

    @property
    def in_flight(self) -> int:
        """Requests that SGLang was sent and has not answered."""
        return len(self._flights)

    @property
    def follows_seeds(self) -> bool:
        return bool(self._arguments.enable_deterministic_inference)

    async def running(self) -> int:
        """Requests that SGLang's schedulers have now, waiting ones included."""
        self._check_open()
        self._attach()
        loads = await self._control(self._manager.get_loads(include=["core"]))
        return sum(load.num_running_reqs + load.num_waiting_reqs for load in loads)

    # -- generating ---------------------------------------------------------------------------------------------------

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, trajectory_id: str) -> Generation:
        self._check_usable()
        protocol.check_sampling(sampling)
        own = self._checked(ids)
        if sampling.stop and self._arguments.skip_tokenizer_init:
            raise EngineError("stop strings need a tokenizer, and SGLang was started with skip_tokenizer_init")
        self._attach()
        clock = asyncio.get_running_loop()
        came = clock.time()
        if not await self._gate.passed(heeds=("pause", "weights")):
            none: list[float] | None = [] if sampling.log_probs else None
            version = self._version
            return Generation([], none, StopReason.ABORTED, version, version, queue_s=clock.time() - came)
        self._check_usable("was")
        queue_s, began = clock.time() - came, self._version
        request = protocol.generate_request(
            own,
            sampling,
            rid=protocol.new_request_id(),
            room=self._context - len(own),
            ignore_eos=self.config.ignore_eos,
            routed_experts=self._experts is not None,
            cache_key=self._cache_key,
        )
        answer = await self._fly(request)
        return protocol.generation(
            answer, log_probs=sampling.log_probs, began_version=began, queue_s=queue_s, experts_shape=self._experts
        )

    async def score(self, ids: Sequence[int], *, temperature: float = 1.0) -> list[float]:
        """At temperature 1 only: one prefill, which reuses nothing of the prefix cache. `pause` does not hold it back, and
        `abort_all` does not end it."""
        self._check_usable()
        protocol.check_score_temperature(temperature)
        own = self._checked(ids)
        if len(own) == 1:
            return []
        self._attach()
        while not await self._gate.passed(heeds=("weights",)):
            pass
        self._check_usable("was")
        return protocol.scores(await self._fly(protocol.score_request(own, rid=protocol.new_request_id()), scoring=True), own)

    async def _fly(self, request: dict[str, Any], *, scoring: bool = False) -> Mapping[str, Any]:
        """Send a request and wait for its answer; whoever stops waiting leaves an aborted request behind."""
        answer: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        flight = _Flight(request["rid"], answer, asyncio.ensure_future(self._ask(request, answer)), scoring)
        self._flights.add(flight)
        flight.task.add_done_callback(lambda task: self._flights.discard(flight))
        try:
            return await answer
        finally:
            if not flight.task.done():
                self._abort(flight)

    async def _ask(self, request: dict[str, Any], answer: asyncio.Future[Mapping[str, Any]]) -> None:
        from sglang.srt.managers.io_struct import GenerateReqInput  # type: ignore[import-not-found, unused-ignore]

        try:
            said: Mapping[str, Any] | None = None
            # To its end, not just to the first answer: the generator holds a lock that weight updates wait for.
            async for said in self._manager.generate_request(GenerateReqInput(**request), None):  # noqa: B007
                pass
            if said is None:
                raise EngineError("SGLang ended a request without an answer")
            if not answer.done():
                answer.set_result(said)
        except Exception as error:  # ValueError for a wrong request, fastapi's HTTPException with `detail` for a failed one
            if not answer.done():
                why = getattr(error, "detail", None) or error or type(error).__name__
                answer.set_exception(EngineError(f"SGLang: {why}"))
        finally:
            # SGLang forgets to, of requests that were aborted in its queue or never sent (managers/tokenizer_manager.py,
            # `_handle_abort_req`). Before the answer has come it must stay: SGLang ends the process for one that it misses.
            self._manager.rid_to_state.pop(request["rid"], None)

    def _abort(self, flight: _Flight) -> None:
        if flight.landing is None and not self._closed:
            flight.landing = asyncio.ensure_future(self._land(flight))

    async def _land(self, flight: _Flight) -> None:
        await asyncio.sleep(0)  # a task that was just made has sent nothing yet, and SGLang ignores what it does not know
        while not flight.task.done() and not self._is_down:
            self._manager.abort_request(flight.rid)
            await asyncio.wait({flight.task}, timeout=ABORT_AGAIN_S)

    async def abort_all(self) -> None:
        if self._closed:
            return
        self._gate.wake(False)
        flights = [flight for flight in self._flights if not flight.scoring]
        for flight in flights:
            self._abort(flight)
        await self._until_landed(flights)

    async def _until_landed(self, flights: Iterable[_Flight]) -> None:
        tasks = {flight.task for flight in flights}
        while tasks and not self._is_down:
            _, tasks = await asyncio.wait(tasks, timeout=WATCH_S)

    async def pause(self) -> None:
        """Holds new requests back here; what SGLang has goes on."""
        self._check_open()
        self._gate.reasons.add("pause")

    async def resume(self) -> None:
        self._check_open()
        self._gate.let("pause")

    # -- weights ------------------------------------------------------------------------------------------------------

    async def update_weights(self, weights: Weights, version: int) -> None:
        """Hand over the tensors in pieces of `update_bucket_mib`, each checked against the checkpoint before it is sent.

        So a wrong name in the first piece leaves everything as it was; after one in a later piece, and after any failure of
        SGLang's, the weights are neither the old nor the new ones and `generate` raises until a whole update has succeeded.
        A mixture of experts must come with one weight for each expert (`experts.0.gate_proj.weight`), as in checkpoints.
        """
        self._check_open()
        self._attach()
        import torch

        device = torch.device(self._arguments.device, self._arguments.base_gpu_id)
        known = await asyncio.to_thread(shapes, self._arguments.model_path)
        if known is None:
            logger.warning("no checkpoint in '%s': the names of weights are not checked", self._arguments.model_path)
        names = Names(known)
        limit = self.config.update_bucket_mib << 20
        pieces = buckets(weights, names, lambda tensor: tensor.detach().to(device, copy=True).contiguous(), limit)
        async with self._changing:
            if "weights" in self._asleep:
                raise EngineError("the weights sleep; wake them before an update")
            piece = await anext(pieces, None)
            self._gate.reasons.add("weights")
            try:
                await self._quieten()
                self._broken = "the last update of its weights failed"
                while piece is not None:
                    await self._load_piece(piece)
                    piece = await anext(pieces, None)
                self._broken = None
                self._version = version
                self._manager.server_args.weight_version = str(version)  # as SGLang's own /update_weight_version does
                if self.config.update_mode != "abort":
                    # The prefix cache cannot be flushed while there are requests: from here on nobody reads what it has.
                    self._cache_key = f"{version}/{protocol.new_request_id()}"
            finally:
                await self._go_on()
                self._gate.let("weights")
        if device.type == "cuda":
            torch.cuda.ipc_collect()

    async def _quieten(self) -> None:
        """Make the weights safe to change, as `update_mode` says."""
        if self.config.update_mode == "abort":
            await self._drain()
            return
        from sglang.srt.managers.io_struct import PauseGenerationReqInput  # type: ignore[import-not-found, unused-ignore]

        await self._control(self._manager.pause_generation(PauseGenerationReqInput(mode=self.config.update_mode)))

    async def _go_on(self) -> None:
        if self.config.update_mode != "abort" and self._manager.is_pause:
            from sglang.srt.managers.io_struct import ContinueGenerationReqInput  # type: ignore[import-not-found, unused-ignore]

            with contextlib.suppress(EngineError):  # it is down, which whoever waits learns anyway
                await self._control(self._manager.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False)))

    async def _drain(self) -> None:
        """Abort what runs, wait until SGLang is idle, and empty the prefix cache."""
        generating = [flight for flight in self._flights if not flight.scoring]
        for flight in generating:
            self._abort(flight)
        await self._until_landed(self._flights)
        # Deferred until the scheduler has nothing left, one step after its last answer; without a timeout it would just fail,
        # and with flush_cache=True an update that comes too early ends the scheduler (scheduler_update_weights_mixin.py).
        answer = await self._control(self._manager.flush_cache(timeout_s=self.config.flush_timeout_s))
        if not answer.success:
            raise EngineError(f"SGLang did not become idle within {self.config.flush_timeout_s:g} s")

    async def _load_piece(self, piece: list[tuple[str, Any]]) -> None:
        import torch
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput  # type: ignore[import-not-found, unused-ignore]
        from sglang.srt.utils import MultiprocessingSerializer  # type: ignore[import-not-found, unused-ignore]

        if piece[0][1].is_cuda:
            torch.cuda.current_stream(piece[0][1].device).synchronize()
        handles = [MultiprocessingSerializer.serialize(piece) for _ in range(self._arguments.tp_size)]
        request = UpdateWeightsFromTensorReqInput(serialized_named_tensors=handles, flush_cache=False)
        success, message = await self._control(self._manager.update_weights_from_tensor(request, None))
        if not success:
            raise EngineError(f"SGLang did not take the weights: {message}")

    async def weight_checksums(self, names: Sequence[str] | None = None) -> dict[str, int]:
        raise EngineError(protocol.NO_CHECKSUMS)

    async def weight_fingerprints(self) -> dict[str, str]:
        """By SGLang's own weight checker, of the weights as it keeps them (`qkv_proj`, `experts.w13_weight`, …); of the first
        rank of tensor parallelism only, since the others' answers stay with their schedulers. Written against SGLang 0.5.12's
        source; not run on it."""
        self._check_usable()
        self._attach()
        from sglang.srt.managers.io_struct import CheckWeightsReqInput  # type: ignore[import-not-found, unused-ignore]

        success, message, ranks = await self._control(self._manager.check_weights(CheckWeightsReqInput(action="checksum")))
        if not success:
            raise EngineError(f"SGLang's weight checker failed: {message}")
        return protocol.fingerprints(ranks or ())

    def group_member(self) -> EngineMember:
        """How SGLang's processes take part in a process group with a trainer."""
        return EngineMember(self)

    # -- memory -------------------------------------------------------------------------------------------------------

    async def sleep(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        """Aborts what runs and frees GPU memory; needs the setting `enable_memory_saver`. Freed weights come back only with
        `enable_weights_cpu_backup`; else `generate` raises after `wake` until they were updated."""
        self._check_open()
        self._check_tags(tags)
        if not self._arguments.enable_memory_saver:
            raise EngineError("SGLang frees memory only with the setting enable_memory_saver")
        self._attach()
        async with self._changing:
            new = [tag for tag in dict.fromkeys(tags) if tag not in self._asleep]
            if not new:
                return
            self._asleep.update(new)
            self._gate.wake(False)
            await self._drain()  # a scheduler that is not idle does not survive this (release_memory_occupation)
            from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput  # type: ignore[import-not-found, unused-ignore]

            await self._control(self._manager.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=new)))

    async def wake(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        self._check_open()
        self._check_tags(tags)
        async with self._changing:
            mine = [tag for tag in dict.fromkeys(tags) if tag in self._asleep]
            if not mine:  # SGLang's scheduler does not survive being asked for what it has
                return
            from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput  # type: ignore[import-not-found, unused-ignore]

            await self._control(self._manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=mine)))
            if "weights" in mine and not self._arguments.enable_weights_cpu_backup:
                self._broken = "its weights were freed and not updated since"
            self._asleep.difference_update(mine)

    # -- the end ------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Ends SGLang's processes, and no others. `sglang.Engine.shutdown` would kill every child of this process, sandboxes
        included."""
        if self._closed:
            return
        self._closed = True
        self._fall("the engine was closed")
        self._gate.reasons.clear()
        self._gate.wake(True)
        tasks: list[asyncio.Task[Any]] = [*self._background, *(flight.task for flight in self._flights)]
        tasks += [flight.landing for flight in self._flights if flight.landing is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(end, self._processes)
        for socket in (self._manager.recv_from_detokenizer, self._manager.send_to_scheduler, self._engine.send_to_rpc):
            with contextlib.suppress(Exception):
                socket.close(linger=0)

    # -- SGLang's processes -------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        """Start receiving, in the event loop that runs now.

        In place of `TokenizerManager.auto_create_handle_loop`, which would take SIGTERM and SIGQUIT from the program and end it
        when a process of SGLang fails.
        """
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = self._manager.event_loop = loop
            self._down = loop.create_future()
            self._background = [loop.create_task(self._receive()), loop.create_task(self._watch())]
        elif self._loop is not loop:
            raise EngineError("the engine belongs to another event loop: the one in which it was first used")

    async def _receive(self) -> None:
        try:
            await self._manager.handle_loop()
        except Exception as error:
            logger.exception("SGLang's tokenizer manager failed")
            self._fall(f"SGLang's tokenizer manager failed: {type(error).__name__}: {error}")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            dead = next((process for process in self._processes if not process.is_alive()), None)
            if dead is not None:
                self._fall(f"a process of SGLang died (exit code {dead.exitcode})")
                return

    def _fall(self, why: str) -> None:
        """SGLang answers no more: fail what waits for it."""
        if self._down is None or self._down.done():
            return
        self._down.set_result(why)
        for flight in self._flights:
            if not flight.answer.done():
                flight.answer.set_exception(EngineError(why))

    @property
    def _is_down(self) -> bool:
        return self._down is not None and self._down.done()

    async def _control(self, call: Coroutine[Any, Any, Any]) -> Any:
        """The result of a request to the schedulers, which never comes if they are down. Once sent it is waited for, even if
        the caller is cancelled: the next one would get its answer."""
        down = self._down
        if down is None or down.done():
            call.close()
            raise EngineError("SGLang was asked for nothing yet" if down is None else down.result())
        task: asyncio.Future[Any] = asyncio.ensure_future(call)
        first: set[asyncio.Future[Any]] = {task, down}
        await to_the_end(asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED))
        if not task.done():
            task.cancel()
            raise EngineError(down.result())
        try:
            return task.result()
        except Exception as error:
            raise EngineError(f"SGLang: {type(error).__name__}: {error}") from error

    # -- small parts --------------------------------------------------------------------------------------------------

    def _check_open(self, verb: str = "is") -> None:
        if self._closed:
            raise EngineError(f"the engine {verb} closed")
        if self._down is not None and self._down.done():
            raise EngineError(self._down.result())

    def _check_usable(self, verb: str = "is") -> None:
        self._check_open(verb)
        if self._asleep:
            raise EngineError(f"the engine sleeps ({', '.join(sorted(self._asleep))})")
        if self._broken is not None and "weights" not in self._gate.reasons:
            raise EngineError(f"the engine cannot answer: {self._broken}")

    def _check_tags(self, tags: Sequence[str]) -> None:
        for tag in tags:
            if tag not in TAGS:
                raise EngineError(f"unknown tag '{tag}': {nearest(tag, TAGS)}")

    def _checked(self, ids: Sequence[int]) -> list[int]:
        return protocol.check_input(ids, max_input=self._max_input, vocabulary=self._vocabulary)
