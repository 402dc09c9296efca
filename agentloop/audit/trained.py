"""The trainer's side of trajectories: joined to the right tokens, and in agreement with the rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentloop.audit.report import Finding
from agentloop.audit.subject import Subject

APART = 0.1
"""Mean absolute difference, in nats, above which the two sides are not of the same model. A rollout in another precision or by
another kernel is an order of magnitude closer."""
SYSTEMATIC = 0.5
"""Correlation of the difference with the log-probability itself, above which it is no noise."""
_ENOUGH = 64
_FEW = 4


@dataclass(frozen=True)
class Compared:
    """Two sides' log-probabilities of the n sampled tokens of one trajectory."""

    finding: Callable[..., Finding]
    """As `Subject.finding`: invariant, message, place, and `expected`."""
    places: NDArray[np.int64]
    """Which tokens these are, (n,)."""
    spans: Sequence[tuple[int, int, int]]
    """Turn, first place and one past the last, of each turn."""
    ours: NDArray[np.float32]
    theirs: NDArray[np.float32]
    who: str
    """Whose the other ones are."""


def compared(subject: Subject, theirs: Any, who: str) -> Compared | None:
    """`theirs`: (T,), over all tokens."""
    places = np.flatnonzero(subject.sampled & ~np.isnan(subject.log_probs))
    if not len(places):
        return None
    spans = [(turn.index, start, end) for turn, start, end in subject.spans()]
    return Compared(subject.finding, places, spans, subject.log_probs[places], np.asarray(theirs, np.float32)[places], who)


def check_agreement(sides: Sequence[Compared]) -> Iterator[Finding]:
    """First whether one side is the other's, shifted by a token; then how far apart they are, each by itself and together."""
    rest: list[Compared] = []
    for side in sides:
        finding = _finite(side) or _shifted(side) or _apart(side)
        if finding is not None:
            yield finding
        else:
            rest.append(side)
    if not rest:
        return
    ours, theirs = (np.concatenate([getattr(side, name) for side in rest]).astype(np.float64) for name in ("ours", "theirs"))
    difference = theirs - ours
    mean = float(np.abs(difference).mean())
    if len(ours) < _ENOUGH or mean < 0.01 or ours.std() < 1e-6 or difference.std() < 1e-6:
        return
    slope = float(np.corrcoef(difference, ours)[0, 1])
    if abs(slope) > SYSTEMATIC:
        side = max(rest, key=lambda side: float(np.abs(side.theirs - side.ours).max()))
        at = int(np.abs(side.theirs - side.ours).argmax())
        message = (
            f"{side.who} log-probabilities differ from the rollout's by {mean:.3f} on average, the more the less likely a "
            f"token is (correlation {slope:.2f}): as those before temperature differ from those after it"
        )
        yield side.finding("log_probs", message, int(side.places[at]), expected=_about(side, at))


def _about(side: Compared, at: int) -> str:
    return f"about {float(side.theirs[at]):.4f}"


def _finite(side: Compared) -> Finding | None:
    wrong = np.flatnonzero(~np.isfinite(side.theirs))
    if not len(wrong):
        return None
    message = f"{side.who} log-probability is {float(side.theirs[wrong[0]])}"
    return side.finding("train_side", message, int(side.places[wrong[0]]), expected="a finite number")


def _shifted(side: Compared) -> Finding | None:
    apart = float(np.abs(side.theirs - side.ours).mean())
    if len(side.ours) < _FEW or apart < 0.02 or len(np.unique(side.ours)) < 3:
        return None
    for by, name in ((1, "next"), (-1, "previous")):
        a, b = (side.ours[:-by], side.theirs[by:]) if by > 0 else (side.ours[-by:], side.theirs[:by])
        if float(np.abs(a - b).mean()) < 0.1 * apart:
            at = int(np.flatnonzero(np.abs(side.theirs - side.ours) > 0.5 * apart)[0])
            message = f"its log-probability is that of the {name} sampled token in {side.who} numbers: they are shifted by one"
            return side.finding("log_probs", message, int(side.places[at]), expected=_about(side, at))
    return None


def _apart(side: Compared) -> Finding | None:
    """Each turn by itself: a retry's stale numbers are of one turn."""
    for turn, start, end in side.spans:
        here = np.flatnonzero((side.places >= start) & (side.places < end))
        if len(here) < _FEW:
            continue
        difference = np.abs(side.theirs - side.ours)[here]
        # The median, so that a few tokens that moved far do not count as another model.
        if float(difference.mean()) > APART and float(np.median(difference)) > APART / 2:
            at = int(here[np.flatnonzero(difference > APART / 2)[0]])
            message = (
                f"{side.who} log-probabilities of turn {turn} differ from the rollout's by {float(difference.mean()):.3f} on "
                "average: they are of other weights, another temperature or other tokens"
            )
            return side.finding("log_probs", message, int(side.places[at]), expected=_about(side, at))
    return None
