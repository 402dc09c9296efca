"""What is too far apart: thresholds, and the sentence for a step that is beyond one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from agentloop.config import Strict
from agentloop.consistency.report import CLIP, Consistency, Step
from agentloop.errors import AgentloopError

SECTION = "agentloop.consistency"


class ConsistencyError(AgentloopError):
    """Trainer and rollout are further apart than the run allows; the message is one sentence for each threshold."""


class Thresholds(Strict):
    """How far trainer and rollout may be apart in one update of the trainer. Each is off by default.

    If any is set, an update with sampled tokens of which none can be compared is beyond it too, as is one in which a side calls
    a sampled token impossible, or a token is trained that was not sampled.
    """

    max_abs: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Of the largest |trainer − rollout| of a token, in nats."""
    max_mean_abs: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Of the mean |trainer − rollout|, in nats."""
    max_k3: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Of the k3 estimate of KL(rollout ‖ trainer), in nats a token."""
    max_ratio_outside: float | None = Field(None, ge=0, le=1)
    """Of the share of tokens whose ratio is outside of `clip`."""
    clip: tuple[float, float] = CLIP
    """The lower and the upper end of the range of ratios."""
    action: Literal["warn", "stop"] = "warn"
    """`warn`: log the sentence and go on. `stop`: end the run with it, before the step's weights change."""

    @field_validator("clip")
    @classmethod
    def _around_one(cls, clip: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= clip[0] <= 1 <= clip[1]:
            raise ValueError("Input should be two numbers, at most 1 and at least 1")
        return clip

    @property
    def limits(self) -> dict[str, float]:
        """Those that are set, by the figure that they bound."""
        given = {name.removeprefix("max_") if name != "max_abs" else name: getattr(self, name) for name in _NAMES}
        return {figure: value for figure, value in given.items() if value is not None}


_NAMES = ("max_abs", "max_mean_abs", "max_k3", "max_ratio_outside")


@dataclass(frozen=True, slots=True)
class Beyond:
    """One update that is beyond one threshold."""

    step: int
    update: int
    figure: str
    """A name of `Figures`, `tokens` (none could be compared), `infinite` or `misplaced`."""
    value: float
    threshold: float | None
    """`None` for the last three."""
    worst_turn: dict[str, Any] | None
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(report: Consistency, thresholds: Thresholds) -> list[Beyond]:
    """Every update of `report` against `thresholds`, which must have the report's clip range. Nothing if none is set."""
    limits = thresholds.limits
    return [beyond for step in report.steps for beyond in _beyond(step, limits)] if limits else []


def _beyond(step: Step, limits: dict[str, float]) -> Iterator[Beyond]:
    figures = step.figures

    def found(figure: str, value: float, threshold: float | None, what: str) -> Beyond:
        turn = "" if step.worst_turn is None else f"; worst turn: {_turn(step.worst_turn)}"
        return Beyond(step.step, step.update, figure, value, threshold, step.worst_turn, f"step {step.name}: {what}{turn}")

    if step.misplaced:
        yield found("misplaced", step.misplaced, None, f"{step.misplaced} trained tokens were not sampled")
    if figures.infinite:
        yield found(
            "infinite", figures.infinite, None, f"one side gives the probability 0 to {figures.infinite} sampled tokens"
        )
    if not figures.tokens and figures.not_recorded:
        yield found(
            "tokens",
            0,
            None,
            f"none of {figures.not_recorded} sampled tokens can be compared, since a side's log-probabilities are not recorded "
            "(see actor_rollout_ref.rollout.calculate_log_probs)",
        )
    for figure, limit in limits.items():
        value = getattr(figures, figure)
        if value is not None and value > limit:
            key = figure if figure == "max_abs" else f"max_{figure}"
            yield found(
                figure,
                value,
                limit,
                f"trainer and rollout are too far apart: {figure} is {value:.3g} over {figures.tokens} tokens, beyond "
                f"{SECTION}.{key}={limit:g}",
            )


def _turn(turn: dict[str, Any]) -> str:
    where = f"turn {turn['turn']} of trajectory {turn['id']}"
    if turn["step"] != turn["trained_step"]:
        where += f" of the rollout's step {turn['step']}"
    if not turn["tokens"]:
        return f"{where} ({turn['infinite']} impossible tokens)"
    return f"{where} (max_abs {turn['max_abs']:.3g}, mean_abs {turn['mean_abs']:.3g} over {turn['tokens']} tokens)"
