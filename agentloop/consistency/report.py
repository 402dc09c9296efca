"""`consistency`: the report on one run, or on one batch.

`Consistency.to_dict()`, plain JSON types (numbers that do not exist are `null`):

```
{"version": 1,
 "clip": [0.5, 2.0],                     outside of it a ratio counts as `ratio_outside`
 "trajectories": 128,                    whose both sides are there
 "not_recomputed": 0,                    of these, not compared: the trainer took the rollout's numbers as its own
 "expected": 128, "arrived": 128,        training trajectories, and those whose train side is there; null for a batch
 "missing": {"2": 24},                   the difference, by the rollout's step
 "sampled_tokens": 1611,                 of the trajectories that are compared; `all.tokens` of these have both sides
 "all": FIGURES,
 "by": {
   "step": [{"name": "3", "step": 3, "update": 0, "trajectories": 128, "not_recomputed": 0,
             "misplaced": 0,                           trained tokens that were not sampled
             "sampled_by": [1, 2] or null,             lowest and highest weight version
             "turns": [{"name": "0", FIGURES…}, …], FIGURES…}, …],      the trainer's steps; "3.1" is update 1 of step 3
   "turn": [{"name": "0", FIGURES…}, …],
   "position": [{"name": "0-15", …}, …],               of the token in the response
   "in_turn": [{"name": "0", …}, {"name": "2-3", …}, …],       of the token in its turn
   "in_turn_after_observation": […],                   the same, of turns that follow a tool's answer (a batch: any later turn)
   "origin": [{"name": "after_prompt", …}, …],         see `agentloop.consistency.tokens.ORIGINS`
   "staleness": [{"name": "0", …}, {"name": "1", …}, {"name": "mixed", …}, {"name": "not recorded", …}, …]},
 "turn_level": {"turns": 60,                           each turn counts once, whatever its length
    "max_abs" | "mean_abs" | "k1" | "k3": {"mean", "p50", "p95", "p99", "max"},
    "ratio": {"min", "p0.1", …, "max"}} or null,       geometric mean of a turn's ratios
 "worst_tokens": [{"key": "train/3/g0_1", "id": "g0_1", "partition": "train", "step": 3, "trained_step": 3, "update": 0,
    "turn": 2, "token": 913 or null, "response_position": 813, "in_turn": 0, "origin": "after_observation",
    "staleness": 0 or "mixed" or null, "token_id": 151 or null, "text": " the" or null,
    "trainer": -9.1, "rollout": -0.2, "diff": -8.9}, …],       by |diff|; impossible ones first, as null with `infinite`
 "worst_turns": [{"key", "id", "partition", "step", "trained_step", "update", "turn", "tokens", "max_abs", "mean_abs",
    "k1", "k3", "share", "infinite"}, …],              by the share of all squared differences that is theirs
 "findings": ["one sentence", …]}                      what should not be at all, whatever the thresholds
```
FIGURES are those of `agentloop.consistency.figures.Figures`. Groups without a sampled token are left out. `key` is the viewer's
`KEY` and `token` its position there, the prompt included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from agentloop.consistency.batches import rows_of_dataproto
from agentloop.consistency.figures import PERCENTILES, SAFETY_BOUND, Drift, Figures
from agentloop.consistency.tokens import (
    MIXED_STALENESS,
    NO_STALENESS,
    ORIGINS,
    Place,
    Tokens,
    tokens_of_rows,
    tokens_of_trajectories,
)
from agentloop.journal.reader import Run
from agentloop.journal.train_side import TrainedTrajectory, TrainerRow

if TYPE_CHECKING:
    from verl.protocol import DataProto

VERSION = 1
POSITIONS = (0, 16, 64, 256, 1024, 4096, 16384, 65536)
"""Where the bins of the position in the response begin."""
IN_TURN = (0, 1, 2, 4, 8, 16, 64, 256)
"""Where the bins of the position in the turn begin."""
CLIP = (0.5, 2.0)
"""verl's default: `algorithm.rollout_correction.rollout_is_threshold` is 2, and the lower end its inverse."""
WORST = 10
_NONE = ""
"""Name of the group of what belongs to none; it is never shown."""


@dataclass(frozen=True, slots=True)
class Group:
    """Tokens that have something in common."""

    name: str
    figures: Figures

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **self.figures.to_dict()}


@dataclass(frozen=True, slots=True)
class Step:
    """One update of the trainer."""

    step: int
    update: int
    trajectories: int
    not_recomputed: int
    misplaced: int
    """Trained tokens that were not sampled."""
    sampled_by: tuple[int, int] | None
    figures: Figures
    turns: tuple[Group, ...]
    worst_turn: dict[str, Any] | None
    """As in `Consistency.worst_turns`."""

    @property
    def name(self) -> str:
        return f"{self.step}.{self.update}" if self.update else str(self.step)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "step": self.step,
            "update": self.update,
            "trajectories": self.trajectories,
            "not_recomputed": self.not_recomputed,
            "misplaced": self.misplaced,
            "sampled_by": None if self.sampled_by is None else list(self.sampled_by),
            "turns": [group.to_dict() for group in self.turns],
            **self.figures.to_dict(),
        }


@dataclass(frozen=True)
class Consistency:
    """Trainer against rollout. The module says what each part means, under the names of `to_dict`."""

    clip: tuple[float, float]
    trajectories: int
    not_recomputed: int
    expected: int | None
    arrived: int | None
    missing: dict[str, int]
    sampled_tokens: int
    all: Figures
    steps: tuple[Step, ...]
    by: dict[str, tuple[Group, ...]]
    """Without `step`, which is in `steps`."""
    turn_level: dict[str, Any] | None
    worst_tokens: tuple[dict[str, Any], ...]
    worst_turns: tuple[dict[str, Any], ...]
    findings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "clip": list(self.clip),
            "trajectories": self.trajectories,
            "not_recomputed": self.not_recomputed,
            "expected": self.expected,
            "arrived": self.arrived,
            "missing": dict(self.missing),
            "sampled_tokens": self.sampled_tokens,
            "all": self.all.to_dict(),
            "by": {
                "step": [step.to_dict() for step in self.steps],
                **{name: [group.to_dict() for group in groups] for name, groups in self.by.items()},
            },
            "turn_level": self.turn_level,
            "worst_tokens": list(self.worst_tokens),
            "worst_turns": list(self.worst_turns),
            "findings": list(self.findings),
        }


def consistency(
    source: Run | Iterable[TrainedTrajectory] | Sequence[TrainerRow] | DataProto,
    *,
    step: int | None = None,
    update: int = 0,
    recomputed: bool = True,
    clip: tuple[float, float] = CLIP,
    worst: int = WORST,
) -> Consistency:
    """Compare both sides.

    `source` is a recorded run with a train side, all of it or the trainer's `step`; trajectories of `Run.train_side`; or a
    batch that the trainer has in memory in its `step`, then with `update` and `recomputed`: a `DataProto`, or rows as
    `agentloop.verl.train_side` makes them of TransferQueue's. `worst` is how many tokens and turns are named.

    Takes some 100 bytes a sampled token. Raises `JournalError` if something that is needed is damaged.
    """
    if isinstance(source, Run):
        return _of_run(source, step, clip, worst)
    given: Any = source
    if hasattr(given, "non_tensor_batch"):
        step = given.meta_info.get("global_steps") if step is None else step
        given = rows_of_dataproto(given, step or 0)
    given = list(given)
    if given and isinstance(given[0], TrainerRow):
        if step is None:
            raise TypeError("consistency() of a batch needs the trainer's step")
        return report_of(tokens_of_rows(given, step=step, update=update, recomputed=recomputed), clip, worst)
    return report_of(tokens_of_trajectories(given), clip, worst)


def _of_run(run: Run, step: int | None, clip: tuple[float, float], worst: int) -> Consistency:
    expected = arrived = 0
    missing: dict[str, int] = {}
    chosen: list[Any] = []
    for place in run.steps():
        if place.partition != "train":
            continue
        side = run.train_side(place.step)
        expected += side.expected
        arrived += side.arrived
        if side.arrived < side.expected:
            missing[str(place.step)] = side.expected - side.arrived
        if step is None or step in side.trained_steps:
            chosen.append(side)
    trained = (trajectory for side in chosen for trajectory in side if step in (None, trajectory.trained_step))
    tokens = tokens_of_trajectories(trained, keep=False)
    return report_of(tokens, clip, worst, run, (expected, arrived, missing))


def report_of(
    tokens: Tokens,
    clip: tuple[float, float] = CLIP,
    worst: int = WORST,
    run: Run | None = None,
    coverage: tuple[int | None, int | None, dict[str, int]] = (None, None, {}),
) -> Consistency:
    """Of a table. `run`: where the texts of the worst tokens are to be found; `coverage`: expected, arrived, missing."""
    drift = Drift(tokens["trainer"], tokens["rollout"], clip)
    updates = sorted({(place.trained_step, place.update) for place in tokens.places})
    numbers = {update: number for number, update in enumerate(updates)}
    of_place = np.array([numbers[place.trained_step, place.update] for place in tokens.places], np.int32)
    step_labels = of_place[tokens["trajectory"]]
    turn_labels, turn_names = _dense(tokens["turn"])
    groupings = {"turn": (turn_labels, turn_names), **_groupings(tokens)}
    several = len(turn_names)
    everything, by_step, by_step_turn, *rest = drift.by(
        (np.zeros(len(tokens), np.uint8), 1),
        (step_labels, len(updates)),
        (step_labels.astype(np.int64) * several + turn_labels, len(updates) * several),
        *((labels, len(names)) for labels, names in groupings.values()),
    )
    turns = _Turns(tokens, drift)
    step_of_turn = step_labels[turns.first]
    places_of: list[list[Place]] = [[] for _ in updates]
    for place, index in zip(tokens.places, of_place.tolist(), strict=True):
        places_of[index].append(place)
    misplaced = Counter(of_place[[found.trajectory for found in tokens.misplaced]].tolist()) if tokens.misplaced else Counter()
    steps = []
    for index, ((at, update), places) in enumerate(zip(updates, places_of, strict=True)):
        versions = [version for place in places for version in place.versions or ()]
        worst_turn = turns.worst(1, step_of_turn == index)
        steps.append(
            Step(
                step=at,
                update=update,
                trajectories=len(places),
                not_recomputed=sum(not place.recomputed for place in places),
                misplaced=misplaced[index],
                sampled_by=(min(versions), max(versions)) if versions else None,
                figures=by_step[index],
                turns=_groups(turn_names, by_step_turn[index * several : (index + 1) * several]),
                worst_turn=worst_turn[0] if worst_turn else None,
            )
        )
    expected, arrived, missing = coverage
    return Consistency(
        clip=clip,
        trajectories=len(tokens.places),
        not_recomputed=sum(not place.recomputed for place in tokens.places),
        expected=expected,
        arrived=arrived,
        missing=missing,
        sampled_tokens=len(tokens),
        all=everything[0],
        steps=tuple(steps),
        by={name: _groups(names, found) for (name, (_, names)), found in zip(groupings.items(), rest, strict=True)},
        turn_level=turns.level(),
        worst_tokens=tuple(_worst_tokens(tokens, drift, worst, run)),
        worst_turns=tuple(turns.worst(worst)),
        findings=tuple(_findings(tokens, everything[0])),
    )


def _groups(names: Sequence[str], figures: Sequence[Figures]) -> tuple[Group, ...]:
    return tuple(
        Group(name, found)
        for name, found in zip(names, figures, strict=True)
        if name != _NONE and (found.tokens or found.not_recorded or found.infinite)
    )


# -- groupings ------------------------------------------------------------------------------------------------------------


def _groupings(tokens: Tokens) -> dict[str, tuple[Any, list[str]]]:
    """By name: the label of each token, and the labels' names."""
    position, position_names = _binned(tokens["position"], POSITIONS)
    in_turn, in_turn_names = _binned(tokens["in_turn"], IN_TURN)
    later = (tokens["origin"] == ORIGINS.index("after_observation")) | (tokens["origin"] == ORIGINS.index("after_turn"))
    staleness, values = _dense(tokens["staleness"])
    special = {str(MIXED_STALENESS): "mixed", str(NO_STALENESS): "not recorded"}
    return {
        "position": (position, position_names),
        "in_turn": (in_turn, in_turn_names),
        "in_turn_after_observation": (np.where(later, in_turn, len(IN_TURN)), [*in_turn_names, _NONE]),
        "origin": (tokens["origin"], list(ORIGINS)),
        "staleness": (staleness, [special.get(value, value) for value in values]),
    }


def _binned(values: Any, starts: Sequence[int]) -> tuple[Any, list[str]]:
    ends = [*starts[1:], None]
    names = [
        f"{start}+" if end is None else str(start) if end == start + 1 else f"{start}-{end - 1}"
        for start, end in zip(starts, ends, strict=True)
    ]
    labels: Any = np.zeros(len(values), np.uint8)
    for start in starts[1:]:
        labels += values >= start
    return labels, names


def _dense(values: Any) -> tuple[Any, list[str]]:
    """Labels 0, 1, … for the values that are there, in their order, and what they are."""
    there: list[int] = []
    if len(values):
        low, high = int(values.min()), int(values.max())
        if high - low < 1 << 16:
            there = [low + int(at) for at in np.flatnonzero(np.bincount(values - low))]
        else:
            there = [int(value) for value in np.unique(values)]
    if there and len(there) == there[-1] - there[0] + 1:
        return values - there[0], [str(value) for value in there]
    return np.searchsorted(np.array(there, values.dtype), values), [str(value) for value in there]


# -- turns ----------------------------------------------------------------------------------------------------------------


class _Turns:
    """Every turn by itself."""

    def __init__(self, tokens: Tokens, drift: Drift) -> None:
        self._tokens = tokens
        trajectory, turn = tokens["trajectory"], tokens["turn"]
        new: Any = np.ones(len(tokens), bool)
        new[1:] = (trajectory[1:] != trajectory[:-1]) | (turn[1:] != turn[:-1])
        self.first = np.flatnonzero(new)
        """A token of each turn."""
        each = np.cumsum(new, dtype=np.int64) - 1
        n, own, d = len(self.first), each[drift.finite], drift.diff
        bounded = np.clip(d, -SAFETY_BOUND, SAFETY_BOUND)
        self.tokens = np.bincount(own, minlength=n)
        self.infinite = np.bincount(each[drift.recorded & ~drift.finite], minlength=n)
        sums = {
            "mean_abs": np.bincount(own, np.abs(d), minlength=n),
            "k1": np.bincount(own, -d, minlength=n),
            "k3": np.bincount(own, np.expm1(bounded) - bounded, minlength=n),
        }
        self.figures = {name: total / np.maximum(self.tokens, 1) for name, total in sums.items()}
        self.figures["max_abs"] = np.zeros(n)
        np.maximum.at(self.figures["max_abs"], own, np.abs(d))
        squares = np.bincount(own, d * d, minlength=n)
        total = squares.sum()
        self.share = squares / total if total > 0 else np.zeros(n)

    def level(self) -> dict[str, Any] | None:
        """Over turns: how each figure is spread."""
        there = self.tokens > 0
        if not there.any():
            return None
        shares = [50, 95, 99]
        result: dict[str, Any] = {"turns": int(there.sum())}
        for name in ("max_abs", "mean_abs", "k1", "k3"):
            values = self.figures[name][there]
            found = np.percentile(values, shares).tolist()
            result[name] = {"mean": float(values.mean()), **dict(zip(("p50", "p95", "p99"), found, strict=True))}
            result[name]["max"] = float(values.max())
        ratios = np.exp(np.clip(-self.figures["k1"][there], -SAFETY_BOUND, SAFETY_BOUND))
        found = np.percentile(ratios, [0, *(100 * share for share in PERCENTILES.values()), 100]).tolist()
        result["ratio"] = dict(zip(("min", *PERCENTILES, "max"), found, strict=True))
        return result

    def worst(self, count: int, among: Any = None) -> list[dict[str, Any]]:
        """Turns with the largest share of the squared differences; `among`: bool, which turns."""
        there = (self.tokens > 0) | (self.infinite > 0)
        if among is not None:
            there &= among
        chosen = np.flatnonzero(there)
        order = np.lexsort((-self.share[chosen], -self.infinite[chosen]))[:count]
        return [self._told(int(turn)) for turn in chosen[order]]

    def _told(self, turn: int) -> dict[str, Any]:
        at = self.first[turn]
        place = self._tokens.places[int(self._tokens["trajectory"][at])]
        compared = bool(self.tokens[turn])
        return {
            **_named(place),
            "turn": int(self._tokens["turn"][at]),
            "tokens": int(self.tokens[turn]),
            "infinite": int(self.infinite[turn]),
            **{name: float(self.figures[name][turn]) if compared else None for name in ("max_abs", "mean_abs", "k1", "k3")},
            "share": float(self.share[turn]) if compared else None,
        }


def _named(place: Place) -> dict[str, Any]:
    return {
        "key": f"{place.partition}/{place.step}/{place.id}",
        "id": place.id,
        "partition": place.partition,
        "step": place.step,
        "trained_step": place.trained_step,
        "update": place.update,
    }


# -- single tokens --------------------------------------------------------------------------------------------------------


def _worst_tokens(tokens: Tokens, drift: Drift, count: int, run: Run | None) -> list[dict[str, Any]]:
    infinite = np.flatnonzero(drift.recorded & ~drift.finite)[:count]
    apart = np.abs(drift.diff)
    few = min(count - len(infinite), len(apart))
    chosen = np.argpartition(apart, len(apart) - few)[len(apart) - few :] if few > 0 else np.empty(0, np.intp)
    chosen = np.flatnonzero(drift.finite)[chosen[np.argsort(-apart[chosen], kind="stable")]]
    loaded: dict[str, Any] = {}
    return [_told(tokens, int(at), run, loaded) for at in (*infinite, *chosen)]


def _told(tokens: Tokens, at: int, run: Run | None, loaded: dict[str, Any]) -> dict[str, Any]:
    place = tokens.places[int(tokens["trajectory"][at])]
    position = int(tokens["position"][at])
    trainer, rollout = float(tokens["trainer"][at]), float(tokens["rollout"][at])
    finite = bool(np.isfinite(trainer) and np.isfinite(rollout))
    staleness = int(tokens["staleness"][at])
    if run is None:
        token_id, text = place.describe(position)
    else:
        named = _named(place)["key"]
        if named not in loaded:
            loaded[named] = run.load(place.id, place.step, place.partition)
        columns, where = loaded[named].columns, position + (place.prompt_len or 0)
        token_id, text = int(columns.ids[where]), columns.text(where, where + 1)
    return {
        **_named(place),
        "turn": int(tokens["turn"][at]),
        "token": None if place.prompt_len is None else place.prompt_len + position,
        "response_position": position,
        "in_turn": int(tokens["in_turn"][at]),
        "origin": ORIGINS[int(tokens["origin"][at])],
        "staleness": {MIXED_STALENESS: "mixed", NO_STALENESS: None}.get(staleness, staleness),
        "token_id": token_id,
        "text": text,
        "trainer": trainer if np.isfinite(trainer) else None,
        "rollout": rollout if np.isfinite(rollout) else None,
        "diff": trainer - rollout if finite else None,
        "infinite": not finite,
    }


# -- what should not be ---------------------------------------------------------------------------------------------------


def _findings(tokens: Tokens, everything: Figures) -> list[str]:
    found = []
    if tokens.misplaced:
        first = tokens.misplaced[0]
        place = tokens.places[first.trajectory]
        several = len(tokens.misplaced) > 1
        found.append(
            f"{len(tokens.misplaced)} trained token{'s were' if several else ' was'} not sampled"
            f"{', the first' if several else ''}: trajectory {place.id} of step {place.step}, response token "
            f"{first.response_position} ({first.origin.replace('_', ' ')})"
        )
    if everything.infinite:
        found.append(
            f"{everything.infinite} sampled token{'s' if everything.infinite > 1 else ''} to which one side gives the "
            "probability 0: see the worst tokens"
        )
    return found
