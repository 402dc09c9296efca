"""The bytes of tokens, for tokenizers of the real kinds."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agentloop.journal import token_bytes
from agentloop.journal.pieces import PieceTable

TEXT = "Été à Zürich: 価格は 12 € 🙂👩‍👩‍👧 \t\n  x_1 = [1, 2]\r\n" * 3
ADDED = ["<|im_end|>", "<tool_call>", "<｜tool▁calls▁begin｜>"]


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return with_added(tokenizer)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama 2's kind: `▁` for a space, bytes for what is not in the vocabulary."""
    pieces = ["<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)] + sorted({*"abcx_1= [,2]:▁Zrich"} - {" "}) + ["▁x"]
    merges = [("▁", "x")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return with_added(tokenizer)


def with_added(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(ADDED[0], special=True)])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED[1:]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_joined_pieces_are_the_text(make: type) -> None:
    tokenizer = make()
    piece = token_bytes(tokenizer)
    text = ADDED[1] + TEXT + ADDED[2] + "▁" * (make is byte_level) + ADDED[0]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(piece, ids)).decode() == text
    assert any(not _is_text(piece(i)) for i in ids), "some character is split over tokens"


def test_ids_that_are_no_tokens_are_empty() -> None:
    piece = token_bytes(byte_level())
    assert piece(10**6) == b""


def test_a_table_looks_up_what_decode_says() -> None:
    asked: list[int] = []

    def decode(token_id: int) -> bytes:
        asked.append(token_id)
        return b"x" * (token_id % 7)

    table = PieceTable(decode)
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.integers(0, 5000, 300).astype(np.uint32)
        lens, text = table.lookup(ids)
        assert lens.tolist() == [i % 7 for i in ids.tolist()]
        assert text == b"x" * int(lens.sum())
    assert len(asked) == len(set(asked)), "each id is asked for once"
    lens, text = table.lookup(np.array([4_000_000_000, 1], np.uint32))
    assert (lens.tolist(), text) == ([4_000_000_000 % 7, 1], b"x" * (4_000_000_000 % 7 + 1))
    assert table.lookup(np.empty(0, np.uint32))[1] == b""


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True
