"""How a problem becomes a conversation; template, tokenizer and transcripts are made as in the quickstart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from agentloop.chat import Renderer
from agentloop.config import load_yaml
from examples.code_math.task import Problem
from examples.quickstart.conversation import Transcript, encode_after

TOOLS = Path(__file__).parent / "tools.yaml"
SYSTEM = "Write Python for the tool. Answer in \\boxed{}."
SCHEMA: dict[str, Any] = load_yaml(TOOLS)["tools"][0]["tool_schema"]
"""Part of every prompt, and the tokenizer spells it in a few tokens: the model has to be made anew if it changes."""
PIECES = r'\{"[^\d\n]*"|"?[\]}]+|\\boxed\{|\\n *|\d| [-+*/%=<>]+ | ?[A-Za-z_]+\(?|, ?\(?| +|\n|.'
"""What byte pairs are merged within: JSON up to its last quote before a digit (a schema and the opening of a call are one token
each), an escaped newline with the spaces after it, single digits, operators, words, a name with its opening bracket."""


def messages(question: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def call(code: str) -> str:
    """A turn that runs `code`."""
    body = json.dumps({"name": "python", "arguments": {"code": code}})
    return f"<tool_call>\n{body}\n</tool_call>"


def encode(
    tokenizer: PreTrainedTokenizerFast, renderer: Renderer, problem: Problem, transcript: Transcript
) -> tuple[list[int], list[int]]:
    """Ids and labels of the whole conversation, as `encode_after`."""
    return encode_after(tokenizer, renderer, renderer.prompt(messages(problem.question), [SCHEMA]), transcript)
