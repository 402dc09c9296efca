"""Looking at a run: the viewer, in a notebook, in a file or in a browser, and dataframes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentloop.replay.frames import to_frame as to_frame
    from agentloop.replay.html import Page as Page
    from agentloop.replay.notebook import view as view

_HOMES = {"Page": "html", "to_frame": "frames", "view": "notebook"}

__all__ = ["Page", "to_frame", "view"]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
