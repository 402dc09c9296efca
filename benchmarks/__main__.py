"""`python -m benchmarks`: run every benchmark that a CPU can, then print the aims of all results as one table.

`python -m benchmarks --show` only prints the table of what is in `benchmarks/results/`.
"""

from __future__ import annotations

import json
import subprocess
import sys

from rich.console import Console
from rich.table import Table

from benchmarks.report import RESULTS

CPU = (
    "loop_overhead",
    "batch_assembly",
    "local_engine",
    "train_side",
    "journal",
    "sandboxes",
    "math_rewards",
    "viewer",
    "canary",
    "consistency",
)


def main() -> int:
    """Exit status 1 if a benchmark could not be run; a missed aim is shown, and is no failure."""
    run = () if "--show" in sys.argv[1:] else CPU
    failed = [name for name in run if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode]
    table = Table(title="aims")
    for column in ("benchmark", "commit", "figure", "value", "aim", "holds"):
        table.add_column(column)
    for path in sorted(RESULTS.glob("*.json")):
        if path.stem in failed:  # an older result would pass for today's
            continue
        result = json.loads(path.read_text())
        for aim in result["aims"]:
            holds = "yes" if aim["holds"] else "MISSED"
            table.add_row(path.stem, result["commit"], aim["name"], f"{aim['value']:.4g}", aim["aim"], holds)
    for name in failed:
        table.add_row(name, "", "could not be run", "", "", "no", style="red")
    Console().print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
