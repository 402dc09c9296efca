"""64 conversations of 32,768 tokens in the viewer, recorded by the journal and served as `agentloop view` serves them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.replay.browser import chromium

PATIENCE = 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_64_conversations_of_32k_tokens(tmp_path: Path) -> None:
    chromium()
    for module in ("psutil", "aiohttp"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    from benchmarks.viewer import aims, measure, record, served

    run = tmp_path / "run"
    record(run, siblings=64, tokens=32_768)
    with served(run, page=False) as url:
        figures = asyncio.run(measure(url, siblings=64))
    # The benchmark says whether the aims hold. Times may be longer here, on machines that do other things too.
    patient = {name: value / PATIENCE if name.endswith("_ms") else value for name, value in figures.items()}
    assert not [aim for aim in aims(patient) if not aim.holds], figures
