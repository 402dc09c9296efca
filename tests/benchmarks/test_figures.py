"""Results become tables in the docs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.figures import BEGIN, END, PAGE, command, section, written
from benchmarks.report import RESULTS, Aim, save

FIGURES: dict[str, Any] = {"rows": 512, "loss": [0.5, 0.7, 0.25], "sides": [{"wall_s": 1.5}, {"wall_s": 2.0}], "none": None}


def test_a_result_tells_its_command_machine_date_aims_and_every_figure(tmp_path: Path) -> None:
    save("loop_overhead", FIGURES, [Aim("speed", 2.5, "at least 3", False)], tmp_path)
    path = tmp_path / "loop_overhead.json"
    result = json.loads(path.read_text())
    text = section(result, path)
    assert f"`python -m benchmarks.loop_overhead` on {result['machine']['processor']}" in text
    assert f"Python {result['machine']['python']}" in text and result["date"] in text
    assert "| speed | 2.5 | at least 3 | **no** |" in text
    assert (
        "rows **512**; loss **0.5 first, 0.25 last, 0.7 at most (3)**; sides #1.wall_s **1.5**; sides #2.wall_s **2**." in text
    )


def test_the_command_is_the_results_own_or_follows_from_its_name() -> None:
    assert command({"benchmark": "gpu_quickstart_sync", "figures": {}}) == "python -m benchmarks.gpu.quickstart sync"
    assert command({"benchmark": "quickstart_seed2", "figures": {}}) == "make quickstart SEED=2"
    own = {"benchmark": "gpu_throughput", "figures": {"command": "python -m benchmarks.gpu.throughput --seed 1"}}
    assert command(own) == "python -m benchmarks.gpu.throughput --seed 1"


def test_only_what_is_between_the_marks_is_written_anew(tmp_path: Path) -> None:
    save("local_engine", {"rows": 1}, [], tmp_path)
    page = written(f"before\n{BEGIN}old\n{END}after\n", tmp_path)
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page and "### local_engine" in page
    assert written(page, tmp_path) == page


def test_the_page_has_every_result() -> None:
    page = PAGE.read_text()
    for path in RESULTS.glob("*.json"):
        assert f"### {path.stem}\n" in page, f"run `python -m benchmarks.figures`: {path.stem} is not in {PAGE.name}"
