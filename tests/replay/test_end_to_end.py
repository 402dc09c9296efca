"""Recorded runs in a real browser, through the server and from a file: Python's side and the core agree."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentloop import replay
from agentloop.journal import Run
from agentloop.replay.payload import Payload
from agentloop.replay.server import ReplayServer
from tests.replay.browser import ready
from tests.replay.runs import STEPS, TEXT, Recorded, planted_badges


@pytest.fixture
def page(context: Any) -> Iterator[Any]:
    page = context.new_page()
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda message: page.wrong.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: page.wrong.append(dialog.message))
    yield page
    page.close()
    assert [text for text in page.wrong if "favicon" not in text and "404" not in text] == []


@pytest.fixture(scope="module")
def server(recorded: Recorded) -> Iterator[ReplayServer]:
    server = ReplayServer(Payload(Run(recorded.path)), title="mini")
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    yield server
    server.close()
    thread.join()


def test_the_run_is_counted_as_planted(page: Any, server: ReplayServer, recorded: Recorded) -> None:
    page.goto(server.url())
    ready(page, "run")
    planted: Counter[str] = Counter()
    for partition, step, key in recorded.trajectories:
        planted.update(planted_badges(step, key) if partition == "train" else ())
    for name, count in planted.items():
        chip = page.locator(f"[data-filter='{name}']")
        assert chip.locator("b").inner_text() == str(count), name
    assert page.get_by_text("train side: 22 of 30 arrived").count() == 1


def test_a_place_is_opened_from_the_address(page: Any, server: ReplayServer) -> None:
    page.goto(server.url({"key": "train/1/flat_2", "turn": 1}))
    ready(page, key="train/1/flat_2")
    assert page.locator(".frame").get_by_text(TEXT.split()[0]).count() > 0
    page.get_by_role("button", name="next sibling").click()
    ready(page, key="train/1/flat_3")


def test_hostile_text_of_a_recorded_tool_never_runs(page: Any, server: ReplayServer) -> None:
    for view in ("conversation", "tokens"):
        page.goto(server.url({"key": "train/1/trouble_3", "view": view}))
        ready(page, key="train/1/trouble_3")
        page.wait_for_timeout(200)
        assert page.title().startswith("mini")
        assert page.locator(".frame").get_by_text("onerror=").count() > 0 or view == "tokens"
        assert page.locator("img, svg[onload], .frame style + style").count() == 0


def test_an_unfinished_trajectory_is_shown_as_far_as_it_is_written(page: Any, server: ReplayServer) -> None:
    page.goto(server.url({"key": f"train/{STEPS[-1]}/trouble_3"}))
    ready(page, key=f"train/{STEPS[-1]}/trouble_3")
    assert page.locator(".frame [data-badge='incomplete']").count() > 0


def test_a_page_from_disk(page: Any, recorded: Recorded, tmp_path: Path) -> None:
    file = tmp_path / "run.html"
    replay.view(recorded.path, "even_0", step=1, steps=1, file=file, theme="dark")
    page.goto(file.as_uri())
    ready(page, key="train/1/even_0")
    page.get_by_role("button", name="next sibling").click()
    ready(page, key="train/1/even_1")
