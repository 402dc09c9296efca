"""The service's life: start, run until told to stop, let runs finish, end everything."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any, cast

from agentloop.errors import ConfigError
from agentloop.sandboxes.base import Limits, Sandbox
from agentloop.sandboxes.serve.config import ServeConfig

logger = logging.getLogger(__name__)


async def serve_forever(sandbox: Sandbox, config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT; then no new run begins, those under way have `grace_s`. A second signal ends them.

    Prints one line with its address once it takes requests. Raises `ConfigError` (an open address without a token, a missing
    package, a port that is taken) and `SandboxError` if the sandbox cannot start.
    """
    config.check()
    try:
        from aiohttp import web

        from agentloop.sandboxes.serve.app import Service
    except ModuleNotFoundError as error:
        hint = "pip install 'agentloop[sandbox-server]'"
        raise ConfigError(f"sandbox serve needs the package '{error.name}', which is not installed: {hint}") from error
    limits = cast(Any, sandbox).config.limits
    assert isinstance(limits, Limits)
    stop = asyncio.Event()
    hurry = asyncio.Event()

    def told() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    async with sandbox:
        service = Service(sandbox, limits, config)
        # A client that hangs up wants its run no more: its handler is cancelled, and the run with it.
        runner = web.AppRunner(service.app(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        idle = asyncio.create_task(service.sessions.close_idle())
        try:
            port = await _listen(web.TCPSite(runner, config.host, config.port), runner, config)
            print(f"agentloop: kind '{sandbox.kind}' is served at http://{_shown(config.host)}:{port}", flush=True)
            await stop.wait()
            drained = asyncio.create_task(service.admission.drained(config.grace_s))
            hurried = asyncio.create_task(hurry.wait())
            await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
            for task in (drained, hurried):
                task.cancel()
            if service.admission.running:
                logger.warning("%d runs are ended before their time", service.admission.running)
        finally:
            idle.cancel()
            await runner.cleanup()
            await service.sessions.close_all()


async def _listen(site: Any, runner: Any, config: ServeConfig) -> int:
    try:
        await site.start()
    except OSError as error:
        raise ConfigError(f"--host {config.host} --port {config.port}: {error.strerror or error}") from error
    return int(runner.addresses[0][1])


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
