"""The bytes of tokens, for tokenizers of the real kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agentloop.journal import JournalError, token_bytes
from agentloop.journal.format import dump_line
from agentloop.journal.pieces import PieceReader, PieceTeller, pieces_event

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


def test_what_is_told_of_tokens_is_read_back_and_told_once(tmp_path: Path) -> None:
    def decode(token_id: int) -> bytes:
        return bytes([token_id % 256, 10, 0x85]) * (token_id % 13)

    path, teller, reader = tmp_path / "events", PieceTeller(), PieceReader(tmp_path / "events")
    rng, places, told = np.random.default_rng(0), [], []
    for large in (1, 1, 1, 10**6):
        for _ in range(5):
            ids = (rng.integers(0, 4000, 300) * large).astype(np.uint32)
            fresh = teller.untold(ids)
            told += fresh.tolist()
            if len(fresh):
                teller.tell(fresh)
                line = dump_line(pieces_event(fresh, decode, 0.0))
                assert len(line.decode().splitlines()) == 1, "whatever a program takes for a line's end"
                with path.open("ab") as file:
                    places.append((file.tell(), len(line)))
                    file.write(line)
            reader.read(places)
            lens, text = reader.lookup(ids)
            assert lens.tolist() == [len(decode(i)) for i in ids.tolist()]
            assert text == b"".join(decode(i) for i in ids.tolist())
    assert len(told) == len(set(told)), "each id is told once"
    assert reader.lookup(np.empty(0, np.uint32))[1] == b""
    with pytest.raises(JournalError, match="the text of token 4000000001 is missing"):
        reader.lookup(np.array([told[0], 4_000_000_001], np.uint32))


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True
