"""The sampled tokens of many trajectories as one table: what both sides say of each, and where it stands.

Two things can be put into it: recorded trajectories with their train side (`TrainedTrajectory`), and the rows of a batch that a
trainer has in memory (`TrainerRow`). A batch tells less: turns are counted by runs of sampled tokens (an empty generation has
none), and what came before a later turn, a tool's answer or glue alone, is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from agentloop.journal.recorded import MIXED_VERSION, NO_VERSION
from agentloop.journal.train_side import TrainedTrajectory, TrainerRow
from agentloop.trajectory import Origin

ORIGINS = ("after_prompt", "after_observation", "after_template", "after_turn")
"""What the model had just read when it began the turn in which a token was sampled: the prompt; a tool's answer, whatever glue
stood around it; glue alone; or, in a batch in memory, something after an earlier turn."""

MIXED_STALENESS = -(2**30)
"""In the column `staleness`: sampled while the weights changed, and nobody told at which token."""
NO_STALENESS = MIXED_STALENESS + 1
"""In the column `staleness`: the engine did not tell the version."""


Describe = Callable[[int], tuple[int | None, str | None]]
"""Of a position in the response: the token's id and its text, where they can be told."""


class Misplaced(NamedTuple):
    """A trained token that was not sampled."""

    trajectory: int
    response_position: int
    origin: str
    """`observation`, `template`, or `not_sampled` where the source does not tell more."""


@dataclass(frozen=True, slots=True)
class Place:
    """One trajectory of the table."""

    id: str
    partition: str
    step: int
    """Of the rollout: the one under which the journal has it."""
    trained_step: int
    update: int
    recomputed: bool
    """False: the trainer took the rollout's log-probabilities as its own, so none of its tokens are in the table."""
    prompt_len: int | None
    """`None` in a batch in memory."""
    versions: tuple[int, int] | None
    """Oldest and newest weights that sampled it; `None` if the engine did not tell."""
    describe: Describe


COLUMNS: dict[str, Any] = {
    "trainer": np.float32,
    "rollout": np.float32,
    "trajectory": np.int32,
    "turn": np.int32,
    "position": np.int32,
    "in_turn": np.int32,
    "origin": np.uint8,
    "staleness": np.int32,
}


@dataclass
class Tokens:
    """One entry a sampled token, trajectory by trajectory, in order. 36 bytes each."""

    columns: dict[str, Any] = field(default_factory=dict)
    """By the names of `COLUMNS`, each (N,). `trainer` and `rollout` are log-probabilities, NaN where not recorded; `trajectory`
    is a place in `places`; `turn` its index; `position` counts in the response and `in_turn` in the turn, both from 0; `origin`
    is a place in `ORIGINS`; `staleness` is by how many versions the weights that sampled it were behind the trainer's."""
    places: list[Place] = field(default_factory=list)
    misplaced: list[Misplaced] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.columns["trainer"])


class _Builder:
    def __init__(self) -> None:
        self.parts: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self.table = Tokens()

    def add(self, place: Place, at: Any, **columns: Any) -> None:
        """`at`: positions in the response of the sampled tokens."""
        index = len(self.table.places)
        self.table.places.append(place)
        if not place.recomputed:
            return
        columns |= {"trajectory": np.full(len(at), index), "position": at}
        for name, kind in COLUMNS.items():
            self.parts[name].append(np.asarray(columns[name]).astype(kind, copy=False))

    def misplaced(self, at: Any, origin: Callable[[int], str]) -> None:
        """Of the trajectory that is added next."""
        index = len(self.table.places)
        self.table.misplaced += [Misplaced(index, int(position), origin(int(position))) for position in at]

    def done(self) -> Tokens:
        self.table.columns = {
            name: np.concatenate(parts) if parts else np.empty(0, COLUMNS[name]) for name, parts in self.parts.items()
        }
        return self.table


def tokens_of_trajectories(trajectories: Iterable[TrainedTrajectory], *, keep: bool = True) -> Tokens:
    """Of recorded trajectories. Without `keep` their tokens' ids are not held on to, and `describe` cannot tell them."""
    builder = _Builder()
    for trained in trajectories:
        _add_trained(builder, trained, keep)
    return builder.done()


def _add_trained(builder: _Builder, trained: TrainedTrajectory, keep: bool) -> None:
    recorded, row = trained.recorded, trained.recorded.row
    sampled, first = trained.sampled, recorded.prompt_len
    at = np.flatnonzero(sampled)
    indexes, starts, origins = _turns_of(trained)
    turn = np.searchsorted(starts, at, side="right") - 1
    versions = trained.weight_version[at]
    staleness = trained.trained_step - 1 - versions
    staleness[versions == MIXED_VERSION] = MIXED_STALENESS
    staleness[versions == NO_VERSION] = NO_STALENESS
    misplaced = np.flatnonzero((trained.response_mask == 1) & ~sampled)
    if len(misplaced):
        ends = np.cumsum([n for _, n, _ in recorded.segments])
        names = [origin.value for origin, _, _ in recorded.segments]
        builder.misplaced(misplaced, lambda position: names[int(np.searchsorted(ends, first + position, side="right"))])
    told = [
        version for run in recorded.turns for version in (run.min_weight_version, run.weight_version) if version is not None
    ]
    builder.add(
        Place(
            id=row.id,
            partition=row.partition,
            step=row.step,
            trained_step=trained.trained_step,
            update=trained.update,
            recomputed=trained.recomputed,
            prompt_len=first,
            versions=(min(told), max(told)) if told else None,
            describe=_describer(recorded) if keep else _unknown,
        ),
        at,
        trainer=trained.old_log_probs[at],
        rollout=trained.rollout_log_probs[at],
        turn=indexes[turn],
        in_turn=at - starts[turn],
        origin=origins[turn],
        staleness=staleness,
    )


def _turns_of(trained: TrainedTrajectory) -> tuple[Any, Any, Any]:
    """Of the turns that have tokens, in order: their indexes, where they begin in the response, and their origins as places in
    `ORIGINS`."""
    recorded = trained.recorded
    at = 0
    read: set[Origin] = set()
    origin_at: dict[int, int] = {}
    for origin, n, _ in recorded.segments:
        if origin is Origin.SAMPLED:
            name = "observation" if Origin.OBSERVATION in read else "prompt" if Origin.PROMPT in read else "template"
            origin_at[at], read = ORIGINS.index(f"after_{name}"), set()
        else:
            read.add(origin)
        at += n
    turns = [turn for turn in recorded.turns if turn.end > turn.start]
    indexes = np.array([turn.index for turn in turns], np.int64)
    starts = np.array([turn.start - recorded.prompt_len for turn in turns], np.int64)
    return indexes, starts, np.array([origin_at.get(turn.start, ORIGINS.index("after_template")) for turn in turns], np.uint8)


def _describer(recorded: Any) -> Describe:
    def describe(position: int) -> tuple[int | None, str | None]:
        at = recorded.prompt_len + position
        return int(recorded.columns.ids[at]), recorded.columns.text(at, at + 1)

    return describe


def _unknown(position: int) -> tuple[int | None, str | None]:
    raise LookupError(position)


def tokens_of_rows(rows: Sequence[TrainerRow], *, step: int, update: int = 0, recomputed: bool = True) -> Tokens:
    """Of a batch in memory, in update `update` of the trainer's `step`.

    A row's columns: `old_log_probs` and `response_mask`, and where there `rollout_log_probs` (without it nothing is compared)
    and `sampled`, 1 for what was sampled. Without `sampled` that is `response_mask`, which lacks what verl's rejection sampling
    took out.
    """
    builder = _Builder()
    for row in rows:
        mask = np.asarray(row.columns["response_mask"]) == 1
        sampled = np.asarray(row.columns.get("sampled", mask)).astype(bool)
        at = np.flatnonzero(sampled)
        begins = sampled & ~np.concatenate([[False], sampled[:-1]])
        starts, turn = np.flatnonzero(begins), np.cumsum(begins)[at] - 1
        rollout = row.columns.get("rollout_log_probs")
        builder.misplaced(np.flatnonzero(mask & ~sampled), lambda _: "not_sampled")
        first = sampled[:1].any()
        builder.add(
            Place(
                id=f"{row.uid}_{row.sibling}",
                partition="train",
                step=row.step,
                trained_step=step,
                update=update,
                recomputed=recomputed,
                prompt_len=None,
                versions=row.versions,
                describe=_row_describer(row),
            ),
            at,
            trainer=np.asarray(row.columns["old_log_probs"])[at],
            rollout=np.full(len(at), np.nan) if rollout is None else np.asarray(rollout)[at],
            turn=turn,
            in_turn=at - starts[turn],
            origin=np.where((turn == 0) & first, ORIGINS.index("after_prompt"), ORIGINS.index("after_turn")),
            staleness=np.full(len(at), _staleness(step, row.versions)),
        )
    return builder.done()


def _staleness(step: int, versions: tuple[int, int] | None) -> int:
    if versions is None:
        return NO_STALENESS
    return step - 1 - versions[1] if versions[0] == versions[1] else MIXED_STALENESS


def _row_describer(row: TrainerRow) -> Describe:
    return lambda position: (None if row.response_ids is None else int(row.response_ids[position]), None)
