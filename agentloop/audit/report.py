"""What an audit found, for a terminal and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from agentloop.journal.show import visible

INVARIANTS = {
    "record": "Every event and token of the record is readable, and is what its checksum and its counts say.",
    "identity": "Each trajectory has one id, made of its group, its place in it and its attempt, and no other has the same.",
    "turns": "Turns are numbered without a gap, and each one's sampled tokens lie where the turn says.",
    "prefix": "A turn's prompt is all tokens before it, and these never change: neither ids nor text nor place.",
    "prompt": "The prompt is whole: it begins as the others do, with at most one BOS, and says what the sample's messages say.",
    "observation": "What follows a turn says what its own calls came to, in order, in the template's unchanging glue.",
    "mask": "The tokens that the model sampled are trained, all of them and no others.",
    "log_probs": "A sampled token has one log-probability, its own, finite and at most 0; no other token has one.",
    "weight_versions": "Versions add up to the sampled tokens, never fall, and a turn of several is labelled with all of them.",
    "end_of_turn": "The stop reason is what the tokens say, and a conversation that was cut off never counts as finished.",
    "lengths": "Nothing is longer than its budget, and nothing is cut between the record and the batch.",
    "reward": "The reward is finite and, added up over the row, the trajectory's own, on valid tokens of the response.",
    "masked": "What was given up (failed, aborted) has no reward, no trained token and no part in a group's baseline.",
    "group": "Siblings are numbered from 0, share one prompt and one way of sampling.",
    "advantages": "Advantages are one number a trajectory, on trained tokens alone, as GRPO's formula has them.",
    "train_side": "The trainer's numbers belong to the tokens that they stand beside, and agree with the rollout's.",
    "shape": "The tensors of a batch fit together: prompts beside responses are the input.",
    "padding": "Prompts are padded on the left and responses on the right, and the attention mask is 1 on tokens alone.",
    "positions": "Positions count from 0 at the prompt's first token.",
    "rows": "A row is one trajectory, whole, at the place that it should have.",
}
"""Every invariant and what it says. The names are stable."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One place where an invariant does not hold: the first token of one trajectory, or one thing that is no token."""

    invariant: str
    """A key of `INVARIANTS`."""
    message: str
    """One sentence on what is wrong."""
    trajectory: str | None = None
    """Its id; of a row of a batch that is audited alone, the row's uid if it has one."""
    turn: int | None = None
    """0-based; -1 is the prompt."""
    token: int | None = None
    """Position in the trajectory of the first token for which it does not hold."""
    token_id: int | None = None
    """What is there."""
    text: str | None = None
    """That token's text, if it is known."""
    expected: str | None = None
    """What should be there."""
    partition: str | None = None
    step: int | None = None
    row: int | None = None
    """Of a batch: the row."""
    column: str | None = None
    """Of a batch: the tensor or column."""
    place: int | None = None
    """Of a batch: the position in the padded tensor."""

    def as_json(self) -> dict[str, Any]:
        """All fields, those that are not known as `None`."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        """On one line, safe to print."""
        where = (
            [f"step {self.step} of {self.partition}" if self.partition else f"step {self.step}"]
            if self.step is not None
            else []
        )
        where += [f"row {self.row}"] if self.row is not None else []
        where += [f"trajectory {self.trajectory}"] if self.trajectory is not None else []
        where += ["prompt" if self.turn < 0 else f"turn {self.turn}"] if self.turn is not None else []
        if self.token is not None:
            shown = "" if self.token_id is None else f" ({self.token_id}{'' if self.text is None else f' {self.text!r}'})"
            where.append(f"token {self.token}{shown}")
        if self.column is not None:
            where.append(self.column if self.place is None else f"{self.column}[{self.place}]")
        wanted = "" if self.expected is None else f"; expected {self.expected}"
        return visible(f"{self.invariant}: {', '.join(where)}{': ' if where else ''}{self.message}{wanted}")


@dataclass
class Report:
    """The outcome of an audit. True in a condition if nothing was found."""

    what: str = ""
    """What was audited."""
    findings: list[Finding] = field(default_factory=list)
    """At most one for each trajectory (or row), invariant and column: the first token where it does not hold."""
    trajectories: int = 0
    rows: int = 0
    tokens: int = 0
    not_checked: list[str] = field(default_factory=list)
    """What the record does not allow to be checked, and why; one sentence each."""

    @property
    def ok(self) -> bool:
        return not self.findings

    def __bool__(self) -> bool:
        return self.ok

    def of(self, invariant: str) -> list[Finding]:
        """The findings of one invariant."""
        return [finding for finding in self.findings if finding.invariant == invariant]

    def add(self, findings: Iterable[Finding]) -> None:
        """Take findings in; a second one of the same place, invariant and column is left out."""
        seen = {_key(finding) for finding in self.findings}
        for finding in findings:
            if _key(finding) not in seen:
                seen.add(_key(finding))
                self.findings.append(finding)

    def skip(self, sentence: str) -> None:
        """Note what cannot be checked, once."""
        if sentence not in self.not_checked:
            self.not_checked.append(sentence)

    def raise_if_any(self) -> None:
        """`AssertionError` with the text of `render` if anything was found: for tests."""
        if self.findings:
            raise AssertionError(self.render())

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "ok": self.ok,
            "trajectories": self.trajectories,
            "rows": self.rows,
            "tokens": self.tokens,
            "counts": dict(Counter(finding.invariant for finding in self.findings)),
            "findings": [finding.as_json() for finding in self.findings],
            "not_checked": self.not_checked,
        }

    def render(self, limit: int | None = None) -> str:
        """For a terminal; `limit`: no more findings than that are shown. What a model or tool wrote cannot act on it."""
        counts = [f"{self.trajectories} trajectories"] if self.trajectories else []
        counts += [f"{self.rows} rows"] if self.rows else []
        head = f"{', '.join([*counts, f'{self.tokens} tokens'])}: "
        lines = [visible(self.what)] if self.what else []
        if self.ok:
            lines.append(f"{head}every invariant holds")
        else:
            by_name = Counter(finding.invariant for finding in self.findings)
            lines.append(f"{head}{len(self.findings)} findings ({', '.join(f'{n} {c}' for n, c in by_name.most_common())})")
            lines += [f"  {finding}" for finding in self.findings[:limit]]
            if limit is not None and len(self.findings) > limit:
                lines.append(f"  … and {len(self.findings) - limit} more")
        lines += [f"not checked: {visible(sentence)}" for sentence in self.not_checked]
        return "\n".join(lines)


def _key(finding: Finding) -> tuple[Any, ...]:
    where = (finding.partition, finding.step, finding.trajectory) if finding.row is None else (finding.row,)
    return (
        finding.invariant,
        finding.column,
        where,
        finding.message if finding.trajectory is None and finding.row is None else "",
    )
