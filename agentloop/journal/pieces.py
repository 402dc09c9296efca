"""The bytes of each token, so that a record shows split characters truly and needs no tokenizer to be read."""

from __future__ import annotations

import functools
import json
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentloop.journal.format import MAX_PIECE, PIECES, JournalError, load_line

PieceBytes = Callable[[int], bytes]
"""The bytes that one token id stands for; empty for an id that the tokenizer does not have."""

_BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")
_LARGEST_TABLE = 1 << 22
_WINDOW = 16
"""Bytes of a token that are written at once when tokens are spelt. Few tokens are longer."""
_FEW = 500
"""Numbers that are sorted quicker than a table of the vocabulary is gone through."""


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


_SHOWN = {byte: char for char, byte in byte_alphabet().items()}
_MEANT = {ord(char): byte for char, byte in byte_alphabet().items()}


class PieceTeller:
    """Of one event file: which tokens' bytes have been told there. Not for several threads at once."""

    def __init__(self) -> None:
        self._told: Any = np.zeros(1024, dtype=bool)
        self._told_large: set[int] = set()

    def untold(self, ids: Any) -> Any:
        """Those of `ids` (uint32, (n,)) that were not told yet, each once, in ascending order."""
        try:
            told = self._told.take(ids)
        except IndexError:
            return self._untold_beyond(ids)
        if told.all():
            return ids[:0]
        untold = ids[~told]
        if len(untold) < _FEW:
            return np.array(sorted(set(untold.tolist())), np.uint32)
        among: Any = np.zeros(len(self._told), dtype=bool)
        among[untold] = True
        return np.flatnonzero(among).astype(np.uint32)

    def _untold_beyond(self, ids: Any) -> Any:
        top = int(ids.max())
        if top >= _LARGEST_TABLE:  # no vocabulary is that large; do not allocate for it
            large = {i for i in ids.tolist() if i >= _LARGEST_TABLE} - self._told_large
            small = self.untold(ids[ids < _LARGEST_TABLE])
            return np.concatenate([small, np.array(sorted(large), np.uint32)])
        grown: Any = np.zeros(max(top + 1, 2 * len(self._told)), dtype=bool)
        grown[: len(self._told)] = self._told
        self._told = grown
        return self.untold(ids)

    def tell(self, fresh: Any) -> None:
        """What `untold` found is in the file by now."""
        if fresh[-1] < _LARGEST_TABLE:
            self._told[fresh] = True
        else:
            self._told[fresh[fresh < _LARGEST_TABLE]] = True
            self._told_large.update(fresh[fresh >= _LARGEST_TABLE].tolist())


def pieces_event(ids: Any, decode: PieceBytes, t: float) -> dict[str, Any]:
    """The event that tells the bytes of `ids`: how many of each, and all of them in GPT-2's alphabet, a character a byte."""
    known = ids.tolist()
    pieces = list(map(decode, known))
    lens = list(map(len, pieces))
    if max(lens, default=0) > MAX_PIECE:
        pieces = [piece[:MAX_PIECE] for piece in pieces]
        lens = list(map(len, pieces))
    joined = b"".join(pieces)
    shown = joined.decode("latin-1")
    plain = shown.isascii() and shown.isprintable()  # of these the alphabet changes the space alone
    shown = shown.replace(" ", _SHOWN[32]) if plain else shown.translate(_SHOWN)
    return {"type": PIECES, "t": t, "ids": known, "lens": lens, "bytes": shown, "crc": zlib.crc32(joined)}


class PieceReader:
    """The bytes of token ids, from the `pieces` events of one event file; of an id that comes twice the last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        """Events that were taken in."""
        self._ids: Any = np.empty(0, dtype=np.int64)
        """Of the columns below; one that comes twice counts as it came last."""
        self._lens: Any = np.empty(0, dtype=np.uint16)
        self._windows: Any = np.empty(0, dtype=f"V{_WINDOW}")
        """The first bytes of each, zeros behind them."""
        self._tails: dict[int, bytes] = {}
        """Of those that are longer, by place: the rest."""
        self._places: Any = np.empty(0, dtype=np.int64)
        """By id, of ids that are not huge, where it is in the columns; -1: not told."""
        self._large: dict[int, int] = {}
        """The same for huge ones."""

    def read(self, events: Sequence[Sequence[int]]) -> None:
        """Take in the events at these offsets and lengths that are new since the last time. Raises `JournalError`."""
        if len(events) == self._read:
            return
        ids: list[int] = []
        lens: list[int] = []
        chunks: list[bytes] = []
        offset = 0
        try:
            with self._path.open("rb") as file:
                for offset, length in events[self._read :]:
                    file.seek(offset)
                    event = load_line(file.read(length))
                    chunks.append(event["bytes"].translate(_MEANT).encode("latin-1"))
                    if zlib.crc32(chunks[-1]) != event["crc"] or sum(event["lens"]) != len(chunks[-1]):
                        raise ValueError("the checksum differs")
                    ids += event["ids"]
                    lens += event["lens"]
            every_id = np.concatenate([self._ids, np.array(ids, np.int64)])
            every_len = np.concatenate([self._lens.astype(np.int64), np.array(lens, np.int64)])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise JournalError(f"{self._path}: the texts of tokens, offset {offset}: {error}") from error
        if len(every_id) != len(every_len) or every_id.min(initial=0) < 0 or every_len.min(initial=0) < 0:
            raise JournalError(f"{self._path}: the texts of tokens, offset {offset}: damaged")
        if every_len.max(initial=0) > MAX_PIECE:
            raise JournalError(f"{self._path}: the texts of tokens, offset {offset}: damaged")
        windows, tails = _windows(np.array(lens, np.int64), b"".join(chunks))
        self._tails |= {len(self._lens) + place: tail for place, tail in tails.items()}
        self._windows = np.concatenate([self._windows, windows])
        self._ids, self._lens = every_id, every_len.astype(np.uint16)
        self._read = len(events)
        small = np.flatnonzero(self._ids < _LARGEST_TABLE)
        self._places = np.full(int(self._ids[small].max(initial=-1)) + 1, -1, dtype=np.int64)
        self._places[self._ids[small]] = small
        self._large = {int(self._ids[place]): int(place) for place in np.flatnonzero(self._ids >= _LARGEST_TABLE)}

    def lookup(self, ids: Any) -> tuple[Any, bytes]:
        """Lengths (uint16, (n,)) and the joined bytes of `ids` (uint32, (n,)). `JournalError` if one was never told."""
        return self.spell(self.places(ids))

    def places(self, ids: Any) -> Any:
        """Where `ids` (uint32, (n,)) are in the columns, which only ever grow; for `spell`. `JournalError` if one is not."""
        known = len(self._places)
        if int(ids.max(initial=0)) < known:
            places = self._places.take(ids)
        else:
            looked_up = (int(self._places[i]) if i < known else self._large.get(i, -1) for i in ids.tolist())
            places = np.fromiter(looked_up, np.int64, len(ids))
        if places.min(initial=0) < 0:
            unknown = int(ids[int(np.argmax(places < 0))])
            raise JournalError(f"{self._path}: the text of token {unknown} is missing")
        return places

    def spell(self, places: Any) -> tuple[Any, bytes]:
        """Lengths (uint16, (n,)) and the joined bytes of the tokens at these places."""
        lens = self._lens.take(places)
        starts = np.cumsum(lens, dtype=np.int64)
        size = int(starts[-1]) if len(starts) else 0
        starts -= lens
        spelt: Any = np.empty(size + _WINDOW, np.uint8)
        # Every token writes a whole window at its start; the next one overwrites what is too much, for numpy assigns in order.
        np.ndarray((size + 1,), self._windows.dtype, spelt, 0, (1,))[starts] = self._windows.take(places)
        if self._tails and int(lens.max(initial=0)) > _WINDOW:
            for at in np.flatnonzero(lens > _WINDOW).tolist():
                start = int(starts[at])
                spelt[start + _WINDOW : start + int(lens[at])] = np.frombuffer(self._tails[int(places[at])], np.uint8)
        return lens, spelt[:size].tobytes()


def _windows(lens: Any, joined: bytes) -> tuple[Any, dict[int, bytes]]:
    """The first bytes of pieces of these lengths, and by number the rest of those that are longer."""
    ends = np.cumsum(lens)
    starts = ends - lens
    padded = np.frombuffer(joined + bytes(_WINDOW), np.uint8)
    found = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[starts]
    found *= np.arange(_WINDOW) < lens[:, None]
    long = np.flatnonzero(lens > _WINDOW).tolist()
    return found.view(f"V{_WINDOW}").reshape(-1), {at: joined[int(starts[at]) + _WINDOW : int(ends[at])] for at in long}
