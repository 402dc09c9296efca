"""The benchmark of the weight path, over the local engine."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gpu.weight_sync import main


def test_syncs_land_faults_are_found_and_what_cannot_be_had_is_told(tmp_path: Path) -> None:
    plans = "tensors,distributed,disk,restart"
    assert main(["--engine", "local", "--plans", plans, "--faults", "3", "--results", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "weight_sync_local.json").read_text())
    figures = result["figures"]
    assert {name: len(rows) for name, rows in figures["plans"].items()} == {"tensors": 3, "disk": 3, "restart": 1}
    versions = [row["version"] for rows in figures["plans"].values() for row in rows]
    assert versions == list(range(1, 8))
    assert sum(row["cut_short"] for row in figures["plans"]["tensors"]) > 0, "a sync ended what was under way"
    assert (
        list(figures["not_run"]) == ["distributed"]
        and "takes no weights over a process group" in figures["not_run"]["distributed"]
    )
    assert len(figures["faults"]["planted"]) == 3 and all(row["layer"] == 1 for row in figures["faults"]["planted"].values())
    assert "tensors differ from what was sent" in figures["refusal"]["sync"]
    assert all(aim["holds"] for aim in result["aims"]) and len(result["aims"]) == 9
