"""Reward for the form of what was written: tags in order, or a pattern."""

from __future__ import annotations

import asyncio
import re
from typing import Any, Literal

from pydantic import Field

from agentloop.config import Strict, validate
from agentloop.errors import ConfigError
from agentloop.rewards.linear_regex import LinearRegex
from agentloop.rewards.spec import plain
from agentloop.trajectory import Origin, Reward, Sample, Trajectory

_TAG = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_SHORT = 2_000
"""Characters that are checked without leaving the event loop."""


class FormatSettings(Strict):
    """Settings of `FormatReward`. At least one of `tags` and `pattern`."""

    tags: tuple[str, ...] = ()
    """`[think, answer]`: the text is `<think>…</think>`, then `<answer>…</answer>`, each once, in this order, not empty, and
    with nothing but white space before and between them."""
    after: Literal["nothing", "text", "any"] = "nothing"
    """What follows the last tag: `nothing` but white space, some `text`, or `any`thing. `tags: [think]` with `after: text` is
    reasoning, then an answer."""
    pattern: str | None = None
    """A regular expression that the whole text matches, see `LinearRegex`."""
    turns: Literal["text", "last", "all"] = "text"
    """What is looked at. `text`: the text of the last turn as every reward gets it, without reasoning that the parser took
    out. `last` and `all`: what the model sampled in the last turn, or in each, reasoning and tool calls included; they need a
    tokenizer."""
    tokenizer: str | None = None
    """Folder or name of the model's tokenizer. As verl's reward manager it is the model's without being named."""
    score: Literal["all", "fraction"] = "all"
    """With `turns: all`: 1 if every turn has the form, or the fraction of the turns that do."""
    reward: float = Field(1.0, allow_inf_nan=False)
    """For the right form."""
    penalty: float = Field(0.0, allow_inf_nan=False)
    """For the wrong one."""


class FormatReward:
    """`reward` if what was written has the form, `penalty` if not. Takes time linear in the text, whatever is in it."""

    def __init__(self, **settings: Any) -> None:
        """`settings` are those of `FormatSettings`. Raises `ConfigError`."""
        self.settings = validate(FormatSettings, plain(settings), "reward format")
        if not self.settings.tags and self.settings.pattern is None:
            raise ConfigError("reward format: give 'tags' or 'pattern', or both")
        for tag in self.settings.tags:
            if not _TAG.fullmatch(tag):
                raise ConfigError(f"reward format: key 'tags': {tag!r} is no name of a tag")
        pattern = self.settings.pattern
        self._pattern = None if pattern is None else LinearRegex(pattern, "reward format: key 'pattern':")
        self._tokenizer: Any = None
        self.reads_trajectory = self.settings.turns != "text"

    def bind_tokenizer(self, tokenizer: Any) -> None:
        """Use this tokenizer if none is configured."""
        if self.settings.tokenizer is None:
            self._tokenizer = tokenizer

    async def __call__(self, trajectory: Trajectory, sample: Sample, text: str) -> Reward:
        """Raises `ConfigError` where a tokenizer is needed and there is none."""
        if self.settings.turns == "text":
            texts = [text]
        else:
            texts = await asyncio.to_thread(self._sampled, trajectory)
        if sum(map(len, texts)) <= _SHORT:
            problems = [self.problem(text) for text in texts]
        else:
            problems = await asyncio.to_thread(lambda: [self.problem(text) for text in texts])
        right = problems.count("") / len(problems) if problems else 0.0
        if self.settings.score == "all":
            right = float(right == 1.0)
        value = right * self.settings.reward + (1.0 - right) * self.settings.penalty
        first = next((problem for problem in problems if problem), "" if problems else "there is no turn")
        return Reward(value, {"right": right}, {"problem": first})

    def problem(self, text: str) -> str:
        """What is wrong with the form of `text`; empty if nothing is."""
        problem = _tags_problem(text, self.settings.tags, self.settings.after) if self.settings.tags else ""
        if not problem and self._pattern is not None and not self._pattern.fullmatch(text):
            problem = "it does not match the pattern"
        return problem

    def _sampled(self, trajectory: Trajectory) -> list[str]:
        """The text of each turn (or of the last) as it was sampled, without the control token that ended it."""
        if self._tokenizer is None:
            if self.settings.tokenizer is None:
                raise ConfigError(f"reward format: 'turns: {self.settings.turns}' needs 'tokenizer'")
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self.settings.tokenizer)
        special = set(self._tokenizer.all_special_ids)
        sampled = {segment.turn: segment.ids for segment in trajectory.segments if segment.origin is Origin.SAMPLED}
        turns = trajectory.turns if self.settings.turns == "all" else trajectory.turns[-1:]
        texts = []
        for turn in turns:
            ids = sampled.get(turn.index, ())
            ids = ids[:-1] if ids and ids[-1] in special else ids
            texts.append(str(self._tokenizer.decode(ids, skip_special_tokens=False)))
        return texts


def _tags_problem(text: str, tags: tuple[str, ...], after: str) -> str:
    for tag in dict.fromkeys(tags):
        for mark in (f"<{tag}>", f"</{tag}>"):
            if text.count(mark) != tags.count(tag):
                return f"{mark} stands {text.count(mark)} times, expected {tags.count(tag)}"
    place = 0
    for tag in tags:
        opening, closing = text.find(f"<{tag}>", place), text.find(f"</{tag}>", place)
        inside = opening + len(tag) + 2
        if opening < 0 or closing < inside:
            return f"<{tag}> is out of order"
        if text[place:opening].strip():
            return f"there is text before <{tag}>"
        if not text[inside:closing].strip():
            return f"<{tag}> is empty"
        place = closing + len(tag) + 3
    rest = text[place:].strip()
    if after == "nothing" and rest:
        return "there is text after the last tag"
    if after == "text" and not rest:
        return "there is no text after the last tag"
    return ""
