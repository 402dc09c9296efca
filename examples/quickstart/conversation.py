"""How a problem becomes a conversation, and the tokenizer that spells it.

The format is ChatML with Hermes calls, as Qwen3 writes it without thinking: a transcript is a prompt followed by pieces that
the model writes (trained) and pieces that the template and the calculator add (not trained).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.quickstart.calculator_tool import SCHEMA

SYSTEM = "Use the calculator, one operation per call. Answer in \\boxed{}."
TEMPLATE = Path(__file__).parent / "chat_template.jinja"

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
PIECES = r'\{"[^\d\n]*"|"?[\]}]+|\\boxed\{|\d| [-+*] |[()]| ?[A-Za-z]+|\n|.'
"""What byte pairs are merged within: JSON up to its last quote (so a schema and the opening of a call are one token each),
single digits, operators, words. A newline always stands alone, so text may be cut there and encoded in parts."""
VOCABULARY = 1024
"""At most; the corpus runs out of pairs before."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a transcript."""

    text: str
    trained: bool
    """The model is to write it."""


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def prompt_text(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """The conversation up to the opening of the model's first turn."""
    return str(tokenizer.apply_chat_template(messages(question), tools=[SCHEMA], add_generation_prompt=True, tokenize=False))


def call_turn(expression: str) -> Piece:
    """A turn that calls the calculator, with its end-of-turn token."""
    call = json.dumps({"name": "calculator", "arguments": {"expression": expression}})
    return turn(f"<tool_call>\n{call}\n</tool_call>")


def answer_turn(answer: int) -> Piece:
    return turn(f"\\boxed{{{answer}}}")


def turn(text: str, trained: bool = True) -> Piece:
    return Piece(f"{text}<|im_end|>", trained)


def response(text: str) -> Piece:
    """A tool's answer and the opening of the next turn."""
    wrapped = f"<tool_response>\n{text}\n</tool_response>"
    return Piece(f"\n<|im_start|>user\n{wrapped}<|im_end|>\n<|im_start|>assistant\n", trained=False)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Ids of every text by itself, control tokens included as such."""
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def train_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Qwen's control tokens (the tags are added tokens that are not special, as Qwen has them).

    `corpus` is plain text; control tokens are taken out of it, since they never take part in merges.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator((_without_control_tokens(text) for text in corpus), trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE.read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
    )


def _without_control_tokens(text: str) -> str:
    for token in SPECIAL + TAGS:
        text = text.replace(token, "\n")
    return text


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer so that transformers 4 and 5 both load it: version 5 gives the class a name that 4 lacks."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in ("backend", "is_local", "local_files_only")}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
