"""The viewer as a notebook widget: JupyterLab, Notebook and marimo, through anywidget."""

from __future__ import annotations

import json
import threading
from functools import cache
from typing import Any

from agentloop.errors import ConfigError
from agentloop.replay.html import Link, script
from agentloop.replay.payload import Payload


def replay_widget(payload: Payload, *, height: int = 640, theme: str = "auto", link: Link | None = None) -> Any:
    """A widget that shows the run. Raises `ConfigError` if anywidget is not installed."""
    return _widget_class()(payload, height=height, theme=theme, link=link)


@cache
def _widget_class() -> type[Any]:
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        raise ConfigError("the widget needs anywidget: pip install 'agentloop[notebook]', or mode='iframe'") from error

    class ReplayWidget(anywidget.AnyWidget):  # type: ignore[misc, unused-ignore]
        """Tokens go to the browser in answers to its requests, one trajectory at a time, and are never part of the widget's
        state, so the notebook does not grow."""

        _esm = script("viewer.js")
        options = traitlets.Dict().tag(sync=True)
        """`theme`, `height`, `link`."""

        def __init__(self, payload: Payload, *, height: int, theme: str, link: Link | None) -> None:
            super().__init__(options={"theme": theme, "height": height, "link": link})
            self._payload = payload
            self._lock = threading.Lock()  # ipykernel 7 answers in threads of its own while a cell runs
            self.on_msg(self._told)

        def goto(
            self,
            trajectory: str | None = None,
            *,
            step: int | None = None,
            partition: str | None = None,
            turn: int | None = None,
            token: int | None = None,
            view: str | None = None,
        ) -> None:
            """Show this place in the views that are open; as the arguments of `agentloop.replay.view`."""
            from agentloop.replay.notebook import link_to

            link = link_to(self._payload, trajectory, step=step, partition=partition, turn=turn, token=token, view=view)
            self.send({"type": "event", "event": {"kind": "goto", "link": link or {"view": "run"}}})

        def refresh(self) -> None:
            """Tell the views that are open that there may be more to see."""
            self.send({"type": "event", "event": {"kind": "changed"}})

        def _told(self, widget: Any, message: Any, buffers: Any) -> None:
            del widget, buffers
            if not isinstance(message, dict) or message.get("type") != "request":
                return
            with self._lock:
                answer = self._payload.answer(message.get("request"))
            content = {"type": "answer", "n": message.get("n"), "header": json.loads(answer.json())}
            self.send(content, buffers=[answer.buffer] if answer.buffer else None)

        def __repr__(self) -> str:
            return f"ReplayWidget({str(self._payload.run.path)!r})"

    return ReplayWidget
