"""`agentloop tools`: look at a tools file, check it, and try one call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agentloop.errors import ConfigError, nearest
from agentloop.tools.policy import CircuitBreaker, RateLimit, ToolPolicy
from agentloop.tools.registry import ToolRegistry, read_tools
from agentloop.trajectory import CallRecord, CallStatus, Sample, ToolCall

app = typer.Typer(no_args_is_help=True, help="Tools files: what is in them, what is wrong with them, what they cost.")

_FILE = typer.Argument(help="tools YAML", show_default=False)
_TRY_S = 3600.0  # the deadline of a tried call, where the tool has no timeout of its own


@app.command("list")
def list_tools(file: Annotated[Path, _FILE]) -> None:
    """The tools of a file, with their arguments and policies."""
    table = Table("tool", "arguments", "policies", "description")
    for entry in ToolRegistry.from_yaml(file):
        function = entry.schema["function"]
        parameters = function.get("parameters", {})
        required = parameters.get("required", [])
        names = [name if name in required else f"[{name}]" for name in parameters.get("properties", {})]
        cells = (entry.name, ", ".join(names), _policies(entry.policy), function.get("description", ""))
        table.add_row(*(escape(cell) for cell in cells))
    Console().print(table)


def _policies(policy: ToolPolicy) -> str:
    shown = []
    for key in sorted(policy.model_fields_set):
        value = getattr(policy, key)
        if isinstance(value, RateLimit):
            value = f"{value.calls}/{value.period:g}s"
        elif isinstance(value, CircuitBreaker):
            value = f"{value.failures} failures, {value.open_s:g}s"
        shown.append(f"{key}={value}")
    return " ".join(shown)


@app.command("lint")
def lint(file: Annotated[Path, _FILE]) -> None:
    """Everything that is wrong with a file, one line each; exit status 2 if anything is."""
    entries, problems = read_tools(file)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(2)
    typer.echo(f"{file}: {len(entries)} tool{'' if len(entries) == 1 else 's'}, nothing wrong")


@app.command("explain")
def explain(
    file: Annotated[Path, _FILE],
    model: Annotated[Path, typer.Option(help="folder with the model's tokenizer and chat template", show_default=False)],
) -> None:
    """What each tool's schema costs in prompt tokens: the prompt with all tools, less the prompt without this one."""
    registry = ToolRegistry.from_yaml(file)
    tokenizer = _tokenizer(model)
    schemas = registry.schemas
    everything = _prompt_tokens(tokenizer, schemas, model)
    nothing = _prompt_tokens(tokenizer, [], model)
    table = Table("tool", "tokens")
    table.columns[1].justify = "right"
    left = everything - nothing
    for index, entry in enumerate(registry):
        others = [schema for at, schema in enumerate(schemas) if at != index]
        cost = everything - _prompt_tokens(tokenizer, others, model)
        left -= cost
        table.add_row(escape(entry.name), str(cost))
    if len(schemas) > 1:
        table.add_row("what having tools adds at all", str(left), end_section=True)
    table.add_row("together", str(everything - nothing))
    Console().print(table)
    if schemas and everything == nothing:
        typer.echo(f"The chat template of {model} does not show tools to the model.")


def _tokenizer(model: Path) -> Any:
    if not model.is_dir():
        raise ConfigError(f"--model {model}: no such folder")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {model}: no tokenizer can be loaded: {str(error).splitlines()[0]}") from error
    return tokenizer


def _prompt_tokens(tokenizer: Any, schemas: Sequence[dict[str, Any]], model: Path) -> int:
    if not tokenizer.chat_template:
        raise ConfigError(f"--model {model}: the tokenizer has no chat template")
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tools=list(schemas) or None, tokenize=False, add_generation_prompt=True)
    return len(tokenizer.encode(text, add_special_tokens=False))


@app.command("try")
def try_call(
    file: Annotated[Path, _FILE],
    name: Annotated[str, typer.Argument(help="the tool's name", show_default=False)],
    arguments: Annotated[str, typer.Argument(help='arguments as JSON: \'{"expression": "1+1"}\'')] = "{}",
    create_kwargs: Annotated[str, typer.Option(help="JSON for the tool's create, as a dataset row gives it")] = "{}",
    model: Annotated[Path | None, typer.Option(help="model folder whose tokenizer counts max_response_tokens")] = None,
) -> None:
    """Run one call under the tool's policies; exit status 1 if it does not end as `ok`."""
    registry = ToolRegistry.from_yaml(file)
    entry = next((entry for entry in registry if entry.name == name), None)
    if entry is None:
        raise ConfigError(f"{file}: there is no tool '{name}'; {nearest(name, registry.names)}")
    if model is not None:
        registry.bind(_Codec(_tokenizer(model)))
    elif entry.policy.max_response_tokens is not None:
        typer.echo("max_response_tokens is not applied: give --model to count tokens", err=True)
        policy = entry.policy.model_copy(update={"max_response_tokens": None})
        registry = ToolRegistry([replace(entry, policy=policy)])
    given = _json(create_kwargs, "--create-kwargs")
    if not isinstance(given, dict):
        raise ConfigError(f"--create-kwargs: expected a JSON object, got {create_kwargs}")
    kwargs = {name: {"create_kwargs": given}} if given else {}
    sample = Sample(messages=[], tools=(name,), tools_kwargs=kwargs)
    record, rewards = asyncio.run(_call(registry, sample, ToolCall(name, _json(arguments, "the arguments"), "t0c0")))
    typer.echo(f"status    {record.status}")
    typer.echo(f"attempts  {record.attempts}")
    typer.echo(f"queued    {record.queue_s:.3f} s")
    typer.echo(f"ran       {record.run_s:.3f} s")
    if record.cut_tokens:
        typer.echo(f"cut       {record.cut_tokens} tokens")
    for component, value in rewards.items():
        typer.echo(f"reward    {value:g} ({component})")
    for metric, number in record.metrics.items():
        typer.echo(f"metric    {metric} = {number:g}")
    typer.echo(f"text\n{record.text}")
    if record.status is not CallStatus.OK:
        raise typer.Exit(1)


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{what}: not valid JSON: {error}") from error


async def _call(registry: ToolRegistry, sample: Sample, call: ToolCall) -> tuple[CallRecord, dict[str, float]]:
    session = registry.session(sample, "try")
    try:
        await session.open()
        record = await session.call(call, deadline=asyncio.get_running_loop().time() + _TRY_S)
        return record, await session.rewards()
    finally:
        await session.close()
        await registry.close()


class _Codec:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode_text(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))
