"""The snippets of docs/tools.md run, in order, in one namespace; the tools file in it loads."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentloop.tools import ToolPolicy, ToolRegistry
from agentloop.tools.registry import SHIPPED

PAGE = Path(__file__).parents[2] / "docs" / "tools.md"


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_snippets_run() -> None:
    names: dict[str, Any] = {"__name__": "snippets"}
    for snippet in snippets("python"):
        exec(compile(snippet, str(PAGE), "exec"), names)


def test_the_tools_file_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guess = next(snippet for snippet in snippets("python") if "class Guess" in snippet)
    hint = "\n\ndef hint(parity: bool) -> str:\n    return 'odd'\n"
    (tmp_path / "guessing.py").write_text(guess + hint, encoding="utf-8")
    (file,) = snippets("yaml")
    (tmp_path / "tools.yaml").write_text(file, encoding="utf-8")
    assert ToolRegistry.from_yaml(tmp_path / "tools.yaml").names == ["calculator", "guess", "hint"]
    monkeypatch.delitem(sys.modules, "guessing")
    assert yaml.safe_load(file)


def test_the_table_has_every_key_and_every_shipped_tool() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for key in ("class_name", "function", "config", "tool_schema", *ToolPolicy.model_fields):
        assert f"| `{key}` |" in text
    for name in SHIPPED:
        assert f"## `{name}`" in text
