"""`agentloop data`: checks data files before anything expensive starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentloop.data import LintReport, lint, lint_pair
from agentloop.errors import ConfigError

if TYPE_CHECKING:
    from agentloop.chat.base import Renderer

app = typer.Typer(no_args_is_help=True, help="Data sets: verl's columns, and what may be wrong with them.")


@app.callback()
def _group() -> None:
    """Data sets: verl's columns, and what may be wrong with them."""


@app.command("lint")
def lint_command(
    files: Annotated[list[Path], typer.Argument(help=".parquet, .json or .jsonl; several must not share prompts")],
    tools: Annotated[Path | None, typer.Option(help="tools YAML: check the tools' names that rows use")] = None,
    model: Annotated[Path | None, typer.Option(help="model folder: count the prompts' tokens, tools included")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="longer prompts are errors; needs --model")] = None,
    limit: Annotated[int, typer.Option(min=1, help="problems of one kind that are shown; the rest are counted")] = 5,
) -> None:
    """Check data files: one sentence for every problem, exit status 2 if any is an error."""
    if max_prompt_tokens is not None and model is None:
        raise ConfigError("--max-prompt-tokens needs --model, whose chat template and tokenizer count the tokens")
    registry = None
    if tools is not None:
        from agentloop.tools.registry import ToolRegistry

        registry = ToolRegistry.from_yaml(tools)
    renderer = None if model is None else _renderer(model)
    reports = [
        lint(file, tools=registry, max_prompt_tokens=max_prompt_tokens, renderer=renderer, limit=limit) for file in files
    ]
    problems = [problem for report in reports for problem in report.problems]
    for first, second in combinations(reports, 2):
        problems += lint_pair(first, second)
    for problem in problems:
        typer.echo(problem if problem.severity == "error" else f"warning: {problem}")
    for report in reports:
        if report.ok:
            typer.echo(_summary(report))
    if any(problem.severity == "error" for problem in problems):
        raise typer.Exit(2)


def _summary(report: LintReport) -> str:
    parts = [
        f"{report.rows:,} rows",
        "data_source " + ", ".join(f"{name} ({count:,})" for name, count in report.sources.most_common()),
        "messages " + ", ".join(f"{role} ({count:,})" for role, count in report.roles.most_common()),
    ]
    if lengths := report.prompt_lengths:
        parts.append(f"prompts of {min(lengths):,} to {max(lengths):,} tokens (median {median(lengths):,.0f})")
    return f"{report.file}: {'; '.join(parts)}"


def _renderer(model: Path) -> Callable[[Mapping[str, Any]], Renderer]:
    """From a row's chat-template arguments to the renderer of the model's template."""
    if not model.is_dir():
        raise ConfigError(f"{model}: no such model folder")
    from transformers import AutoTokenizer

    from agentloop.chat import load_renderer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model}: holds no tokenizer that transformers can load: {str(error).splitlines()[0]}") from error
    load_renderer(tokenizer)  # a template that is refused is refused here, before any file is read

    def renderer(template_kwargs: Mapping[str, Any]) -> Renderer:
        return load_renderer(tokenizer, template_kwargs=template_kwargs)

    return renderer
