"""`agentloop logprobs`: the trainer's log-probabilities against the rollout's."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from agentloop.commands.journal import RunArgument, new_console, open_run
from agentloop.errors import ConfigError
from agentloop.journal.logprobs import run_logprobs
from agentloop.journal.show import table


def logprobs(
    run: RunArgument,
    step: Annotated[int | None, typer.Option(min=0, help="only this step of the trainer")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Trainer against rollout: how far apart their log-probabilities are, by step and turn.

    Of runs with `agentloop.train_side=true`.
    """
    opened = open_run(run)
    found = run_logprobs(opened, step)
    if not found["arrived"]:
        raise ConfigError(f"{opened.path}: no train side has arrived; it is written with agentloop.train_side=true")
    if not found["steps"]:
        raise ConfigError(f"{opened.path}: step {step} of the trainer has no train side")
    if as_json:
        typer.echo(json.dumps({"run": str(opened.path), **found}))
        return
    console = new_console()
    table(
        console,
        ["step", "trajectories", "sampled by", "turn", "tokens", "max |diff|", "mean |diff|", "correlation"],
        [row for item in found["steps"] for row in _rows(item)],
    )
    console.print()
    for sentence in _notes(found):
        console.print(sentence, markup=False)


def _rows(item: dict[str, Any]) -> list[list[Any]]:
    rows = []
    for turn, figures in [*item["turns"].items(), ("all", item["all"])]:
        correlation = figures["correlation"]
        rows.append(
            [
                *(item["step"], item["trajectories"], _span(item["sampled_by"]), turn, figures["tokens"]),
                *(_short(figures["max_diff"]), _short(figures["mean_diff"])),
                "-" if correlation is None else f"{correlation:.6f}",
            ]
        )
    return rows


def _notes(found: dict[str, Any]) -> list[str]:
    notes = [f"The train side of {found['arrived']} of {found['expected']} trajectories has arrived."]
    if found["missing"]:
        missing = ", ".join(f"{count} of step {step}" for step, count in found["missing"].items())
        notes.append(f"Not arrived, by the rollout's step: {missing}.")
    copied = sum(item["not_recomputed"] for item in found["steps"])
    if copied:
        notes.append(
            f"{copied} trajectories are not compared: with algorithm.rollout_correction.bypass_mode the trainer takes the "
            "rollout's log-probabilities as its own."
        )
    missing_tokens = sum(item["all"]["not_compared"] for item in found["steps"])
    if missing_tokens:
        notes.append(
            f"{missing_tokens} tokens are not compared: one side has no finite log-probability of them "
            "(see actor_rollout_ref.rollout.calculate_log_probs)."
        )
    return notes


def _span(ends: list[int] | None) -> str:
    if ends is None:
        return "-"
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"
