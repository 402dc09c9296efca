"""The snippets of docs/tools.md run, in order, in one namespace; the tools file in it loads."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentloop.tools import ToolPolicy, ToolRegistry
from agentloop.tools.registry import SHIPPED, read_tools

PAGE = Path(__file__).parents[2] / "docs" / "tools.md"


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_snippets_run() -> None:
    names: dict[str, Any] = {"__name__": "snippets"}
    for snippet in snippets("python"):
        exec(compile(snippet, str(PAGE), "exec"), names)


def sections() -> list[tuple[str, str]]:
    """(heading, text) of the page's sections."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the page's tools files stand, with what they name."""
    guess = next(snippet for snippet in snippets("python") if "class Guess" in snippet)
    hint = "\n\ndef hint(parity: bool) -> str:\n    return 'odd'\n"
    (tmp_path / "guessing.py").write_text(guess + hint, encoding="utf-8")
    (tmp_path / "manuals").mkdir()
    (tmp_path / "manuals" / "kettle.md").write_text("# Kettle\n\nFill it before use.")
    shutil.copy(Path(__file__).parent / "shop.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SHOP_TOKEN", "t0ken")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    yield tmp_path
    monkeypatch.delitem(sys.modules, "guessing", raising=False)


@pytest.mark.parametrize(("heading", "text"), sections(), ids=[heading for heading, _ in sections()])
def test_every_tools_file_loads_and_shows_what_its_section_is_about(folder: Path, heading: str, text: str) -> None:
    files = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    tool = re.fullmatch("`(.*)`", heading)
    if tool is not None:
        assert files, "an example is missing"
    for file in files:
        for program in re.findall(r"command: ([\w-]+)", file):
            if shutil.which(program) is None:
                pytest.skip(f"{program} is not installed")
        (folder / "tools.yaml").write_text(file, encoding="utf-8")
        entries, problems = read_tools(folder / "tools.yaml")
        assert not problems and entries
        if tool is not None:
            assert f"class_name: {tool[1]}" in file


def test_the_tools_file_at_the_top_has_every_kind_of_entry(folder: Path) -> None:
    text = dict(sections())["The tools file"]
    (folder / "tools.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0], encoding="utf-8")
    assert ToolRegistry.from_yaml(folder / "tools.yaml").names == ["calculator", "guess", "hint"]


def test_the_table_has_every_key_and_every_shipped_tool() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for key in ("class_name", "function", "config", "tool_schema", *ToolPolicy.model_fields):
        assert f"| `{key}` |" in text
    for name in SHIPPED:
        assert f"## `{name}`" in text
