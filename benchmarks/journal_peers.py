"""Other ways to keep trajectories on disk, each as one would write it: what `benchmarks.journal` compares with."""

from __future__ import annotations

import json
import sqlite3
import zipfile
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard


@dataclass(frozen=True, slots=True)
class Record:
    """One trajectory, whole."""

    id: str
    prompt: str
    response: str
    ids: list[int]
    log_probs: list[float]
    mask: list[int]
    piece_lens: Any
    """uint16: bytes of text of each token."""
    reward: float
    facts: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        """With the keys of verl's dump, and the tokens."""
        return {
            "id": self.id,
            "input": self.prompt,
            "output": self.response,
            "score": self.reward,
            "ids": self.ids,
            "log_probs": self.log_probs,
            "mask": self.mask,
            **self.facts,
        }


class Clock:
    """Adds up the time of `with` blocks: of the wall, and of the processor (all threads)."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 0.0

    def __enter__(self) -> Clock:
        self._began = perf_counter(), process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s += perf_counter() - self._began[0]
        self.cpu_s += process_time() - self._began[1]


class Peer(ABC):
    """A format. `write` is called with some records at a time; the clock runs over it and over `close`."""

    name = ""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.clock = Clock()

    @abstractmethod
    def write(self, records: Sequence[Record]) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def read(self, number: int) -> Sequence[int]:
        """Read one record whole; its token ids, as the format has them: a list, or an array of numpy's."""

    @abstractmethod
    def rewards(self) -> list[float]:
        """Of all records, from the disk."""


class Jsonl(Peer):
    """As verl dumps rollouts: the standard library's json, one line a trajectory. A line's place is known when one is read."""

    name = "jsonl"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "1.jsonl"
        self.file = self.path.open("wb")
        self.places = [0]

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            self.file.write(self.dump(record.plain()))
            self.places.append(self.file.tell())

    def close(self) -> None:
        self.file.close()

    def read(self, number: int) -> list[int]:
        with self.path.open("rb") as file:
            file.seek(self.places[number])
            found: list[int] = self.load(file.read(self.places[number + 1] - self.places[number]))["ids"]
        return found

    def rewards(self) -> list[float]:
        with self.path.open("rb") as file:
            return [self.load(line)["score"] for line in file]

    def dump(self, value: Any) -> bytes:
        return (json.dumps(value, ensure_ascii=False) + "\n").encode()

    def load(self, line: bytes) -> Any:
        return json.loads(line)


class OrjsonLines(Jsonl):
    name = "jsonl_orjson"

    def dump(self, value: Any) -> bytes:
        return orjson.dumps(value) + b"\n"

    def load(self, line: bytes) -> Any:
        return orjson.loads(line)


class MsgpackZstd(Peer):
    """One compressed message a trajectory, the tokens as typed columns, and an index in a file of its own."""

    name = "msgpack_zstd"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path, self.index_path = folder / "frames", folder / "index"
        self.file, self.index = self.path.open("wb"), self.index_path.open("wb")
        self.compressor = zstandard.ZstdCompressor(level=1)

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            frame = self.compressor.compress(msgpack.packb(packed(record)))
            self.index.write(msgpack.packb([record.id, record.reward, self.file.tell(), len(frame)]))
            self.file.write(frame)

    def close(self) -> None:
        self.file.close()
        self.index.close()

    def rows(self) -> list[Any]:
        return list(msgpack.Unpacker(self.index_path.open("rb")))

    def read(self, number: int) -> list[int]:
        if not hasattr(self, "known"):
            self.known = self.rows()
        _, _, offset, length = self.known[number]
        with self.path.open("rb") as file:
            file.seek(offset)
            return ids_of(msgpack.unpackb(zstandard.ZstdDecompressor().decompress(file.read(length))))

    def rewards(self) -> list[float]:
        return [row[1] for row in self.rows()]


class Sidecar(Peer):
    """JSON lines that point into a file of compressed token columns, one frame a turn, and an index: the journal at its
    plainest. Nothing is flushed or told apart in it, it is written when all is known, and each frame has its tokens' texts."""

    name = "jsonl_sidecar"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.events, self.tokens, self.index = ((folder / name).open("wb") for name in ("events", "tokens", "index"))
        self.compressor = zstandard.ZstdCompressor(level=1)

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            text, at, began, frames = (record.prompt + record.response).encode(), 0, 0, []
            for end in [turn[1] for turn in record.facts["turns"]]:
                ids, values, lens = record.ids[began:end], record.log_probs[began:end], record.piece_lens[began:end]
                size = int(lens.sum())
                parts = (array("I", ids).tobytes(), array("f", values).tobytes(), lens.tobytes(), text[at : at + size])
                frame = self.compressor.compress(b"".join(parts))
                frames.append([self.tokens.tell(), len(frame), end - began, zlib.crc32(frame)])
                self.tokens.write(frame)
                at, began = at + size, end
            line = orjson.dumps({"id": record.id, "score": record.reward, "frames": frames, **record.facts}) + b"\n"
            self.index.write(orjson.dumps(self.row(record) | {"off": self.events.tell(), "len": len(line)}) + b"\n")
            self.events.write(line)

    @staticmethod
    def row(record: Record) -> dict[str, Any]:
        """What a listing of a run shows."""
        facts = record.facts
        return {
            "id": record.id,
            "uid": facts["uid"],
            "step": facts["step"],
            "end_reason": facts["end_reason"],
            "reward": record.reward,
            "turns": len(facts["turns"]),
            "tokens": len(record.ids),
            "sampled": sum(record.mask),
            "calls": len(facts["calls"]),
            "failures": sum(call[2] != "ok" for call in facts["calls"]),
        }

    def close(self) -> None:
        for file in (self.events, self.tokens, self.index):
            file.close()

    def rows(self) -> list[Any]:
        return [orjson.loads(line) for line in (self.folder / "index").read_bytes().splitlines()]

    def read(self, number: int) -> Sequence[int]:
        """All columns and the tokens' texts."""
        if not hasattr(self, "known"):
            self.known = self.rows()
        row = self.known[number]
        with (self.folder / "events").open("rb") as file:
            file.seek(row["off"])
            line = orjson.loads(file.read(row["len"]))
        columns: dict[str, list[Any]] = {"ids": [], "log_probs": [], "lens": []}
        texts = []
        with (self.folder / "tokens").open("rb") as file:
            for offset, length, n, crc in line["frames"]:
                file.seek(offset)
                frame = file.read(length)
                assert zlib.crc32(frame) == crc
                data = zstandard.ZstdDecompressor().decompress(frame)
                columns["ids"].append(np.frombuffer(data, np.uint32, n))
                columns["log_probs"].append(np.frombuffer(data, np.float32, n, 4 * n))
                columns["lens"].append(np.frombuffer(data, np.uint16, n, 8 * n))
                texts.append(data[10 * n :])
        whole: dict[str, Any] = {name: np.concatenate(parts) for name, parts in columns.items()}
        whole["text"] = b"".join(texts)
        ids: Sequence[int] = whole["ids"]
        return ids

    def rewards(self) -> list[float]:
        return [row["reward"] for row in self.rows()]


class Sqlite(Peer):
    """One row a trajectory in WAL mode, the message compressed."""

    name = "sqlite_wal"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.db = sqlite3.connect(folder / "run.db")
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=NORMAL")
        self.db.execute("CREATE TABLE t (number INTEGER PRIMARY KEY, id TEXT, reward REAL)")
        self.db.execute("CREATE TABLE body (number INTEGER PRIMARY KEY, frame BLOB)")
        self.compressor = zstandard.ZstdCompressor(level=1)
        self.count = 0

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            frame = self.compressor.compress(msgpack.packb(packed(record)))
            self.db.execute("INSERT INTO t VALUES (?, ?, ?)", (self.count, record.id, record.reward))
            self.db.execute("INSERT INTO body VALUES (?, ?)", (self.count, frame))
            self.db.commit()
            self.count += 1

    def close(self) -> None:
        self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def read(self, number: int) -> list[int]:
        [frame] = self.db.execute("SELECT frame FROM body WHERE number = ?", (number,)).fetchone()
        return ids_of(msgpack.unpackb(zstandard.ZstdDecompressor().decompress(frame)))

    def rewards(self) -> list[float]:
        return [reward for (reward,) in self.db.execute("SELECT reward FROM t ORDER BY number")]


class Parquet(Peer):
    """A row group for what comes at a time; nothing can be read before the file is closed."""

    name = "parquet"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "run.parquet"
        texts = [("id", pa.string()), ("input", pa.string()), ("output", pa.string()), ("facts", pa.string())]
        lists = [("ids", pa.list_(pa.uint32())), ("log_probs", pa.list_(pa.float32())), ("mask", pa.list_(pa.uint8()))]
        self.schema = pa.schema([*texts, *lists, ("score", pa.float64())])
        self.writer = pq.ParquetWriter(self.path, self.schema, compression="zstd")
        self.groups: list[int] = [0]

    def write(self, records: Sequence[Record]) -> None:
        columns = [
            [record.id for record in records],
            [record.prompt for record in records],
            [record.response for record in records],
            [orjson.dumps(record.facts).decode() for record in records],
            [np.frombuffer(array("I", record.ids), np.uint32) for record in records],
            [np.array(record.log_probs, np.float32) for record in records],
            [np.array(record.mask, np.uint8) for record in records],
            [record.reward for record in records],
        ]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self.schema, strict=True)]
        self.writer.write_table(pa.Table.from_arrays(arrays, schema=self.schema))
        self.groups.append(self.groups[-1] + len(records))

    def close(self) -> None:
        self.writer.close()

    def read(self, number: int) -> list[int]:
        group = next(i for i, last in enumerate(self.groups[1:]) if number < last)
        table = pq.ParquetFile(self.path).read_row_group(group)
        return [int(i) for i in table.slice(number - self.groups[group], 1).to_pylist()[0]["ids"]]

    def rewards(self) -> list[float]:
        return [float(x) for x in pq.read_table(self.path, columns=["score"])["score"].to_pylist()]


class Zip(Peer):
    """A member a trajectory, JSON, deflated: the kind of Inspect's logs."""

    name = "zip_deflate"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "run.zip"
        self.zip = zipfile.ZipFile(self.path, "w", zipfile.ZIP_DEFLATED)
        self.summaries: list[Any] = []

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            self.zip.writestr(f"{len(self.summaries)}.json", orjson.dumps(record.plain()))
            self.summaries.append([record.id, record.reward])

    def close(self) -> None:
        self.zip.writestr("summaries.json", orjson.dumps(self.summaries))
        self.zip.close()

    def read(self, number: int) -> list[int]:
        with zipfile.ZipFile(self.path) as file:
            found: list[int] = orjson.loads(file.read(f"{number}.json"))["ids"]
        return found

    def rewards(self) -> list[float]:
        with zipfile.ZipFile(self.path) as file:
            return [row[1] for row in orjson.loads(file.read("summaries.json"))]


def packed(record: Record) -> dict[str, Any]:
    ids, values, mask = array("I", record.ids), array("f", record.log_probs), array("B", record.mask)
    return record.plain() | {"ids": ids.tobytes(), "log_probs": values.tobytes(), "mask": mask.tobytes()}


def ids_of(message: Any) -> list[int]:
    return [int(i) for i in np.frombuffer(message["ids"], np.uint32).tolist()]


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Jsonl, OrjsonLines, Sidecar, MsgpackZstd, Parquet, Sqlite, Zip)}
