"""`agentloop consistency`: the trainer's log-probabilities against the rollout's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

from agentloop.commands.journal import RunArgument, new_console, open_run
from agentloop.config import validate
from agentloop.consistency import Beyond, Consistency, Figures, Group, Thresholds, consistency, judge
from agentloop.errors import ConfigError
from agentloop.journal.format import JournalError
from agentloop.journal.reader import Run
from agentloop.journal.show import table

_TITLES = {
    "turn": "turn",
    "origin": "the turn began",
    "position": "position in the response",
    "in_turn": "position in the turn",
    "in_turn_after_observation": "position in a turn after a tool's answer",
    "staleness": "versions behind the trainer",
}
_HEAD = ("tokens", "max", "mean |diff|", "k1", "k3", "ratio p0.1", "p99.9", "outside", "ess", "correlation")


def report(
    run: RunArgument,
    step: Annotated[int | None, typer.Option(min=0, help="only this step of the trainer")] = None,
    worst: Annotated[int, typer.Option(min=0, help="how many of the worst tokens and turns are named")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    max_abs: Annotated[float | None, typer.Option(min=0, help="threshold: largest |diff| of a token of a step")] = None,
    max_mean_abs: Annotated[float | None, typer.Option(min=0, help="threshold: mean |diff| of a step")] = None,
    max_k3: Annotated[float | None, typer.Option(min=0, help="threshold: k3 estimate of a step's KL divergence")] = None,
    max_ratio_outside: Annotated[
        float | None, typer.Option(min=0, max=1, help="threshold: share of a step's tokens whose ratio is outside of --clip")
    ] = None,
    clip: Annotated[tuple[float, float] | None, typer.Option(metavar="LOW HIGH", help="range of ratios; else 0.5 2")] = None,
) -> None:
    """Trainer against rollout: how far apart their log-probabilities of the same tokens are, and where.

    Of runs with `agentloop.train_side=true`. Thresholds that are not given are those that the run was trained with
    (`agentloop.consistency`). Exit status 1 if a step is beyond one, or something is found that should not be.
    """
    opened = open_run(run)
    given = {"max_abs": max_abs, "max_mean_abs": max_mean_abs, "max_k3": max_k3, "max_ratio_outside": max_ratio_outside}
    thresholds = _thresholds(opened, given | {"clip": clip})
    try:
        found = consistency(opened, step=step, clip=thresholds.clip, worst=worst)
    except JournalError as error:
        raise ConfigError(str(error)) from error
    if not found.arrived:
        raise ConfigError(f"{opened.path}: no train side has arrived; it is written with agentloop.train_side=true")
    if not found.trajectories:
        raise ConfigError(f"{opened.path}: step {step} of the trainer has no train side")
    beyond = judge(found, thresholds)
    if as_json:
        told = {"run": str(opened.path), "thresholds": thresholds.limits, "beyond": [item.to_dict() for item in beyond]}
        typer.echo(json.dumps(told | found.to_dict()))
    else:
        _print(new_console(), found, beyond)
    if beyond or found.findings:
        raise typer.Exit(1)


def _thresholds(run: Run, given: Mapping[str, Any]) -> Thresholds:
    """The run's own, with what is given on the command line over them."""
    config = run.meta.get("config")
    section = (config.get("agentloop") or {}) if isinstance(config, Mapping) else {}
    own = section.get("consistency") or {}
    known = {name: own[name] for name in Thresholds.model_fields if own.get(name) is not None}
    return validate(
        Thresholds, known | {name: value for name, value in given.items() if value is not None}, "agentloop.consistency"
    )


def _print(console: Console, found: Consistency, beyond: Sequence[Beyond]) -> None:
    table(
        console,
        ["step", "trajectories", "sampled by", "turn", *_HEAD],
        [
            [step.name, step.trajectories, _span(step.sampled_by), name, *_figures(figures)]
            for step in found.steps
            for name, figures in (*((group.name, group.figures) for group in step.turns), ("all", step.figures))
        ],
    )
    for name, title in _TITLES.items():
        _groups(console, title, found.by[name])
    if found.worst_turns:
        console.print()
        table(
            console,
            ["worst turns", "turn", "trained in", "tokens", "max", "mean |diff|", "share"],
            [
                [
                    *(_place(turn), turn["turn"], turn["trained_step"], turn["tokens"]),
                    *(_short(turn["max_abs"]), _short(turn["mean_abs"]), _percent(turn["share"])),
                ]
                for turn in found.worst_turns
            ],
        )
    if found.worst_tokens:
        console.print()
        table(
            console,
            ["worst tokens", "turn", "token", "in turn", "id", "text", "trainer", "rollout", "diff"],
            [
                [
                    *(_place(token), token["turn"], token["token"], token["in_turn"], token["token_id"]),
                    *("-" if token["text"] is None else repr(token["text"]), *_sides(token)),
                ]
                for token in found.worst_tokens
            ],
        )
    console.print()
    for sentence in (*_notes(found), *found.findings, *(item.sentence for item in beyond)):
        console.print(sentence, markup=False)


def _groups(console: Console, title: str, groups: Sequence[Group]) -> None:
    if len(groups) > 1:
        console.print()
        table(console, [title, *_HEAD], [[group.name.replace("_", " "), *_figures(group.figures)] for group in groups])


def _figures(figures: Figures) -> list[Any]:
    ratio = figures.ratio or {}
    return [
        figures.tokens,
        *(_short(value) for value in (figures.max_abs, figures.mean_abs, figures.k1, figures.k3)),
        *(_fixed(ratio.get(name), 4) for name in ("p0.1", "p99.9")),
        _percent(figures.ratio_outside),
        _fixed(figures.ess, 4),
        _fixed(figures.correlation, 6),
    ]


def _place(named: Mapping[str, Any]) -> str:
    return f"{named['id']} (step {named['step']})"


def _sides(token: Mapping[str, Any]) -> list[str]:
    return ["-inf" if token[side] is None else f"{token[side]:.4f}" for side in ("trainer", "rollout")] + [
        "infinite" if token["infinite"] else f"{token['diff']:+.4f}"
    ]


def _notes(found: Consistency) -> list[str]:
    notes = [
        f"The train side of {found.arrived} of {found.expected} trajectories has arrived. "
        f"Compared: {found.all.tokens} of {found.sampled_tokens} sampled tokens."
    ]
    if found.missing:
        missing = ", ".join(f"{count} of step {step}" for step, count in found.missing.items())
        notes.append(f"Not arrived, by the rollout's step: {missing}.")
    if found.not_recomputed:
        notes.append(
            f"{found.not_recomputed} trajectories are not compared: with algorithm.rollout_correction.bypass_mode the trainer "
            "takes the rollout's log-probabilities as its own."
        )
    if found.all.not_recorded:
        notes.append(
            f"{found.all.not_recorded} tokens are not compared: one side's log-probability of them is not recorded "
            "(see actor_rollout_ref.rollout.calculate_log_probs)."
        )
    return notes


def _span(ends: tuple[int, int] | None) -> str:
    if ends is None:
        return "-"
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _fixed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"
