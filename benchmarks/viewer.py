"""The replay viewer in a real browser over a long group: first paint, elements, memory, switching, scrolling.

`python -m benchmarks.viewer [--siblings 64] [--tokens 32768] [--page]`

One group is recorded by the real journal, with the trainer's part beside it, and served as `agentloop view` serves it;
`--page` writes it as one HTML file and opens that instead. Chromium draws without a GPU. Times are of the page's own clock
and end when the browser has drawn; memory is what the browser's processes keep to themselves, over what they kept before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import threading
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import aiohttp
import numpy as np

from agentloop.journal import JournalWriter, Run
from agentloop.journal.train_side import TrainerRow, write_update
from agentloop.trajectory import EndReason, Origin, Reward, Sample, StopReason, Trajectory, Turn
from benchmarks.report import Aim, report

TURNS = 8
VOCABULARY = 5000
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync")  # fmt: skip

# Each ends after the frame that shows what was asked for.
_DRAWN = "const drawn = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));"
_ROOT = "const root = document.querySelector('#agentloop-replay'), shadow = root.shadowRoot;"
FIRST_PAINT = f"""async () => {{ {_DRAWN}
  for (;;) {{
    const frame = document.querySelector("#agentloop-replay")?.shadowRoot?.querySelector(".frame[data-ready]");
    if (frame) {{ await drawn(); return performance.now(); }}
    await drawn();
  }}
}}"""
NODES = f"() => {{ {_ROOT} return document.querySelectorAll('*').length + shadow.querySelectorAll('*').length; }}"
SWITCH = f"""async (key) => {{ {_DRAWN} {_ROOT}
  const start = performance.now();
  await root.viewer.goto({{view: "tokens", key}});
  await drawn();
  return performance.now() - start;
}}"""
SCROLL = f"""async () => {{ {_ROOT}
  const pane = shadow.querySelector(".tokens"), frames = [];
  pane.scrollTop = 0;
  let last = await new Promise(requestAnimationFrame);
  for (let i = 0; i < 240; i++) {{
    pane.scrollTop += i % 8 ? 180 : 900;
    const now = await new Promise(requestAnimationFrame);
    frames.push(now - last);
    last = now;
  }}
  return frames;
}}"""
STRIPS = f"""async (key) => {{ {_DRAWN} {_ROOT}
  const start = performance.now();
  await root.viewer.goto({{view: "group", key}});
  while (!shadow.querySelector("[data-strips]")) await drawn();
  return performance.now() - start;
}}"""


def piece(token: int) -> bytes:
    """The text of a made-up token: mostly words, some newlines."""
    rng = random.Random(token % VOCABULARY)
    if rng.random() < 0.04:
        return b"\n"
    return (" " if rng.random() < 0.8 else "").encode() + bytes(rng.choices(b"etaoinshrdlu", k=rng.randint(1, 8)))


def record(folder: Path, siblings: int, tokens: int) -> None:
    """A run of one step and one group."""
    rng = np.random.default_rng(0)
    rows = []
    with JournalWriter(folder, "w0", generation=1, decode=piece, queue_limit=1 << 20) as writer:
        for sibling in range(siblings):
            trajectory = Trajectory(Sample(messages=[{"role": "user", "content": "?"}], uid="0"), sibling=sibling, step=1)
            trajectory.append_prompt([*range(512)])
            writer.trajectory_start(trajectory)
            for index in range(TURNS):
                start = len(trajectory)
                end = tokens if index == TURNS - 1 else start + (tokens - 512) // TURNS
                sampled = (end - start) * 3 // 4
                turn = Turn(index, start, start + sampled, StopReason.STOP, weight_version=1, generate_s=1.0)
                ids = rng.integers(0, VOCABULARY, end - start).tolist()
                trajectory.append_sampled(ids[:sampled], (-rng.exponential(0.5, sampled)).tolist(), turn)
                writer.turn(trajectory, turn)
                trajectory.append(Origin.OBSERVATION, ids[sampled:])
                writer.observation(trajectory, turn)
            trajectory.end_reason, trajectory.reward = EndReason.FINAL_ANSWER, Reward(float(sibling % 2))
            writer.trajectory_end(trajectory)
            mask = np.array(trajectory.response_mask, np.uint8)
            old = np.array(trajectory.rollout_log_probs, np.float32) + rng.normal(0, 0.1, len(mask)).astype(np.float32)
            columns = {"old_log_probs": old, "advantages": mask * np.float32(0.5), "response_mask": mask}
            rows.append(TrainerRow(1, "0", sibling, trajectory.response_ids, columns))
            writer.flush()
    write_update(folder, rows, step=1, update=0, generation=1)


@contextmanager
def served(run: Path, page: bool) -> Iterator[str]:
    """The address of a viewer of the run."""
    from agentloop.replay.payload import Payload
    from agentloop.replay.server import ReplayServer

    if page:
        from agentloop.replay import view

        path = run.parent / "run.html"
        view(run, mode="html", file=path, max_mb=1000)
        yield path.as_uri()
        return
    server = ReplayServer(Payload(Run(run)))
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server.url()
    finally:
        server.close()


def own_memory() -> float:
    """MB that the browser's processes keep to themselves."""
    import psutil

    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            if "chrom" in process.name():
                total += process.memory_full_info().uss
        except psutil.NoSuchProcess:
            continue
    return total / 1e6


class Browser:
    """A page of a Chromium of its own, over its debugging protocol. Playwright would ask the browser to keep a copy of all
    that it receives, which is not the viewer's memory."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._asked = 0

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._asked += 1
        await self._socket.send_json({"id": self._asked, "method": method, "params": parameters})
        while True:
            answer: dict[str, Any] = await self._socket.receive_json()
            if answer.get("id") == self._asked:
                return dict(answer["result"])

    async def open(self, url: str) -> None:
        await self.ask("Page.navigate", url="about:blank")
        await asyncio.sleep(0.3)
        await self.ask("Page.navigate", url=url)

    async def call(self, function: str, *arguments: str) -> Any:
        """What a JavaScript function gives in the page, once its promise is settled."""
        text = f"({function})({','.join(map(json.dumps, arguments))})"
        answer = await self.ask("Runtime.evaluate", expression=text, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"the page failed: {answer['exceptionDetails']}")
        return answer["result"].get("value")


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        sys.exit("no Chromium on this machine")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = [
            f"--user-data-dir={profile}",
            "--headless",
            "--remote-debugging-port=0",
            "--window-size=1280,860",
            *ARGUMENTS,
        ]
        process = await asyncio.create_subprocess_exec(path, *arguments, "about:blank", stdout=DEVNULL, stderr=DEVNULL)
        try:
            said = Path(profile) / "DevToolsActivePort"
            while not (said.exists() and "\n" in said.read_text()):  # noqa: ASYNC110 - another program writes it
                await asyncio.sleep(0.05)
            port = said.read_text().split()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                    pages = await answer.json(content_type=None)
                address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    yield Browser(socket)
        finally:
            process.terminate()
            await process.wait()


async def measure(url: str, siblings: int) -> dict[str, float]:
    """All figures of a viewer of `record`'s run at `url`."""
    keys = [f"train/1/0_{sibling}" for sibling in range(siblings)]
    fragment = f"#view=tokens&key={keys[0].replace('/', '%2F')}"
    async with browser() as tab:
        await tab.open(url)
        await tab.call(FIRST_PAINT)  # the browser itself has started
        await tab.ask("Page.navigate", url="about:blank")
        await asyncio.sleep(1)
        before = own_memory()
        await tab.open(url)
        run_paint = await tab.call(FIRST_PAINT)
        nodes = [await tab.call(NODES)]
        await tab.open(url + fragment)
        paint = await tab.call(FIRST_PAINT)
        nodes.append(await tab.call(NODES))
        switches = [await tab.call(SWITCH, key) for key in keys[3 : min(siblings, 43) : 2]]
        scroll = await tab.call(SCROLL)
        nodes.append(await tab.call(NODES))
        strips = await tab.call(STRIPS, keys[0])
        nodes.append(await tab.call(NODES))
        await tab.call(SWITCH, keys[-1])
        after = own_memory()
    return {
        "first_paint_run_ms": run_paint,
        "first_paint_tokens_ms": paint,
        "strips_all_ms": strips,
        "nodes_max": max(nodes),
        "memory_more_mb": after - before,
        "switch_p50_ms": quantiles(switches, n=20)[9],
        "switch_p95_ms": quantiles(switches, n=20)[18],
        "scroll_p50_ms": quantiles(scroll, n=20)[9],
        "scroll_p95_ms": quantiles(scroll, n=20)[18],
    }


def aims(figures: dict[str, float]) -> list[Aim]:
    limits = [
        ("first_paint_tokens_ms", 1000, "under 1,000"),
        ("nodes_max", 5000, "under 5,000"),
        ("memory_more_mb", 250, "under 250"),
        ("switch_p50_ms", 100, "under 100"),
        ("scroll_p95_ms", 50, "under 50"),
    ]
    return [Aim(name, figures[name], words, figures[name] < limit) for name, limit, words in limits]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.viewer", description=__doc__)
    parser.add_argument("--siblings", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--page", action="store_true", help="one HTML file from disk instead of a server")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        started = perf_counter()
        record(run, arguments.siblings, arguments.tokens)
        recorded_s = perf_counter() - started
        with served(run, arguments.page) as url:
            figures = asyncio.run(measure(url, arguments.siblings))
    settings = {"siblings": arguments.siblings, "tokens": arguments.tokens, "recorded_s": recorded_s}
    report("viewer_page" if arguments.page else "viewer", settings | figures, aims(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
