"""`agentloop logprobs`: the trainer's log-probabilities against the rollout's."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from agentloop.commands.journal import RunArgument, StepOption, new_console, open_run, rows_of
from agentloop.errors import ConfigError
from agentloop.journal.logprobs import run_logprobs
from agentloop.journal.show import table


def logprobs(
    run: RunArgument,
    step: StepOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Trainer against rollout: how far apart their log-probabilities are, by step and turn.

    Of runs with `agentloop.train_side=true`.
    """
    opened = open_run(run)
    rows_of(opened, step, "train")
    steps = list(run_logprobs(opened, step))
    if not any(item["arrived"] for item in steps):
        where = "has arrived" if step is None else f"of step {step} has arrived"
        raise ConfigError(f"{opened.path}: no train side {where}; it is written with agentloop.train_side=true")
    if as_json:
        typer.echo(json.dumps({"run": str(opened.path), "steps": steps}))
        return
    console = new_console()
    table(
        console,
        ["step", "arrived", "sampled by", "trained at", "turn", "tokens", "max |diff|", "mean |diff|", "correlation"],
        [row for item in steps for row in _rows(item)],
    )
    copied = sum(item["not_recomputed"] for item in steps)
    if copied:
        console.print(
            f"{copied} trajectories are not compared: with algorithm.rollout_correction.bypass_mode the trainer takes the "
            "rollout's log-probabilities as its own"
        )
    missing = sum(item["all"]["not_compared"] for item in steps)
    if missing:
        console.print(
            f"{missing} tokens are not compared: one side has no log-probability of them "
            "(actor_rollout_ref.rollout.calculate_log_probs)"
        )


def _rows(item: dict[str, Any]) -> list[list[Any]]:
    rows = []
    for turn, figures in [*item["turns"].items(), ("all", item["all"])]:
        head = [item["step"], f"{item['arrived']} of {item['expected']}", _span(item["sampled_by"]), _span(item["trained_at"])]
        apart = [_short(figures["max_diff"]), _short(figures["mean_diff"])]
        correlation = figures["correlation"]
        rows.append([*head, turn, figures["tokens"], *apart, "-" if correlation is None else f"{correlation:.6f}"])
    return rows


def _span(ends: list[int] | None) -> str:
    if ends is None:
        return "-"
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"
