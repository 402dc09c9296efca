"""What models, tools and datasets wrote, at its worst, through the journal and every host: it is text, it is seen, and nothing
freezes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from agentloop import replay
from agentloop.journal import JournalWriter, Run
from agentloop.replay.payload import Payload
from agentloop.replay.server import ReplayServer
from agentloop.trajectory import (
    CallRecord,
    CallStatus,
    EndReason,
    Origin,
    Reward,
    Sample,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)
from tests.replay.browser import ready

EVIL = (
    "\u202e</script><img src=x onerror=window.hacked=1>\u200b\u200d\x00\ud800 \x1b]8;;http://evil\x07link\x1b]8;;\x07 "
    "<svg/onload=window.hacked=2>'\"`--><!--\U000e0041\u2028\ufeff"
)
FAMILY = "👩‍👩‍👧".encode()
PIECES = [
    *(bytes([byte]) for byte in FAMILY),
    *(
        text.encode()
        for text in (
            "</script><img src=x onerror=window.hacked=3>",
            "\u202e\u2066\u200b",
            "e\u0301" * 3,
            "مرحبا",
            "\r\u2029\x85",
        )
    ),
    *(b"\x00\x1b[2J", b"\xed\xa0\x80", b"\xff\xfe", b"A" * 3000),
]
TEXTS = {
    "evil": (EVIL, [*range(len(FAMILY), len(PIECES))] * 20),
    "line": ("x" * 1_000_000, [1]),
    "rtl": ("\u202e\u2067" * 1000 + "שלום" * 5000, [len(FAMILY) + 3] * 500),
    "split": ("👩‍👩‍👧" * 1000, [*range(len(FAMILY))] * (10_000 // len(FAMILY))),
    "lines": ("\n" * 100_000, [2]),
}
STATE = """() => {
  const shadow = document.querySelector("#agentloop-replay").shadowRoot;
  const unseen = /[\\u0000-\\u0008\\u001b\\u200b\\u202a-\\u202e\\u2066-\\u2069]/;
  const attributes = [...shadow.querySelectorAll("*")].flatMap((el) => [...el.attributes])
    .filter(({name, value}) => !name.startsWith("data-") && unseen.test(value)).map(({name}) => name);
  return {hacked: window.hacked ?? null, made: shadow.querySelectorAll("img, script, iframe, a[href], svg[onload]").length,
          unseen: unseen.test(shadow.querySelector(".frame").textContent), attributes};
}"""
WIDE = """() => {
  const pane = document.querySelector("#agentloop-replay").shadowRoot.querySelector(".conversation");
  return pane.scrollWidth - pane.clientWidth;
}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "hostile"
    with JournalWriter(folder, "w0", generation=1, decode=PIECES.__getitem__) as writer:
        for name, (text, ids) in TEXTS.items():
            sample = Sample(
                [{"role": EVIL, "content": text}, {"role": "user", "content": text}],
                uid=f"{name}<b>\u202e/%#?&",
                ground_truth=EVIL,
            )
            trajectory = Trajectory(sample, step=1)
            trajectory.append_prompt([0])
            writer.trajectory_start(trajectory)
            turn = Turn(0, 1, 1 + len(ids), StopReason.STOP, weight_version=1, generate_s=1.0)
            trajectory.append_sampled(ids, [-0.1] * len(ids), turn)
            writer.turn(trajectory, turn)
            call = CallRecord(ToolCall(EVIL, {EVIL: text}, EVIL), CallStatus.OK, text, metrics={EVIL: 1.0}, attempts=1)
            turn.calls.append(call)
            writer.tool(trajectory, turn, call)
            trajectory.append(Origin.OBSERVATION, ids[:50])
            writer.observation(trajectory, turn)
            trajectory.end_reason, trajectory.error = EndReason.FINAL_ANSWER, EVIL
            trajectory.reward = Reward(0.0, {EVIL: 1.0, "more": 0.0}, {EVIL: EVIL})
            writer.trajectory_end(trajectory)
    return folder


@pytest.mark.parametrize("host", ["server", "page"])
def test_the_worst_texts_are_only_text(context: Any, run: Path, tmp_path: Path, host: str) -> None:
    wrong: list[str] = []
    tab = context.new_page()
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("dialog", lambda dialog: wrong.append(dialog.message))
    server = ReplayServer(Payload(Run(run)), title="hostile")
    threading.Thread(target=server.serve, daemon=True).start()
    if host == "page":
        replay.view(run, mode="html", file=tmp_path / "run.html")
    tab.goto(server.url() if host == "server" else (tmp_path / "run.html").as_uri())
    ready(tab, "run")
    assert len(list(Run(run).trajectories())) == len(TEXTS)
    for row in Run(run).trajectories():
        for view in ("group", "tokens", "conversation"):
            link = {"key": f"train/1/{row.id}", "view": view}
            tab.evaluate("link => document.querySelector('#agentloop-replay').viewer.goto(link)", link)
            ready(tab, view)
        while tab.locator(".more").count():  # a line of a megabyte too
            tab.locator(".more").first.click()
        tab.wait_for_timeout(50)
        assert tab.evaluate(STATE) == {"hacked": None, "made": 0, "unseen": False, "attributes": []}, row.id
        assert tab.evaluate(WIDE) <= 0, row.id
    tab.close()
    server.close()
    assert wrong == []
