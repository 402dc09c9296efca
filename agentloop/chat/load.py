"""Choosing a renderer and a parser."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from agentloop.chat.base import Renderer, ToolCallParser
from agentloop.chat.chatml import ChatMLRenderer
from agentloop.chat.generic import GenericRenderer
from agentloop.chat.hermes import HermesParser
from agentloop.chat.proof import prove, proves_same
from agentloop.chat.template import Template
from agentloop.chat.text import TextEncoder
from agentloop.errors import ConfigError, RendererRefused, nearest

KINDS = ("auto", "chatml", "generic")

PROBES = (
    "plain words",
    "",
    " \n spaced\t\n\n",
    "\n",
    "<|im_end|>\n<|im_start|>user\n",
    "</tool_response> <think>",
    '"quoted\\" {{ x }} {% if %}',
)
"""What messages say when the renderers are compared: among it what templates like to change."""

_encoders: WeakKeyDictionary[Any, tuple[int, TextEncoder]] = WeakKeyDictionary()
_renderers: WeakKeyDictionary[Any, dict[tuple[Any, ...], Renderer]] = WeakKeyDictionary()


def load_renderer(
    tokenizer: Any,
    *,
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    kind: str = "auto",
) -> Renderer:
    """The renderer for a tokenizer's chat template.

    `tokenizer` is a fast transformers tokenizer. `chat_template` is used instead of the tokenizer's own; of several named ones
    `tool_use` is taken, else `default`. `template_kwargs` are the template's arguments (`enable_thinking`). `kind` `auto`
    takes the renderer of our own for ChatML where it appends the same as the template does, else the generic one; `chatml` or
    `generic` insist on one. Renderers are kept: asking again with the same arguments is free.

    Raises `RendererRefused` for a template that cannot be rendered append-only, naming the first piece that differs.
    """
    if kind not in KINDS:
        raise ConfigError(f"renderer kind '{kind}' is unknown: {nearest(kind, KINDS)}")
    source = _source(tokenizer, chat_template)
    arguments = dict(template_kwargs or {})
    key = (source, len(tokenizer), json.dumps(arguments, sort_keys=True, default=repr), kind)
    kept = _renderers.setdefault(tokenizer, {})
    if key not in kept:
        kept[key] = _load(tokenizer, source, arguments, kind)
    return kept[key]


def _source(tokenizer: Any, chat_template: str | None) -> str:
    source = chat_template if chat_template is not None else getattr(tokenizer, "chat_template", None)
    if isinstance(source, Mapping):
        source = source.get("tool_use", source.get("default"))
    if not isinstance(source, str) or not source.strip():
        raise ConfigError("the tokenizer has no chat template; give one as chat_template")
    return source


def _load(tokenizer: Any, source: str, arguments: dict[str, Any], kind: str) -> Renderer:
    encoder = _encoder(tokenizer)
    for reserved in ("messages", "tools", "add_generation_prompt", "documents"):
        if reserved in arguments:
            raise ConfigError(f"template_kwargs must not have '{reserved}': the renderer sets it")
    template = Template(source, {**tokenizer.special_tokens_map, **arguments}, encoder)
    generic = GenericRenderer(template, encoder)
    prove(generic)
    if kind == "generic":
        return generic
    own = ChatMLRenderer(template, encoder)
    if own.fits():
        for own.grouped in (True, False):
            if proves_same(generic, own, PROBES):
                return own
    if kind == "chatml":
        raise RendererRefused("the chat template does not write ChatML as the renderer of our own does; use kind 'auto'")
    return generic


def _encoder(tokenizer: Any) -> TextEncoder:
    known = _encoders.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        known = (len(tokenizer), TextEncoder(tokenizer))
        _encoders[tokenizer] = known
    return known[1]


PARSERS: dict[str, Callable[[Any], ToolCallParser]] = dict.fromkeys(
    ("hermes", "qwen", "qwen2", "qwen2_5", "qwen25", "qwen3"), HermesParser
)
"""Names as verl's `multi_turn.format` has them where they mean the same (`hermes`), and those of other engines."""


def load_parser(name: str, renderer: Renderer) -> ToolCallParser:
    """The parser called `name`; raises `ConfigError` for an unknown one."""
    if name not in PARSERS:
        raise ConfigError(f"tool-call parser '{name}' is unknown: {nearest(name, PARSERS)}")
    return PARSERS[name](renderer)
