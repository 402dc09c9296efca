"""64 conversations of 32,768 tokens in the viewer, recorded by the journal and served as `agentloop view` serves them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.replay.browser import chromium


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
        for _ in range(3):  # a machine that is busy with something else is not the viewer's fault, three times in a row it is
            missed = [aim for aim in aims(asyncio.run(measure(url, siblings=64))) if not aim.holds]
            if not missed:
                return
    pytest.fail("missed: " + ", ".join(f"{aim.name} is {aim.value:.0f}, not {aim.aim}" for aim in missed))
