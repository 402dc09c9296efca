"""`view`: a run in the notebook, by whichever way the notebook can show it."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from agentloop.errors import ConfigError, nearest
from agentloop.journal.recorded import Row
from agentloop.replay.forks import MakeLoop, forker, recorded_loop
from agentloop.replay.html import MAX_FILE_MB, MAX_INLINE_MB, Link, Page
from agentloop.replay.payload import Payload, key_of
from agentloop.replay.runs import RunLike, as_run, chosen_rows

Mode = Literal["auto", "widget", "iframe", "html"]
Theme = Literal["auto", "light", "dark"]
View = Literal["run", "group", "conversation", "tokens"]


def view(
    run: RunLike,
    trajectory: str | None = None,
    *,
    mode: Mode = "auto",
    step: int | None = None,
    partition: str | None = None,
    turn: int | None = None,
    token: int | None = None,
    view: View | None = None,
    steps: Iterable[int] | int | None = None,
    ids: Iterable[str] | str | None = None,
    height: int = 640,
    theme: Theme = "auto",
    file: str | Path | None = None,
    max_mb: float | None = None,
    fork: str | MakeLoop | None = None,
) -> Any:
    """Look at a run: `view("runs/quickstart")` as the last line of a cell.

    `run` is a folder, a name under `./runs` or an opened `Run`. `trajectory` is the id of the one to show first (of several
    with that id the one of the last step, or of `step` and `partition`), `turn` or `token` (a position, the prompt included) a
    place in it, and `view` which side of it. `steps` and `ids` narrow what there is to see.

    Modes:

    - `widget`: JupyterLab, Notebook and marimo. The kernel hands over one trajectory at a time; the notebook hardly grows, and
      shows nothing after its kernel has gone. Runs that go on are seen going on.
    - `iframe`: a self-contained page in the cell's output, for VS Code and Colab, which would fetch the widget's machinery from
      elsewhere. Saved with the notebook, it stays readable without a kernel. At most `max_mb` (10) megabytes.
    - `html`: the same page for a file: `.save(file)`, or at once with `file=`; `.open()` shows it in a browser. At most
      `max_mb` (100) megabytes.
    - `auto`: `iframe` in VS Code and Colab or without anywidget, `widget` in other notebooks, `html` elsewhere.

    `fork` lets the widget fork conversations: the name of the engine that goes on (`local`: the run's own model, in this
    process), or a function that makes the loop. Without it the viewer shows the command that does it.

    Nothing is ever fetched from outside the machine. Raises `ConfigError` for a wrong argument or a page that is too large.
    """
    for name, value, known in (("mode", mode, Mode), ("theme", theme, Theme), ("view", view, View)):
        if value not in get_args(known) and not (name == "view" and value is None):
            raise ConfigError(f"view: no {name} '{value}'; {nearest(str(value), get_args(known))}")
    opened = as_run(run)
    if mode == "auto":
        mode = "html" if file is not None else detect_mode()
    narrowed = steps is not None or ids is not None

    def rows() -> list[Row]:
        return chosen_rows(opened, steps=steps, ids=ids)

    make_loop = recorded_loop(opened, fork) if isinstance(fork, str) else fork
    payload = Payload(opened, rows if narrowed else None, fork=None if make_loop is None else forker(opened, make_loop))
    link = link_to(payload, trajectory, step=step, partition=partition, turn=turn, token=token, view=view)
    if mode == "widget":
        if file is not None:
            raise ConfigError("view: a widget cannot be written to a file; use mode='html'")
        from agentloop.replay.widget import replay_widget

        if narrowed:
            rows()
        return replay_widget(payload, height=height, theme=theme, link=link)
    limit = max_mb if max_mb is not None else MAX_INLINE_MB if mode == "iframe" else MAX_FILE_MB
    page = Page(opened, rows(), theme=theme, height=height, link=link, max_mb=limit)
    if file is not None:
        page.save(file)
    return page


def link_to(
    payload: Payload,
    trajectory: str | None,
    *,
    step: int | None = None,
    partition: str | None = None,
    turn: int | None = None,
    token: int | None = None,
    view: str | None = None,
) -> Link | None:
    """The viewer's name for a place; `None` for the run as a whole. `ConfigError` if there is no such place."""
    if trajectory is None:
        if turn is not None or token is not None:
            raise ConfigError("view: a turn or a token is one of a trajectory; name the trajectory too")
        if step is not None or partition is not None:
            raise ConfigError("view: step and partition say which trajectory is meant; to narrow what is shown use steps")
        return None if view is None else {"view": view}
    rows = [row for row in payload.rows() if step in (None, row.step) and partition in (None, row.partition)]
    found = [row for row in rows if trajectory in (row.id, key_of(row))]
    if not found:
        where = "".join([f" in step {step}" if step is not None else "", f" of {partition}" if partition else ""])
        hint = nearest(trajectory, sorted({row.id for row in rows})[:1000])
        raise ConfigError(f"{payload.run.path}: no trajectory '{trajectory}'{where}; {hint}")
    row = max(found, key=lambda row: (row.step, row.t))
    if token is not None and not 0 <= token < row.tokens:
        raise ConfigError(f"{payload.run.path}: trajectory {row.id} has tokens 0 to {row.tokens - 1}, not {token}")
    if turn is not None and not 0 <= turn < row.turns:
        raise ConfigError(f"{payload.run.path}: trajectory {row.id} has turns 0 to {row.turns - 1}, not {turn}")
    places = {"turn": turn, "token": token, "view": view}
    return {"key": key_of(row)} | {name: value for name, value in places.items() if value is not None}


def detect_mode() -> Mode:
    """What `auto` means here."""
    if _is_marimo():
        return "widget" if _has_anywidget() else "iframe"
    if not _is_notebook():
        return "html"
    elsewhere = "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ or _is_vs_code()
    return "iframe" if elsewhere or not _has_anywidget() else "widget"


def _is_marimo() -> bool:
    marimo = sys.modules.get("marimo")
    return marimo is not None and bool(marimo.running_in_notebook())


def _shell() -> Any:
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None


def _is_notebook() -> bool:
    return hasattr(_shell(), "kernel")


def _is_vs_code() -> bool:
    return "__vsc_ipynb_file__" in _shell().user_ns or "VSCODE_PID" in os.environ or "VSCODE_CWD" in os.environ


def _has_anywidget() -> bool:
    return importlib.util.find_spec("anywidget") is not None
