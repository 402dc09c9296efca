"""A run as one self-contained page: opens from disk or in an `<iframe srcdoc>`, fetches nothing, and says so in its policy."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import os
import webbrowser
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import mkstemp
from typing import Any
from urllib.parse import quote, urlencode

from agentloop.errors import ConfigError
from agentloop.journal.reader import Run
from agentloop.journal.recorded import Row
from agentloop.replay.payload import Answer, Payload, key_of

DIST = Path(__file__).parent / "viewer" / "dist"
MAX_FILE_MB = 100.0
"""Of a page in a file. Browsers take more, but slowly."""
MAX_INLINE_MB = 10.0
"""Of a page in a notebook's output, where it is saved with the notebook."""
_MB = 1e6
STYLE = "html,body{margin:0;height:100%}"

Link = dict[str, Any]
"""A place in the viewer: `key`, `turn`, `token`, `view`, all of which may be absent."""


@cache
def script(name: str) -> str:
    """A built file of the viewer: `viewer.js` (a module) or `page.js` (for pages)."""
    path = DIST / name
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: the viewer is not built: run `npm ci && npm run build` in {DIST.parent}") from error


def document_head(title: str, more: str) -> str:
    """Up to the opened body; `more` goes into the head, policy first."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'{more}\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{html.escape(title)}</title>\n</head>\n<body>\n'
    )


DOCUMENT_END = "</body>\n</html>\n"


def root(host: str, *, theme: str = "auto", height: int | None = None, link: Link | None = None, url: str | None = None) -> str:
    """The element that the viewer's page script draws into."""
    data = {
        "host": host,
        "url": url,
        "theme": None if theme == "auto" else theme,
        "height": height,
        "link": link and urlencode(link, quote_via=quote),
    }
    attributes = "".join(f' data-{name}="{html.escape(str(value))}"' for name, value in data.items() if value is not None)
    return f'<div id="agentloop-replay"{attributes}></div>'


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _block(name: str, answer: Answer) -> str:
    packed = base64.b64encode(gzip.compress(answer.frame(), 6, mtime=0)).decode()
    return f'<script type="text/plain" data-agentloop="{html.escape(name)}">{packed}</script>\n'


@dataclass(frozen=True)
class Page:
    """A self-contained page with some trajectories of a run. A notebook shows it in an `<iframe srcdoc>`, which stays there
    when the notebook is opened again without its kernel."""

    run: Run
    rows: list[Row]
    theme: str = "auto"
    height: int = 640
    """Pixels, of the frame in a notebook."""
    link: Link | None = None
    """What it shows first."""
    max_mb: float = MAX_FILE_MB

    def chunks(self, *, height: int | None = None) -> Iterator[str]:
        """The page, piece by piece. Raises `ConfigError` once it is larger than `max_mb`; damaged trajectories are in the list
        and say what is wrong with them."""
        payload = Payload(self.run, lambda: self.rows, live=False, search=False)
        page_js = script("page.js")
        policy = f"default-src 'none'; script-src {_hash(page_js)}; style-src {_hash(STYLE)}"
        head = document_head(
            f"{self.run.path.resolve().name} – agentloop replay",
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{STYLE}</style>',
        )
        head += f"{root('embedded', theme=self.theme, height=height, link=self.link)}\n"
        overview = payload.overview()
        head += f"{_block('overview', Answer(overview))}<script>{page_js}</script>\n"
        if "consistency" in overview["can"]:
            head += _block("consistency", payload.answer({"kind": "consistency"}))
        yield head
        size, tokens = len(head), 0
        for row in self.rows:
            block = _block(f"sample:{key_of(row)}", payload.answer({"kind": "sample", "key": key_of(row)}))
            size, tokens = size + len(block), tokens + row.tokens
            if size > self.max_mb * _MB:
                raise ConfigError(self._too_large(size, tokens))
            yield block
        yield DOCUMENT_END

    def _too_large(self, size: int, tokens: int) -> str:
        total = sum(row.tokens for row in self.rows)
        estimate = size * total / max(tokens, 1) / _MB
        steps = sorted({row.step for row in self.rows})
        return (
            f"{self.run.path}: {len(self.rows)} trajectories of {total} tokens make a page of about {estimate:.0f} MB, and the "
            f"limit is {self.max_mb:g} MB; choose some of the steps {steps[0]} to {steps[-1]} (--steps, steps=) or "
            f"trajectories (--ids, ids=), or look at the run itself: agentloop view {self.run.path}"
        )

    @cached_property
    def html(self) -> str:
        """The whole page."""
        return "".join(self.chunks())

    def save(self, file: str | Path) -> Path:
        """Write the page, whole or not at all. Raises `ConfigError` if it is too large or cannot be written."""
        path = Path(file)
        write(path, self.chunks())
        return path

    def open(self) -> Path:
        """Write the page to a temporary file and open it in a browser."""
        handle, name = mkstemp(prefix="agentloop-", suffix=".html")
        os.close(handle)
        path = self.save(name)
        webbrowser.open(path.as_uri())
        return path

    def _repr_html_(self) -> str:
        """The frame has an origin of its own: what is in it cannot reach the notebook."""
        page = "".join(self.chunks())
        return (
            '<iframe title="agentloop replay" sandbox="allow-scripts" allow="clipboard-write" width="100%" '
            f'height="{self.height}" style="border:0;width:100%" srcdoc="{html.escape(page)}"></iframe>'
        )

    def __repr__(self) -> str:
        return f"Page({str(self.run.path)!r}, {len(self.rows)} trajectories): .save(file), .open(), .html"


def write(path: Path, chunks: Iterable[str]) -> None:
    """Write text, whole or not at all. Raises `ConfigError` if that fails."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for chunk in chunks:
                file.write(chunk)
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
