"""The journal's benchmark at a size at which it proves that every format gives back what it was given, and no speed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("msgpack")
pytest.importorskip("pyarrow")

from benchmarks.journal import aims, measure
from benchmarks.journal_peers import PEERS


def test_every_format_gives_back_what_was_written(tmp_path: Path) -> None:
    figures = measure(tmp_path, trajectories=30, turns=2, tokens=64, names=list(PEERS))
    assert set(figures["formats"]) == {"journal", *PEERS}
    for name, found in figures["formats"].items():
        assert found["write_s"] > 0, name
        assert found["mb"] > 0, name
    assert {"timer_late_p99_ms", "call_p99_ms"} <= set(figures["event_loop"])
    assert len(aims(figures)) == 9
    assert not list(tmp_path.glob("*/*.jsonl")), "what was measured is removed"
