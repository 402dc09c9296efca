"""`file`: reads, writes and edits text files in the working folder of the trajectory's sandbox session."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from agentloop.errors import ToolInfraError
from agentloop.sandboxes.base import Session, Status
from agentloop.sandboxes.paths import inside
from agentloop.tools.base import InvalidArguments, ToolResult
from agentloop.tools.shown import what_is_lost
from agentloop.tools.threads import run_blocking
from agentloop.tools.workspace import SandboxConfig, SandboxTool

_MAX_BYTES = 2**20  # of a file that is read or edited; what is larger is for code
_MAX_LINE = 2000  # characters of a line that are shown
_NEAREST_LINES, _NEAREST_CHARS = 2000, 200  # among which the nearest to a text that is not there is looked for
_CONTEXT = 3  # lines shown around an edit
_MAX_PLACES = 5  # of a text that is not unique, in the answer

# Runs in the session's interpreter, as one expression: it leaves no variable behind. Kept short of the output limit, which
# would end the interpreter.
_LIST = """\
(lambda os, json, root: (lambda found: print("\\n".join([str(len(found)), *map(json.dumps, found[:{most}])])[:{room}]))(sorted(
    [os.path.relpath(os.path.join(at, name), "."), -1 if name in folders else os.lstat(os.path.join(at, name)).st_size]
    for at, folders, files in os.walk(root)
    for name in [*folders, *files]
)) if os.path.isdir(root) else print("no folder"))(__import__("os"), __import__("json"), {root!r})
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
        last = _last_shown(lines, start, min(end, start + self.settings.max_lines - 1), self.limits.output_bytes)
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
            raise _Refused(f"'old' does not occur in {path}{await run_blocking(_nearest_line, text, old)}")
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
        begin, end = max(1, first - _CONTEXT), min(len(lines), last + _CONTEXT)
        around = _numbered(lines, begin, _last_shown(lines, begin, end, self.limits.output_bytes))
        return f"Edited {path}; it now reads:\n{around}" if around else f"Edited {path}; it is empty now."

    async def _list(self, session: Session, path: str, parameters: Mapping[str, Any]) -> str:
        root = path or "."
        room = max(0, self.limits.output_bytes - 1)
        result = await session.run(_LIST.format(root=root, most=self.settings.max_lines, room=room))
        if result.status is Status.INFRA:
            raise ToolInfraError(result.error or "the sandbox failed")
        if not result.ok:
            raise _Refused(f"the folder cannot be listed: {result.error or result.status.value}")
        count, *entries = result.stdout.split("\n")
        if count == "no folder":
            raise NotADirectoryError
        lines = []
        for entry in entries:
            with contextlib.suppress(ValueError, TypeError):  # the last may be cut, and what the code made of `print` unknown
                name, size = json.loads(entry)
                lines.append(f"{name}/" if size < 0 else f"{name} ({size} bytes)")
        if count.isdecimal() and int(count) > len(lines):
            lines.append(f"[… {int(count) - len(lines)} more; list a folder below]")
        text = "\n".join(lines) or "The folder is empty."
        lost = what_is_lost(result)
        return f"{text}\n[{lost[:1].upper()}{lost[1:]}.]" if lost else text


class _Refused(Exception):
    """What is wrong with the call, for the model."""


async def _text(session: Session, path: str) -> str:
    try:
        data = await session.get(path, max_bytes=_MAX_BYTES)
    except ValueError:  # the path has been looked at already
        raise _Refused(f"{path} has more than {_MAX_BYTES} bytes; work on it with code") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise _Refused(f"{path} is no text file ({len(data)} bytes that are not UTF-8)") from None


def _lines(text: str) -> list[str]:
    """As an editor counts them."""
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _numbered(lines: list[str], first: int, last: int) -> str:
    return "\n".join(f"{number:6}\t{_shortened(lines[number - 1])}" for number in range(first, last + 1))


def _last_shown(lines: list[str], first: int, last: int, room: int) -> int:
    """Until where lines from `first` fit into `room` characters; at least one."""
    for number in range(first, last + 1):
        room -= min(len(lines[number - 1]), _MAX_LINE) + 8
        if room < 0:
            return max(first, number - 1)
    return last


def _shortened(line: str) -> str:
    return line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]}[… {len(line) - _MAX_LINE} more characters]"


def _nearest_line(text: str, old: str) -> str:
    wanted = next((line.strip() for line in old.splitlines() if line.strip()), "")[:_NEAREST_CHARS]
    lines = [line for line in enumerate(_lines(text)[:_NEAREST_LINES], start=1) if len(line[1]) <= _NEAREST_CHARS]
    close = difflib.get_close_matches(wanted, {line.strip() for _, line in lines}, n=1, cutoff=0.6)
    if not close:
        return ""
    number, line = next((number, line) for number, line in lines if line.strip() == close[0])
    return f"; the nearest is line {number}: {line!r}"


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
            return f"{path[:200]}: {error.strerror or error}"
    return str(error)


def _said(notice: str, text: str, *, error: bool) -> ToolResult:
    return ToolResult(f"[{notice}]\n{text}" if notice else text, error=error)
