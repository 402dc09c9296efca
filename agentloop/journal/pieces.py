"""The bytes of each token, so that a record shows split characters truly and needs no tokenizer to be read."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from agentloop.journal.format import MAX_PIECE

PieceBytes = Callable[[int], bytes]
"""The bytes that one token id stands for; empty for an id that the tokenizer does not have."""

_BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")
_LARGEST_TABLE = 1 << 22


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: the printable character that byte-level BPE writes for each byte, to the byte.

    Source: `bytes_to_unicode` in openai/gpt-2, src/encoder.py: printable Latin-1 stands for itself, the rest is shifted
    to U+0100 and up in order.
    """
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in own}
    others = [byte for byte in range(256) if byte not in set(own)]
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_bytes(tokenizer: Any) -> PieceBytes:
    """The bytes of each id of a transformers tokenizer.

    Knows byte-level BPE (GPT-2's alphabet), SentencePiece-like pieces (`▁` is a space, `<0x0A>` a byte) and added tokens
    (their content); anything else is the token's own text as UTF-8.
    """
    added = {int(i): str(token.content).encode() for i, token in tokenizer.added_tokens_decoder.items()}
    kinds = _decoder_kinds(tokenizer)
    alphabet = byte_alphabet() if "ByteLevel" in kinds else None
    sentencepiece = bool({"Metaspace", "ByteFallback"} & kinds)

    @functools.cache
    def piece(token_id: int) -> bytes:
        if token_id in added:
            return added[token_id]
        try:
            token = tokenizer.convert_ids_to_tokens(token_id)
        except (IndexError, KeyError, OverflowError):
            return b""
        if not isinstance(token, str):
            return token if isinstance(token, bytes) else b""
        if alphabet is not None and all(char in alphabet for char in token):
            return bytes(alphabet[char] for char in token)
        if sentencepiece:
            match = _BYTE_TOKEN.match(token)
            return bytes([int(match[1], 16)]) if match else token.replace("▁", " ").encode("utf-8", "replace")
        return token.encode("utf-8", "replace")

    return piece


def _decoder_kinds(tokenizer: Any) -> set[str]:
    """Names of the steps of a fast tokenizer's decoder; empty for a slow one."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {str(step.get("type")) for step in [state, *state.get("decoders", [])]}


class PieceTable:
    """Looks pieces up a whole array at a time. Not for several threads at once."""

    def __init__(self, decode: PieceBytes) -> None:
        self._decode = decode
        self._pieces: Any = np.empty(0, dtype=object)
        self._lens: Any = np.empty(0, dtype=np.int32)
        """-1: not asked for yet."""

    def lookup(self, ids: Any) -> tuple[Any, bytes]:
        """Lengths (uint16, (n,)) and the joined bytes of `ids` (uint32, (n,))."""
        top = int(ids.max(initial=0))
        if top >= _LARGEST_TABLE:  # no vocabulary is that large; do not allocate for it
            pieces = [self._decode(int(i))[:MAX_PIECE] for i in ids]
            return np.array([len(piece) for piece in pieces], dtype=np.uint16), b"".join(pieces)
        if top >= len(self._lens):
            grow = max(top + 1, 2 * len(self._lens), 1024) - len(self._lens)
            self._pieces = np.concatenate([self._pieces, np.full(grow, b"", dtype=object)])
            self._lens = np.concatenate([self._lens, np.full(grow, -1, dtype=np.int32)])
        lens = self._lens[ids]
        if lens.min(initial=0) < 0:
            for i in np.unique(ids[lens < 0]).tolist():
                self._pieces[i] = self._decode(i)[:MAX_PIECE]
                self._lens[i] = len(self._pieces[i])
            lens = self._lens[ids]
        return lens.astype(np.uint16), b"".join(self._pieces[ids].tolist())
