"""Renderers and tool-call parsers: messages to tokens, and sampled tokens to tool calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agentloop.chat.base import Message, Parsed, Piece, Renderer, ToolCallParser

if TYPE_CHECKING:
    from agentloop.chat.hermes import HermesParser
    from agentloop.chat.load import load_parser, load_renderer

__all__ = [
    "HermesParser",
    "Message",
    "Parsed",
    "Piece",
    "Renderer",
    "ToolCallParser",
    "load_parser",
    "load_renderer",
]

_LAZY = {"HermesParser": "hermes", "load_parser": "load", "load_renderer": "load"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"agentloop.chat.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
