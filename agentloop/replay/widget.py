"""The viewer as a notebook widget: JupyterLab, Notebook and marimo, through anywidget.

What a widget synchronises may be saved with the notebook, its own JavaScript included. So the synchronised part is a loader of
a few lines, and everything else, the viewer's code and one trajectory at a time, is handed over when it is asked for.
"""

from __future__ import annotations

import hashlib
import json
import threading
from functools import cache
from typing import Any

from agentloop.errors import ConfigError
from agentloop.replay.html import Link, script
from agentloop.replay.payload import Answer, Payload

_LOADER = """
const HASH = "@HASH@";
const cores = (globalThis[Symbol.for("agentloop.replay")] ??= new Map());

function core(model) {
  if (cores.has(HASH)) return Promise.resolve(cores.get(HASH));
  return new Promise((resolve, reject) => {
    const onMessage = async (message, buffers) => {
      if (message?.type !== "code") return;
      model.off("msg:custom", onMessage);
      const url = URL.createObjectURL(new Blob([buffers[0]], { type: "text/javascript" }));
      try {
        cores.set(HASH, await import(/* webpackIgnore: true */ /* @vite-ignore */ url));
        resolve(cores.get(HASH));
      } catch (error) {
        reject(error);
      } finally {
        URL.revokeObjectURL(url);
      }
    };
    model.on("msg:custom", onMessage);
    model.send({ type: "code" });
  });
}

async function render({ model, el }) {
  const note = document.createElement("p");
  note.setAttribute("role", "status");
  el.append(note);
  const timer = setTimeout(() => {
    note.textContent = "The kernel is busy or gone: the replay is shown when it answers.";
  }, 700);
  try {
    const { render } = await core(model);
    note.remove();
    return await render({ model, el });
  } catch (error) {
    note.textContent = `The replay cannot be shown: ${error}`;
  } finally {
    clearTimeout(timer);
  }
}

export default { render };
"""


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

    code = script("viewer.js").encode()

    class ReplayWidget(anywidget.AnyWidget):  # type: ignore[misc, unused-ignore]
        """A run in a notebook; as the last line of a cell it is shown."""

        _esm = _LOADER.replace("@HASH@", hashlib.sha256(code).hexdigest()[:16])
        options = traitlets.Dict().tag(sync=True)
        """`theme`, `height`, `link`."""

        def __init__(self, payload: Payload, *, height: int, theme: str, link: Link | None) -> None:
            super().__init__(options={"theme": theme, "height": height, "link": link})
            self._payload = payload
            self._sending = threading.Lock()  # ipykernel 7 asks in threads of its own while a cell runs
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
            kind = message.get("type") if isinstance(message, dict) else None
            if kind == "code":
                self.send({"type": "code"}, buffers=[code])
            elif kind == "request":
                request = message.get("request")
                if isinstance(request, dict) and request.get("kind") == "fork":  # takes its time, and the kernel has others
                    threading.Thread(target=self._answer, args=(message.get("n"), request), daemon=True).start()
                else:
                    self._answer(message.get("n"), request)

        def _answer(self, n: Any, request: Any) -> None:
            answer: Answer = self._payload.answer(request)
            content = {"type": "answer", "n": n, "header": json.loads(answer.json())}
            with self._sending:
                self.send(content, buffers=[answer.buffer] if answer.buffer else None)

        def __repr__(self) -> str:
            return f"ReplayWidget({str(self._payload.run.path)!r})"

    return ReplayWidget
