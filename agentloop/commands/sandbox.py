"""`agentloop sandbox`: look at a sandbox, run a file in it, offer it to other machines."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agentloop.config import load_yaml
from agentloop.errors import ConfigError, nearest
from agentloop.sandboxes.base import Layer, Result, Sandbox, SandboxError
from agentloop.sandboxes.load import KINDS, load_sandbox

T = TypeVar("T")
app = typer.Typer(no_args_is_help=True, help="Where model-written code runs: check it, run in it, serve it.")
_CONFIG = typer.Option("--config", help="YAML with `kind` and the settings of that kind", show_default=False)
_KIND = typer.Option("--kind", help=f"{', '.join(KINDS)}; default: process, or what --config says", show_default=False)
_CANNOT_START = 3
_LANGUAGES = {".py": "python", ".sh": "sh", ".bash": "bash"}


def _load(kind: str | None, config: Path | None) -> Sandbox:
    if config is None:
        return load_sandbox(kind or "process", where="--kind")
    settings = load_yaml(config)
    if kind is not None and settings.setdefault("kind", kind) != kind:
        raise ConfigError(f"{config}: its kind is '{settings['kind']}', and --kind says '{kind}'")
    return load_sandbox(settings, where=str(config))


def _finish(work: Coroutine[Any, Any, T]) -> T:
    """Run it; a sandbox that cannot start is one sentence and exit status 3."""
    try:
        return asyncio.run(work)
    except SandboxError as error:
        typer.echo(f"agentloop: {error}", err=True)
        raise typer.Exit(_CANNOT_START) from error


@app.command("check")
def check(
    kind: Annotated[str | None, typer.Argument(help=f"{', '.join(KINDS)}; default: process", show_default=False)] = None,
    config: Annotated[Path | None, _CONFIG] = None,
) -> None:
    """The lines of defence as found on this machine; exit status 3 if the sandbox cannot start."""
    sandbox = _load(kind, config)
    layers, why = _finish(_check(sandbox))
    table = Table("layer", "", "stops", "detail", title=f"sandbox of kind {sandbox.kind}")
    for layer in layers:
        mark = "[green]active[/]" if layer.active else "[red]missing[/]"
        table.add_row(escape(layer.name), mark, escape(layer.stops), escape(layer.detail))
    if layers:
        Console().print(table)
    if why:
        typer.echo(f"agentloop: {why}", err=True)
        raise typer.Exit(_CANNOT_START)
    typer.echo("It starts, and runs code.")


async def _check(sandbox: Sandbox) -> tuple[list[Layer], str]:
    """The layers, and why it cannot be used; empty if it can."""
    layers: list[Layer] = []
    try:
        layers = await sandbox.layers()
        async with sandbox:
            result = await sandbox.run("6 * 7")
    except SandboxError as error:
        return layers, str(error)
    if result.value != "42":
        return layers, f"{sandbox.kind}: it starts, but does not run code: {result.status}: {result.error or result.stderr}"
    return layers, ""


@app.command("run")
def run(
    file: Annotated[str, typer.Argument(help="the code, `-` for standard input", show_default=False)],
    kind: Annotated[str | None, _KIND] = None,
    config: Annotated[Path | None, _CONFIG] = None,
    language: Annotated[str | None, typer.Option(help="default: by the file's suffix, else python", show_default=False)] = None,
    timeout: Annotated[float | None, typer.Option(help="seconds", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the whole result as one line of JSON")] = False,
) -> None:
    """Run a file's code. Its output is printed; exit status 0 if it ended well, 1 if not, 3 if the sandbox failed."""
    if timeout is not None and timeout <= 0:
        raise ConfigError(f"--timeout {timeout:g}: expected a number of seconds above 0")
    code = _code(file)
    sandbox = _load(kind, config)
    spoken = language or _LANGUAGES.get(Path(file).suffix, "python")
    if spoken not in sandbox.languages:
        hint = nearest(spoken, sandbox.languages)
        raise ConfigError(f"--language {spoken}: kind '{sandbox.kind}' does not run it; {hint}")
    result = _finish(_run(sandbox, code, spoken, timeout))
    if as_json:
        typer.echo(orjson.dumps(asdict(result), default=str).decode())
    else:
        _show(result)
    if not result.ok:
        raise typer.Exit(_CANNOT_START if result.status == "infra" else 1)


def _code(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error


async def _run(sandbox: Sandbox, code: str, language: str, timeout: float | None) -> Result:
    async with sandbox:
        return await sandbox.run(code, language=language, timeout=timeout)


def _show(result: Result) -> None:
    typer.echo(result.stdout, nl=False)
    typer.echo(result.stderr, nl=False, err=True)
    if result.value is not None:
        typer.echo(result.value)
    if not result.ok:
        typer.echo(f"agentloop: {result.status}: {result.error}", err=True)


@app.command("image")
def image(
    tag: Annotated[str, typer.Option(help="its name in the engine")] = "agentloop-sandbox:latest",
    package: Annotated[
        list[str] | None, typer.Option(help="an installed package to put in; again for more [default: numpy, sympy]")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="make it even if it is there")] = False,
) -> None:
    """Make an image for `docker` out of this machine's own Python, without a registry."""
    _load("docker", None)  # one sentence if the docker package is missing
    from agentloop.sandboxes.docker.image import PACKAGES, make

    try:
        exact = make(None, tag, package or PACKAGES, again=again)
    except SandboxError as error:
        typer.echo(f"agentloop: {error}", err=True)
        raise typer.Exit(_CANNOT_START) from error
    typer.echo(f"{tag} is {exact}")


@app.command("clean")
def clean(config: Annotated[Path | None, _CONFIG] = None) -> None:
    """Remove the containers that processes which have ended left behind; those of living ones stay."""
    from agentloop.sandboxes.docker import DockerSandbox

    sandbox = _load("docker", config)
    assert isinstance(sandbox, DockerSandbox)
    count = _finish(sandbox.clean())
    typer.echo(f"{count} container{'' if count == 1 else 's'} removed")


@app.command("serve")
def serve(
    kind: Annotated[str | None, _KIND] = None,
    config: Annotated[Path | None, _CONFIG] = None,
    host: Annotated[str, typer.Option(help="address to listen on; other than loopback needs --token-file")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one, which is printed")] = 8080,
    token_file: Annotated[Path | None, typer.Option(help="file with the bearer token that clients must send")] = None,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="runs at once [default: CPUs]", show_default=False)] = None,
    queue: Annotated[int, typer.Option(min=0, help="runs that may wait; more are answered 429")] = 64,
    max_sessions: Annotated[int, typer.Option(min=0, help="sessions open at once; more are answered 429")] = 64,
    session_idle_s: Annotated[float, typer.Option(min=1, help="a session that nobody uses for so long is closed")] = 1800.0,
    grace_s: Annotated[float, typer.Option(min=0, help="seconds that runs may finish in when it is told to stop")] = 30.0,
) -> None:
    """Offer a sandbox over HTTP, as SandboxFusion does: POST /run_code; /healthz and /metrics beside it."""
    from agentloop.sandboxes.serve import ServeConfig, serve_forever

    settings = ServeConfig(
        host=host,
        port=port,
        token=_token(token_file),
        max_concurrency=max_concurrency,
        queue=queue,
        max_sessions=max_sessions,
        session_idle_s=session_idle_s,
        grace_s=grace_s,
    )
    settings.check()
    _finish(serve_forever(_load(kind, config), settings))


def _token(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {file}: cannot be read: {error}") from error
    if not token:
        raise ConfigError(f"--token-file {file}: it is empty")
    return token
