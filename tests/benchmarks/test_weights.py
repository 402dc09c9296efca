"""The benchmark of weight updates, over the local engine."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gpu.weights import main


def test_an_update_is_measured_beside_a_restart_and_answers_across_it_are_not_labelled_with_its_version(tmp_path: Path) -> None:
    assert main(["--engine", "local", "--requests", "4", "--results", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "weights_local.json").read_text())
    figures = result["figures"]
    assert figures["scores_moved"] > 0.01 and figures["scores_back"] == 0 and figures["scores_after_restart"] == 0
    assert figures["in_flight"]["abort"]["marked_as_mixed"] == 4, "the local engine lets requests live through an update"
    assert all(aim["holds"] for aim in result["aims"])
