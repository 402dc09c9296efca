"""The whole quickstart, as a newcomer runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tiny_model_learns_to_use_its_calculator(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "examples.quickstart.run", "--seed", "0", "--run-dir", str(run_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    summary = json.loads((run_dir / "summary.json").read_text())
    print(json.dumps(summary))
    assert summary["held_out"] >= 128
    assert summary["accuracy_before"] <= 0.6
    assert summary["accuracy_after"] >= 0.9
    for when in ("before", "after"):
        assert summary[f"accuracy_without_tool_{when}"] <= 0.1
        assert summary[f"accuracy_wrong_tool_{when}"] <= 0.1
    failures = summary["failures_before"]
    assert len(failures) >= 3
    assert max(failures.values()) <= 0.6 * sum(failures.values())
    assert summary["peak_rss_gib"] < 8
    assert (run_dir / "reward.png").stat().st_size > 10_000
    assert "held-out accuracy" in done.stdout
