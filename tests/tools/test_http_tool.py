"""`http_tool`: operations of a document, called on a server that really listens."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer

from agentloop.errors import ConfigError
from agentloop.tools import ToolRegistry
from agentloop.tools.http_tool import HttpTool
from agentloop.tools.http_tool.guard import Hosts
from agentloop.trajectory import CallRecord, CallStatus, Sample, ToolCall

SPEC = Path(__file__).parent / "shop.yaml"


class Shop:
    """Answers what it was asked, or what `/answer/{kind}` names."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.headers: list[Any] = []
        self.elsewhere = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.raw_path)
        self.headers.append(request.headers)
        kind = request.path.removeprefix("/answer/")
        if kind.isdigit():
            return web.Response(status=int(kind), text=f"because of {kind}")
        if kind == "echo":
            return web.Response(text=f"{request.raw_path} {request.headers.get('Authorization')}")
        if kind == "long":
            response = web.StreamResponse()
            response.content_type = "text/plain"
            await response.prepare(request)
            for _ in range(10_000):  # 100 MB, of which nobody wants all
                await response.write(b"x" * 10_000)
            return response
        if kind == "image":
            return web.Response(body=b"\x89PNG", content_type="image/png")
        if kind == "empty":
            return web.Response(status=204)
        if kind == "slow":
            await asyncio.sleep(3600)
        if kind == "drop":
            assert request.transport is not None
            request.transport.abort()
        if kind == "gzip":
            return web.Response(body=gzip.compress(b"x" * 10**6), headers={"Content-Encoding": "gzip"})
        if kind == "latin":
            return web.Response(body="é".encode("latin-1"), headers={"Content-Type": "text/plain; charset=latin-1"})
        if kind == "punycode":  # it takes time that grows with the square of the length
            return web.Response(body=b"a" * 9 + b"-b", headers={"Content-Type": "text/plain; charset=Punycode"})
        if kind == "here":
            return web.Response(status=302, headers={"Location": "/answer/echo"})
        if kind == "circle":
            return web.Response(status=302, headers={"Location": "/answer/circle"})
        if kind == "there":
            return web.Response(status=302, headers={"Location": self.elsewhere})
        body = await request.text()
        return web.json_response(
            {"method": request.method, "url": request.raw_path, "body": body, "type": request.headers.get("Content-Type")}
        )


@asynccontextmanager
async def serving(shop: Shop) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", shop.handle)
    async with TestServer(app, host="127.0.0.1") as server:
        yield f"127.0.0.1:{server.port}"


def config(operation: str, host: str = "eu.shop.test", **more: Any) -> dict[str, Any]:
    server = {} if host.endswith(".test") else {"server": f"http://{host}"}
    return {"spec": str(SPEC), "operation": operation, "allowed_hosts": [host], **server, **more}


async def call(tool: HttpTool, arguments: dict[str, Any], policies: Any = None) -> CallRecord:
    session = ToolRegistry.from_tools([tool], policies).session(Sample(messages=[]), "row_0")
    await session.open()
    try:
        return await session.call(ToolCall(tool.name, arguments), deadline=asyncio.get_running_loop().time() + 30)
    finally:
        await session.close()


async def sent(operation: str, arguments: dict[str, Any], **more: Any) -> Any:
    async with serving(Shop()) as host:
        record = await call(HttpTool(config(operation, host, **more)), arguments)
    assert record.status is CallStatus.OK, record.text
    return json.loads(record.text)


# -- arguments ----------------------------------------------------------------------------------------------------------


def test_an_operation_becomes_a_schema() -> None:
    function = HttpTool(config("getItem")).tool_schema.to_dict()["function"]
    assert (function["name"], function["description"]) == ("getItem", "Look at an item.\nSays how many are left.")
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "item_id": {"type": "string", "description": "Which item."},
            "tag": {"type": "array", "items": {"type": "string"}},
            "plain": {"type": "array", "items": {"type": "integer"}},
            "filter": {"type": "object"},
            "X-Trace": {"type": ["string", "null"]},
            "depth": {"type": "integer", "exclusiveMinimum": 0},
        },
        "required": ["item_id"],
    }
    put = HttpTool(config("putItem")).tool_schema.to_dict()["function"]["parameters"]
    assert list(put["properties"]) == ["item_id", "id_query", "id_header", "name", "parent", "valid_from", "code"]
    assert put["required"] == ["item_id", "name"]
    assert put["properties"]["name"] == {"type": "string"}
    assert put["properties"]["parent"] == {}  # open where it refers to itself
    assert put["properties"]["code"] == {"type": "string", "description": r"matches ^(\w+)+$"}  # and is not matched
    assert put["properties"]["valid_from"]["default"] == "2024-05-01"


async def test_path_query_and_header_arguments_reach_the_service() -> None:
    shop = Shop()
    arguments = {"item_id": "a b/ü", "tag": ["x", "y&z"], "plain": [1, 2], "filter": {"size": 3}, "X-Trace": "t1"}
    async with serving(shop) as host:
        record = await call(HttpTool(config("getItem", host)), arguments)
    assert record.status is CallStatus.OK
    assert shop.asked == ["/items/a%20b%2F%C3%BC?tag=x&tag=y%26z&plain=1%2C2&filter%5Bsize%5D=3"]
    assert shop.headers[0]["X-Trace"] == "t1"


async def test_bodies() -> None:
    put = await sent("putItem", {"item_id": "7", "id_query": 1, "name": "pear"})
    assert (put["method"], put["url"], put["type"]) == ("PUT", "/items/7?id=1", "application/json")
    assert json.loads(put["body"]) == {"name": "pear"}
    assert json.loads((await sent("postWords", {"body": ["a", "b"]}))["body"]) == ["a", "b"]
    form = await sent("postForm", {"name": "a&b", "size": 3})
    assert (form["body"], form["type"]) == ("name=a%26b&size=3", "application/x-www-form-urlencoded")


@pytest.mark.parametrize("item", ["..", ".", "", "../admin", "a/../../b", "..\\x"])
async def test_an_argument_cannot_change_the_path(item: str) -> None:
    shop = Shop()
    async with serving(shop) as host:
        record = await call(HttpTool(config("getItem", host)), {"item_id": item})
    assert record.status is CallStatus.INVALID_ARGUMENTS
    assert "argument 'item_id' cannot be" in record.text
    assert not shop.asked


async def test_an_argument_cannot_add_headers_or_parameters() -> None:
    shop = Shop()
    async with serving(shop) as host:
        tool = HttpTool(config("getItem", host, headers={"X-Trace": "ours"}, query={"tag": "fixed"}))
        split = await call(HttpTool(config("getItem", host)), {"item_id": "a", "X-Trace": "x\r\nX-Admin: 1"})
        other = await call(tool, {"item_id": "a?admin=1#x", "X-Trace": "theirs"})
        unknown = await call(tool, {"item_id": "a", "admin": "1"})
    assert split.status is unknown.status is CallStatus.INVALID_ARGUMENTS
    assert other.status is CallStatus.OK
    assert shop.asked == ["/items/a%3Fadmin%3D1%23x?tag=fixed"]
    assert shop.headers[0]["X-Trace"] == "ours"


# -- answers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "status", "text"),
    [
        ("404", CallStatus.ERROR, "Error: status 404 Not Found\nbecause of 404"),
        ("422", CallStatus.ERROR, "Error: status 422"),
        ("500", CallStatus.INFRA, "the service answered with status 500"),
        ("503", CallStatus.INFRA, "status 503"),
        ("401", CallStatus.INFRA, "status 401"),
        ("429", CallStatus.INFRA, "status 429"),
        ("drop", CallStatus.INFRA, "cannot be reached"),
        ("gzip", CallStatus.INFRA, "compressed"),
        ("slow", CallStatus.TIMEOUT, "no answer within 1 s"),
        ("image", CallStatus.OK, "[the answer is no text: image/png, 4 bytes]"),
        ("empty", CallStatus.OK, "Done: status 204 No Content, no content."),
        ("latin", CallStatus.OK, "é"),
        ("punycode", CallStatus.OK, "aaaaaaaaa-b"),
        ("here", CallStatus.OK, "/answer/echo None"),
        ("circle", CallStatus.ERROR, "more than 3 redirects"),
    ],
)
async def test_what_a_service_answers(kind: str, status: CallStatus, text: str) -> None:
    async with serving(Shop()) as host:
        record = await call(HttpTool(config("answer", host, timeout_s=1)), {"kind": kind})
    assert record.status is status
    assert text in record.text


async def test_a_long_answer_is_cut_while_it_is_read() -> None:
    async with serving(Shop()) as host:
        record = await call(HttpTool(config("answer", host, max_response_bytes=1000)), {"kind": "long"})
    assert record.text == "x" * 1000 + "\n[… the answer is longer than 1000 bytes; the rest was left out …]"
    assert record.metrics["bytes"] == 1000


async def test_secrets_reach_the_service_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SHOP_TOKEN", "s3cret/+")
    shop = Shop()
    secrets: dict[str, Any] = {
        "headers": {"Authorization": {"env": "SHOP_TOKEN", "format": "Bearer {}"}},
        "fixed": {"api_key": {"env": "SHOP_TOKEN"}},
    }
    async with serving(shop) as host:
        tool = HttpTool(config("answer", host, **secrets))
        assert "api_key" not in json.dumps(tool.tool_schema.to_dict())
        record = await call(tool, {"kind": "echo"})
        over = await call(tool, {"kind": "echo", "api_key": "mine"})
        for size in range(20, 50):  # wherever the answer is cut
            cut = await call(HttpTool(config("answer", host, max_response_bytes=size, **secrets)), {"kind": "echo"})
            assert "s3c" not in cut.text
        await call(tool, {"kind": "500"})
        await call(tool, {"kind": "drop"})
    refused = await call(tool, {"kind": "echo"})  # nobody listens any more
    assert shop.headers[0]["Authorization"] == "Bearer s3cret/+"
    assert shop.asked[0] == "/answer/echo?api_key=s3cret%2F%2B"
    assert record.text == "/answer/echo?api_key=[secret] Bearer [secret]"
    assert over.status is CallStatus.INVALID_ARGUMENTS
    assert refused.status is CallStatus.INFRA
    assert "s3cret" not in caplog.text + refused.text + repr(record)


# -- where it may go ----------------------------------------------------------------------------------------------------


async def test_redirects_leave_the_list_of_hosts_in_no_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_TOKEN", "s3cret")
    first, second = Shop(), Shop()
    headers = {"Authorization": {"env": "SHOP_TOKEN"}}
    async with serving(first) as host, serving(second) as other:
        first.elsewhere = f"http://{other}/answer/echo"
        tool = HttpTool(config("answer", host, headers=headers))
        refused = await call(tool, {"kind": "there"})
        assert refused.status is CallStatus.ERROR
        assert "which is not followed" in refused.text
        assert not second.asked
        both = {**config("answer", host, headers=headers), "allowed_hosts": [host, other]}
        assert (await call(HttpTool(both), {"kind": "there"})).text == "/answer/echo None"  # without the other's secret
        acted = HttpTool({**both, "operation": "act"})
        assert (await call(acted, {"kind": "there"})).status is CallStatus.ERROR
        for elsewhere in ("file:///etc/passwd", f"http://{host}\\@evil.test/", f"//{host}@evil.test/", "//evil.test"):
            first.elsewhere = elsewhere
            assert (await call(HttpTool(both), {"kind": "there"})).status in (CallStatus.ERROR, CallStatus.INFRA)


async def test_a_name_with_an_address_that_is_not_public_is_refused() -> None:
    shop = Shop()
    async with serving(shop) as host:
        port = host.partition(":")[2]
        # names that the system's resolver turns into 127.0.0.1 or this machine's addresses
        for name in ("127.1", "2130706433", "0x7f.0.0.1", "0"):
            tool = HttpTool({**config("answer", host), "server": f"http://{name}:{port}", "allowed_hosts": [f"{name}:{port}"]})
            record = await call(tool, {"kind": "echo"})
            assert record.status is CallStatus.INFRA
            assert not shop.asked
        local = {**config("answer", host), "server": f"http://localhost:{port}", "allowed_hosts": [f"localhost:{port}"]}
        assert (await call(HttpTool(local), {"kind": "echo"})).status is CallStatus.OK
        named = {**local, "server": f"http://0x7f.0.0.1:{port}", "allowed_hosts": [f"0x7f.0.0.1:{port}"]}
        allowed = HttpTool({**named, "allowed_networks": ["127.0.0.0/8"]})
        assert (await call(allowed, {"kind": "echo"})).status is CallStatus.OK


@pytest.mark.parametrize(
    ("address", "fine"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_addresses(address: str, fine: bool) -> None:
    assert Hosts(["api.test"], []).allows("api.test", ipaddress.ip_address(address)) is fine
    assert Hosts(["api.test"], ["0.0.0.0/0", "::/0"]).allows("api.test", ipaddress.ip_address(address))


# -- what is wrong with a configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"operation": "getItems"}, "config.operation: {spec} has no operation 'getItems'; did you mean 'getItem'?"),
        ({"spec": "no.yaml"}, "config.spec: no.yaml: no such file"),
        ({"spec": "{tmp}/old.json"}, "expected an OpenAPI document of version 3.0 or 3.1, found no key 'openapi'"),
        ({"spec": "{tmp}/bad.yaml"}, "bad.yaml: cannot be read"),
        ({"allowed_hosts": []}, "config.allowed_hosts: the service's host 'eu.shop.test' is not in allowed_hosts"),
        ({"allowed_hosts": ["eu.shop.tst"]}, "did you mean 'eu.shop.tst'?"),
        ({"allowed_hosts": ["eu.shop.test:444"]}, "'eu.shop.test' is not in allowed_hosts"),
        ({"allowed_hosts": ["*.shop.test"]}, "expected 'host' or 'host:port', got '*.shop.test'"),
        ({"allowed_hosts": ["https://eu.shop.test"]}, "expected 'host' or 'host:port'"),
        ({"allowed_networks": ["10.0.0.0/99"]}, "config.allowed_networks: expected a network such as 10.0.0.0/8"),
        ({"allowed_host": ["x"]}, "config: unknown key 'allowed_host'; did you mean 'allowed_hosts'?"),
        ({"server": "ftp://eu.shop.test"}, "config.server: expected http:// or https:// URL, got 'ftp://eu.shop.test'"),
        ({"operation": "upload"}, "requestBody: none of multipart/form-data is supported"),
        ({"operation": "away"}, "'other.yaml#/x' lies outside of the document"),
        ({"operation": "lost"}, "there is no '#/components/parameters/Lots'; did you mean 'Lost'?"),
        ({"operation": "circle"}, "its references lead in a circle"),
        ({"operation": "hole"}, "path parameter 'missing' is not described"),
        ({"operation": "odd.name"}, "'odd.name' cannot be a tool's name (letters, digits, _ and -); set config.name"),
        ({"fixed": {"item": 1}}, "config.fixed: the operation has no argument 'item'; did you mean 'item_id'?"),
        ({"headers": {"Host": "x"}}, "config.headers: 'Host' is set by the client itself"),
        ({"headers": {"A": {"env": "NO_SUCH_VARIABLE_HERE"}}}, "config.headers.A: the environment variable"),
        ({"headers": {"A": {"env": "HOME", "format": "x"}}}, "config: key 'headers.A"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    (tmp_path / "old.json").write_text('{"swagger": "2.0"}')
    (tmp_path / "bad.yaml").write_text("a: [")
    entry = json.loads(json.dumps({**config("getItem"), **change}).replace("{tmp}", str(tmp_path)))
    file = tmp_path / "tools.yaml"
    file.write_text(yaml.safe_dump({"tools": [{"class_name": "http_tool", "config": entry}]}))
    with pytest.raises(ConfigError) as caught:
        ToolRegistry.from_yaml(file)
    assert str(caught.value).startswith(f"{file}: tool 'http_tool': ")
    assert sentence.replace("{spec}", str(SPEC)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("listed", "server"),
    [
        ("eu.shop.test", "https://EU.shop.test./v1"),
        ("eu.shop.test:443", "https://eu.shop.test/v1"),
        ("bücher.test", "https://xn--bcher-kva.test"),
        ("xn--bcher-kva.test", "https://bücher.test"),
        ("[::1]:8080", "http://[::1]:8080"),
    ],
)
def test_hosts_are_the_same_however_they_are_written(listed: str, server: str) -> None:
    HttpTool({**config("getItem"), "server": server, "allowed_hosts": [listed]})


def test_a_schema_of_ones_own_must_fit_the_operation() -> None:
    schema = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(ConfigError, match="the operation needs 'item_id'"):
        HttpTool(config("getItem"), schema)
    schema["function"]["parameters"] = {"type": "object", "properties": {"itm_id": {"type": "string"}}}  # type: ignore[index]
    with pytest.raises(ConfigError, match="no argument 'itm_id'; did you mean 'item_id'"):
        HttpTool(config("getItem"), schema)
