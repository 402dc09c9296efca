"""`make quickstart`: GRPO through the real verl on two CPU cores, from data to a table and a picture.

It makes the data, calls `agentloop train examples/quickstart/quickstart.yaml`, follows the run's journal while it goes, and
at the end shows how good the model was before and after. All figures come from the journal of the run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from agentloop.errors import ConfigError
from agentloop.journal.format import Place
from agentloop.journal.reader import Run, is_run
from agentloop.journal.stats import StepSummary, summarise
from agentloop.journal.train_side import FOLDER as TRAIN_SIDE
from agentloop.trajectory import Trajectory
from agentloop.verl.launch import make_plan
from examples.quickstart.evaluate import QUICKSTART, Example, Report, ToolMode, depth_label, measure
from examples.quickstart.evaluate import summarise as judge

POLL_S = 1.0
SHOWN_LOG_LINES = 40
CONTROL_PROBLEMS = 128
"""Held-out problems on which the models are tried without the tool and with one that answers wrongly."""


def main(example: Example[Any] = QUICKSTART) -> int:
    parser = argparse.ArgumentParser(description=f"Train the model of {example.name} and show the result.")
    parser.add_argument("--config", type=Path, default=example.config, help="what `agentloop train` is given")
    parser.add_argument("--run-dir", type=Path, default=Path("runs") / example.name)
    parser.add_argument("--seed", type=int, default=0, help="of the data, the model's updates and every request")
    parser.add_argument("--no-controls", action="store_true", help="skip the evaluations without the tool and with a wrong one")
    parser.add_argument("--train-side", action="store_true", help="record the trainer's log-probabilities and advantages too")
    parser.add_argument("overrides", nargs="*", help="key=value, verl's or agentloop's, as for `agentloop train`")
    args = parser.parse_args()
    overrides = [*(["agentloop.train_side=true"] if args.train_side else []), *args.overrides]
    try:
        return run(example, args.config, args.run_dir, args.seed, overrides, with_controls=not args.no_controls)
    except ConfigError as error:
        print(f"{example.name}: {error}", file=sys.stderr)
        return 2


def run(example: Example[Any], config: Path, run_dir: Path, seed: int, overrides: Sequence[str], *, with_controls: bool) -> int:
    """The exit status. Raises `ConfigError` for wrong input, before anything is written or moved."""
    console = Console()
    with TemporaryDirectory() as folder:
        train_file, val_file = example.write(Path(folder) / "data", seed + 1)
        make_plan(config, settings(run_dir, seed, train_file, val_file, overrides))
        make_room(run_dir, console)
        shutil.move(Path(folder) / "data", run_dir / "data")
    train_file, val_file = (run_dir / "data" / path.name for path in (train_file, val_file))
    console.print(f"Data: {train_file} and {val_file}; no problem is in both.")
    command = [sys.executable, "-m", "agentloop.cli", "train", str(config)]
    watch = train([*command, *settings(run_dir, seed, train_file, val_file, overrides)], run_dir, console)
    if watch.exit_code != 0:
        tail = watch.log.read_text(errors="replace").splitlines()[-SHOWN_LOG_LINES:]
        console.print("\n".join(tail), markup=False, highlight=False, soft_wrap=True)
        console.print(f"Training failed with exit status {watch.exit_code}; all of its output is in {watch.log}.")
        return watch.exit_code
    summary = result(run_dir, seed, watch, example)
    if with_controls:
        console.print("Checking that the model cannot do without the tool …")
        summary.update(controls(run_dir, example))
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    picture = draw(Run(run_dir), summary, run_dir / "reward.png", example)
    show(summary, console, example)
    console.print(f"\nThe reward over the steps: {picture}. Look at the conversations next:")
    for hint in (
        f"agentloop ls {run_dir}",
        f"agentloop show {run_dir} --worst",
        f"agentloop stats {run_dir}",
        *([f"agentloop consistency {run_dir}"] if (run_dir / TRAIN_SIDE).is_dir() else []),
        f"tensorboard --logdir {run_dir / 'tensorboard'}",
    ):
        console.print(f"  {hint}", markup=False, highlight=False, soft_wrap=True)
    return 0


def make_room(run_dir: Path, console: Console) -> None:
    """An empty `run_dir`; one that is there is moved aside."""
    if run_dir.exists():
        older = run_dir.with_name(f"{run_dir.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(run_dir.stat().st_mtime))}")
        run_dir.rename(older)
        console.print(f"The run that was in {run_dir} is now in {older}.")
    run_dir.mkdir(parents=True)


# -- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """What was seen of the training from outside."""

    log: Path
    started: float
    """Seconds since 1970, before the training command was started."""
    exit_code: int = 0
    ended: float = 0.0
    peak_rss_bytes: int = 0
    """Largest sum of the resident memory of all processes of the run, pages that they share counted for each."""
    stop: threading.Event = field(default_factory=threading.Event)

    def sample_memory(self, pid: int) -> None:
        import psutil

        while not self.stop.wait(POLL_S):
            try:
                root = psutil.Process(pid)
                processes = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            total = 0
            for process in processes:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak_rss_bytes = max(self.peak_rss_bytes, total)


def settings(run_dir: Path, seed: int, train_file: Path, val_file: Path, overrides: Sequence[str]) -> list[str]:
    """What `agentloop train` is given beside the file; `overrides`, the user's own, come last and win."""
    return [
        *(f"agentloop.run_dir={run_dir}", f"agentloop.seed={seed}", f"data.seed={seed}"),
        *(f"data.train_files={train_file}", f"data.val_files={val_file}"),
        f"trainer.default_local_dir={run_dir / 'checkpoints'}",
        *overrides,
    ]


def train(command: Sequence[str], run_dir: Path, console: Console) -> Watch:
    """Run the training command to its end, showing one line a step; its own output goes to a file."""
    watch = Watch(log=run_dir / "train.log", started=time.time())
    console.print("Training: " + " ".join(command[1:]), markup=False, highlight=False, soft_wrap=True)
    console.print(f"Its output goes to {watch.log}. verl starts up first; that takes about a minute.")
    steps = Steps(run_dir, console)
    with watch.log.open("wb") as log:
        # In a session of its own, so that Ctrl-C reaches it once, from here.
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    memory = threading.Thread(target=watch.sample_memory, args=(process.pid,), daemon=True)
    memory.start()
    stopping = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    previous = {number: signal.signal(number, _interrupt) for number in stopping}
    try:
        while process.poll() is None:
            try:
                time.sleep(POLL_S)
                steps.report(finished=False)
            except KeyboardInterrupt:
                console.print("Interrupted; waiting for the training to stop …")
                process.terminate()  # not SIGINT, which programs started in the background ignore
    finally:
        process.terminate()
        watch.exit_code = process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
        watch.ended = time.time()
        watch.stop.set()
        memory.join()
    steps.report(finished=True)
    return watch


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class Steps:
    """Prints the steps of a run as they end; a step has ended when a later one has begun, or the run has."""

    def __init__(self, run_dir: Path, console: Console) -> None:
        self.run_dir = run_dir
        self.console = console
        self.run: Run | None = None
        self.shown: set[Place] = set()

    def report(self, *, finished: bool) -> None:
        """Print what has ended since; only the steps that were not printed yet are read."""
        if self.run is None:
            if not is_run(self.run_dir):
                return
            self.run = Run(self.run_dir)
        places = sorted(self.run.steps(), key=lambda place: place.step)
        for index, place in enumerate(places):
            if place in self.shown or (index + 1 == len(places) and not finished):
                continue
            for step in summarise(self.run.trajectories(place.partition, place.step)):
                if finished or not step.incomplete:
                    self.shown.add(place)
                    self.console.print(line(step), markup=False, highlight=False, soft_wrap=True)


def line(step: StepSummary) -> str:
    parts = [
        f"{step.trajectories} trajectories",
        f"reward {step.mean_reward or 0:.3f}",
        f"turns {step.mean_turns or 0:.2f}",
        f"{step.tool_calls} tool calls ({sum(step.tool_failures.values())} failed)",
        f"{step.sampled_tokens} sampled tokens",
    ]
    unfinished = {kind: n for kind, n in step.end_reasons.items() if kind != "final_answer"}
    parts += [f"{kind} {n}" for kind, n in sorted(unfinished.items())]
    return f"{step.place.partition:5} step {step.place.step:3}: " + ", ".join(parts)


# -- the result -------------------------------------------------------------------------------------------------------


def held_out_report(run: Run, step: int, example: Example[Any] = QUICKSTART) -> tuple[list[Any], Report]:
    """The validation of one step, judged problem by problem."""
    groups: dict[int, list[Trajectory]] = {}
    for row in run.trajectories("val", step):
        recorded = run.load(row)
        groups.setdefault(int(recorded.sample.extra_info["index"]), []).append(recorded.to_trajectory())
    known = example.held_out(max(groups) + 1)
    problems = [known[index] for index in sorted(groups)]
    return problems, judge(problems, [groups[index] for index in sorted(groups)], example.failure_kind)


def result(run_dir: Path, seed: int, watch: Watch, example: Example[Any] = QUICKSTART) -> dict[str, Any]:
    """Everything that the table shows, for `summary.json`. `ConfigError` if the run was told not to record it."""
    run = Run(run_dir)
    val_steps = [place.step for place in run.steps() if place.partition == "val"]
    train_steps = summarise(run.trajectories("train"))
    if len(val_steps) < 2 or not train_steps:
        raise ConfigError(
            f"{run_dir}: {len(val_steps)} validations and {len(train_steps)} train steps were recorded; "
            "the result needs a validation before the training, train steps, and a validation after them"
        )
    problems, before = held_out_report(run, val_steps[0], example)
    _, after = held_out_report(run, val_steps[-1], example)
    first = min(row.t for row in run.trajectories())
    return {
        "seed": seed,
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "by_depth_before": before.by_depth,
        "by_depth_after": after.by_depth,
        "failures_before": before.failures,
        "failures_after": after.failures,
        "held_out": len(problems),
        "steps": len(train_steps),
        "trajectories": sum(step.trajectories for step in train_steps),
        "reward_first_step": train_steps[0].mean_reward,
        "reward_last_step": train_steps[-1].mean_reward,
        "mean_turns": mean_turns(train_steps),
        "tool_calls": sum(step.tool_calls for step in train_steps),
        "tool_failures": total(step.tool_failures for step in train_steps),
        "end_reasons": total(step.end_reasons for step in train_steps),
        "sampled_tokens": sum(step.sampled_tokens for step in train_steps),
        "startup_seconds": round(first - watch.started, 1),
        "train_seconds": round(watch.ended - first, 1),
        "peak_rss_gib": round(watch.peak_rss_bytes / 2**30, 2),
    }


def controls(run_dir: Path, example: Example[Any] = QUICKSTART) -> dict[str, float]:
    """Greedy held-out accuracy without the tool and with a tool that answers wrongly, before and after.

    "After" is the last checkpoint of the run; without one only "before" is there.
    """
    weights = (run_dir / "checkpoints").glob("global_step_*/actor/huggingface/model.safetensors")
    trained = sorted(weights, key=lambda path: int(path.parents[2].name.rpartition("_")[2]))
    modes: dict[str, ToolMode] = {"without_tool": "none", "wrong_tool": "wrong"}
    models = {"before": example.model} | ({"after": trained[-1].parent} if trained else {})
    problems = example.held_out(CONTROL_PROBLEMS)
    return {
        f"accuracy_{name}_{when}": measure(example, folder, problems, tool=mode, threads=2).accuracy
        for when, folder in models.items()
        for name, mode in modes.items()
    }


def mean_turns(steps: Sequence[StepSummary]) -> float:
    turns = [count for step in steps for count in step.turns]
    return sum(turns) / len(turns)


def total(counters: Any) -> dict[str, int]:
    added: dict[str, int] = {}
    for counter in counters:
        for kind, count in counter.items():
            added[kind] = added.get(kind, 0) + count
    return added


def show(summary: dict[str, Any], console: Console, example: Example[Any] = QUICKSTART) -> None:
    table = Table("", "before", "after", title=f"\n{example.name}", title_justify="left")
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    table.add_row(f"held-out accuracy ({summary['held_out']} problems, greedy)", f"{before:.3f}", f"{after:.3f}")
    for depth, accuracy in summary["by_depth_before"].items():
        table.add_row(f"  {depth_label(example, depth)}", f"{accuracy:.3f}", f"{summary['by_depth_after'][depth]:.3f}")
    for key, label in (("without_tool", "without the tool"), ("wrong_tool", "with a tool that is wrong")):
        if f"accuracy_{key}_before" in summary:
            figures = [summary.get(f"accuracy_{key}_{when}") for when in ("before", "after")]
            table.add_row(label, *("-" if figure is None else f"{figure:.3f}" for figure in figures))
    for kind in sorted({*summary["failures_before"], *summary["failures_after"]}):
        row = [str(summary[f"failures_{when}"].get(kind, 0)) for when in ("before", "after")]
        table.add_row(f"  failed: {kind}", *row)
    table.add_section()
    reward = [f"{summary[key]:.3f}" for key in ("reward_first_step", "reward_last_step")]
    table.add_row("train reward, first and last step", *reward)
    console.print(table)
    facts = [
        f"{summary['steps']} steps, {summary['trajectories']} trajectories, {summary['sampled_tokens']} sampled tokens",
        f"{summary['mean_turns']:.2f} turns a trajectory, {summary['tool_calls']} tool calls, failed: "
        + (", ".join(f"{kind} {count}" for kind, count in summary["tool_failures"].items()) or "none"),
        "ended by " + ", ".join(f"{kind} {count}" for kind, count in summary["end_reasons"].items()),
        f"start-up {summary['startup_seconds']:.0f} s, training {summary['train_seconds']:.0f} s (with both validations), "
        f"peak memory {summary['peak_rss_gib']:.1f} GiB",
    ]
    for fact in facts:
        console.print(fact, markup=False, highlight=False, soft_wrap=True)


def draw(run: Run, summary: dict[str, Any], path: Path, example: Example[Any] = QUICKSTART) -> Path:
    """The mean reward of each train step and the held-out accuracies, as a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    steps = summarise(run.trajectories("train"))
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=130)
    axes.plot(
        [s.place.step for s in steps], [s.mean_reward or 0 for s in steps], color="#0072B2", label="train reward (sampled)"
    )
    ends = [0, max(step.place.step for step in steps)]
    accuracies = [summary["accuracy_before"], summary["accuracy_after"]]
    axes.plot(ends, accuracies, "o", color="#D55E00", label="held-out accuracy (greedy)")
    for x, y in zip(ends, accuracies, strict=True):
        axes.annotate(f"{y:.2f}", (x, y), textcoords="offset points", xytext=(0, -14), ha="center", color="#D55E00")
    axes.set(xlabel="GRPO step", ylim=(0, 1.03), title=f"{example.name}: a tiny model learns to {example.goal}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
