"""What a verl run needs and can be looked at before anything starts: the model's folder, the data, the reward's file."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError, nearest
from agentloop.verl.settings import RolloutSettings

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
REMOTE = re.compile(r"[a-z0-9]+://")


def check_model(path: Any, where: str) -> None:
    """A folder with `config.json` and a tokenizer, or a name that the Hugging Face hub (or its cache) has."""
    if not path:
        raise ConfigError(f"{where} is missing: the model's folder, or its name on the Hugging Face hub")
    folder = Path(str(path)).expanduser()
    if REMOTE.match(str(path)):
        return
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or folder.parent.is_dir():
            raise ConfigError(f"{where}: '{path}' is no model folder")
        _check_hub(str(path), where)
        return
    config = folder / "config.json"
    if not config.is_file():
        raise ConfigError(f"{where}: '{path}' is no model folder: it has no config.json")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: '{config}' is not valid JSON: {error}") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise ConfigError(f"{where}: '{config}' names no model_type")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(f"{where}: '{path}' has no tokenizer (none of {', '.join(TOKENIZER_FILES)})")


def _check_hub(name: str, where: str) -> None:
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name, "config.json")
    except Exception as error:  # offline, unknown, gated, unreachable: for the user they are one thing
        raise ConfigError(
            f"{where}: '{name}' is no folder here, and the Hugging Face hub did not give it: {str(error).splitlines()[0]}"
        ) from error


def check_data(files: Any, where: str, *, lint: bool = True, tools: Any = None) -> None:
    """Data files exist and hold rows with the columns that verl and agentloop read, which ask of the `tools` (a
    `ToolRegistry`) only what is there."""
    listed = [files] if isinstance(files, str | os.PathLike) else list(files or [])
    if not listed:
        raise ConfigError(f"{where} is missing: a .parquet or .json file, or a list of them")
    for file in map(str, listed):
        if REMOTE.match(file):
            continue
        path = Path(file).expanduser()
        if not path.is_file():
            raise ConfigError(f"{where}: '{file}' does not exist")
        if lint:
            _lint(path, tools)


def _lint(path: Path, tools: Any) -> None:
    from agentloop.data import lint_file

    errors = [problem for problem in lint_file(path, tools=tools) if problem.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more: `agentloop data lint {path}` lists them)" if len(errors) > 1 else ""
        raise ConfigError(f"{errors[0]}{more}")


def check_prompts(files: Any, settings: RolloutSettings, tools: Any) -> None:
    """The longest prompts of each file fit into the run's limit, counted with the model's own tokenizer and template.

    In a run a prompt that is too long is never cut: its trajectories end as `token_limit` and are left out.
    """
    if not Path(settings.model_path).expanduser().is_dir():
        return
    from transformers import AutoTokenizer

    from agentloop.chat.load import load_renderer
    from agentloop.data.lint import lint_longest

    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model_path)
    except Exception as error:  # transformers raises whatever its parts do
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ConfigError(f"{settings.model_path}: the tokenizer cannot be loaded: {reason}") from error

    def renderer(template_kwargs: Mapping[str, Any]) -> Any:
        merged = {**settings.template_kwargs, **template_kwargs}
        return load_renderer(tokenizer, template_kwargs=merged, kind=settings.renderer or "auto")

    limit = settings.loop.max_prompt_tokens
    for file in [files] if isinstance(files, str | os.PathLike) else list(files or []):
        if not REMOTE.match(str(file)):
            problems = lint_longest(Path(str(file)).expanduser(), max_prompt_tokens=limit, renderer=renderer, tools=tools)
            if problems:
                raise ConfigError(f"{problems[0]}")


def check_reward(function: Mapping[str, Any] | None, where: str) -> None:
    """The reward's file exists, is Python, and has something of that name."""
    if not function or not function.get("path"):
        return
    path, name = str(function["path"]), str(function.get("name") or "compute_score")
    if REMOTE.match(path):
        return
    if not Path(path).is_file():
        raise ConfigError(f"{where}.path: '{path}' does not exist")
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{where}.path: '{path}' is not valid Python: {error}") from error
    names = _names(tree)
    if name not in names and "*" not in names:
        raise ConfigError(f"{where}.name: '{path}' has no '{name}'; {nearest(name, names)}")


def _names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names
