"""SGLang's processes: what they are started with, their start, and their end."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from agentloop.engines.sglang_config import SGLangConfig, check_settings
from agentloop.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)


def server_args(config: SGLangConfig) -> Any:
    """SGLang's `ServerArgs`, which checks values against each other and against the machine."""
    try:
        from sglang.srt.server_args import ServerArgs  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ConfigError(f"the engine 'sglang' needs SGLang, which cannot be imported here: {error}") from error
    check_settings(config.settings, [known.name for known in fields(ServerArgs)], "sglang.settings")
    settings = {"log_level": "warning", **config.settings}
    try:
        return ServerArgs(
            model_path=config.model_path,
            weight_version=str(config.weight_version),
            custom_sigquit_handler=note_sigquit,
            **settings,
        )
    except (ValueError, TypeError, AssertionError, OSError, RuntimeError) as error:
        raise ConfigError(f"sglang.settings: SGLang refuses them: {error or type(error).__name__}") from error


def launch(arguments: Any) -> tuple[Any, list[Any]]:
    """Start SGLang; the engine and the processes that it made."""
    import atexit

    from sglang.srt.entrypoints.engine import Engine as Launcher  # type: ignore[import-not-found, unused-ignore]

    before = set(multiprocessing.active_children())
    children: Callable[[], list[Any]] = lambda: [p for p in multiprocessing.active_children() if p not in before]  # noqa: E731
    try:
        engine = Launcher(server_args=arguments)
    except Exception as error:
        end(children())
        raise EngineError(f"SGLang did not start: {error or type(error).__name__}") from error
    atexit.unregister(engine.shutdown)
    processes = children()
    atexit.register(end, processes)
    # It would send this process SIGQUIT when one of them dies; `SGLangEngine` looks after them.
    if engine.tokenizer_manager._subprocess_watchdog is not None:
        engine.tokenizer_manager._subprocess_watchdog.stop()
    return engine, processes


def end(processes: list[Any]) -> None:
    """Kill these processes and what they started, and empty the list: their numbers may soon be those of others."""
    import psutil

    family: list[Any] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    processes.clear()
    _, alive = psutil.wait_procs(family, timeout=60)
    if alive:
        logger.warning("%d processes of SGLang did not end: %s", len(alive), [member.pid for member in alive])


def note_sigquit(number: int, frame: Any) -> None:
    """Processes of SGLang that fail send SIGQUIT, at which SGLang ends the whole program; here the engine alone fails."""
    logger.error("a process of SGLang failed and sent SIGQUIT")
