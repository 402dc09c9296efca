"""Does a tiny model learn to write Python for its tool? `python -m benchmarks.code_math` trains it and reports.

About 8 minutes on two cores. What is measured is a run of `python -m examples.code_math.run`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import Aim, report


def aims(summary: dict[str, Any]) -> list[Aim]:
    before, after, memory = (summary[key] for key in ("accuracy_before", "accuracy_after", "peak_rss_gib"))
    minutes = round((summary["startup_seconds"] + summary["train_seconds"]) / 60, 1)
    controls = [(key, value) for key, value in summary.items() if key.startswith(("accuracy_without", "accuracy_wrong"))]
    return [
        Aim("held-out accuracy before", before, "at most 0.6", before <= 0.6),
        Aim("held-out accuracy after", after, "at least 0.9", after >= 0.9),
        Aim("minutes", minutes, "at most 10", minutes <= 10),
        Aim("peak memory, GiB", memory, "under 9", memory < 9),
        *(Aim(key.replace("_", " "), value, "at most 0.1", value <= 0.1) for key, value in controls),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the model of code_math and report.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/code_math"))
    parser.add_argument("--report-only", action="store_true", help="report the run that is in --run-dir")
    args = parser.parse_args()
    arguments = ["-m", "examples.code_math.run", "--seed", str(args.seed)]
    if not args.report_only:
        status = subprocess.run([sys.executable, *arguments, "--run-dir", str(args.run_dir)], check=False).returncode
        if status:
            return status
    summary = json.loads((args.run_dir / "summary.json").read_text())
    if summary["seed"] != args.seed:
        raise SystemExit(f"the run in {args.run_dir} has seed {summary['seed']}, not {args.seed}")
    report(f"code_math_seed{args.seed}", {"command": f"python {' '.join(arguments)}", **summary}, aims(summary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
