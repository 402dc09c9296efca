"""Building an index in a process of its own, once for all processes of a node.

As a program (`python -m agentloop.tools.search.build`) it reads one JSON object from its standard input, builds what is
missing and prints `{"index": folder}` or `{"error": sentence}`. It ends when its standard input does: whoever waits for it
may die in any way.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from agentloop.errors import ConfigError, ToolInfraError
from agentloop.tools.search.corpus import Columns, check_columns, content_digest, corpus_files, documents, stat_key
from agentloop.tools.search.index import FORMAT, Index, write_index


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/agentloop/search`, or below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentloop" / "search"


class Build:
    """The index of a corpus, found in the cache or being built.

    Begins at once; `ConfigError` for what can be seen without reading the corpus.
    """

    def __init__(self, corpus: Path, columns: Columns, cache: Path) -> None:
        if importlib.util.find_spec("bm25s") is None:
            raise ConfigError("config.corpus: searching files needs bm25s: pip install bm25s")
        check_columns(corpus_files(corpus), columns)
        self._corpus = corpus
        self._lock = threading.Lock()
        self._index: Index | None = None
        self._error: Exception | None = None
        self._process: subprocess.Popen[str] | None = None
        if (folder := _known(corpus, columns, cache)) is not None:
            self._index = Index(folder)
            return
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"config.cache: {cache} cannot be made: {error.strerror}") from error
        self._process = subprocess.Popen(
            [sys.executable, "-m", "agentloop.tools.search.build"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None
        job = {"corpus": str(corpus), "columns": columns.model_dump(), "cache": str(cache)}
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()  # and left open: its end would end the build

    def stop(self) -> None:
        """Give up a build that goes on; whoever waits gets `ToolInfraError`."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def index(self) -> Index:
        """Blocks until the index is there. `ConfigError` if the corpus is wrong, `ToolInfraError` if building it failed."""
        with self._lock:
            if self._process is not None:
                try:
                    self._index = Index(self._finish(self._process))
                except (ConfigError, ToolInfraError) as error:
                    self._error = error
                self._process = None
        if self._index is None:
            assert self._error is not None
            raise self._error
        return self._index

    def _finish(self, process: subprocess.Popen[str]) -> Path:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        # stderr is small (a traceback): it cannot fill its pipe while stdout is read
        printed, complaints = process.stdout.read(), process.stderr.read()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()
        answer = json.loads(printed) if process.returncode == 0 and printed.strip() else {}
        if "error" in answer:
            raise ConfigError(answer["error"])
        if "index" not in answer:
            last = complaints.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
            raise ToolInfraError(f"building the index of {self._corpus} failed: {last[0]}")
        return Path(answer["index"])


def _known(corpus: Path, columns: Columns, cache: Path) -> Path | None:
    """The finished index of a corpus that has not changed since its contents were last read."""
    try:
        digest = (cache / "known" / stat_key(corpus, columns, FORMAT)).read_text()
    except OSError:
        return None
    return cache / digest if (cache / digest / "complete").is_file() else None


def build(corpus: Path, columns: Columns, cache: Path) -> Path:
    """The folder of the index, built if it is not there. Of one index one process builds; the others wait and find it."""
    before = stat_key(corpus, columns, FORMAT)
    digest = content_digest(corpus, columns, FORMAT)
    folder = cache / digest
    for below in ("locks", "known"):
        (cache / below).mkdir(parents=True, exist_ok=True)
    with (cache / "locks" / digest).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").is_file():
            unfinished = cache / f"unfinished-{digest}"
            for leftover in (unfinished, folder):  # of a build that was killed: nobody else builds this one now
                shutil.rmtree(leftover, ignore_errors=True)
            unfinished.mkdir()
            count = write_index(unfinished, documents(corpus, columns))
            (unfinished / "complete").write_text(f"{count}\n")
            unfinished.rename(folder)
    if stat_key(corpus, columns, FORMAT) == before:
        note = cache / "known" / f"{before}.{os.getpid()}"
        note.write_text(digest)
        note.rename(cache / "known" / before)
    return folder


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        folder = build(Path(job["corpus"]), Columns(**job["columns"]), Path(job["cache"]))
    except ConfigError as error:
        answer = {"error": str(error)}
    except OSError as error:
        answer = {"error": f"the index of {job['corpus']} cannot be built: {error}"}
    else:
        answer = {"index": str(folder)}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # the thread that reads standard input would not let go of it


if __name__ == "__main__":
    main()
