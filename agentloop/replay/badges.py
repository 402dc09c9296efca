"""What is remarkable about a trajectory, in one place: the viewer's filters, its marks and the dataframes all ask here.

A badge is a word of `BADGES`. Most follow from the run's index; whether calls were malformed and whether the weights changed
within a trajectory stands in its events.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agentloop.journal.format import load_line
from agentloop.journal.recorded import Row
from agentloop.trajectory import MIXED, EndReason, StopReason

ERROR = "error"
"""It ended by a failure: of a tool, the engine or the program."""
CUT_OFF = "cut_off"
"""It was ended by a limit (of turns, tokens or time) or from outside, not by the model."""
PARSE_FAILURE = "parse_failure"
"""At least one call of a tool was malformed."""
TOOL_FAILURE = "tool_failure"
"""At least one call of a tool did not end well."""
MIXED_VERSIONS = "mixed_versions"
"""Its tokens were sampled by more than one version of the weights."""
INCOMPLETE = "incomplete"
"""It is still running, was killed, or could not be written."""
MASKED = "masked"
"""It was kept out of training."""
ZERO_VARIANCE = "zero_variance"
"""All siblings of its group have the same reward, so GRPO learns nothing from it."""
DAMAGED = "damaged"
"""Its record cannot be read as it was written."""

BADGES = (
    ERROR,
    CUT_OFF,
    PARSE_FAILURE,
    TOOL_FAILURE,
    MIXED_VERSIONS,
    INCOMPLETE,
    MASKED,
    ZERO_VARIANCE,
    DAMAGED,
)

_ERRORS = {EndReason.TOOL_FAILURE, EndReason.ENGINE_FAILURE}
_CUT_OFF = {EndReason.TURN_LIMIT, EndReason.TOKEN_LIMIT, EndReason.DEADLINE, EndReason.ABORTED}


class Facts(NamedTuple):
    """What the index does not tell of a trajectory. `None`: not known (yet)."""

    parse_errors: int | None
    """Malformed calls. Known when it has ended."""
    cut_turns: int | None
    """Turns that stopped for their length."""
    retries: int | None
    """Attempts beyond the first, over all calls."""
    versions: tuple[int | str, ...]
    """Of the weights that sampled it, in ascending order, `MIXED` last; empty if the engine did not tell."""
    damaged: bool = False

    @property
    def numbers(self) -> list[int]:
        return [version for version in self.versions if isinstance(version, int)]

    @property
    def is_mixed(self) -> bool:
        return len(self.versions) > 1 or MIXED in self.versions


UNKNOWN = Facts(None, None, None, (), damaged=True)


def facts(row: Row) -> Facts:
    """Reads the trajectory's events."""
    try:
        return _facts(row, list(_lines(row)))
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return UNKNOWN


def _lines(row: Row) -> Iterator[bytes]:
    with row.file.open("rb") as file:
        for offset, length in row.lines:
            file.seek(offset)
            yield file.read(length)


def _facts(row: Row, lines: list[bytes]) -> Facts:
    cut_turns = 0
    attempts: dict[int, list[int]] = {}
    versions: set[int | str | None] = set()
    end: Mapping[str, Any] | None = None
    for line in lines:
        if line.startswith(_TURN) and row.complete:  # long, and this is all that its end does not repeat
            cut_turns += _CUT in line
            continue
        if not line.startswith(_WANTED):
            continue
        event: Mapping[str, Any] = load_line(line)
        if event["id"] != row.id:
            raise ValueError("another trajectory's event")
        if event["type"] == "turn":
            cut_turns += event["stop_reason"] == StopReason.LENGTH
            versions.update(version for version, count in event.get("versions", ()) if count)
        elif event["type"] == "tool":
            attempts.setdefault(event["turn"], []).append(event["attempts"])
        elif event["type"] == "traj_end":
            end = event
    if end is not None:
        settled = enumerate(end["turns"])
        attempts = {index: [attempts[index][place] for place in turn["calls"]] for index, turn in settled if turn["calls"]}
        versions = {version for version, count in end["weight_versions"] if count}
    numbers: list[int | str] = sorted(version for version in versions if isinstance(version, int))
    return Facts(
        parse_errors=None if end is None else sum(len(turn["parse_errors"]) for turn in end["turns"]),
        cut_turns=cut_turns,
        retries=sum(number - 1 for tries in attempts.values() for number in tries),
        versions=(*numbers, *([MIXED] if MIXED in versions else [])),
    )


_TURN = b'{"type":"turn"'
_CUT = b'"stop_reason":"length"'
"""A text cannot hold it: there its quotes are escaped."""
_WANTED = (_TURN, b'{"type":"tool"', b'{"type":"traj_end"', b" ")
"""How the writer begins the lines that matter here. One with a space holds values that not every parser keeps."""


def own_badges(row: Row, found: Facts) -> list[str]:
    """The badges that do not depend on siblings, in the order of `BADGES`."""
    reason = EndReason(row.end_reason) if row.end_reason in set(EndReason) else None
    holds = {
        ERROR: bool(row.error) or reason in _ERRORS or (row.complete and reason is None and "end_reason" not in row.missing),
        CUT_OFF: reason in _CUT_OFF,
        PARSE_FAILURE: bool(found.parse_errors) or reason is EndReason.PARSE_FAILURE,
        TOOL_FAILURE: bool(row.tool_failures),
        MIXED_VERSIONS: found.is_mixed,
        INCOMPLETE: not row.complete,
        MASKED: row.masked,
        DAMAGED: found.damaged,
    }
    return [badge for badge in BADGES if holds.get(badge)]


def has_zero_variance(siblings: Iterable[Row]) -> bool:
    """Whether at least two siblings are in the group's baseline, and all of these have the same reward."""
    rewards = [row.reward for row in siblings if not row.masked and row.reward is not None]
    return len(rewards) > 1 and len(set(rewards)) == 1


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The siblings of each group, by `group_key`; of a sibling that was started anew the last attempt."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        siblings = found.setdefault(group_key(row), {})
        other = siblings.get(row.sibling)
        if other is None or other.attempt <= row.attempt:
            siblings[row.sibling] = row
    return {key: list(siblings.values()) for key, siblings in found.items()}


def group_key(row: Row) -> str:
    return f"{row.partition}/{row.step}/{row.uid}"


class Badges:
    """The badges of a run's trajectories. What has been read of one is kept until more of it is written."""

    def __init__(self) -> None:
        self._facts: dict[tuple[Path, str], tuple[str, Facts]] = {}
        """By event file and id: where the events lay that were read, and what they told."""

    def facts(self, row: Row) -> Facts:
        places, known = self._facts.get((row.file, row.id), ("", UNKNOWN))
        if places != row.places:
            known = facts(row)
            self._facts[row.file, row.id] = (row.places, known)
        return known

    def of_rows(self, rows: Sequence[Row]) -> list[list[str]]:
        """The badges of each row; a group counts as far as it is among the rows."""
        flat = {key for key, siblings in groups(rows).items() if has_zero_variance(siblings)}
        found = []
        for row in rows:
            badges = own_badges(row, self.facts(row))
            if group_key(row) in flat:
                badges.append(ZERO_VARIANCE)
            found.append(sorted(badges, key=BADGES.index))
        return found
