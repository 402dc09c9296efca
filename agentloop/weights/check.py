"""The canary: after an update of weights, does the engine serve what the trainer has?

Two questions, asked apart, since each finds what the other cannot:

- **Scores.** Fixed sequences are scored by the engine and by the trainer and compared with a declared tolerance. It takes
  nothing but `Engine.score`, so it works on every engine, and it sees what serves: post-load processing, kernels and all. It
  cannot see what no sequence touches (an expert that none is routed to), nor what is smaller than rounding.
- **Checksums.** What was sent, tensor by tensor, against what the engine says that it serves. Exact, names the tensors, and
  sees the smallest change; but only engines that can tell (`Engine.weight_checksums`) take part, and a fault that both sides
  share (a wrong export) has equal checksums. Of an engine that can only tell what changed (`Engine.weight_fingerprints`), the
  tensors that should have changed and did not, and the other way round.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

from agentloop.engines.base import Engine
from agentloop.errors import ConfigError, EngineError, nearest
from agentloop.weights.check_step import MissingStep, Scores, missing_step
from agentloop.weights.check_tensors import Faults, changes, compare

Sequences = Sequence[Sequence[int]]
LogProbs = Sequence[Sequence[float]]
"""For each sequence those of its tokens but the first, as `Engine.score` gives them."""
Reference = Callable[[Sequences], LogProbs | Awaitable[LogProbs]]
"""The trainer's log-probabilities, at temperature 1. A plain function is called where `check` runs and blocks its event loop
(CUDA's current device is its thread's); a coroutine function is awaited."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far engine and trainer may be apart where nothing is wrong, in nats.

    Three statistics of the differences (engine less trainer), since noise and faults are shaped differently. Rounding and
    routing that flips at a tie make many small differences of either sign and a few large ones: the measured maximum is some
    40 times the mean, so a tolerance for single tokens alone must be wide. A fault moves the mean of all tokens, or, if only
    some texts meet it, all of one sequence to one side, which noise does not: it cancels.
    """

    mean: float
    """Of the absolute differences of all tokens."""
    sequence: float
    """The largest absolute value of one sequence's mean difference, signs kept."""
    worst: float
    """The largest absolute difference of one token."""
    source: str
    """The measurement that it comes from."""

    def __post_init__(self) -> None:
        if not min(self.mean, self.sequence, self.worst) > 0:
            raise ConfigError("a canary's tolerances must be positive")

    @staticmethod
    def measured(reports: Iterable[CanaryReport], *, source: str = "measured on right updates") -> Tolerance:
        """The largest that was seen on updates known to be right (the engine as it was started from a checkpoint is one), times
        2 for the mean, 2.5 for a sequence and 3 for a token. Take 20 reports and some 500 tokens: over 200 right updates each
        of the three grew beyond its first 20 by up to 1.3, 1.8 and 1.5 (benchmarks/results/canary.json).

        Raises `ConfigError` for no reports, and where noise was none at all or no number."""
        seen = list(reports)
        if not seen:
            raise ConfigError("a tolerance is measured on at least one report")
        mean, sequence, worst = (
            max(getattr(report, name) for report in seen) * factor
            for name, factor in (("mean", 2.0), ("sequence", 2.5), ("worst", 3.0))
        )
        if not (0 < mean < math.inf and 0 < sequence < math.inf and 0 < worst < math.inf):
            raise ConfigError(f"no tolerance can be made of the differences {mean}, {sequence} and {worst}")
        return Tolerance(mean, sequence, worst, f"{source}, {len(seen)} reports")


TOLERANCES = {
    "float32": Tolerance(
        2e-6,
        4e-6,
        5e-5,
        "local engine in float32 against transformers in float32, tiny models of three families: mean 7.5e-8, one sequence "
        "9.1e-8, worst 1e-6 (benchmarks/results/canary.json); 25 to 50 times these, which leaves larger models room",
    ),
    "bfloat16": Tolerance(
        0.02,
        0.045,
        0.6,
        "SGLang 0.5.12 scoring a dense model in bfloat16 against transformers: mean 0.0050, worst 0.20 of 4096 tokens; single "
        "sequences of 64 tokens up to 0.0146 (benchmarks/results/gpu_engine_conformance.json); 3 to 4 times these",
    ),
    "bfloat16_moe": Tolerance(
        0.08,
        0.16,
        3.0,
        "SGLang 0.5.12 on DeepSeek-V3's shape in bfloat16, scoring against decoding: mean 0.027, worst 0.97 of 4096 tokens, "
        "2.6 % of tokens and layers routed otherwise (benchmarks/results/gpu_engine_moe_deepseek_v3.json); 3 times these; one "
        "sequence was not measured: twice the mean's",
    ),
}
"""By what the engine computes in. A model of one's own is better served by `Tolerance.measured`, a mixture of experts above
all: against transformers instead of against itself the same shape differs by 0.05 in the mean with 64 small experts, 0.16 with
larger ones, 0.24 with 128 (random weights; benchmarks/results/gpu_deepseek.json): two implementations route more apart."""


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """What one check of one engine found."""

    ok: bool
    version: int
    message: str
    """One sentence."""
    mean: float
    sequence: float
    worst: float
    """As in `Tolerance`; infinite where a score is no number."""
    tolerance: Tolerance
    tokens: int
    """That were compared."""
    layer: int | None = None
    """The lowest one with a tensor that differs; `None`: none is known, or only tensors outside of layers."""
    tensors: tuple[str, ...] = ()
    """All that differ from what was sent, or were not sent, or did not change where they should have; see `Faults`."""
    step: MissingStep | None = None
    """How much of the step since the last check of this engine that found nothing is missing; `None`: there was none."""
    compared: int | None = None
    """Tensors of which what was sent was compared with what the engine told; `None`: it could not be."""
    compared_by: Literal["checksums", "fingerprints"] | None = None
    """Fingerprints tell less: that something changed, not to what."""

    @property
    def margin(self) -> float:
        """How many times its tolerance the largest of the statistics is, the step's included; above 1 the scores alone give
        alarm."""
        limits = self.tolerance
        step = 0.0 if self.step is None else abs(self.step.share) / self.step.limit
        return max(self.mean / limits.mean, self.sequence / limits.sequence, self.worst / limits.worst, step)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, but for infinities."""
        return {**asdict(self), "tensors": list(self.tensors), "margin": self.margin}


@dataclass(frozen=True, slots=True)
class _Seen:
    """Of the last check of an engine that found nothing."""

    scores: Scores
    sent: Mapping[str, int] | None
    kept: Mapping[str, str] | None


@dataclass(frozen=True, slots=True)
class _Tensors:
    faults: Faults = field(default_factory=Faults)
    compared: int | None = None
    by: Literal["checksums", "fingerprints"] | None = None
    kept: Mapping[str, str] | None = None
    why_not: str = ""
    """Why there was no comparison, or none of checksums."""


class Canary:
    """Fixed sequences, the trainer's side, and a tolerance. Of each engine it keeps the scores of the last check that found
    nothing, to tell an update that was lost from one that was made (`check_step`)."""

    def __init__(self, sequences: Sequences, reference: Reference, *, tolerance: Tolerance | str, whole: bool = True) -> None:
        """`tolerance`: one of `TOLERANCES` by name, or one of your own. `whole`: an update sends every tensor, so one that
        serves and was not sent is a fault.

        Raises `ConfigError` for sequences of fewer than two tokens, or none, and for an unknown name of a tolerance."""
        if not sequences or any(len(ids) < 2 for ids in sequences):
            raise ConfigError("a canary needs at least one sequence, and two tokens in each")
        if isinstance(tolerance, str):
            if tolerance not in TOLERANCES:
                raise ConfigError(f"unknown tolerance '{tolerance}': {nearest(tolerance, TOLERANCES)}")
            tolerance = TOLERANCES[tolerance]
        self.sequences = tuple(tuple(ids) for ids in sequences)
        self.tolerance = tolerance
        self._reference = reference
        self._whole = whole
        self._last: WeakKeyDictionary[Engine, _Seen] = WeakKeyDictionary()

    async def expected(self) -> LogProbs:
        """The trainer's side. Ask once where several engines are checked after one update, and hand it to each `check`."""
        answer = self._reference(self.sequences)
        values: LogProbs = await answer if inspect.isawaitable(answer) else answer
        _check_lengths(self.sequences, values, "the trainer")
        return values

    async def check(
        self, engine: Engine, version: int, sent: Mapping[str, int] | None = None, *, expected: LogProbs | None = None
    ) -> CanaryReport:
        """Score on both sides and compare; then, if `sent` is given, the checksums.

        `sent`: of every tensor of the update, in the dtype in which the engine keeps it (`checksum(…, dtype=…)` casts).
        Raises `EngineError` where the engine cannot score (it sleeps, it died)."""
        values = await self.expected() if expected is None else expected
        _check_lengths(self.sequences, values, "the trainer")
        got = [await engine.score(ids) for ids in self.sequences]
        _check_lengths(self.sequences, got, type(engine).__name__)
        mean, sequence, worst = statistics(values, got)
        last = self._last.get(engine)
        tensors = await self._tensors(engine, sent, last)
        faults = tensors.faults
        told = engine.weight_version
        limits = self.tolerance
        now = Scores(values, got)
        step = None if last is None else missing_step(last.scores, now)
        beyond = not (mean <= limits.mean and sequence <= limits.sequence and worst <= limits.worst)
        beyond = beyond or (step is not None and step.beyond)
        wrong_version = told is not None and told != version
        ok = not (beyond or faults or wrong_version)
        broken = any(math.isnan(value) for row in values for value in row)
        if ok:
            self._last[engine] = _Seen(now, None if sent is None else dict(sent), tensors.kept)
        report = CanaryReport(
            ok=ok,
            version=version,
            message="",
            mean=mean,
            sequence=sequence,
            worst=worst,
            tolerance=limits,
            tokens=sum(map(len, got)),
            step=step,
            layer=faults.layer,
            tensors=faults.all,
            compared=tensors.compared,
            compared_by=tensors.by,
        )
        other = told if wrong_version else None
        return replace(report, message=_sentence(report, faults, beyond, broken, other, tensors.why_not))

    async def _tensors(self, engine: Engine, sent: Mapping[str, int] | None, last: _Seen | None) -> _Tensors:
        """By checksums; where the engine cannot tell these, by its fingerprints; else not."""
        if sent is None:
            return _Tensors(why_not="no checksums of what was sent are at hand")
        try:
            served = await engine.weight_checksums()
            if more := [name for name in sent if name not in served]:
                served = {**served, **await engine.weight_checksums(more)}
        except EngineError as error:
            why = str(error)
        else:
            return _Tensors(compare(sent, served, whole=self._whole), len(sent.keys() & served.keys()), "checksums")
        try:
            kept = await engine.weight_fingerprints()
        except EngineError:
            return _Tensors(why_not=why)
        if last is None or last.sent is None or last.kept is None:
            return _Tensors(kept=kept, why_not=f"{why}, and of what changed there is nothing to compare with yet")
        faults, compared = changes(last.sent, sent, last.kept, kept)
        return _Tensors(faults, compared, "fingerprints", kept, why)


def statistics(expected: LogProbs, got: LogProbs) -> tuple[float, float, float]:
    """`Tolerance`'s three of the differences, `got` less `expected`; infinite if one is no number. Two infinities of one sign
    are equal: a token that neither side can produce."""
    absolute, count, sequence, worst = 0.0, 0, 0.0, 0.0
    for ours, theirs in zip(expected, got, strict=True):
        row = [0.0 if a == b else b - a for a, b in zip(ours, theirs, strict=True)]
        if not all(map(math.isfinite, row)):
            return math.inf, math.inf, math.inf
        absolute += sum(map(abs, row))
        count += len(row)
        sequence = max(sequence, abs(sum(row)) / len(row))
        worst = max(worst, *map(abs, row))
    return absolute / count, sequence, worst


def _check_lengths(sequences: Sequences, values: LogProbs, who: str) -> None:
    if [len(row) for row in values] != [len(ids) - 1 for ids in sequences]:
        raise EngineError(f"{who} did not give the canary one log-probability for each token but the first")


def _sentence(report: CanaryReport, faults: Faults, beyond: bool, broken: bool, other_version: int | None, why_not: str) -> str:
    """`broken`: the trainer's side is no number. `why_not`: checksums could not be compared."""
    limits = report.tolerance
    scores = (
        f"scores differ by {report.mean:.2g} in the mean (tolerance {limits.mean:.2g}), {report.sequence:.2g} over one "
        f"sequence ({limits.sequence:.2g}) and {report.worst:.2g} at one token ({limits.worst:.2g})"
    )
    if broken:
        scores = "the trainer's own scores are not numbers"
    elif math.isinf(report.worst):
        scores = "the engine's scores are not numbers"
    if report.step is not None and report.step.beyond and not math.isinf(report.worst):
        scores += f", and {report.step.share:.0%} of the last step is missing from them (tolerance {report.step.limit:.0%})"
    told = "" if other_version is None else f", and the engine says that it serves version {other_version}"
    if report.ok:
        return f"version {report.version} serves: {scores}; {_agreed(report, why_not)}"
    what = f"version {report.version} is not what serves"
    if faults:
        if not beyond and faults.differ and len(faults.all) == len(faults.differ) == report.compared:
            return (
                f"{what}: all {report.compared} checksums differ though {scores}: were they taken in another dtype than the "
                f"engine keeps?{told}"
            )
        unseen = "" if beyond else " (too little or too rare for the scores to show)"
        return f"{what}: {faults}; {scores}{unseen}{told}"
    if not beyond:
        return f"{what}: the engine says that it serves version {other_version}; {scores}"
    if broken:
        return f"{what}: {scores}{told}"
    if report.compared_by == "checksums":
        cause = "so what differs is no weight on its way: a wrong export, the engine's own processing, or how it computes"
    else:
        cause = "so which tensors differ is not known"
    return f"{what}: {scores}; {_agreed(report, why_not)}, {cause}{told}"


def _agreed(report: CanaryReport, why_not: str) -> str:
    if report.compared_by == "checksums":
        return f"all {report.compared} tensors are as sent"
    if report.compared_by == "fingerprints":
        return f"{report.compared} tensors changed where they were sent anew, which is all that can be told ({why_not})"
    return f"tensors were not compared ({why_not})"
