"""`python -m benchmarks`: run every benchmark that a CPU can, then print the aims of all as one table."""

from __future__ import annotations

import json
import subprocess
import sys

from rich.console import Console
from rich.table import Table

from benchmarks.report import RESULTS

CPU = ("loop_overhead", "batch_assembly", "local_engine")


def main() -> int:
    """Exit status 1 if a benchmark could not be run; a missed aim is shown, and is no failure."""
    failed = [name for name in CPU if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode]
    table = Table(title="aims")
    for column in ("benchmark", "figure", "value", "aim", "holds"):
        table.add_column(column)
    for name in CPU:
        if name in failed:
            table.add_row(name, "could not be run", "", "", "no", style="red")
            continue
        for aim in json.loads((RESULTS / f"{name}.json").read_text())["aims"]:
            table.add_row(name, aim["name"], f"{aim['value']:.4g}", aim["aim"], "yes" if aim["holds"] else "MISSED")
    Console().print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
