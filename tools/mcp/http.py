"""The SDK's streamable HTTP transport, with a bound on what is read."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2
from mcp.client.streamable_http import streamable_http_client


@contextlib.asynccontextmanager
async def http_transport(url: str, *, headers: Mapping[str, str], max_message_bytes: int) -> AsyncIterator[tuple[Any, Any]]:
    """The streams of the SDK's client. Redirects leave the server's origin in no case (the SDK's rule); proxies that the
    environment names are not used."""
    client = httpx2.AsyncClient(
        headers=dict(headers),
        transport=_Bounded(max_message_bytes),
        trust_env=False,
        timeout=httpx2.Timeout(30.0, read=None),  # each call has a timeout of its own
    )
    async with client, streamable_http_client(url, http_client=client, max_sse_event_size=max_message_bytes) as streams:
        yield streams


class _Bounded(httpx2.AsyncBaseTransport):
    """Answers that are no event stream (whose events are bounded one by one) end with an error when they are too large."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inner = httpx2.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        request.headers["Accept-Encoding"] = "identity"  # a compressed answer would be bounded before it grows
        response = await self._inner.handle_async_request(request)
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise httpx2.DecodingError("the server compressed its answer without being asked to", request=request)
        if not response.headers.get("content-type", "").lower().startswith("text/event-stream"):
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            response.stream = _Counted(response.stream, self._limit)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Counted(httpx2.AsyncByteStream):
    def __init__(self, inner: httpx2.AsyncByteStream, limit: int) -> None:
        self._inner = inner
        self._limit = limit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        count = 0
        async for chunk in self._inner:
            count += len(chunk)
            if count > self._limit:
                # The one kind of error that the SDK hands to whoever waits for this answer.
                raise httpx2.StreamError(f"the answer is larger than {self._limit} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._inner.aclose()
