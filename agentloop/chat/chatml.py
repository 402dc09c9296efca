"""The ChatML family (Qwen2.5, Qwen3 and their like): glue that is known, and written without asking the template.

A turn is `<|im_start|>role\\n…<|im_end|>\\n`. Results of tools come either together in one turn of the user, each between
`<tool_response>` tags (Qwen), or each in a turn of a role `tool`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from agentloop.chat.base import Message, Piece
from agentloop.chat.generic import GenericRenderer
from agentloop.chat.template import check_messages
from agentloop.chat.text import Run

END = "<|im_end|>"


class ChatMLRenderer(GenericRenderer):
    """Appends ChatML's own glue. `agentloop.chat.load_renderer` uses it only after comparing what it appends with what the
    template writes; the prompt is the template's either way."""

    grouped: bool
    """Results of tools are grouped in a turn of the user."""
    opening: str
    """The opening of the model's turn."""

    def fits(self) -> bool:
        """Whether the template looks like ChatML at all; sets `opening`."""
        if set(self._closings.values()) != {END}:
            return False
        head = self.template.render([{"role": "user", "content": "q"}], self.tools, opening=False)
        whole = self.template.render([{"role": "user", "content": "q"}], self.tools)
        self.opening = whole[len(head) :]
        return whole.startswith(head) and self.opening.startswith("<|im_start|>assistant\n")

    def after_turn(self, sampled: Sequence[int], messages: Sequence[Message]) -> list[Piece]:
        messages = check_messages(messages)
        if not all(message["role"] in ("user", "tool") and isinstance(message["content"], str) for message in messages):
            return super().after_turn(sampled, messages)
        if "tool" in self.not_taken and any(message["role"] == "tool" for message in messages):
            return super().after_turn(sampled, messages)  # says why not
        return self._pieces(sampled, [Run(f"{END}\n", False), *self._turns(messages), Run(self.opening, False)], END)

    def _turns(self, messages: Sequence[Message]) -> Iterator[Run]:
        for i, message in enumerate(messages):
            role, content = message["role"], Run(message["content"], True)
            if role == "tool" and self.grouped:
                before = i > 0 and messages[i - 1]["role"] == "tool"
                after = i + 1 < len(messages) and messages[i + 1]["role"] == "tool"
                yield Run(("" if before else "<|im_start|>user") + "\n<tool_response>\n", False)
                yield content
                yield Run("\n</tool_response>" + ("" if after else f"{END}\n"), False)
            else:
                yield Run("<|im_start|>", False)
                yield Run(role, False)
                yield Run("\n", False)
                yield content
                yield Run(f"{END}\n", False)
