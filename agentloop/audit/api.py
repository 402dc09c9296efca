"""`audit_run`, `audit_trajectories` and `audit_batch`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentloop.audit.against import check_rows, pair
from agentloop.audit.batches import to_batch
from agentloop.audit.groups import check_step
from agentloop.audit.ledger import BELOW_ALL, FAR_ABOVE_ZERO, check_trajectory
from agentloop.audit.load import read_step
from agentloop.audit.padded import Batch, check_advantages, check_batch
from agentloop.audit.report import Finding, Report
from agentloop.audit.subject import PieceBytes, Subject, from_trajectory
from agentloop.audit.texts import CUT, Glue, check_calls, check_glue, check_texts
from agentloop.audit.trained import Compared, check_agreement, compared
from agentloop.chat.base import Renderer
from agentloop.config import LoopConfig
from agentloop.journal.format import JournalError
from agentloop.journal.reader import Run
from agentloop.journal.recorded import RecordedTrajectory
from agentloop.trajectory import Trajectory, Turn

Score = Callable[[Sequence[int], float], Sequence[float]]
"""Log-probabilities of `ids[1:]`, each given all before it, at a temperature: what `Engine.score` answers."""


def audit_run(
    path: str | Path | Run,
    *,
    step: int | None = None,
    partition: str | None = None,
    renderer: Renderer | None = None,
    score: Score | None = None,
) -> Report:
    """Audit the record of a run: each trajectory, each group, each step, and the trainer's side where it was recorded.

    `renderer`: render prompts and tools' answers anew and compare them token by token. `score`: compare log-probabilities with
    a model's; its weights must be those that sampled. Raises `ConfigError` if there is no run at `path`.
    """
    run = path if isinstance(path, Run) else Run(path)
    meta = run.meta
    report = Report(str(run.path))
    for place in run.steps():
        if partition in (None, place.partition) and step in (None, place.step):
            read = read_step(run.path, place, _get(meta, "loop") or {})
            report.add(read.found)
            _audit(report, read.subjects, renderer=renderer, score=score, tools=meta.get("tools"), whole=True)
            if place.partition == "train":
                report.add(_temperature(read.subjects, meta))
                _train_side(report, run, place.step, read.subjects, _estimator(meta))
    if not report.trajectories:
        report.skip("anything: no trajectory is recorded")
    report.findings.sort(key=_order)
    return report


def audit_trajectories(
    trajectories: Sequence[Trajectory | RecordedTrajectory],
    *,
    decode: PieceBytes | None = None,
    renderer: Renderer | None = None,
    score: Score | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    prompts: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> Report:
    """Audit ledgers in memory, of any number of groups and steps.

    `decode` gives the bytes of a token id (`agentloop.journal.token_bytes(tokenizer)`): without it what the tokens say is not
    looked at. `tools`: the schemas in the prompt, for `renderer`. `prompts`: by trajectory id, what an engine was really
    given for each turn (`ScriptedEngine(record="ids")` keeps it).
    """
    report = Report()
    subjects = [_subject(trajectory, decode) for trajectory in trajectories]
    by_step: dict[tuple[int, bool], list[Subject]] = defaultdict(list)
    for subject, trajectory in zip(subjects, trajectories, strict=True):
        by_step[subject.step, bool(getattr(trajectory, "validate", False))].append(subject)
    for members in by_step.values():
        _audit(report, members, renderer=renderer, score=score, tools=tools)
    for subject in subjects:
        report.add(_given(subject, (prompts or {}).get(subject.id)))
    report.findings.sort(key=_order)
    return report


def audit_batch(
    batch: Any,
    trajectories: Sequence[Trajectory | RecordedTrajectory] | Run | str | Path | None = None,
    *,
    step: int | None = None,
    pad_token_id: int | None = None,
    estimator: str | None = None,
    decode: PieceBytes | None = None,
) -> Report:
    """Audit a batch, alone or against the trajectories that it was made of.

    `batch`: see `agentloop.audit.batches.to_batch`. `trajectories`: in the order of the rows, a row each; or a run (or its
    folder), of which those of training `step` are taken, in any order; with a column `agentloop_row` rows are told by it in
    either case. The trajectories are audited too. `estimator`: `grpo`, `grpo without std` or `rloo`, if the advantages must be
    that; by default they are held against whichever fits most rows, and not at all if none does. Raises `ConfigError` for
    what is no batch.
    """
    own = to_batch(batch, pad_token_id=pad_token_id)
    report = Report()
    subjects: list[Subject] = []
    in_order = False
    if isinstance(trajectories, Run | str | Path):
        run = trajectories if isinstance(trajectories, Run) else Run(trajectories)
        report.what = str(run.path)
        for place in run.steps():
            if place.partition == "train" and step in (None, place.step):
                read = read_step(run.path, place, {})
                report.add(read.found)
                subjects += read.subjects
                _audit(report, read.subjects, whole=True)
    elif trajectories is not None:
        in_order = True
        subjects = [_subject(trajectory, decode) for trajectory in trajectories]
        if not any(subject.found for subject in subjects):
            report.add(audit_trajectories(trajectories, decode=decode).findings)
        else:
            report.add(finding for subject in subjects for finding in check_trajectory(subject))
        report.trajectories = len(subjects)
    report.rows, report.tokens = len(own), int(own.attention.sum())
    alone = list(check_batch(own, estimator))
    if not subjects or any(finding.invariant == "shape" and finding.row is None for finding in alone):
        report.add(alone)
    else:
        paired, found = pair(own, subjects, in_order=in_order)
        found += check_rows(own, paired)
        # What both see is told once, by the one that knows what should be there.
        seen = {(finding.row, finding.column) for finding in found}
        compared_columns = {
            "prompts",
            "attention_mask",
            "response_mask",
            "rollout_log_probs",
            "rm_scores",
            "token_level_scores",
        }
        told = {row for row, subject in enumerate(paired) if subject is not None}
        known = [f for f in alone if f.row not in told or f.column not in compared_columns]
        # What only the trainer's side or the other rows tell is kept.
        kept = known + [f for f in alone if f.invariant == "group" or (f.invariant == "log_probs" and "trainer" in f.message)]
        report.add(found)
        report.add(f for f in kept if (f.row, f.column) not in seen)
    if "advantages" not in own.tensors:
        report.skip("advantages: the batch has none")
    if not subjects:
        report.skip("whether the rows are what was sampled: no trajectories were given")
    report.findings.sort(key=_order)
    return report


def _subject(trajectory: Trajectory | RecordedTrajectory, decode: PieceBytes | None) -> Subject:
    return from_trajectory(trajectory.to_trajectory() if isinstance(trajectory, RecordedTrajectory) else trajectory, decode)


def _order(finding: Finding) -> tuple[Any, ...]:
    nothing = -1
    return (
        finding.partition or "",
        finding.step or 0,
        nothing if finding.row is None else finding.row,
        finding.trajectory or "",
    )


def _audit(
    report: Report,
    subjects: Sequence[Subject],
    *,
    renderer: Renderer | None = None,
    score: Score | None = None,
    tools: Any = None,
    whole: bool = False,
) -> None:
    report.trajectories += len(subjects)
    report.tokens += sum(len(subject) for subject in subjects)
    glue: list[Glue] = []
    sides: list[Compared] = []
    doubted: list[list[Finding]] = []
    called: list[Finding | None] = []
    for subject in subjects:
        own = list(check_trajectory(subject))
        report.add(own)
        if not any(finding.invariant in ("turns", "prefix", "record") for finding in own):
            said = list(check_texts(subject, glue))
            if any(turn.calls for turn in subject.turns):
                called.append(check_calls(subject))
            if subject.sampling is None:
                doubted.append(said)
            else:
                report.add(said)
            if renderer is not None:
                report.add(_rendered(subject, renderer, tools))
            if score is not None and subject.sampled.any():
                side = compared(subject, _scored(subject, score), "the model's")
                sides += [side] if side is not None else []
    # A ledger that the loop has not made may have tokens that were never meant to say what its messages say.
    if 2 * sum(map(bool, doubted)) > len(doubted):
        report.skip("what the tokens say, of trajectories that our loop did not make: most of them do not say it")
    else:
        report.add(finding for said in doubted for finding in said)
    unasked = [finding for finding in called if finding is not None]
    if 2 * len(unasked) <= len(called):  # else calls are written in a way of their own here
        report.add(unasked)
    if renderer is not None and tools is None:
        report.skip("prompts against the renderer: the schemas of the tools in them are not known")
    report.add(check_glue(glue))
    report.add(check_step(subjects, whole=whole))
    report.add(check_agreement(sides))
    _unchecked(report, subjects)


def _unchecked(report: Report, subjects: Sequence[Subject]) -> None:
    whole = [subject for subject in subjects if len(subject)]
    if any(subject.pieces is None for subject in whole):
        report.skip("what the tokens say (prompt, tools' answers, glue): written without a tokenizer")
    if any(subject.sampling is None for subject in whole):
        report.skip("end-of-turn tokens and temperature: the record does not say how it was sampled")
    if any(turn.prompt_crc is None for subject in whole for turn in subject.turns):
        report.skip("that each turn's prompt was all tokens before it: the record has no checksum of it")
    if any(np.isnan(subject.log_probs[subject.sampled]).any() for subject in whole):
        report.skip("log-probabilities: some were not recorded")


def _given(subject: Subject, prompts: Sequence[Sequence[int]] | None) -> Iterator[Finding]:
    """What the engine was given against the ledger; more requests than turns are those that were aborted or asked again."""
    if prompts is None:
        return
    ids = subject.ids.astype(np.int64)
    for number, prompt in enumerate(prompts):
        given: NDArray[np.int64] = np.asarray(prompt, np.int64)
        n = min(len(given), len(ids))
        differs = np.flatnonzero(given[:n] != ids[:n])
        if len(differs) or len(given) > len(ids):
            at = int(differs[0]) if len(differs) else n
            message = f"request {number} to the engine is not the tokens before it: it was given token {int(given[at])}"
            wanted = f"token {int(ids[at])}" if at < len(ids) else "no token"
            yield subject.finding("prefix", message, at, expected=wanted)
            return
    starts = {turn.start for turn in subject.turns}
    missing = starts - {len(prompt) for prompt in prompts}
    if missing:
        message = f"no request to the engine had the {min(missing)} tokens before this one"
        yield subject.finding("prefix", message, min(missing))


def _rendered(subject: Subject, renderer: Renderer, tools: Any) -> Iterator[Finding]:
    """Prompt and observations anew, token by token."""
    names = subject.sample.tools
    schemas = [tool for tool in tools or () if names is None or tool.get("function", {}).get("name") in names]
    if subject.prompt_len and tools is not None:
        yield from _same(subject, "prompt", 0, subject.prompt_len, renderer.prompt(subject.sample.messages, schemas or None))
    note = str(subject.loop.get("final_turn_note") or LoopConfig.model_fields["final_turn_note"].default)
    # Some templates write results of tools as JSON, with a newline as two characters, or in capitals.
    noted = re.compile(rf"(?:\n|\\n)({re.escape(note)}(?: A call of [^\n]* is still taken\.)?)", re.IGNORECASE)
    for turn in subject.turns:
        first, until = subject.after(turn)
        if until <= first or not subject.complete:
            continue
        messages = [
            {"role": "tool", "name": record.call.name, "tool_call_id": record.call.id, "content": record.text}
            for record in turn.calls
        ]
        messages += [{"role": "tool", "content": f"Error: {error}"} for error in turn.parse_errors]
        shown = subject.pieces  # a run that was written without a tokenizer has none
        text = renderer.decode(subject.ids[first:until].tolist()) if shown is None else shown.text(first, until)
        if not messages or (turn.parse_errors and not _all_told(turn, text)):
            continue
        sampled = subject.ids[turn.start : turn.end].tolist()
        found = list(_same(subject, "observation", first, until, _after(renderer, sampled, messages)))
        if found:
            match = noted.search(text)
            messages[-1]["content"] += f"\n{match[1] if match is not None else note}"
            found = list(_same(subject, "observation", first, until, _after(renderer, sampled, messages))) and found
        yield from found


def _all_told(turn: Turn, text: str) -> bool:
    """Whether the sentences on malformed calls are there as they were: where they were cut to fit, the record does not tell."""
    return not CUT.search(text) and all(error in text for error in turn.parse_errors)


def _after(renderer: Renderer, sampled: list[int], messages: list[dict[str, Any]]) -> list[int]:
    return [token for piece in renderer.after_turn(sampled, messages) for token in piece.ids]


def _same(subject: Subject, invariant: str, start: int, end: int, expected: Sequence[int]) -> Iterator[Finding]:
    own = subject.ids[start:end].tolist()
    if own != list(expected):
        n = min(len(own), len(expected))
        at = next((i for i in range(n) if own[i] != expected[i]), n)
        wanted = f"token {expected[at]}" if at < len(expected) else "its end"
        message = "the renderer writes this otherwise" if at < len(own) else "the renderer writes more here"
        yield subject.finding(invariant, message, min(start + at, len(subject) - 1), expected=wanted)


def _scored(subject: Subject, score: Score) -> NDArray[np.float32]:
    temperature = float((subject.sampling or {}).get("temperature", 1.0)) or 1.0  # greedy answers are told at temperature 1
    values = score(subject.ids.tolist(), temperature)
    return np.concatenate([[np.nan], np.asarray(values, np.float32)]).astype(np.float32)


def _temperature(subjects: Sequence[Subject], meta: Mapping[str, Any]) -> Iterator[Finding]:
    """What the run was configured with."""
    configured = _get(meta, "config", "actor_rollout_ref", "rollout", "temperature")
    if not isinstance(configured, int | float):
        return
    for subject in subjects:
        own = (subject.sampling or {}).get("temperature")
        if own is not None and own != configured and not subject.uid.endswith("-greedy"):
            yield subject.finding(
                "log_probs", f"it was sampled at temperature {own}", expected=f"{configured}, as the run's configuration says"
            )


def _estimator(meta: Mapping[str, Any]) -> str | None:
    algorithm = _get(meta, "config", "algorithm")
    name = _get(algorithm, "adv_estimator")
    if name in ("grpo", "agentloop_grpo") and not _get(algorithm, "use_kl_in_reward"):
        return "grpo" if _get(algorithm, "norm_adv_by_std_in_grpo") in (None, True) else "grpo without std"
    return None


def _get(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


# -- the trainer's side ---------------------------------------------------------------------------------------------------


def _train_side(report: Report, run: Run, step: int, subjects: Sequence[Subject], estimator: str | None) -> None:
    known = {subject.id: subject for subject in subjects}
    try:
        side = run.train_side(step)
    except JournalError as error:
        report.add([Finding("train_side", str(error), partition="train", step=step)])
        return
    sides: list[Compared] = []
    rows: list[tuple[Subject, Any]] = []
    iterator = iter(side)
    while True:
        try:
            trained = next(iterator, None)
        except JournalError as error:
            report.add([Finding("train_side", str(error), partition="train", step=step)])
            break
        if trained is None:
            break
        subject = known.get(trained.recorded.row.id)
        if subject is None:
            continue
        report.add(_beside(subject, trained))
        rows.append((subject, trained))
        versions = {turn.weight_version for turn in subject.turns} | {turn.min_weight_version for turn in subject.turns}
        current = versions <= {None, trained.trained_step - 1}
        if (
            trained.recomputed
            and current
            and not any(f.trajectory == subject.id and f.step == subject.step for f in report.of("train_side"))
        ):
            whole = np.concatenate([np.full(subject.prompt_len, np.nan, np.float32), trained.old_log_probs])
            found = compared(subject, whole, "the trainer's")
            sides += [found] if found is not None else []
    if not rows:
        if subjects:
            which = "of steps of which it recorded none (agentloop.train_side=true)"
            report.skip(f"log-probabilities against the trainer's, and advantages, {which}")
        return
    report.add(check_agreement(sides))
    report.add(_advantages(rows, estimator))


def _beside(subject: Subject, trained: Any) -> Iterator[Finding]:
    """The trainer trained what was sampled, or less."""
    start = subject.prompt_len
    wrong = np.flatnonzero((trained.response_mask > 0) & ~subject.sampled[start:])
    if len(wrong):
        yield subject.finding("mask", "the trainer trained a token that was not sampled", start + int(wrong[0]), expected="0")
    if not (trained.response_mask > 0).any():
        yield subject.finding("train_side", "the trainer trained none of its tokens", start)
    wrong = np.flatnonzero(
        (trained.response_mask > 0) & ~((trained.old_log_probs <= FAR_ABOVE_ZERO) & (trained.old_log_probs > BELOW_ALL))
    )
    if len(wrong):
        value = float(trained.old_log_probs[wrong[0]])
        yield subject.finding(
            "train_side", f"the trainer's log-probability is {value:g}", start + int(wrong[0]), expected="finite and at most 0"
        )


def _advantages(rows: Sequence[tuple[Subject, Any]], estimator: str | None) -> Iterator[Finding]:
    """As those of a padded batch of the same rows; groups of which not all has arrived are left out by their formula."""
    by_update: dict[tuple[int, int], list[tuple[Subject, Any]]] = defaultdict(list)
    for subject, trained in rows:
        by_update[trained.trained_step, trained.update].append((subject, trained))
    for members in by_update.values():
        room = max(len(trained.advantages) for _, trained in members)
        count = len(members)
        values: NDArray[np.float64] = np.zeros((count, room))
        mask: NDArray[np.int64] = np.zeros((count, room), np.int64)
        scores: NDArray[np.float64] = np.zeros((count, room))
        attention: NDArray[np.int64] = np.zeros((count, room + 1), np.int64)
        for row, (subject, trained) in enumerate(members):
            n = len(trained.advantages)
            values[row, :n], mask[row, :n] = trained.advantages, trained.response_mask
            attention[row, : n + 1] = 1
            scores[row, n - 1] = subject.reward.value if subject.reward is not None else 0.0
        tensors = {
            "prompts": np.zeros((count, 1), np.int64),
            "responses": np.zeros((count, room), np.int64),
            "attention_mask": attention,
            "response_mask": mask,
            "advantages": values,
        }
        if all(subject.reward is not None for subject, _ in members):
            tensors["token_level_scores"] = scores
        batch = Batch(tensors, {"uid": [subject.uid for subject, _ in members]}, pad=-1)
        for finding in check_advantages(batch, estimator):
            assert finding.row is not None
            subject, _ = members[finding.row]
            token = subject.prompt_len + (finding.place or 0)
            yield subject.finding(finding.invariant, finding.message, token, expected=finding.expected)


__all__ = ["Score", "audit_batch", "audit_run", "audit_trajectories"]
