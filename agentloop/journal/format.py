"""The format on disk: names, token frames, JSON lines. `docs/journal.md` describes it for other programs.

```
RUN/run.json                                    what the run is, written at every start
RUN/starts/g1.json                              the same for each start (generation), kept
RUN/train/step_000123/w0.g1.traj.jsonl          events of one writer, generation and step, one a line
RUN/train/step_000123/w0.g1.tok                 the tokens that the events point to
RUN/train/step_000123/w0.g1.index.jsonl         one row a trajectory; can be rebuilt from the events
RUN/val/step_000123/...                         the same for validation
```
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import zstandard

from agentloop.errors import AgentloopError

FORMAT = "agentloop-journal"
VERSION = 1
PARTITIONS = ("train", "val")
EVENTS_SUFFIX = ".traj.jsonl"
TOKENS_SUFFIX = ".tok"
INDEX_SUFFIX = ".index.jsonl"

PIECES = "pieces"
"""The type of the events that tell the bytes of token ids; they belong to no trajectory."""
MAX_PIECE = 0xFFFF
"""Longest text of one token, in bytes; what is longer is cut in the record's text (never in its ids)."""

_PREFIX = struct.Struct("<II")
_HEAD = struct.Struct("<4sII")
_MAGIC = b"TOK2"
_OLD_MAGIC = b"TOK1"
_HAS_LOG_PROBS = 1
_HAS_PIECES = 2
_HAS_TEXT = 4
_WIDE_IDS = 8
_HAS_ENTROPIES = 16
_FILE_NAME = re.compile(r"^(?P<writer>[A-Za-z0-9_-]+)\.g(?P<generation>[1-9][0-9]*)\.traj\.jsonl$")
_STEP_NAME = re.compile(r"^step_(?P<step>[0-9]{6,})$")
WRITER_NAME = re.compile(r"^[A-Za-z0-9_-]+$")


class JournalError(AgentloopError):
    """What is on disk is damaged; the message names the file and the place."""


class Place(NamedTuple):
    """Which files an event belongs to."""

    partition: str
    """`train` or `val`."""
    step: int

    @property
    def folder(self) -> str:
        return f"{self.partition}/step_{self.step:06d}"


class FileName(NamedTuple):
    """What the name of an event file says."""

    writer: str
    generation: int

    @property
    def stem(self) -> str:
        return f"{self.writer}.g{self.generation}"


def parse_file_name(name: str) -> FileName | None:
    match = _FILE_NAME.match(name)
    return FileName(match["writer"], int(match["generation"])) if match else None


def parse_step_name(name: str) -> int | None:
    match = _STEP_NAME.match(name)
    return int(match["step"]) if match else None


def sibling_path(events: Path, suffix: str) -> Path:
    """The token or index file that goes with an event file."""
    return events.with_name(events.name.removesuffix(EVENTS_SUFFIX) + suffix)


Buffer = bytes | memoryview

_NEAR = 64
"""Bytes between two parts of a file that are read along rather than skipped."""


def read_parts(path: Path, places: Sequence[tuple[int, int]]) -> list[Buffer]:
    """The parts of a file at these offsets and lengths, with as few reads as it takes; shorter ones where the file ends.
    Raises `OSError`, and `ValueError` for a place that no file has."""
    if any(offset < 0 or length < 0 for offset, length in places):
        raise ValueError("a place in a file is negative")
    parts: list[Buffer] = []
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        first = 0
        while first < len(places):
            start, end, last = places[first][0], sum(places[first]), first + 1
            while last < len(places) and end <= places[last][0] <= end + _NEAR:
                end, last = sum(places[last]), last + 1
            chunk = memoryview(os.pread(fd, min(end, size) - start, start) if start < size else b"")
            parts += [chunk[offset - start : offset - start + length] for offset, length in places[first:last]]
            first = last
    finally:
        os.close(fd)
    return parts


# -- token frames ---------------------------------------------------------------------------------------------------


class FrameRef(NamedTuple):
    """Where a frame lies in the token file: its compressed bytes, without the length prefix, and their CRC-32."""

    off: int
    len: int
    crc: int


@dataclass(frozen=True, slots=True)
class TokenFrame:
    """Columns of `n` tokens."""

    ids: Any
    """uint32, (n,)."""
    log_probs: Any
    """float32, (n,), NaN where a token was not sampled or its log-probability was not asked for; or `None`."""
    has_text: bool = False
    """`pieces` events tell the bytes of these ids."""
    piece_lens: Any = None
    """uint16, (n,): bytes of text of each token, in frames of the first kind, which carried them; else `None`."""
    piece_bytes: bytes = b""
    entropies: Any = None
    """float16, (n,); `None` if they were not told."""
    """The tokens' bytes one after the other. A token may hold a part of a UTF-8 character."""


def encode_frame(
    ids: bytes,
    log_probs: bytes | None,
    has_text: bool,
    compressor: zstandard.ZstdCompressor,
    entropies: Sequence[float] | None = None,
) -> tuple[list[Buffer], int, int]:
    """The record to append to a token file, in parts, and the length and CRC-32 of its packed bytes, from `n` token ids as
    uint32 and as many log-probabilities as float32, and maybe as many entropies.

    Numbers are split into planes: all lowest bytes, then all second ones, and so on. What compresses (the ids' lower three,
    since no vocabulary needs the fourth, and signs and exponents of the log-probabilities) goes into a zstd frame; the rest
    of the log-probabilities is noise and follows as it is.
    """
    n = len(ids) // 4
    flags = (0 if log_probs is None else _HAS_LOG_PROBS) | (_HAS_TEXT if has_text else 0)
    planes, values = _planes(ids), b"" if log_probs is None else _planes(log_probs)
    wide = not planes.endswith(bytes(n))
    told = b"" if entropies is None else _planes(np.array(entropies, np.float16).tobytes(), 2)
    if len(told) != 2 * n:  # also of an engine that told too few
        told = b""
    head = _HEAD.pack(_MAGIC, n, flags | (_WIDE_IDS if wide else 0) | (_HAS_ENTROPIES if told else 0))
    columns = head, planes if wide else memoryview(planes)[: 3 * n], memoryview(values)[3 * n :], told
    frame = compressor.compress(b"".join(columns))
    noise = memoryview(values)[: 3 * n]
    length, crc = len(frame) + len(noise), zlib.crc32(noise, zlib.crc32(frame))
    return [_PREFIX.pack(length, crc), frame, noise], length, crc


def _planes(numbers: bytes, width: int = 4) -> bytes:
    return bytes(np.frombuffer(numbers, np.uint8).reshape(-1, width).T.tobytes())


PREFIX_SIZE = _PREFIX.size


@dataclass(frozen=True, slots=True)
class PackedFrame:
    """A frame whose checksum held, with its columns still in planes."""

    n: int
    has_text: bool
    ids: Buffer
    """3 or 4 planes."""
    log_probs: tuple[Buffer, Buffer] | None
    """3 planes, 1 plane."""
    entropies: Buffer | None
    """2 planes."""
    old: TokenFrame | None = None
    """A frame of the first kind, which has no planes."""

    def put(self, ids: Any, log_probs: Any, entropies: Any = None) -> None:
        """Write the columns into arrays of `n` numbers: uint32 zeros, float32, float16. What the frame has not is left."""
        if self.old is not None:
            ids[:] = self.old.ids
            if self.old.log_probs is not None:
                log_probs[:] = self.old.log_probs
            return
        _put_planes(ids, self.ids)
        if self.log_probs is not None:
            _put_planes(log_probs, *self.log_probs)
        if self.entropies is not None:
            _put_planes(entropies, self.entropies)


def _put_planes(numbers: Any, *planes: Buffer) -> None:
    """The bytes of `n` numbers from buffers that hold their lowest planes, one after the other; the higher ones are left."""
    n = len(numbers)
    joined = numbers.view(np.uint8).reshape(n, -1)
    place = 0
    for part in planes:
        for plane in np.frombuffer(part, np.uint8).reshape(-1, n) if n else ():
            joined[:, place] = plane
            place += 1


def decode_frame(packed: bytes, crc: int, where: str) -> TokenFrame:
    """The inverse of `encode_frame`, without the prefix. `JournalError` that begins with `where` if it is damaged."""
    frame = open_frame(packed, crc, where, zstandard.ZstdDecompressor())
    if frame.old is not None:
        return frame.old
    ids: Any = np.zeros(frame.n, "<u4")
    log_probs: Any = None if frame.log_probs is None else np.empty(frame.n, "<f4")
    entropies: Any = None if frame.entropies is None else np.empty(frame.n, "<f2")
    frame.put(ids, log_probs, entropies)
    return TokenFrame(ids, log_probs, frame.has_text, entropies=entropies)


def open_frame(packed: Buffer, crc: int, where: str, decompressor: zstandard.ZstdDecompressor) -> PackedFrame:
    """The first half of `decode_frame`."""
    if zlib.crc32(packed) != crc:
        raise JournalError(f"{where}: the checksum of a token frame differs")
    try:
        data = decompressor.decompress(packed, allow_extra_data=True)
        magic, n, flags = _HEAD.unpack_from(data)
    except (zstandard.ZstdError, struct.error) as error:
        raise JournalError(f"{where}: not a token frame: {error}") from error
    if magic == _OLD_MAGIC:
        old = _decode_old(data, n, flags, where)
        return PackedFrame(n, old.has_text, b"", None, None, old)
    at, exponents = _HEAD.size, n if flags & _HAS_LOG_PROBS else 0
    end = at + (4 if flags & _WIDE_IDS else 3) * n
    rest = end + exponents
    if magic != _MAGIC or len(data) != rest + (2 * n if flags & _HAS_ENTROPIES else 0) or len(packed) < 3 * exponents:
        raise JournalError(f"{where}: not a token frame")
    view = memoryview(data)
    log_probs = (memoryview(packed)[len(packed) - 3 * n :], view[end:rest]) if flags & _HAS_LOG_PROBS else None
    return PackedFrame(n, bool(flags & _HAS_TEXT), view[at:end], log_probs, view[rest:] if flags & _HAS_ENTROPIES else None)


def _decode_old(data: bytes, n: int, flags: int, where: str) -> TokenFrame:
    """A frame of the first kind: columns as they are, and with flag 2 the text of each token."""
    at = _HEAD.size
    need = n * (4 + (4 if flags & _HAS_LOG_PROBS else 0) + (2 if flags & _HAS_PIECES else 0))
    if len(data) < at + need:
        raise JournalError(f"{where}: not a token frame")
    ids = np.frombuffer(data, "<u4", n, at)
    at += 4 * n
    log_probs = lens = None
    text = b""
    if flags & _HAS_LOG_PROBS:
        log_probs = np.frombuffer(data, "<f4", n, at)
        at += 4 * n
    if flags & _HAS_PIECES:
        lens = np.frombuffer(data, "<u2", n, at)
        text = data[at + 2 * n :]
        if len(text) != int(lens.sum()):
            raise JournalError(f"{where}: a token frame's text does not fit its lengths")
    return TokenFrame(ids, log_probs, lens is not None, lens, text)


# -- JSON lines -----------------------------------------------------------------------------------------------------

_OPTIONS = orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY


def dump_json(value: Any) -> bytes:
    """`value` as JSON.

    What orjson refuses (integers beyond 64 bits, lone surrogates) is written by the standard library, with a space before
    it: that is JSON too, but not every parser keeps such values exactly. Non-finite numbers become `null`; what JSON has no
    form for becomes its `str`.
    """
    try:
        return orjson.dumps(value, default=_plain, option=_OPTIONS)
    except (TypeError, ValueError):
        return b" " + json.dumps(_sanitise(value), ensure_ascii=True, separators=(",", ":")).encode()


def dump_line(event: Any) -> bytes:
    """One line with its newline; see `dump_json`."""
    return dump_json(event) + b"\n"


_SEAL = b',"line_crc":'
_SEALED_END = re.compile(rb"([0-9]+)\}\n?")
_LONGEST_SEAL = 32


def sealed(event: Mapping[str, Any]) -> bytes:
    """A line whose last key, `line_crc`, is the CRC-32 of all bytes before it."""
    body = dump_json(event)[:-1]
    return b"%b%b%d}\n" % (body, _SEAL, zlib.crc32(body))


def load_line(line: bytes) -> Any:
    """Raises `ValueError` for a line that is not JSON (a torn one), or that has a `line_crc` and another one now."""
    at = line.rfind(_SEAL, max(0, len(line) - _LONGEST_SEAL))
    told = _SEALED_END.fullmatch(line, at + len(_SEAL)) if at >= 0 else None
    if told and int(told[1]) != zlib.crc32(line[:at]):
        raise ValueError("the checksum of a line differs")
    return json.loads(line) if line.startswith(b" ") else orjson.loads(line)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return str(value)


def _sanitise(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _sanitise(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_sanitise(item) for item in value]
    return _sanitise(_plain(value))
