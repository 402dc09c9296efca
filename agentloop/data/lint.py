"""Checks data files before a model is loaded: every mistake one sentence, with the file, the row and the column."""

from __future__ import annotations

import difflib
import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import orjson

from agentloop.data import rows as read
from agentloop.errors import ConfigError, nearest

if TYPE_CHECKING:
    from agentloop.chat.base import Renderer

    Renderers = Renderer | Callable[[Mapping[str, Any]], Renderer]

Severity = Literal["error", "warning"]

REQUIRED = ("prompt", "data_source", "reward_model")
OPTIONAL = ("extra_info", "agent_name", "ability", *read.MEDIA_COLUMNS)
EXTRA_INFO_KEYS = ("index", "split", "tools_kwargs", "tool_selection", "system_prompt", "chat_template_kwargs")
TOOL_KWARGS_KEYS = ("create_kwargs", "execute_kwargs", "calc_reward_kwargs", "release_kwargs")
BATCH_ROWS = 2048


class Tools(Protocol):
    """What the linter needs of a `ToolRegistry`."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def schemas(self) -> list[dict[str, Any]]: ...

    def select(self, selection: Iterable[str] | None, tools_kwargs: Mapping[str, Mapping[str, Any]]) -> object:
        """Raises `ConfigError` if a row with these could not be run."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a data file."""

    file: str
    row: int | None
    """0-based; `None` where the whole file is meant."""
    column: str | None
    message: str
    severity: Severity = "error"

    def __str__(self) -> str:
        row = "" if self.row is None else f", row {self.row}"
        column = "" if self.column is None else f", column '{self.column}'"
        return f"{self.file}{row}{column}: {self.message}"


@dataclass(slots=True)
class LintReport:
    """What is wrong with one file, and what it holds."""

    file: str
    problems: list[Problem] = field(default_factory=list)
    rows: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    """Rows by `data_source`."""
    roles: Counter[str] = field(default_factory=Counter)
    """Messages by role."""
    prompt_lengths: list[int] = field(default_factory=list)
    """Tokens of every prompt, tools included; only with a renderer."""
    keys: dict[bytes, int] = field(default_factory=dict)
    """Digest of each prompt without its system message -> the first row that has it."""

    @property
    def ok(self) -> bool:
        return not any(problem.severity == "error" for problem in self.problems)


def lint_file(
    path: str | Path,
    *,
    tools: Tools | None = None,
    max_prompt_tokens: int | None = None,
    renderer: Renderers | None = None,
    limit: int = 5,
) -> list[Problem]:
    """Everything that is wrong with a data file (`.parquet`, `.json` or `.jsonl`, as verl reads them); see `lint`."""
    return lint(path, tools=tools, max_prompt_tokens=max_prompt_tokens, renderer=renderer, limit=limit).problems


def lint(
    path: str | Path,
    *,
    tools: Tools | None = None,
    max_prompt_tokens: int | None = None,
    renderer: Renderers | None = None,
    limit: int = 5,
) -> LintReport:
    """Read the whole file once and report what is wrong, at most `limit` problems of a kind and then their count.

    With `tools`, the names that rows use are checked; with `renderer` and `max_prompt_tokens`, the prompts' lengths, the
    tools' schemas included. `renderer` may be a function from a row's chat-template arguments to a renderer, as the loop
    takes it. Nothing about the file raises.
    """
    report = LintReport(str(path))
    found = _Collector(report, limit)
    try:
        for batch in _read(Path(path)):
            if report.rows == 0:
                _columns(batch[0], found)
                if not report.ok:
                    return report
            for row in batch:
                _row(row, found, tools, max_prompt_tokens, renderer)
                report.rows += 1
    except ConfigError as error:
        found.add(None, None, str(error).removeprefix(f"{path}: "))
        found.finish()
        return report
    if report.rows == 0:
        found.add(None, None, "holds no rows")
    found.finish()
    return report


def lint_longest(
    path: str | Path, *, max_prompt_tokens: int, renderer: Renderers, tools: Tools | None = None, count: int = 64
) -> list[Problem]:
    """Whether the prompts of the `count` rows with the most text fit into `max_prompt_tokens`: what can be known in a
    moment, whatever the size of the file. A file that `lint` finds wrong is to be linted first."""
    report = LintReport(str(path))
    found = _Collector(report, 1)

    def rows() -> Iterator[tuple[int, int, dict[str, Any], list[dict[str, Any]]]]:
        number = 0
        for batch in _read(Path(path)):
            for row in batch:
                messages = read.with_system_prompt(read.messages_of(row), read.system_prompt_of(row), None)
                yield sum(len(str(message.get("content") or "")) for message in messages), number, row, messages
                number += 1

    for _, number, row, messages in heapq.nlargest(count, rows(), key=lambda item: item[0]):
        report.rows = number
        _check_length(row, messages, read.tool_selection_of(row), found, tools, max_prompt_tokens, renderer)
    return report.problems


def lint_pair(train: LintReport | str | Path, val: LintReport | str | Path) -> list[Problem]:
    """One problem if the same prompt (system messages apart) is in both files: held-out accuracy would mean nothing."""
    first, second = (item if isinstance(item, LintReport) else lint(item) for item in (train, val))
    shared = [row for key, row in second.keys.items() if key in first.keys]
    if not shared:
        return []
    row = shared[0]
    other = next(first.keys[key] for key, at in second.keys.items() if at == row)
    message = f"{len(shared)} of its {len(second.keys)} prompts are also in {first.file} (row {row} is its row {other})"
    return [Problem(second.file, None, "prompt", message)]


class _Collector:
    """Adds problems to a report, at most `limit` of a kind."""

    def __init__(self, report: LintReport, limit: int) -> None:
        self.report = report
        self.limit = limit
        self.said: tuple[int | None, str | None, str] | None = None
        self.counts: Counter[tuple[str | None, str, Severity]] = Counter()
        self.wishes: dict[str, str | None] = {}
        """Names and keys that a row asks of its tools -> what is wrong with them; rows repeat each other."""

    def add(self, row: int | None, column: str | None, message: str, kind: str = "", severity: Severity = "error") -> None:
        key = (column, kind or message, severity)
        if row is not None and self.said == (row, column, message):  # every part of `extra_info` finds that it is no struct
            return
        self.said = (row, column, message)
        self.counts[key] += 1
        if self.counts[key] <= self.limit:
            self.report.problems.append(Problem(self.report.file, row, column, message, severity))

    def finish(self) -> None:
        for (column, kind, severity), count in self.counts.items():
            if count > self.limit:
                message = f"{count - self.limit} more rows with the same kind of problem ({kind})"
                self.report.problems.append(Problem(self.report.file, None, column, message, severity))


def _read(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The rows in batches, never an empty one; `ConfigError` if the file cannot be read."""
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.6)
        raise ConfigError(f"{path}: no such file" + (f"; did you mean '{close[0]}'?" if close else ""))
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder, expected a .parquet, .json or .jsonl file")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix in (".json", ".jsonl"):
        return _read_json(path)
    raise ConfigError(f"{path}: ends in '{path.suffix}', expected .parquet, .json or .jsonl")


def _read_parquet(path: Path) -> Iterator[list[dict[str, Any]]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError(f"{path}: reading Parquet needs pyarrow: pip install 'agentloop[verl]'") from error
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                if batch.num_rows:
                    yield batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from error


def _read_json(path: Path) -> Iterator[list[dict[str, Any]]]:
    """A JSON array of objects, or one object a line."""
    with path.open("rb") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start == b"[":
            try:
                rows = orjson.loads(file.read())
            except orjson.JSONDecodeError as error:
                raise ConfigError(f"{path}: not valid JSON: {error}") from error
            numbered = enumerate(rows, start=0)
            what = "row"
        else:
            numbered = ((number, line) for number, line in enumerate(file, start=1) if line.strip())  # type: ignore[assignment]
            what = "line"
        batch: list[dict[str, Any]] = []
        for number, item in numbered:
            if what == "line":
                try:
                    item = orjson.loads(item)
                except orjson.JSONDecodeError as error:
                    raise ConfigError(f"{path}: line {number} is not valid JSON: {error}") from error
            if not isinstance(item, dict):
                raise ConfigError(f"{path}: {what} {number} is a {type(item).__name__}, expected an object")
            batch.append(item)
            if len(batch) == BATCH_ROWS:
                yield batch
                batch = []
        if batch:
            yield batch


def _columns(first: Mapping[str, Any], found: _Collector) -> None:
    """The names of the columns, from the first row."""
    missing = [column for column in REQUIRED if column not in first]
    taken: set[str] = set()
    unknown = [column for column in first if column not in REQUIRED + OPTIONAL]
    for column in missing:
        close = difflib.get_close_matches(column, unknown, n=1, cutoff=0.7)
        taken.update(close)
        hint = f"did you mean it by '{close[0]}'?" if close else f"it has {', '.join(map(repr, first)) or 'no columns'}"
        found.add(None, column, f"the column is missing; {hint}")
    for column in ("tools_kwargs", "tool_selection", "system_prompt", "chat_template_kwargs"):
        if column in first:
            found.add(None, column, f"belongs inside 'extra_info' (extra_info.{column}); verl does not read it here")
    for column in unknown:
        if column not in taken:
            _misspelt(column, [name for name in OPTIONAL if name not in first], None, column, found)


def _misspelt(word: str, known: Iterable[str], row: int | None, column: str, found: _Collector) -> None:
    """A warning for an unknown name that is nearly a known one; others may be anything."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.85)
    if close:
        found.add(row, column, f"'{word}' is not read; did you mean '{close[0]}'?", severity="warning")


def _row(
    row: dict[str, Any], found: _Collector, tools: Tools | None, max_prompt_tokens: int | None, renderer: Renderers | None
) -> None:
    report, at = found.report, found.report.rows
    try:
        messages = read.messages_of(row)
        messages = read.with_system_prompt(messages, read.system_prompt_of(row), None)
    except read.RowError as error:
        found.add(at, error.column, error.message, error.kind)
        messages = []
    for check in (read.refuse_media, read.template_kwargs_of, _check_truth, _check_agent):
        try:
            check(row)
        except read.RowError as error:
            found.add(at, error.column, error.message, error.kind)
    _check_source(row, found)
    selection = _check_tools(row, found, tools)
    if messages:
        report.roles.update(message["role"] for message in messages)
        _check_duplicate(row, messages, found)
        if renderer is not None:
            _check_length(row, messages, selection, found, tools, max_prompt_tokens, renderer)


def _check_source(row: Mapping[str, Any], found: _Collector) -> None:
    try:
        source = read.data_source_of(row)
    except read.RowError as error:
        found.add(found.report.rows, error.column, error.message, error.kind)
        return
    if source:
        found.report.sources[source] += 1
    else:
        found.add(found.report.rows, "data_source", "is empty; name where the row comes from")


def _check_truth(row: Mapping[str, Any]) -> None:
    if read.ground_truth_of(row) is None:
        keys = read.prune(read.mapping_of(row, "reward_model"))
        hint = f"; {nearest('ground_truth', keys)}" if keys else ""
        raise read.RowError("reward_model.ground_truth", f"is missing{hint}", "is missing")


def _check_agent(row: Mapping[str, Any]) -> None:
    if "agent_name" in row and not (isinstance(row["agent_name"], str) and row["agent_name"]):
        raise read.RowError("agent_name", f"is {row['agent_name']!r:.40}, expected the name of an agent loop", "no name")


def _check_tools(row: Mapping[str, Any], found: _Collector, tools: Tools | None) -> tuple[str, ...] | None:
    """Checks `extra_info`; returns the row's tool selection."""
    at = found.report.rows
    selection: tuple[str, ...] | None = None
    try:
        for key, value in read.mapping_of(row, "extra_info").items():
            if value is not None and key not in EXTRA_INFO_KEYS:
                _misspelt(key, EXTRA_INFO_KEYS, at, "extra_info", found)
        selection = read.tool_selection_of(row)
        if selection == ():
            message = "is empty, so the row gets no tools (verl's own loop would give it all); leave it out to get all"
            found.add(at, "extra_info.tool_selection", message, severity="warning")
        kwargs = read.tools_kwargs_of(row)
    except read.RowError as error:
        found.add(at, error.column, error.message, error.kind)
        return selection
    fits = True
    for name, settings in kwargs.items():
        for key in settings:
            if key not in TOOL_KWARGS_KEYS:
                message = f"unknown key '{key}'; {nearest(key, TOOL_KWARGS_KEYS)}"
                found.add(at, f"extra_info.tools_kwargs.{name}", message)
                fits = False
    if tools is not None:
        for column, names in (("tool_selection", selection or ()), ("tools_kwargs", tuple(kwargs))):
            for name in names:
                if name not in tools.names:
                    message = f"there is no tool '{name}'; {nearest(name, tools.names)}"
                    found.add(at, f"extra_info.{column}", message, f"no tool '{name}'")
                    fits = False
        if fits and (problem := _asked_of_tools(selection, kwargs, found, tools)):
            found.add(at, "extra_info", problem)
    return selection


def _asked_of_tools(
    selection: tuple[str, ...] | None, kwargs: Mapping[str, Mapping[str, Any]], found: _Collector, tools: Tools
) -> str | None:
    """What would keep the tools from being created for a row, worked out once for all rows that ask the same."""
    wish = repr((selection, {name: {group: sorted(given) for group, given in kwargs[name].items()} for name in sorted(kwargs)}))
    if wish not in found.wishes:
        try:
            tools.select(selection, kwargs)
            found.wishes[wish] = None
        except ConfigError as error:
            found.wishes[wish] = str(error)
    return found.wishes[wish]


def _check_duplicate(row: Mapping[str, Any], messages: list[dict[str, Any]], found: _Collector) -> None:
    said = [
        [m["role"], m["content"].strip(), m.get("tool_calls")] for m in messages if m["role"] not in ("system", "developer")
    ]
    key = hashlib.blake2b(orjson.dumps(said, option=orjson.OPT_SORT_KEYS, default=repr), digest_size=16).digest()
    at = found.report.rows
    first = found.report.keys.setdefault(key, at)
    if first != at:
        found.add(at, "prompt", f"the same prompt as row {first}", "duplicate", severity="warning")


def _check_length(
    row: Mapping[str, Any],
    messages: list[dict[str, Any]],
    selection: tuple[str, ...] | None,
    found: _Collector,
    tools: Tools | None,
    max_prompt_tokens: int | None,
    renderer: Renderers,
) -> None:
    at = found.report.rows
    try:
        schemas = [] if tools is None else tools.schemas
        if selection is not None:
            schemas = [schema for schema in schemas if schema["function"]["name"] in selection]
        chosen = renderer(read.template_kwargs_of(row)) if callable(renderer) else renderer
        length = len(chosen.prompt(messages, schemas or None))
    except read.RowError:
        return  # reported already
    except ConfigError as error:
        found.add(at, "prompt", f"the chat template refuses it: {error}", "refused by the chat template")
        return
    found.report.prompt_lengths.append(length)
    if max_prompt_tokens is not None and length > max_prompt_tokens:
        message = f"is {length} tokens long, the limit is {max_prompt_tokens}; it is never cut, so raise the limit or drop it"
        found.add(at, "prompt", message, "longer than the limit")
