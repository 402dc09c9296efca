"""A recorded run as a cassette: played back through the real loop without a model or a tool, and forked at any turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentloop.cassette.forking import Fork as Fork
    from agentloop.cassette.forking import fork as fork
    from agentloop.cassette.forking import forks as forks
    from agentloop.cassette.replaying import Replay as Replay
    from agentloop.cassette.replaying import replay as replay
    from agentloop.cassette.setup import load_engine as load_engine
    from agentloop.cassette.setup import loop_of as loop_of
    from agentloop.cassette.tape import Cassette as Cassette
    from agentloop.cassette.tape import CassetteMismatch as CassetteMismatch
    from agentloop.cassette.tape import EndOfRecord as EndOfRecord
    from agentloop.cassette.tools import CassetteTools as CassetteTools
    from agentloop.cassette.tools import RecordedTools as RecordedTools

_HOMES = {
    "Cassette": "tape",
    "CassetteMismatch": "tape",
    "CassetteTools": "tools",
    "EndOfRecord": "tape",
    "Fork": "forking",
    "RecordedTools": "tools",
    "Replay": "replaying",
    "fork": "forking",
    "forks": "forking",
    "load_engine": "setup",
    "loop_of": "setup",
    "replay": "replaying",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
