"""The reports of a run's steps, beside its journal.

```
RUN/consistency/g1.jsonl      one line for each update of the trainer, written by the start (generation) 1 of the run
```
A line is a JSON object with a `line_crc`, as the journal's events have it: `{"type": "consistency", "version": 1, "t", "step",
"update", "generation", "action", "report", "beyond"}`. `step` is the trainer's, `t` in seconds since 1970, `report` is
`Consistency.to_dict()` of the update's batch, `beyond` what was beyond a threshold (`Beyond.to_dict()`), and `action` what was
then done: `warn`, `stop`, or `null` if nothing was beyond. Of each step only the highest generation counts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentloop.consistency.judge import Beyond
from agentloop.consistency.report import VERSION, Consistency
from agentloop.journal.format import JournalError, load_line, sealed

FOLDER = "consistency"
_NAME = re.compile(r"^g(?P<generation>[1-9][0-9]*)\.jsonl$")


def write_event(
    run_dir: Path, report: Consistency, beyond: Sequence[Beyond], *, step: int, update: int, generation: int, action: str | None
) -> None:
    """Append the report on one update. Raises `OSError`."""
    event = {
        "type": "consistency",
        "version": VERSION,
        "t": time.time(),
        "step": step,
        "update": update,
        "generation": generation,
        "action": action,
        "beyond": [found.to_dict() for found in beyond],
        "report": report.to_dict(),
    }
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"g{generation}.jsonl").open("ab") as file:
        file.write(sealed(event))


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """The events that count, by step and update. Lines that are torn or damaged are left out; of a later version of agentloop,
    `JournalError`."""
    folder = Path(run_dir) / FOLDER
    by_step: dict[int, list[dict[str, Any]]] = {}
    files = [(int(match["generation"]), path) for path in folder.glob("g*.jsonl") if (match := _NAME.match(path.name))]
    for _, path in sorted(files):
        own: dict[int, list[dict[str, Any]]] = {}
        for event in _events(path):
            own.setdefault(event["step"], []).append(event)
        by_step |= own
    return [event for step in sorted(by_step) for event in sorted(by_step[step], key=lambda event: int(event["update"]))]


def _events(path: Path) -> list[dict[str, Any]]:
    events = []
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}") from error
    for line in lines:
        try:
            event = load_line(line + b"\n")
        except ValueError:
            continue
        if not isinstance(event, dict) or event.get("type") != "consistency":
            continue
        if event.get("version", 0) > VERSION:
            raise JournalError(f"{path}: version {event['version']}, this agentloop reads {VERSION}")
        events.append(event)
    return events
