"""Frames between a client and a launcher: a JSON head and any number of byte strings.

`u32 total, u32 head length, head, blobs`; big-endian; `head["blobs"]` holds the blobs' lengths. `total` counts what follows it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any

MAX_FRAME = 256 * 2**20


def pack(head: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    text = json.dumps({**head, "blobs": [len(blob) for blob in blobs]}, separators=(",", ":")).encode()
    total = 4 + len(text) + sum(map(len, blobs))
    if total > MAX_FRAME:
        raise ValueError(f"{total} bytes of code, input and files: a sandbox takes at most {MAX_FRAME} at once")
    return b"".join((struct.pack("!II", total, len(text)), text, *blobs))


class Unpacker:
    """Bytes in, frames out. Raises `ValueError` for what is no frame: the other side is not to be trusted any further."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
        self._buffer += data
        while len(self._buffer) >= 8:
            total, length = struct.unpack_from("!II", self._buffer)
            if total > MAX_FRAME or length + 4 > total:
                raise ValueError(f"a frame of {total} bytes with a head of {length}")
            if len(self._buffer) < 4 + total:
                return
            head = json.loads(bytes(self._buffer[8 : 8 + length]))
            blobs, at = [], 8 + length
            for size in head["blobs"]:
                if not isinstance(size, int) or size < 0 or at + size > 4 + total:
                    raise ValueError("a frame whose parts do not fit in it")
                blobs.append(bytes(self._buffer[at : at + size]))
                at += size
            del self._buffer[: 4 + total]
            yield head, blobs
