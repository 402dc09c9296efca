"""The local engine behind SGLang's HTTP protocol: `python -m agentloop.engines.serve_local --model-path … --port 30000`.

For those who have no GPU: what talks to an SGLang server can be run and tested against this one, in one process or several,
and killed. It follows SGLang 0.5.12 (`srt/entrypoints/http_server.py`, `srt/managers/tokenizer_manager.py`) in what a client
can notice, the awkward parts included:

- an abort of a request that is not known yet, or that waits because generation is paused, does nothing;
- `/abort_request` ends every request whose id begins with the given one; the answer holds the tokens so far;
- an update of weights waits for the requests that run, unless generation is paused; flushing the cache needs an idle server;
- `weight_version` is a string, «default» unless given, and is read when an answer is built;
- a client that hangs up is noticed after 4 seconds;
- `/health` generates a token, and fails while generation is paused;
- the API keys protect what they protect there.

Where it differs: ids outside of the vocabulary and unknown names of weights are errors (SGLang dies of the first and skips the
second), no streaming, no batches in one request, the prefix cache is per trajectory (by the header `X-SMG-Routing-Key`) rather
than shared, and the sampling parameters are the ones that agentloop sends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from agentloop.engines.base import Generation, Sampling
from agentloop.engines.local import LocalEngine
from agentloop.engines.serve_local_group import UpdateGroups
from agentloop.errors import ConfigError, EngineError, nearest
from agentloop.trajectory import StopReason

DISCONNECT_POLL_S = 4.0
HEALTH_TIMEOUT_S = 20.0
TAGS = ("weights", "kv_cache", "cuda_graph")
PARAMETERS = {
    "max_new_tokens": 128,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "stop_token_ids": None,
    "stop": None,
    "sampling_seed": None,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "no_stop_trim": False,
}
"""What is taken of SGLang's `SamplingParams`, with its defaults."""
ADMIN = (
    "/abort_request",
    "/flush_cache",
    "/pause_generation",
    "/continue_generation",
    "/update_weights_from_disk",
    "/update_weight_version",
    "/init_weights_update_group",
    "/destroy_weights_update_group",
    "/update_weights_from_distributed",
    "/weights_checker",
    "/release_memory_occupation",
    "/resume_memory_occupation",
)
"""Paths that want the admin key where there is one."""


class LocalServer:
    """One local engine on one port. The engine belongs to the server from now on."""

    def __init__(
        self,
        engine: LocalEngine,
        *,
        model_path: str = "local",
        weight_version: str = "default",
        api_key: str | None = None,
        admin_api_key: str | None = None,
    ) -> None:
        self._engine = engine
        self._eos = engine.stop_token_ids
        engine.stop_token_ids = frozenset()  # SGLang's stop tokens are added to the end-of-sequence tokens; see `_sampling`
        self._model_path = model_path
        self._version = weight_version
        self._keys = (api_key, admin_api_key)
        self._running: dict[str, str] = {}
        """Request id -> the engine's name for its sequence."""
        self._arrived: set[str] = set()
        """Request ids, those that wait because generation is paused included."""
        self._paused = False
        self._unpaused = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._updating = asyncio.Lock()
        self._groups = UpdateGroups(engine)
        self._runner: web.AppRunner | None = None
        self.url = ""
        """Where it listens, once it does."""

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen; port 0 takes a free one. Returns the address."""
        app = web.Application(middlewares=[self._guard], client_max_size=1 << 30)
        post, get = app.router.add_post, app.router.add_get
        post("/generate", self._generate)
        for path in ("/health", "/health_generate"):
            get(path, self._health)
        for path in ("/model_info", "/get_model_info"):
            get(path, self._model_info)
        for path in ("/server_info", "/get_server_info"):
            get(path, self._server_info)
        get("/v1/models", self._models)
        get("/get_load", self._load)
        post("/abort_request", self._abort)
        post("/flush_cache", self._flush)
        post("/pause_generation", self._pause)
        post("/continue_generation", self._continue)
        post("/update_weights_from_disk", self._update_weights)
        post("/update_weight_version", self._update_version)
        post("/init_weights_update_group", self._join_group)
        post("/destroy_weights_update_group", self._leave_group)
        post("/update_weights_from_distributed", self._receive_weights)
        post("/weights_checker", self._fingerprints)
        post("/release_memory_occupation", self._release_memory)
        post("/resume_memory_occupation", self._resume_memory)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        self.url = f"http://{host}:{self._runner.addresses[0][1]}"
        return self.url

    async def close(self) -> None:
        await self._engine.close()
        if self._runner is not None:
            await self._runner.cleanup()

    # -- generating ---------------------------------------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        began = time.perf_counter()
        body = await request.json()
        ids = body.get("input_ids")
        if not isinstance(ids, list) or not ids or isinstance(ids[0], list):
            return _error("input_ids must be one list of token ids")
        if body.get("stream"):
            return _error("this server does not stream")
        rid = str(body.get("rid") or f"{time.monotonic_ns():032x}")
        if rid in self._arrived:
            return _error(f"Duplicate request ID detected: {rid}")
        self._arrived.add(rid)
        try:
            work = asyncio.create_task(self._work(rid, ids, body, request.headers.get("X-SMG-Routing-Key", "")))
            while not work.done():
                await asyncio.wait({work}, timeout=DISCONNECT_POLL_S)
                if not work.done() and (request.transport is None or request.transport.is_closing()):
                    work.cancel()
                    await asyncio.wait({work})
                    return _error(f"Request is disconnected from the client side. Abort request {rid}")
            answer = work.result()
        except EngineError as error:
            return _error(str(error))
        finally:
            self._arrived.discard(rid)
        answer["meta_info"]["e2e_latency"] = time.perf_counter() - began
        return _json(answer)

    async def _work(self, rid: str, ids: list[int], body: dict[str, Any], routing_key: str) -> dict[str, Any]:
        log_probs = bool(body.get("return_logprob"))
        params = body.get("sampling_params") or {}
        meta: dict[str, Any] = {"id": rid, "prompt_tokens": len(ids), "num_retractions": 0}
        while self._paused:
            await self._unpaused.wait()
        async with self._updating:
            pass
        # A sequence has one request at a time, so that an abort ends the one that is meant.
        name = routing_key if routing_key and routing_key not in self._running.values() else rid
        self._running[rid] = name
        self._idle.clear()
        try:
            if params.get("max_new_tokens") == 0:
                values = await self._engine.score(ids)
                meta["input_token_logprobs"] = [[value, token, None] for value, token in zip([None, *values], ids, strict=True)]
                output = Generation([], [], StopReason.LENGTH)
            else:
                sampling = self._sampling(params, log_probs, len(ids))
                output = await self._engine.generate(ids, sampling, trajectory_id=name)
        finally:
            del self._running[rid]
            if not self._running:
                self._idle.set()
        if log_probs:
            pairs = zip(output.log_probs or (), output.ids, strict=True)
            meta["output_token_logprobs"] = [[value, token, None] for value, token in pairs]
        meta["finish_reason"] = _finish_reason(output)
        meta["completion_tokens"] = len(output.ids)
        meta["cached_tokens"] = output.cached_tokens
        meta["weight_version"] = self._version
        return {"text": "", "output_ids": output.ids, "meta_info": meta}

    def _sampling(self, params: dict[str, Any], log_probs: bool, input_length: int) -> Sampling:
        for key in params:
            if key not in PARAMETERS:
                raise EngineError(f"this server has no sampling parameter '{key}': {nearest(key, PARAMETERS)}")
        given = {**PARAMETERS, **{key: value for key, value in params.items() if value is not None}}
        most = self._engine.max_len
        if input_length + given["max_new_tokens"] > most:
            raise EngineError(
                f"Requested token count exceeds the model's maximum context length of {most} tokens: "
                f"{input_length} of the input and {given['max_new_tokens']} new ones"
            )
        stops = set(given["stop_token_ids"] or ()) | self._eos
        stop = given["stop"] or ()
        return Sampling(
            max_tokens=given["max_new_tokens"],
            temperature=given["temperature"],
            top_p=given["top_p"],
            top_k=given["top_k"],
            stop_token_ids=() if given["ignore_eos"] else tuple(sorted(stops)),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            seed=given["sampling_seed"],
            log_probs=log_probs,
        )

    async def _abort(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        rid = body.get("rid") or ""
        if body.get("abort_all"):
            await self._engine.abort_all()
        elif rid in self._arrived:
            names = [name for other, name in self._running.items() if other.startswith(rid)]
            await asyncio.gather(*(self._engine.abort(name) for name in names))
        return web.Response()

    async def _pause(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        mode = body.get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            return _error(f"Invalid mode: {mode!r}")
        self._paused = True
        self._unpaused.clear()
        while mode == "abort" and self._running:
            await self._engine.abort_all()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), 1.0)
        return _json({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, request: web.Request) -> web.StreamResponse:
        self._paused = False
        self._unpaused.set()
        return _json({"message": "Generation continued successfully.", "status": "ok"})

    # -- weights and memory -------------------------------------------------------------------------------------------

    async def _update_weights(self, request: web.Request) -> web.StreamResponse:
        from safetensors.torch import load_file

        body = await request.json()
        path = body["model_path"]

        def load() -> dict[str, Any]:
            files = sorted(Path(path).glob("*.safetensors"))
            if not files:
                raise EngineError(f"Cannot find any model weights with `{path}`")
            return {name: tensor for file in files for name, tensor in load_file(file).items()}

        async with self._updating:
            if body.get("abort_all_requests"):
                await self._engine.abort_all()
            if not self._paused:
                await self._idle.wait()
            try:
                weights = await asyncio.to_thread(load)
                if body.get("flush_cache", True) and self._running:
                    raise web.HTTPInternalServerError(text="Cache flush failed after updating weights")  # SGLang dies here
                number = body.get("weight_version")
                await self._engine.update_weights(weights.items(), _number(number or self._version))
            except (EngineError, OSError) as error:
                return _json({"success": False, "message": str(error), "num_paused_requests": 0}, status=400)
        self._model_path = path
        self._version = self._version if number is None else str(number)
        message = f"Succeeded to update model weights. Weight version updated to {number}."
        return _json({"success": True, "message": message, "num_paused_requests": 0})

    async def _join_group(self, request: web.Request) -> web.StreamResponse:
        return _success(*await self._groups.join(await request.json()))

    async def _leave_group(self, request: web.Request) -> web.StreamResponse:
        return _success(*await self._groups.leave(await request.json()))

    async def _receive_weights(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        async with self._updating:
            if not self._paused:
                await self._idle.wait()
            success, message = await self._groups.receive(body)
            if success and body.get("weight_version") is not None:
                self._version = str(body["weight_version"])
        return _success(success, message)

    async def _fingerprints(self, request: web.Request) -> web.StreamResponse:
        action = (await request.json())["action"]
        if action != "checksum":
            return _success(False, f"Unsupported action={action!r}")
        payload = {"checksums": await self._engine.weight_fingerprints(), "parallelism_info": {"tp_rank": 0, "tp_size": 1}}
        return _json({"success": True, "message": "Success.", "ranks": [payload]})

    async def _update_version(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self._version = str(body["new_version"])
        return _json({"success": True, "message": f"Weight version updated to {self._version}", "new_version": self._version})

    async def _flush(self, request: web.Request) -> web.StreamResponse:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), float(request.query.get("timeout", 0)))
        if self._running:
            return web.Response(text="Flush cache failed.\n", status=400)
        await self._engine.sleep(("kv_cache",))
        await self._engine.wake(("kv_cache",))
        return web.Response(text="Cache flushed.\n")

    async def _release_memory(self, request: web.Request) -> web.StreamResponse:
        if self._running:
            return web.Response(text="release_memory_occupation should be called only when server is idle.", status=500)
        await self._engine.sleep(await _tags(request))
        return _json(None)

    async def _resume_memory(self, request: web.Request) -> web.StreamResponse:
        await self._engine.wake(await _tags(request))
        return _json(None)

    # -- what can be asked --------------------------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.StreamResponse:
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                while self._paused:
                    await self._unpaused.wait()
                if not self._running:
                    await self._engine.generate([0], Sampling(max_tokens=1, temperature=0.0), trajectory_id="")
        except (TimeoutError, EngineError):
            return web.Response(status=503)
        return web.Response()

    async def _model_info(self, request: web.Request) -> web.StreamResponse:
        info = {"model_path": self._model_path, "tokenizer_path": self._model_path, "is_generation": True}
        return _json({**info, "weight_version": self._version})

    async def _server_info(self, request: web.Request) -> web.StreamResponse:
        limits = {"max_req_input_len": self._engine.max_len, "dp_size": 1, "tp_size": 1}
        return _json({"model_path": self._model_path, "weight_version": self._version, "version": "agentloop", **limits})

    async def _models(self, request: web.Request) -> web.StreamResponse:
        card = {"id": self._model_path, "object": "model", "max_model_len": self._engine.max_len}
        return _json({"object": "list", "data": [card]})

    async def _load(self, request: web.Request) -> web.StreamResponse:
        return _json([{"dp_rank": 0, "num_reqs": len(self._arrived), "num_waiting_reqs": self._engine.waiting}])

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        key, admin = self._keys
        wanted = (admin or key) if request.path in ADMIN else key
        open_to_all = request.path.startswith(("/health", "/metrics"))
        if wanted and not open_to_all and request.headers.get("Authorization") != f"Bearer {wanted}":
            return _json({"error": "Unauthorized"}, status=401)
        try:
            return await handler(request)
        except (orjson.JSONDecodeError, ValueError, KeyError, TypeError) as error:
            return _error(f"{type(error).__name__}: {error}")


def _finish_reason(output: Generation) -> dict[str, Any]:
    if output.stop_reason is StopReason.LENGTH:
        return {"type": "length", "length": len(output.ids)}
    if output.stop_reason is StopReason.STOP:
        return {"type": "stop", "matched": output.ids[-1]}
    return {"type": "abort", "message": "Aborted"}


def _number(version: str) -> int:
    return int(version) if version.isdecimal() else 0


async def _tags(request: web.Request) -> tuple[str, ...]:
    tags = (await request.json()).get("tags") or TAGS
    return tuple(tag for tag in tags if tag != "cuda_graph")


def _json(data: Any, *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(data), status=status, content_type="application/json")


def _success(success: bool, message: str) -> web.Response:
    return _json({"success": success, "message": message}, status=200 if success else 400)


def _error(message: str) -> web.Response:
    return _json({"error": {"message": message}}, status=400)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000, help="0 takes a free one")
    parser.add_argument("--weight-version", default="default")
    parser.add_argument("--api-key")
    parser.add_argument("--admin-api-key")
    parser.add_argument("--context-length", type=int, help="default: the model's own")
    parser.add_argument("--max-running-requests", type=int, help="default: what fits into memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, help="of torch")
    arguments = parser.parse_args()
    try:
        asyncio.run(_serve(arguments))
    except (ConfigError, OSError) as error:  # a model that cannot be loaded, a port that is taken
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        pass


async def _serve(arguments: argparse.Namespace) -> None:
    engine = LocalEngine.load(
        arguments.model_path,
        device=arguments.device,
        dtype=arguments.dtype,
        max_slots=arguments.max_running_requests or "auto",
        max_len=arguments.context_length,
        weight_version=_number(arguments.weight_version),
        threads=arguments.threads,
    )
    server = LocalServer(
        engine,
        model_path=arguments.model_path,
        weight_version=arguments.weight_version,
        api_key=arguments.api_key,
        admin_api_key=arguments.admin_api_key,
    )
    try:
        url = await server.start(arguments.host, arguments.port)
        print(f"The server is ready at {url}", flush=True)
        await asyncio.sleep(math.inf)
    finally:
        await server.close()


if __name__ == "__main__":
    main()
