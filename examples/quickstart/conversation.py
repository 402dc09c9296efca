"""How a problem becomes a conversation, and the tokenizer that spells it.

The format is ChatML with Hermes calls, as Qwen3 writes it without thinking. Prompts and tool answers are rendered by agentloop
itself, so that what the model is trained on is token for token what it meets in a rollout.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agentloop.chat import Renderer
from examples.quickstart.calculator_tool import SCHEMA
from examples.quickstart.task import Problem

SYSTEM = "Use the calculator, one operation per call. Answer in \\boxed{}."
TEMPLATE = Path(__file__).parent / "chat_template.jinja"

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TURN = "<|im_end|>"
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
PIECES = r'\{"[^\d\n]*"|"?[\]}]+|\\boxed\{|\d| [-+*] |[()]| ?[A-Za-z]+|\n|.'
"""What byte pairs are merged within: JSON up to its last quote (so a schema and the opening of a call are one token each),
single digits, operators, words. A newline always stands alone, so text may be cut there and encoded in parts."""
VOCABULARY = 1024
"""At most; the corpus runs out of pairs before."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One turn of the model, and what it is told if it called the calculator."""

    written: str
    """Without the end-of-turn token."""
    answer: str | None = None
    """`None`: nothing follows, the turn is the last one."""
    is_taught: bool = True
    """`False`: a slip that the model is shown, to learn what to do after it."""


Transcript = Sequence[Exchange]
"""What follows the prompt."""


def messages(question: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def call(expression: str) -> str:
    """A turn that calls the calculator."""
    body = json.dumps({"name": "calculator", "arguments": {"expression": expression}})
    return f"<tool_call>\n{body}\n</tool_call>"


def final(answer: int) -> str:
    """A turn that answers."""
    return f"\\boxed{{{answer}}}"


def encode(
    tokenizer: PreTrainedTokenizerFast, renderer: Renderer, problem: Problem, transcript: Transcript
) -> tuple[list[int], list[int]]:
    """Ids and labels of the whole conversation, as `encode_after`."""
    return encode_after(tokenizer, renderer, renderer.prompt(messages(problem.question), [SCHEMA]), transcript)


def encode_after(
    tokenizer: PreTrainedTokenizerFast, renderer: Renderer, prompt: Sequence[int], transcript: Transcript
) -> tuple[list[int], list[int]]:
    """Ids of prompt and transcript, and labels: the same ids where the model writes, -100 elsewhere. Both [length]."""
    ids, labels = list(prompt), [-100] * len(prompt)
    for exchange in transcript:
        written = tokenizer.encode(exchange.written + END_OF_TURN, add_special_tokens=False)
        ids += written
        labels += written if exchange.is_taught else [-100] * len(written)
        if exchange.answer is not None:
            for piece in renderer.after_turn(written, [{"role": "tool", "content": exchange.answer}]):
                ids += piece.ids
                labels += [-100] * len(piece.ids)
    return ids, labels


def train_tokenizer(corpus: Iterable[str], pieces: str = PIECES) -> PreTrainedTokenizerFast:
    """A byte-level BPE within `pieces`, a regular expression, with Qwen's control tokens (the tags are added tokens that are
    not special, as Qwen has them)."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(corpus, trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TURN,
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE.read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer so that transformers 4 and 5 both load it: version 5 gives the class a name that 4 lacks."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in ("backend", "is_local", "local_files_only")}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
