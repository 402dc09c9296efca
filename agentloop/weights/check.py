"""The canary: after an update of weights, does the engine serve what the trainer has?

Two questions, asked apart, since each finds what the other cannot:

- **Scores.** Fixed sequences are scored by the engine and by the trainer and compared with a declared tolerance. It takes
  nothing but `Engine.score`, so it works on every engine, and it sees what serves: post-load processing, kernels and all. It
  cannot see what no sequence touches (an expert that none is routed to), nor what is smaller than rounding.
- **Checksums.** What was sent, tensor by tensor, against what the engine says that it serves. Exact, names the tensors, and
  sees the smallest change; but only engines that can tell (`Engine.weight_checksums`) take part, and a fault that both sides
  share (a wrong export) has equal checksums.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from agentloop.engines.base import Engine
from agentloop.errors import ConfigError, EngineError, nearest
from agentloop.weights.checksum import differing

Sequences = Sequence[Sequence[int]]
LogProbs = Sequence[Sequence[float]]
"""For each sequence those of its tokens but the first, as `Engine.score` gives them."""
Reference = Callable[[Sequences], LogProbs | Awaitable[LogProbs]]
"""The trainer's log-probabilities, at temperature 1. A plain function is called where `check` runs and blocks its event loop
(CUDA's current device is its thread's); a coroutine function is awaited."""

LAYER = re.compile(r"\blayers\.(\d+)\.")
EXPERT = re.compile(r"^(.*\.experts)\.\d+\.(gate|up|down)_proj\.weight$")
TIED = ("model.embed_tokens.weight", "lm_head.weight")
SHOWN = 4
"""Tensors that a message names; the report holds all."""


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
    def measured(
        reports: Iterable[CanaryReport], *, factor: float = 3.0, source: str = "measured on right updates"
    ) -> Tolerance:
        """`factor` times the largest that was seen on updates known to be right (a restart of the engine from a checkpoint is
        one). Raises `ConfigError` for none, and where noise was none at all or no number."""
        seen = list(reports)
        if not seen:
            raise ConfigError("a tolerance is measured on at least one report")
        mean, sequence, worst = (
            max(getattr(report, name) for report in seen) * factor for name in ("mean", "sequence", "worst")
        )
        if not (0 < mean < math.inf and 0 < sequence < math.inf and 0 < worst < math.inf):
            raise ConfigError(f"no tolerance can be made of the differences {mean}, {sequence} and {worst}")
        return Tolerance(mean, sequence, worst, f"{factor:g} times the largest of {len(seen)} reports: {source}")


TOLERANCES = {
    "float32": Tolerance(2e-5, 4e-5, 5e-4, "local engine in float32 against transformers in float32 (docs/canary.md)"),
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
        "2.6 % of tokens and layers routed otherwise (benchmarks/results/gpu_engine_moe_deepseek_v3.json); 3 times these",
    ),
}
"""By what the engine computes in. A model of one's own is better served by `Tolerance.measured`."""


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
    """All whose checksums differ from what was sent, that were sent and are not served, or served and not sent."""
    compared: int | None = None
    """Tensors whose checksums were compared; `None`: none could be."""

    @property
    def margin(self) -> float:
        """How many times its tolerance the largest of the three statistics is; above 1 the scores alone give alarm."""
        limits = self.tolerance
        return max(self.mean / limits.mean, self.sequence / limits.sequence, self.worst / limits.worst)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, but for infinities."""
        return {**asdict(self), "tensors": list(self.tensors), "margin": self.margin}


class Canary:
    """Fixed sequences, the trainer's side, and a tolerance. Keeps nothing from one check to the next."""

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
        served: Mapping[str, int] | None = None
        why = "no checksums of what was sent are at hand"
        if sent is not None:
            try:
                served = await engine.weight_checksums()
                more = [name for name in sent if name not in served]
                if more:
                    served = {**served, **await engine.weight_checksums(more)}
            except EngineError as error:
                why = str(error)
        faults = Faults() if sent is None or served is None else compare(sent, served, whole=self._whole)
        told = engine.weight_version
        limits = self.tolerance
        beyond = not (mean <= limits.mean and sequence <= limits.sequence and worst <= limits.worst)
        wrong_version = told is not None and told != version
        ok = not (beyond or faults or wrong_version)
        broken = any(not math.isfinite(value) for row in values for value in row)
        report = CanaryReport(
            ok=ok,
            version=version,
            message="",
            mean=mean,
            sequence=sequence,
            worst=worst,
            tolerance=limits,
            tokens=sum(len(row) for row in got),
            layer=faults.layer,
            tensors=faults.all,
            compared=None if served is None or sent is None else len(sent.keys() & served.keys()),
        )
        return replace(report, message=_sentence(report, faults, beyond, broken, told if wrong_version else None, why))


@dataclass(frozen=True, slots=True)
class Faults:
    """What comparing checksums found."""

    differ: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    """Sent, but the engine has nothing of that name."""
    unsent: tuple[str, ...] = ()
    """Served, but not sent."""

    @property
    def all(self) -> tuple[str, ...]:
        return self.differ + self.absent + self.unsent

    def __bool__(self) -> bool:
        return bool(self.differ or self.absent or self.unsent)

    @property
    def layer(self) -> int | None:
        return min((int(match[1]) for name in self.all if (match := LAYER.search(name))), default=None)


def compare(sent: Mapping[str, int], served: Mapping[str, int], *, whole: bool = True) -> Faults:
    """Of two sets of checksums, by name. Tensors that came under another name (experts that transformers fuses, tied ones)
    are not missed."""
    absent = tuple(name for name in sent if name not in served)
    unsent = tuple(name for name in served if name not in sent and not _covered(name, sent, served)) if whole else ()
    return Faults(tuple(differing(sent, served)), absent, unsent)


def _covered(name: str, sent: Mapping[str, int], served: Mapping[str, int]) -> bool:
    if match := EXPERT.match(name):
        return f"{match[1]}.{'down_proj' if match[2] == 'down' else 'gate_up_proj'}" in sent
    return name in TIED and any(other in sent and served.get(other) == served[name] for other in TIED)


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
    told = "" if other_version is None else f", and the engine says that it serves version {other_version}"
    if report.ok:
        checked = (
            f"the {report.compared} checksums agree" if report.compared is not None else f"checksums not compared: {why_not}"
        )
        return f"version {report.version} serves: {scores}; {checked}"
    what = f"version {report.version} is not what serves"
    if faults:
        if not beyond and not (faults.absent or faults.unsent) and len(faults.differ) == report.compared:
            return (
                f"{what}: all {report.compared} checksums differ though {scores}: were they taken in another dtype than the "
                f"engine keeps?{told}"
            )
        unseen = "" if beyond else " (too little or too rare for the scores to show)"
        return f"{what}: {_where(faults)}; {scores}{unseen}{told}"
    if not beyond:
        return f"{what}: the engine says that it serves version {other_version}; {scores}"
    if report.compared is not None:
        cause = (
            f"all {report.compared} tensors are as sent, so what differs is no weight on its way: a wrong export, the engine's "
            "own processing, or how it computes"
        )
    else:
        cause = f"which tensors is not known: {why_not}"
    return f"{what}: {scores}; {cause}{told}"


def _where(faults: Faults) -> str:
    """Layer and tensors, a few by name."""
    layers = sorted({int(match[1]) for name in faults.all if (match := LAYER.search(name))})
    if not layers:
        place = "outside of the layers"
    elif len(layers) == 1:
        place = f"in layer {layers[0]}"
    elif layers == list(range(layers[0], layers[-1] + 1)):
        place = f"in layers {layers[0]} to {layers[-1]}"
    else:
        place = f"in layers {', '.join(map(str, layers[:SHOWN]))}{', …' if len(layers) > SHOWN else ''}"
    parts = []
    for names, one, many in (
        (faults.differ, "tensor differs from what was sent", "tensors differ from what was sent"),
        (faults.absent, "was sent and is not known to the engine", "were sent and are not known to the engine"),
        (faults.unsent, "serves and was not sent", "serve and were not sent"),
    ):
        if names:
            shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
            parts.append(f"{len(names)} {one if len(names) == 1 else many} ({shown})")
    return f"{place} {' and '.join(parts)}"
