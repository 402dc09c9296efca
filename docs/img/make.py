"""The README's pictures from a run of the quickstart: `python docs/img/make.py runs/quickstart`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.console import Console

from agentloop.journal.reader import Run
from agentloop.journal.show import show_trajectory

HERE = Path(__file__).parent


def main(run_dir: Path) -> None:
    """`quickstart.png` is the run's curve; `show.svg` a conversation of its last validation with three calls or more."""
    shutil.copy(run_dir / "reward.png", HERE / "quickstart.png")
    run = Run(run_dir)
    last = max(place.step for place in run.steps() if place.partition == "val")
    row = next(row for row in run.trajectories("val", last) if row.tool_calls >= 3 and row.reward == 1.0)
    console = Console(record=True, width=100, force_terminal=True)
    show_trajectory(console, run.load(row))
    console.save_svg(str(HERE / "show.svg"), title=f"agentloop show {run_dir} {row.id}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
