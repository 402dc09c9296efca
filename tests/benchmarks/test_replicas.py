"""The benchmark of several servers, over servers of the local engine."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gpu.replicas import main


def test_two_servers_serve_from_their_caches_and_one_that_is_killed_loses_no_trajectory(tmp_path: Path) -> None:
    argv = ["--engine", "local", "--trajectories", "8", "--scale", "0.3", "--results", str(tmp_path)]
    assert main(argv) == 0
    result = json.loads((tmp_path / "replicas_local.json").read_text())
    figures = result["figures"]
    assert sorted(figures["undisturbed"]["placed"]) == [4, 4]
    assert figures["undisturbed"]["prefix_cache"]["share"] > 0.98
    assert figures["one_killed"]["complete"] == 8 and figures["one_killed"]["replicas_up"] == 1
