"""`agentloop view`: the viewer over HTTP, for this machine alone.

Who may ask: whoever has the token, which is in the address that is printed and opened, from a page of this server. It listens
on 127.0.0.1, and refuses any `Host` but its own, so no other page can reach it by giving its own name this address (DNS
rebinding); `Origin`, where a browser sends it, must be its own too.
"""

from __future__ import annotations

import hmac
import json
import secrets
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from agentloop.errors import ConfigError
from agentloop.replay.html import DOCUMENT_END, STYLE, Link, document_head, root, script
from agentloop.replay.payload import Payload, error

ADDRESS = "127.0.0.1"
MAX_REQUEST = 1 << 20
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class ReplayServer:
    """Serves one run until it is closed. `port=0` takes a free one. Raises `ConfigError` if the port is taken."""

    def __init__(self, payload: Payload, *, port: int = 0, title: str = "agentloop", theme: str = "auto") -> None:
        self.token = secrets.token_urlsafe(24)
        self._payload = payload
        query = urlencode({"token": self.token})
        self._files = {
            "/": ("text/html; charset=utf-8", _page(title, f"request?{query}", theme).encode()),
            "/page.js": ("text/javascript; charset=utf-8", script("page.js").encode()),
            "/page.css": ("text/css; charset=utf-8", STYLE.encode()),
        }
        try:
            self._server = _Server((ADDRESS, port), _handler(self))
        except (OSError, OverflowError) as wrong:
            raise ConfigError(f"port {port} of {ADDRESS} cannot be listened on: {wrong}") from wrong
        self.port = int(self._server.server_address[1])

    def url(self, link: Link | None = None) -> str:
        """The address to open, token included; `link`: what to show first."""
        fragment = "#" + urlencode(link, quote_via=quote) if link else ""
        return f"http://{ADDRESS}:{self.port}/?{urlencode({'token': self.token})}{fragment}"

    def serve(self) -> None:
        """Until `close` is called from another thread, or an interrupt."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def is_host(self, host: str | None) -> bool:
        return host in (f"{ADDRESS}:{self.port}", f"localhost:{self.port}")

    def is_origin(self, origin: str | None) -> bool:
        """Browsers leave it out of plain navigation."""
        return origin is None or origin in (f"http://{ADDRESS}:{self.port}", f"http://localhost:{self.port}")

    def is_token(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self.token.encode())

    def file(self, path: str) -> tuple[str, bytes] | None:
        """Type and content."""
        return self._files.get(path)

    def answer(self, body: bytes) -> bytes:
        try:
            request = json.loads(body)
        except ValueError:
            return error("the request is not JSON").frame()
        return self._payload.answer(request).frame()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # a page that was closed is none
            super().handle_error(request, client_address)


def _page(title: str, url: str, theme: str) -> str:
    head = document_head(title, '<link rel="stylesheet" href="page.css">')
    return f'{head}{root("http", url=url, theme=theme)}\n<script src="page.js"></script>\n{DOCUMENT_END}'


def _handler(server: ReplayServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version, sys_version = "agentloop", ""
        timeout = 60

        def do_GET(self) -> None:
            path, token = self._asked()
            found = server.file(path)
            if not self._is_allowed(token if path == "/" else None):
                return
            if found is None:
                self._send(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"not found\n")
            else:
                self._send(HTTPStatus.OK, *found)

        def do_POST(self) -> None:
            path, token = self._asked()
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > MAX_REQUEST:
                self.close_connection = True
                self._send(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "text/plain; charset=utf-8", b"the request is too large\n")
                return
            body = self.rfile.read(int(length))
            if not self._is_allowed(token):
                return
            if path != "/request" or self.headers.get_content_type() != "application/json":
                self._send(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"not found\n")
                return
            self._send(HTTPStatus.OK, "application/octet-stream", server.answer(body))

        def _asked(self) -> tuple[str, str]:
            parts = urlsplit(self.path)
            return parts.path, parse_qs(parts.query).get("token", [""])[0]

        def _is_allowed(self, token: str | None) -> bool:
            """`token`: `None` where none is asked for."""
            if not server.is_host(self.headers.get("Host")) or not server.is_origin(self.headers.get("Origin")):
                sentence = b"this server answers to its own address alone\n"
            elif token is not None and not server.is_token(token):
                sentence = b"open the address that `agentloop view` printed, with its token\n"
            else:
                return True
            self._send(HTTPStatus.FORBIDDEN, "text/plain; charset=utf-8", sentence)
            return False

        def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
            self.send_response(status)
            for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
