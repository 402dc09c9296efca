"""What a run is (`run.json`), and which of its starts a file belongs to (the generation)."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from agentloop import __version__
from agentloop.errors import ConfigError
from agentloop.journal.format import FORMAT, PARTITIONS, VERSION, dump_line, load_line, parse_file_name

PACKAGES = ("agentloop", "numpy", "ray", "sglang", "tokenizers", "torch", "transformers", "verl")
"""Whose versions are recorded."""


def next_generation(run_dir: str | Path, start: str | None = None) -> int:
    """Claim the number of this start of a run: 1 for a new run, one more each time it is resumed.

    Called once for a run by whoever starts its writers, and handed to all of them: writers of one generation are merged
    by the reader, and a step's higher generation supersedes its lower ones. Two callers never get the same number, unless
    they name the same `start`: that is for writers which nobody starts in common, and then the first of them claims it.
    Raises `ConfigError` if the folder cannot be written.
    """
    run_dir = Path(run_dir)
    starts = run_dir / "starts"
    try:
        starts.mkdir(parents=True, exist_ok=True)
        while True:
            # First the number, then who has one: whoever claims in between takes this number, and the link fails.
            generation = max([0, *_generations(run_dir)]) + 1
            if start is not None:
                for path in starts.glob("g*.json"):
                    if path.stem[1:].isdigit() and _start_of(path) == start:
                        return int(path.stem[1:])
            # Linked and not written in place: whoever sees the file sees whose it is.
            claim = starts / f"claim-{uuid4().hex}.part"
            claim.write_bytes(dump_line({"generation": generation, "started": _now(), "start": start}))
            try:
                os.link(claim, starts / f"g{generation}.json")
            except FileExistsError:
                continue
            finally:
                claim.unlink()
            return generation
    except OSError as error:
        raise ConfigError(f"{run_dir}: a journal cannot be written here: {error.strerror}") from error


def write_run(run_dir: Path, generation: int, meta: Mapping[str, Any]) -> None:
    """Write `run.json` and the start's own copy, each whole or not at all. Raises `ConfigError` if that fails.

    A resumed run keeps the first start's `created`; the rest of `run.json` is the latest start's.
    """
    now = _now()
    own = run_dir / "starts" / f"g{generation}.json"
    try:
        created = read_run(run_dir).get("created", now)
    except ConfigError:
        created = now
    document = {
        **meta,
        "format": FORMAT,
        "format_version": VERSION,
        "created": created,
        "started": now,
        "generation": generation,
        "start": _start_of(own),
        "packages": package_versions(),
    }
    try:
        (run_dir / "starts").mkdir(parents=True, exist_ok=True)
        for path in (own, run_dir / "run.json"):
            partial = path.with_name(f"{path.name}.{uuid4().hex}.part")
            partial.write_bytes(dump_line(document))
            partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{run_dir}: a journal cannot be written here: {error.strerror}") from error


def read_run(run_dir: Path) -> dict[str, Any]:
    """`run.json`, or an empty dict if there is none; `ConfigError` if it is malformed or of a later format."""
    path = run_dir / "run.json"
    try:
        document = load_line(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as a run's metadata: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ConfigError(f"{path}: key 'format' is not '{FORMAT}'")
    if document.get("format_version", 0) > VERSION:
        raise ConfigError(f"{path}: key 'format_version' is {document['format_version']}, this agentloop reads {VERSION}")
    return document


def package_versions() -> dict[str, str]:
    """Versions of Python and of what is installed of `PACKAGES`."""
    versions = {"python": platform.python_version(), "agentloop": __version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _start_of(path: Path) -> str | None:
    """The name that a start's file was claimed with."""
    try:
        document = load_line(path.read_bytes())
    except (OSError, ValueError):
        return None
    return document.get("start") if isinstance(document, dict) else None


def _generations(run_dir: Path) -> list[int]:
    """All generations that left a trace in a run, its claims and its files."""
    found = [int(path.stem[1:]) for path in (run_dir / "starts").glob("g*.json") if path.stem[1:].isdigit()]
    for partition in PARTITIONS:
        for path in (run_dir / partition).glob("step_*/*.traj.jsonl"):
            name = parse_file_name(path.name)
            if name is not None:
                found.append(name.generation)
    return found


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
