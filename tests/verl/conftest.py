"""Fixtures of the verl tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agentloop.trajectory import Trajectory
from tests.verl.support import conversation


@pytest.fixture
def build() -> Callable[..., Trajectory]:
    """Builds ledgers by hand, see `conversation`."""
    return conversation


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A small real tokenizer with a padding token, made on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(chr(code) for code in range(33, 127))]
    tokens = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")
