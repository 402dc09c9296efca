"""Documents from files: text, Markdown, JSON lines and parquet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentloop.config import Strict
from agentloop.errors import ConfigError, nearest

SUFFIXES = (".jsonl", ".md", ".parquet", ".txt")

_READ = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Document:
    id: str
    title: str
    text: str


class Columns(Strict):
    """Which columns (of parquet) or keys (of JSON lines) hold a document."""

    id: str | None = None
    """By default `id` where there is one, else the file's name and the row's number."""
    title: str | None = None
    """By default `title` where there is one, else the text's first line (in quotes or not), which then leaves the text."""
    text: str | None = None
    """By default `text`, else `contents`."""


def corpus_files(corpus: Path) -> list[Path]:
    """The files of a corpus: `corpus` itself, or what a folder holds, below it too, in order. Hidden ones are left out.

    Raises `ConfigError` if there are none.
    """
    if corpus.is_file():
        if corpus.suffix not in SUFFIXES:
            raise ConfigError(f"config.corpus: {corpus} is none of {', '.join(SUFFIXES)}")
        return [corpus]
    if not corpus.is_dir():
        beside = [path.name for path in corpus.parent.iterdir()] if corpus.parent.is_dir() else []
        hint = nearest(corpus.name, beside)
        raise ConfigError(f"config.corpus: {corpus}: no such file or folder{f'; {hint}' if 'did you mean' in hint else ''}")
    files = [
        path
        for path in sorted(corpus.rglob("*"))
        if path.suffix in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(corpus).parts)
    ]
    if not files:
        raise ConfigError(f"config.corpus: {corpus} holds no file that ends with {', '.join(SUFFIXES)}")
    return files


def check_columns(files: list[Path], columns: Columns) -> None:
    """Looks at the head of every table. `ConfigError` for a column that is not there."""
    for path in files:
        if path.suffix == ".parquet":
            _pick(_parquet(path).schema_arrow.names, columns, str(path))
        elif path.suffix == ".jsonl":
            for number, row in _json_rows(path):
                _pick(row, columns, f"{path}: line {number}")
                break


def documents(corpus: Path, columns: Columns) -> Iterator[Document]:
    """Every document, in order. `ConfigError` names the file and the line of what cannot be read."""
    for path in corpus_files(corpus):
        name = path.name if path == corpus else path.relative_to(corpus).as_posix()
        if path.suffix in (".txt", ".md"):
            text = path.read_text(encoding="utf-8", errors="replace")
            yield Document(name, _heading(text) or path.stem, text)
        elif path.suffix == ".jsonl":
            for number, row in _json_rows(path):
                yield _document(row, columns, f"{name}:{number}", f"{path}: line {number}")
        else:
            number = 0
            table = _parquet(path)
            names = [column for column in _pick(table.schema_arrow.names, columns, str(path)) if column]
            for batch in table.iter_batches(batch_size=1024, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield _document(row, columns, f"{name}:{number}", f"{path}: row {number}")


def stat_key(corpus: Path, columns: Columns, version: str) -> str:
    """Changes whenever a file is added, removed, renamed or written (by size and time of change); reads no file."""
    digest = hashlib.blake2b(f"{version}\n{corpus.resolve()}\n{columns.model_dump_json()}\n".encode(), digest_size=16)
    for path in corpus_files(corpus):
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def content_digest(corpus: Path, columns: Columns, version: str) -> str:
    """The same for the same names, contents, columns and version, wherever the corpus lies. Reads every file."""
    digest = hashlib.blake2b(f"{version}\n{columns.model_dump_json()}\n".encode(), digest_size=16)
    for path in corpus_files(corpus):
        name = path.name if path == corpus else path.relative_to(corpus).as_posix()
        digest.update(f"{name}\0{path.stat().st_size}\n".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            while block := file.read(_READ):
                digest.update(block)
    return digest.hexdigest()


def title_and_text(contents: str) -> tuple[str, str]:
    """A text whose first line is its title, as corpora for Search-R1 have it: `"Title"\\ntext`."""
    title, _, text = contents.partition("\n")
    return title.strip().strip('"').strip(), text.strip()


def _document(row: Mapping[str, Any], columns: Columns, default_id: str, where: str) -> Document:
    id_column, title_column, text_column = _pick(row, columns, where)
    text = _text(row[text_column])
    if title_column is None:
        title, rest = title_and_text(text)
        title, text = (title, rest) if rest else ("", text)
    else:
        title = _text(row[title_column])
    return Document(default_id if id_column is None else _text(row[id_column]), title, text)


def _pick(known: Any, columns: Columns, where: str) -> tuple[str | None, str | None, str]:
    """The columns of id, title and text. `known`: names, or a row."""
    for given in (columns.id, columns.title, columns.text):
        if given is not None and given not in known:
            raise ConfigError(f"{where}: there is no column '{given}'; {nearest(given, known)}")
    text = columns.text or ("text" if "text" in known else "contents")
    if text not in known:
        shown = ", ".join(sorted(map(str, known))) or "none"
        raise ConfigError(f"{where}: there is no column 'text'; set config.columns.text to one of: {shown}")
    return columns.id or _if_there("id", known), columns.title or _if_there("title", known), text


def _if_there(name: str, known: Any) -> str | None:
    return name if name in known else None


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _heading(text: str) -> str:
    first = text.lstrip().partition("\n")[0].strip()
    return first.lstrip("#").strip() if first.startswith("#") else ""


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}: line {number}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}: line {number}: expected an object, found {line.strip()[:40]}")
            yield number, row


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise ConfigError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from error
