"""A real browser for the viewer's tests, and a server for made-up runs on the loopback."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

DIST = Path(__file__).parents[2] / "agentloop" / "replay" / "viewer" / "dist"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-precise-memory-info",
    "--js-flags=--expose-gc",
]


def chromium() -> str:
    """Where Chromium is; skips the test, saying so, where there is none or no Playwright."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("no Chromium on this machine")


@contextmanager
def browser(**options: Any) -> Iterator[Any]:
    """A browser context; what it asked for outside the loopback is refused, and listed in its `refused`."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=path,
            headless=True,
            args=ARGUMENTS,
            viewport={"width": 1280, "height": 860},
            **options,
        )
        refused: list[str] = []

        def route(route: Any) -> None:
            url = route.request.url
            if url.startswith(("http://127.0.0.1:", "file:", "data:", "blob:", "about:")):
                route.continue_()
            else:
                refused.append(url)
                route.abort()

        context.route("**/*", route)
        context.refused = refused  # type: ignore[attr-defined]
        context.set_default_timeout(40_000)
        try:
            yield context
        finally:
            context.close()


class Site:
    """Serves pages by path, the built viewer, and one run's answers at `/request`."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {"/": self.page()}
        self.answer: Callable[[dict[str, Any]], bytes] = lambda _: b""
        self.delay = 0.0
        self.requests: list[dict[str, Any]] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                if path in site.pages:
                    self._send(site.pages[path].encode(), "text/html; charset=utf-8")
                elif (DIST / path[1:]).is_file():
                    self._send((DIST / path[1:]).read_bytes(), "text/javascript; charset=utf-8")
                else:
                    self.send_error(404)

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                site.requests.append(request)
                if site.delay and request["kind"] != "overview":
                    time.sleep(site.delay)
                self._send(site.answer(request), "application/octet-stream")

            def _send(self, content: bytes, kind: str) -> None:
                self.send_response(200)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(content)))
                policy = "default-src 'none'; script-src 'self'; connect-src 'self'"
                if self.path.split("?")[0] in ("/", "/dark"):
                    self.send_header("content-security-policy", policy)
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # the page has gone elsewhere
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def serve(self, run: Any) -> None:
        self.answer = run.answer
        self.requests.clear()
        self.delay = 0.0

    @staticmethod
    def page(attributes: str = 'data-theme="light"', body: str = "") -> str:
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>replay</title></head><body>{body}'
            f'<div id="agentloop-replay" data-host="http" data-url="request" {attributes}></div>'
            '<script src="page.js"></script></body></html>'
        )

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def serving() -> Iterator[Site]:
    site = Site()
    site.pages["/dark"] = site.page('data-theme="dark"')
    try:
        yield site
    finally:
        site.close()


def ready(page: Any, view: str | None = None, key: str | None = None) -> None:
    """Wait until the viewer has drawn a view, and a sample."""
    selector = ".frame" + (f'[data-ready="{view}"]' if view else "[data-ready]") + (f'[data-sample="{key}"]' if key else "")
    page.wait_for_selector(selector)
