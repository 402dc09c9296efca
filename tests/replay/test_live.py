"""A run that goes on while it is looked at: what is new comes by itself, and the reader stays where the reader is."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agentloop.journal import JournalWriter, Run
from agentloop.replay.forks import forker
from agentloop.replay.growth import growth
from agentloop.replay.payload import Payload
from agentloop.replay.server import ReplayServer
from tests.journal.conversations import conversation, decode, finish
from tests.replay.browser import ready
from tests.replay.runs import Recorded, going_on


@pytest.fixture
def page(context: Any) -> Iterator[Any]:
    page = context.new_page()
    page.clock.install()  # its seconds can be let pass at once; so it is in all pages of this file's browser
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    page.close()
    assert wrong == []


@contextmanager
def serving(payload: Payload) -> Iterator[ReplayServer]:
    server = ReplayServer(payload, title="live")
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


def test_growth_is_seen_and_rest_is_rest(tmp_path: Path) -> None:
    assert growth(tmp_path / "none").age_s is None
    with JournalWriter(tmp_path, decode=decode) as writer:
        conversation(writer, 0, step=1)
        writer.flush()
        payload = Payload(Run(tmp_path))
        before = payload.answer({"kind": "overview"}).header["stamp"]
        assert payload.answer({"kind": "changes"}).header["stamp"] == before
        conversation(writer, 1, step=2)
        writer.flush()
        told = payload.answer({"kind": "changes"}).header
        assert told["stamp"] != before and 0 <= told["age_s"] < 60
    closed = growth(tmp_path).stamp
    Run(tmp_path).rebuild_indexes()  # an index is nothing new to see
    assert growth(tmp_path).stamp == closed


def test_new_steps_appear_and_the_selection_stays(page: Any, tmp_path: Path) -> None:
    with JournalWriter(tmp_path / "run", decode=decode) as writer:
        for seed in range(3):
            conversation(writer, seed, step=1)
        writer.flush()
        with serving(Payload(Run(tmp_path / "run"))) as server:
            page.goto(server.url())
            ready(page, "run")
            page.keyboard.press("ArrowDown")
            chosen = page.locator(".list .row.active").get_attribute("data-group")
            assert chosen == "train/1/u1"
            page.locator(".chart").first.focus()
            conversation(writer, 3, step=2)
            writer.flush()
            page.clock.run_for(2500)
            page.locator('.list [data-group="train/2/u3"]').wait_for()
            assert page.locator(".list .row.active").get_attribute("data-group") == chosen
            assert page.evaluate("document.activeElement.shadowRoot.activeElement.className") == "chart"
            page.get_by_role("button", name="Live").click()
            conversation(writer, 4, step=2)
            writer.flush()
            page.clock.run_for(70_000)
            page.wait_for_timeout(100)
            assert page.locator('.list [data-group="train/2/u4"]').count() == 0
            page.get_by_role("button", name="Refresh").click()
            page.locator('.list [data-group="train/2/u4"]').wait_for()


def test_an_open_conversation_goes_on_below_the_reader(page: Any, tmp_path: Path) -> None:
    with JournalWriter(tmp_path / "run", decode=decode) as writer:
        going = conversation(writer, 0, step=1, stop_after="observation")
        writer.flush()
        with serving(Payload(Run(tmp_path / "run"))) as server:
            page.goto(server.url({"key": "train/1/u0_0", "token": "5"}))
            ready(page, key="train/1/u0_0")
            page.locator(".end-card", has_text="has not ended").wait_for()
            prompt = "document.querySelector('#agentloop-replay').shadowRoot.querySelector('.prompt')"
            page.evaluate(f"{prompt}.mine = true")
            finish(going, writer, reward=0.5)
            writer.flush()
            page.clock.run_for(2500)
            page.locator(".end-card", has_text="reward 0.5").wait_for()
            assert page.locator(".tokens-pane").get_attribute("data-token") == "5"
            assert page.evaluate(f"{prompt}.mine"), "what is as it was has been drawn anew"
            assert page.locator(".sample-head [data-badge=incomplete]").count() == 0


def test_a_server_that_has_gone_is_said(page: Any, tmp_path: Path) -> None:
    with JournalWriter(tmp_path / "run", decode=decode) as writer:
        conversation(writer, 0, step=1)
    with serving(Payload(Run(tmp_path / "run"))) as server:
        page.goto(server.url())
        ready(page, "run")
        page.route("**/request*", lambda route: route.abort())
        page.clock.run_for(2500)
        page.get_by_role("button", name="Live: no answer").wait_for()
        assert page.locator(".list .row").count() > 0
        page.unroute("**/request*")
        page.clock.run_for(5000)
        page.locator(".live[data-live=live]").wait_for()


def test_a_fork_from_the_page_to_the_command_that_shows_it(page: Any, recorded: Recorded, tmp_path: Path) -> None:
    shutil.copytree(recorded.path, tmp_path / "run")
    run = Run(tmp_path / "run")
    with serving(Payload(run, fork=forker(run, lambda: going_on("Then it is \\boxed{right}.")))) as server:
        page.goto(server.url({"key": "train/1/even_1"}))
        ready(page, key="train/1/even_1")
        page.get_by_role("button", name="fork with another result").first.click()
        page.get_by_label("another result of the tool").first.fill("43")
        page.get_by_role("button", name="Fork and go on").first.click()
        page.locator(".notice", has_text="Forked: 2 turns").wait_for()
        assert page.get_by_role("button", name="Copy command to view it").count() == 1
        page.get_by_role("button", name="fork with another prompt").first.click()
        page.get_by_label("another prompt").first.fill("And 1 + 1?")
        page.locator(".message").get_by_role("button", name="Fork and go on").click()
        page.locator(".notice", has_text="0002").wait_for()
    (made,) = Run(run.path / "forks" / "0001").trajectories()
    told = Run(run.path / "forks" / "0001").load(made)
    assert [call.text for turn in told.turns for call in turn.calls] == ["43"]
    parent = recorded.trajectories["train", 1, "even_1"]
    assert told.input_ids[: parent.turns[0].end] == parent.input_ids[: parent.turns[0].end]
    (made,) = Run(run.path / "forks" / "0002").trajectories()
    assert Run(run.path / "forks" / "0002").load(made).sample.messages[-1]["content"] == "And 1 + 1?"


def test_search_is_told_part_by_part(page: Any, recorded: Recorded) -> None:
    payload = Payload(Run(recorded.path))
    asked: list[Any] = []
    answer = payload.answer

    def noted(request: Any) -> Any:
        if request["kind"] == "search":
            asked.append(len(request["keys"]))
        return answer(request)

    payload.answer = noted  # type: ignore[method-assign]
    with serving(payload) as server:
        page.goto(server.url())
        ready(page, "run")
        page.locator(".search").first.fill("onerror=")
        page.keyboard.press("Enter")
        page.locator(".run-view[data-searched='onerror=']").wait_for()
        assert len(asked) > 1 and sum(asked) == 50
        assert page.locator(".tally").inner_text().startswith("3 groups, 3 of 50")
        found = page.locator(".row[data-key]").first
        assert found.locator("mark").inner_text() == "onerror="
        found.click()
        ready(page, "conversation")
        page.locator(".tok.found").first.wait_for()
        assert "of 1 place" in page.locator(".tokens-pane").inner_text()
