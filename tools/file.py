"""`file`: reads, writes and edits text files in the working folder of the trajectory's sandbox session."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from agentloop.errors import ToolInfraError
from agentloop.sandboxes.base import Session, Status
from agentloop.sandboxes.paths import inside
from agentloop.tools.base import InvalidArguments, ToolResult
from agentloop.tools.workspace import SandboxConfig, SandboxTool

_CONTEXT = 3  # lines shown around an edit
_MAX_PLACES = 5  # of a text that is not unique, in the answer

# Runs in the session's interpreter, as one expression: it leaves no variable behind.
_LIST = """\
(lambda os, root, most: print(__import__("json").dumps((lambda found: [len(found), found[:most]])(sorted(
    [os.path.relpath(os.path.join(at, name), "."), -1 if name in folders else os.lstat(os.path.join(at, name)).st_size]
    for at, folders, files in (os.walk(root) if os.path.isdir(root) else ())
    for name in [*folders, *files]
)) if os.path.isdir(root) else None)))(__import__("os"), {root!r}, {most})
"""


class FileConfig(SandboxConfig):
    max_lines: int = Field(500, ge=1)
    """Lines that one `read` shows, and entries that one `list` does."""


class File(SandboxTool):
    """Work with text files in the working folder: `read` one with line numbers (or lines `start` to `end` of it), `write` a
    whole file from `content`, `edit` one by putting `new` in the place of `old`, which must occur exactly once, or `list` a
    folder."""

    name = "file"
    Config = FileConfig
    settings: FileConfig

    class Arguments(BaseModel):
        action: Literal["read", "write", "edit", "list"]
        path: str = Field(".", description="Relative to the working folder")
        content: str | None = Field(None, description="write: the whole content")
        old: str | None = Field(None, description="edit: the text to replace, with enough around it to be unique")
        new: str | None = Field(None, description="edit: what comes in its place")
        start: int | None = Field(None, ge=1, description="read: the first line")
        end: int | None = Field(None, ge=1, description="read: the last line")

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> ToolResult:
        action, path = parameters["action"], parameters.get("path", ".")
        wanted = {"write": ("content",), "edit": ("old", "new")}.get(action, ())
        for name in wanted:
            if parameters.get(name) is None:
                raise InvalidArguments(f"'{action}' needs the argument '{name}'")
        workspace = self.workspace(instance_id)
        try:
            if action != "list" or path not in ("", ".", "./"):
                path = str(inside(path))
            async with workspace.session() as session:
                text = await getattr(self, f"_{action}")(session, path, parameters)
        except (_Refused, OSError, ValueError) as error:
            return _said(workspace.take_notice(), f"Error: {_why(error, path)}", error=True)
        return _said(workspace.take_notice(), text, error=False)

    async def _read(self, session: Session, path: str, parameters: Mapping[str, Any]) -> str:
        lines = _lines(await _text(session, path))
        if not lines:
            return f"{path} is empty."
        start = parameters.get("start") or 1
        end = min(parameters.get("end") or len(lines), len(lines))
        if start > len(lines):
            raise _Refused(f"{path} has {len(lines)} lines; line {start} is beyond its end")
        if end < start:
            raise _Refused(f"line {start} to {end} is no range: 'start' is after 'end'")
        last = min(end, start + self.settings.max_lines - 1)
        shown = _numbered(lines, start, last)
        if last < end:
            shown += f"\n[lines {start} to {last} of {len(lines)}; read on with start={last + 1}]"
        elif (start, last) != (1, len(lines)):
            shown += f"\n[lines {start} to {last} of {len(lines)}]"
        return shown

    async def _write(self, session: Session, path: str, parameters: Mapping[str, Any]) -> str:
        content: str = parameters["content"]
        await session.put(path, content)
        return f"Wrote {path} ({len(_lines(content))} lines, {len(content.encode('utf-8', 'replace'))} bytes)."

    async def _edit(self, session: Session, path: str, parameters: Mapping[str, Any]) -> str:
        old, new = parameters["old"], parameters["new"]
        if not old:
            raise _Refused("'old' is empty; to make a new file use 'write'")
        text = await _text(session, path)
        count = text.count(old)
        if count == 0:
            raise _Refused(f"'old' does not occur in {path}{_nearest_line(text, old)}")
        at = text.index(old)
        if count > 1:
            places: list[str] = []
            found = -1
            while len(places) < _MAX_PLACES and (found := text.find(old, found + 1)) >= 0:
                places.append(str(text.count("\n", 0, found) + 1))
            where = ", ".join(places) + (", …" if count > len(places) else "")
            raise _Refused(f"'old' occurs {count} times in {path} (lines {where}); give more of the text around it")
        changed = text[:at] + new + text[at + len(old) :]
        await session.put(path, changed)
        first = text.count("\n", 0, at) + 1
        lines = _lines(changed)
        last = min(first + new.count("\n"), first + self.settings.max_lines - 1)
        around = _numbered(lines, max(1, first - _CONTEXT), min(len(lines), last + _CONTEXT))
        return f"Edited {path}; it now reads:\n{around}" if around else f"Edited {path}; it is empty now."

    async def _list(self, session: Session, path: str, parameters: Mapping[str, Any]) -> str:
        root = path or "."
        result = await session.run(_LIST.format(root=root, most=self.settings.max_lines))
        if result.status is Status.INFRA:
            raise ToolInfraError(result.error or "the sandbox failed")
        if not result.ok:
            raise _Refused(f"the folder cannot be listed: {result.error or result.status.value}")
        try:
            found = json.loads(result.stdout)
        except ValueError:
            raise _Refused("the folder cannot be listed: the session's interpreter answers something else") from None
        if found is None:
            raise NotADirectoryError
        count, entries = found
        lines = [f"{name}/" if size < 0 else f"{name} ({size} bytes)" for name, size in entries]
        if count > len(lines):
            lines.append(f"[… {count - len(lines)} more; list a folder below]")
        return "\n".join(lines) or "The folder is empty."


class _Refused(Exception):
    """What is wrong with the call, for the model."""


async def _text(session: Session, path: str) -> str:
    data = await session.get(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise _Refused(f"{path} is no text file ({len(data)} bytes that are not UTF-8)") from None


def _lines(text: str) -> list[str]:
    """As an editor counts them."""
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _numbered(lines: list[str], first: int, last: int) -> str:
    return "\n".join(f"{number:6}\t{lines[number - 1]}" for number in range(first, last + 1))


def _nearest_line(text: str, old: str) -> str:
    wanted = next((line.strip() for line in old.splitlines() if line.strip()), "")
    lines = _lines(text)
    close = difflib.get_close_matches(wanted, [line.strip() for line in lines[:2000]], n=1, cutoff=0.6)
    if not close:
        return ""
    number = next(number for number, line in enumerate(lines, start=1) if line.strip() == close[0])
    return f"; the nearest is line {number}: {lines[number - 1]!r:.200}"


def _why(error: Exception, path: str) -> str:
    match error:
        case FileNotFoundError():
            return f"there is no file {path}; use 'list' to see what there is"
        case IsADirectoryError():
            return f"{path} is a folder; use 'list' to see what is in it"
        case NotADirectoryError():
            return f"{path} is not a folder, or lies below a file"
        case PermissionError():
            return f"{path} is no regular file that may be used"
        case OSError():
            return f"{path}: {error.strerror or error}"
    return str(error)


def _said(notice: str, text: str, *, error: bool) -> ToolResult:
    return ToolResult(f"[{notice}]\n{text}" if notice else text, error=error)
