"""The pictures of the viewer in the README and the docs: `python -m examples.notebooks.screenshots`, in the repository.

Needs what the browser tests need: Chromium, Playwright and JupyterLab. Writes `docs/img/viewer_*.png` and `terminal.svg`, all
of the run of `planted_run` (recorded for it, or `--run FOLDER`).
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from agentloop.journal import Run
from agentloop.journal.show import show_trajectory
from agentloop.replay import to_frame, view
from examples.notebooks import planted_run
from examples.quickstart.evaluate import MODEL
from tests.replay.browser import browser, ready
from tests.replay.notebooks import jupyter, write_notebook

IMAGES = Path(__file__).parents[2] / "docs" / "img"
LARGEST = 300_000
"""Bytes of a picture."""


def suspect(run: Run) -> Any:
    """The trajectory that the notebook finds: after the change, all calls well, answers cut, and no reward; with the most
    turns. A row of `to_frame`."""
    calls = to_frame(run, "call").groupby(["step", "id"]).agg(ok=("ok", "all"), cut=("cut_tokens", "max")).reset_index()
    rows = to_frame(run).merge(calls)
    found = rows[
        (rows.step >= planted_run.CHANGE_AT) & rows.ok & (rows.cut > 0) & (rows.reward == 0) & (rows.parse_errors == 0)
    ]
    return found.sort_values(["turns", "tokens"]).iloc[-1]


def varied(run: Run) -> Any:
    """A trajectory of the group whose siblings differ most."""
    rows = to_frame(run)
    spread = rows.groupby(["step", "uid"]).agg(std=("reward", "std"), turns=("turns", "mean")).sort_values(["std", "turns"])
    step, uid = spread.index[-1]
    return rows[(rows.step == step) & (rows.uid == uid)].iloc[0]


def lab(folder: Path, context: Any) -> None:
    """The run in JupyterLab: where the reward falls."""
    write_notebook(folder / "run.ipynb", ["from agentloop import replay\n\nreplay.view('notebook', height=600)"])
    with jupyter(folder) as server:
        page = context.new_page()
        page.goto(f"{server.url}/lab/tree/run.ipynb?reset")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell .cm-content")
        page.wait_for_function("document.body.innerText.includes('Idle')")
        page.keyboard.press("Control+b")
        page.locator(".jp-CodeCell .cm-content").first.click()
        page.keyboard.press("Control+Enter")
        ready(page, "run")
        page.wait_for_timeout(1000)
        page.screenshot(path=str(IMAGES / "viewer_lab.png"))
        page.close()


def page(run: Run, context: Any, name: str, row: Any, *, colour: str, **place: Any) -> None:
    """A page from disk."""
    file = run.path.with_name(f"{name}.html")
    view(run, row.id, step=int(row.step), steps=int(row.step), file=file, **place)
    opened = context.new_page()
    opened.goto(file.as_uri())
    ready(opened, place["view"])
    opened.get_by_role("button", name=colour).click()
    opened.wait_for_timeout(1000)
    opened.screenshot(path=str(IMAGES / f"viewer_{name}.png"))
    opened.close()


def terminal(run: Run, row: Any) -> None:
    """`agentloop show RUN ID --tokens`."""
    console = Console(record=True, width=150, file=io.StringIO(), force_terminal=True, highlight=False)
    show_trajectory(console, run.load(row.id, step=int(row.step)), tokens=True)
    picture = console.export_svg(title=f"agentloop show runs/notebook {row.id} --step {row.step} --tokens")
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)  # fonts of another machine
    (IMAGES / "terminal.svg").write_text(picture, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures of the viewer.")
    parser.add_argument("--run", type=Path, help="a run of examples.notebooks.planted_run; default: recorded for it")
    given = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if given.run is None:
            planted_run.record(folder / "notebook", model=MODEL)
        else:
            shutil.copytree(given.run, folder / "notebook")
        run = Run(folder / "notebook")
        terminal(run, suspect(run))
        with browser() as context:
            lab(folder, context)
            page(run, context, "tokens", suspect(run), view="tokens", colour="Probability")
            page(run, context, "group", varied(run), view="group", colour="Origin", theme="dark")
    for path in [*IMAGES.glob("viewer_*.png"), IMAGES / "terminal.svg"]:
        size = path.stat().st_size
        print(f"{path.relative_to(IMAGES.parents[1])}  {size} bytes")
        if size > LARGEST:
            raise SystemExit(f"{path}: larger than {LARGEST} bytes")


if __name__ == "__main__":
    main()
