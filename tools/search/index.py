"""A BM25 index in a folder: written once, mapped into memory by every process that searches it.

The scores are bm25s's (method «lucene»: Kamphuis et al. 2020, «Which BM25 do you mean?»): computed when the index is built,
so that a query is a sum of a few rows. Words and documents are kept beside them in files of their own, so that opening an
index reads next to nothing, whatever its size.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentloop.tools.search.corpus import Document
from agentloop.tools.search.hits import Hit

FORMAT = "1"
"""Changes when what is written, or how texts become words, does."""

# Scripts that are written without spaces: each character is a word.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)


def words(text: str) -> list[str]:
    """The words of a text as they are compared: case and compatibility forms folded, nothing left out."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def write_index(folder: Path, documents: Iterable[Document]) -> int:
    """Writes into an empty folder; returns the number of documents. Holds the words of all documents in memory."""
    import bm25s  # type: ignore[import-untyped, unused-ignore]

    vocabulary: dict[str, int] = {}
    rows: list[list[int]] = []
    with (folder / "documents.jsonl").open("wb") as file:
        offsets = [0]
        for document in documents:
            rows.append([vocabulary.setdefault(word, len(vocabulary)) for word in words(f"{document.title}\n{document.text}")])
            file.write(json.dumps([document.id, document.title, document.text]).encode() + b"\n")
            offsets.append(file.tell())
    np.save(folder / "documents.offsets.npy", np.asarray(offsets, dtype=np.int64))
    in_order = sorted((word.encode(errors="surrogatepass"), number) for word, number in vocabulary.items())
    (folder / "words.bin").write_bytes(b"".join(word for word, _ in in_order))
    np.save(folder / "words.offsets.npy", np.cumsum([0, *(len(word) for word, _ in in_order)], dtype=np.int64))
    np.save(folder / "words.numbers.npy", np.asarray([number for _, number in in_order], dtype=np.int64))
    if vocabulary:
        scores = bm25s.BM25(method="lucene")
        scores.index((rows, vocabulary), create_empty_token=False, show_progress=False)
        scores.vocab_dict = {}  # the words lie in files of their own
        scores.save(folder / "scores", show_progress=False)
    return len(rows)


class Index:
    """An index that `write_index` wrote. Any number of threads may search it."""

    def __init__(self, folder: Path) -> None:
        import bm25s  # type: ignore[import-untyped, unused-ignore]

        self._vocabulary = _Words(folder)
        self._offsets: Any = np.load(folder / "documents.offsets.npy", mmap_mode="r")
        self._documents = os.open(folder / "documents.jsonl", os.O_RDONLY | os.O_CLOEXEC)
        self._scores: Any = None
        if len(self._vocabulary):
            self._scores = bm25s.BM25.load(folder / "scores", mmap=True, load_vocab=False, show_progress=False)

    def __del__(self) -> None:
        if (handle := getattr(self, "_documents", None)) is not None:
            os.close(handle)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def search(self, query: str, top_k: int) -> list[Hit]:
        """The best `top_k` documents that hold a word of the query, best first; equal ones in the corpus' order.

        Costs one pass over the scores of all documents: blocking, for a thread.
        """
        known = [number for word in dict.fromkeys(words(query)) if (number := self._vocabulary.number(word)) is not None]
        if not known:
            return []
        scores = self._scores.get_scores_from_ids(known)
        best = np.argpartition(scores, -top_k)[-top_k:] if top_k < len(scores) else np.arange(len(scores))
        floor = scores[best].min()
        if top_k < len(scores) and floor > 0:  # of those that are equal at the edge, the first ones
            equal = np.flatnonzero(scores == floor)
            best = np.concatenate([best[scores[best] > floor], equal[:top_k]])
        ranked = sorted((-float(scores[at]), int(at)) for at in best if scores[at] > 0)
        return [self._hit(at, -score) for score, at in ranked[:top_k]]

    def _hit(self, at: int, score: float) -> Hit:
        start, end = int(self._offsets[at]), int(self._offsets[at + 1])
        identity, title, text = json.loads(os.pread(self._documents, end - start, start))
        return Hit(identity, title, text, score)


class _Words(Sequence[bytes]):
    """Words in order, found by halving."""

    def __init__(self, folder: Path) -> None:
        self._offsets: Any = np.load(folder / "words.offsets.npy", mmap_mode="r")
        self._numbers: Any = np.load(folder / "words.numbers.npy", mmap_mode="r")
        with (folder / "words.bin").open("rb") as file:
            self._text: bytes | mmap.mmap = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(self) else b""

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, at: Any) -> Any:
        return self._text[int(self._offsets[at]) : int(self._offsets[at + 1])]

    def number(self, word: str) -> int | None:
        wanted = word.encode(errors="surrogatepass")
        at = bisect_left(self, wanted)
        return int(self._numbers[at]) if at < len(self) and self[at] == wanted else None
