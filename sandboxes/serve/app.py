"""The service's paths."""

from __future__ import annotations

import errno
import hmac
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import orjson
from aiohttp import web
from pydantic import ValidationError

from agentloop.config import validate
from agentloop.errors import ConfigError
from agentloop.sandboxes.base import Layer, Limits, Result, Sandbox, SandboxError
from agentloop.sandboxes.remote.protocol import RunCodeRequest, answer, decode
from agentloop.sandboxes.serve.admission import Admission, Refused
from agentloop.sandboxes.serve.config import ServeConfig
from agentloop.sandboxes.serve.metrics import Metrics
from agentloop.sandboxes.serve.sessions import NoSuchSession, Sessions

logger = logging.getLogger(__name__)

_OPEN_PATHS = ("/healthz", "/v1/ping")
"""Served without a token: they say nothing but that the service is there."""
_MOST_BODY = 256 * 2**20
_AT_MOST = ("timeout_s", "cpu_s", "memory_mb", "processes", "output_bytes", "value_bytes", "disk_mb", "files", "open_files")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Service:
    """One sandbox, its admission and its sessions, as a web application."""

    def __init__(self, sandbox: Sandbox, limits: Limits, config: ServeConfig) -> None:
        """`limits`: what a request gets without naming any, and cannot exceed."""
        self._sandbox, self._limits, self._config = sandbox, limits, config
        self.admission = Admission(config.places, config.queue)
        self.sessions = Sessions(sandbox, config.max_sessions, config.session_idle_s)
        self._metrics = Metrics(
            lambda: self.admission.running, lambda: self.admission.waiting, lambda: float(len(self.sessions))
        )
        self._pod = socket.gethostname()
        self._layers: list[Layer] | None = None

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._authorize, self._explain], client_max_size=_MOST_BODY)
        app.add_routes(
            [
                web.get("/healthz", self._health),
                web.get("/v1/ping", self._ping),
                web.get("/metrics", self._show_metrics),
                web.get("/layers", self._show_layers),
                web.post("/run_code", self._run_code),
                web.post("/sessions", self._open_session),
                web.post("/sessions/{session}/run", self._run_in_session),
                web.put("/sessions/{session}/files/{path:(?s:.+)}", self._put),
                web.get("/sessions/{session}/files/{path:(?s:.+)}", self._get),
                web.delete("/sessions/{session}", self._close_session),
            ]
        )
        return app

    # around every request

    @web.middleware
    async def _authorize(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._config.token is None or request.path in _OPEN_PATHS:
            return await handler(request)
        given = request.headers.get("Authorization", "").encode(errors="replace")
        if not hmac.compare_digest(given, f"Bearer {self._config.token}".encode()):
            return _error(401, "token", "this service wants its bearer token")
        return await handler(request)

    @web.middleware
    async def _explain(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every failure as JSON: `error` is its kind, `message` one sentence."""
        try:
            return await handler(request)
        except Refused as refused:
            self._metrics.refused(refused.status)
            response = _error(refused.status, "refused", str(refused))
            response.headers["Retry-After"] = str(refused.retry_after_s)
            return response
        except NoSuchSession:
            return _error(404, "session", "there is no such session: it was closed, or idled too long")
        except OSError as error:
            status = {errno.ENOENT: 404, errno.EISDIR: 409, errno.EPERM: 403, errno.EACCES: 403}.get(error.errno or 0, 507)
            return _error(status, type(error).__name__, error.strerror or str(error), errno=error.errno)
        except (ValidationError, ConfigError, ValueError) as error:
            return _error(400, "ValueError", _sentence(error))
        except SandboxError as error:
            return _error(500, "SandboxError", str(error))

    # what is there

    async def _health(self, request: web.Request) -> web.Response:
        state = "stopping" if self.admission.draining else "ok"
        body = {"status": state, "service": "agentloop", "kind": self._sandbox.kind, "languages": self._sandbox.languages}
        return _json(body, 503 if self.admission.draining else 200)

    async def _ping(self, request: web.Request) -> web.Response:
        return _json("pong", 503 if self.admission.draining else 200)

    async def _show_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _show_layers(self, request: web.Request) -> web.Response:
        if self._layers is None:
            self._layers = await self._sandbox.layers()
        return _json([asdict(layer) for layer in self._layers])

    # runs

    async def _run_code(self, request: web.Request) -> web.Response:
        wanted = RunCodeRequest.model_validate_json(await request.read())
        limits = self._limits_of(wanted.agentloop.limits if wanted.agentloop else {}, wanted)
        return await self._run(wanted, limits, lambda given: self._sandbox.run(wanted.code, limits=limits, **given))

    async def _run_in_session(self, request: web.Request) -> web.Response:
        wanted = RunCodeRequest.model_validate_json(await request.read())
        async with self.sessions.using(request.match_info["session"]) as (session, limits):
            return await self._run(wanted, limits, lambda given: session.run(wanted.code, **given))

    async def _run(
        self, wanted: RunCodeRequest, limits: Limits, run: Callable[[dict[str, Any]], Awaitable[Result]]
    ) -> web.Response:
        if wanted.args:
            raise ValueError("args: this service runs no language that takes them")
        if wanted.language not in self._sandbox.languages:
            # As SandboxFusion, which has the status from its framework, answers a language that it does not know.
            known = ", ".join(self._sandbox.languages)
            return _error(422, "ValueError", f"language '{wanted.language}': this service runs {known}")
        if wanted.run_timeout > limits.timeout_s:
            raise ValueError(f"run_timeout {wanted.run_timeout:g}: this service gives at most {limits.timeout_s:g} s")
        given = {
            "language": wanted.language,
            "stdin": wanted.stdin or "",
            "files": decode(wanted.files),
            "fetch": wanted.fetch_files,
            "timeout": wanted.run_timeout,
        }
        async with self.admission.place() as queue_s:
            result = await run(given)
        self._metrics.ran(result, queue_s)
        response = answer(result, exact=wanted.agentloop is not None, pod=self._pod)
        if response.agentloop is not None:
            response.agentloop["queue_s"] = queue_s + result.queue_s
        left_out = {"agentloop"} if response.agentloop is None else set()
        return web.Response(body=response.model_dump_json(exclude=left_out).encode(), content_type="application/json")

    def _limits_of(self, asked: dict[str, Any], wanted: RunCodeRequest | None = None) -> Limits:
        """The limits of a request. Raises `ValueError` where they exceed what this service gives."""
        given = dict(asked)
        if wanted is not None and wanted.memory_limit_MB > 0:
            given["memory_mb"] = wanted.memory_limit_MB
        limits = validate(Limits, self._limits.model_dump() | given, "limits")
        for name in _AT_MOST:
            mine, theirs = getattr(self._limits, name), getattr(limits, name)
            if mine is not None and theirs is not None and theirs > mine:
                shown = "memory_limit_MB" if name == "memory_mb" else name
                raise ValueError(f"{shown} {theirs:g}: this service gives at most {mine:g} (its `limits.{name}`)")
        return limits

    # sessions

    async def _open_session(self, request: web.Request) -> web.Response:
        if self.admission.draining:
            raise Refused(503, "this service is stopping", 5)
        body = orjson.loads(await request.read() or b"{}")
        if not isinstance(body, dict) or not isinstance(body.get("limits", {}), dict):
            raise ValueError("expected a JSON object with `limits`")
        name = await self.sessions.open(self._limits_of(body.get("limits", {})))
        return _json({"session": name}, 201)

    async def _close_session(self, request: web.Request) -> web.Response:
        await self.sessions.close(request.match_info["session"])
        return web.Response(status=204)

    async def _put(self, request: web.Request) -> web.Response:
        async with self._file(request) as (session, _):
            await session.put(request.match_info["path"], await request.read())
        return web.Response(status=204)

    async def _get(self, request: web.Request) -> web.Response:
        most = int(request.query.get("max_bytes", str(16 * 2**20)))
        async with self._file(request) as (session, _):
            data = await session.get(request.match_info["path"], max_bytes=min(most, _MOST_BODY))
        return web.Response(body=data, content_type="application/octet-stream")

    def _file(self, request: web.Request) -> Any:
        return self.sessions.using(request.match_info["session"])


def _json(body: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")


def _error(status: int, kind: str, message: str, **more: Any) -> web.Response:
    return _json({"error": kind, "message": message, **more}, status)


def _sentence(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where or 'the request'}: {first['msg'][:1].lower()}{first['msg'][1:]}"
