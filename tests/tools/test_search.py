"""`search`: over files of every kind, and over a service with Search-R1's interface that really listens."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from agentloop.errors import ConfigError, ToolInfraError
from agentloop.tools import ToolRegistry
from agentloop.tools.search import Search
from agentloop.tools.search.build import Build
from agentloop.tools.search.corpus import Columns, content_digest
from agentloop.tools.search.hits import snippet
from agentloop.tools.search.index import FORMAT
from agentloop.trajectory import CallRecord, CallStatus, Sample, ToolCall

PLANETS = {
    "mars.md": "# Mars\n\nMars is the fourth planet. Its moons are Phobos and Deimos.",
    "far/neptune.txt": "Neptune is the eighth planet; Triton is its largest moon.",
    "far/pluto.txt": "Pluto is a dwarf planet. Charon circles it.",
    ".hidden.txt": "Phobos, not to be found.",
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    for name, text in PLANETS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Search]:
    return lambda corpus, **config: Search({"corpus": str(corpus), "cache": str(tmp_path / "cache"), **config})


async def ask(tool: Search, *queries: Any, policies: Any = None) -> list[CallRecord]:
    session = ToolRegistry.from_tools([tool], policies).session(Sample(messages=[]), "row_0")
    await session.open()
    try:
        deadline = asyncio.get_running_loop().time() + 30
        calls = [ToolCall("search", query if isinstance(query, dict) else {"query": query}) for query in queries]
        return list(await asyncio.gather(*(session.call(call, deadline=deadline) for call in calls)))
    finally:
        await session.close()


# -- a local corpus -----------------------------------------------------------------------------------------------------


def test_files_of_a_folder_are_found_with_title_and_id(corpus: Path, make: Callable[..., Search]) -> None:
    (found,) = asyncio.run(ask(make(corpus), "moons of MARS"))
    assert found.status is CallStatus.OK
    first = found.text.split("\n\n[2]")[0]
    assert first == f"[1] Mars (id: mars.md)\n{PLANETS['mars.md']}"
    assert ".hidden" not in found.text


def test_a_query_without_hits_and_one_without_words_say_so(corpus: Path, make: Callable[..., Search]) -> None:
    none, empty, signs, long = asyncio.run(ask(make(corpus), "xylophone", "", " ?! ", "moon " * 400))
    assert (none.status, none.text) == (CallStatus.OK, "No results for 'xylophone'. Try other words, or fewer.")
    assert empty.status is signs.status is CallStatus.INVALID_ARGUMENTS
    assert "holds no word to search for" in empty.text
    assert long.status is CallStatus.INVALID_ARGUMENTS


def test_top_k_is_what_the_model_says_within_bounds(corpus: Path, make: Callable[..., Search]) -> None:
    tool = make(corpus, top_k=1, max_top_k=2)
    properties = tool.tool_schema.to_dict()["function"]["parameters"]["properties"]
    assert (properties["top_k"]["default"], properties["top_k"]["maximum"]) == (1, 2)
    one, two, many = asyncio.run(ask(tool, "planet", {"query": "planet", "top_k": 2}, {"query": "planet", "top_k": 3}))
    assert ("[1]" in one.text, "[2]" in one.text) == (True, False)
    assert "[2]" in two.text
    assert many.status is CallStatus.INVALID_ARGUMENTS


def test_json_lines_with_contents_and_parquet_with_named_columns(tmp_path: Path, make: Callable[..., Search]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    lines = [{"id": 7, "contents": '"Evita"\nA film of 1996.'}, {"id": "8", "contents": "only one line about Madonna"}]
    (tmp_path / "wiki.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = asyncio.run(ask(make(tmp_path / "wiki.jsonl"), "evita film", "madonna"))
    assert first.text == "[1] Evita (id: 7)\nA film of 1996."
    assert second.text == "[1] id: 8\nonly one line about Madonna"
    table = pyarrow.table({"key": [1, 2], "name": ["Ada", "Bob"], "body": ["wrote programs", None], "unused": [0, 0]})
    parquet.write_table(table, tmp_path / "people.parquet")
    columns = {"id": "key", "title": "name", "text": "body"}
    by_text, by_title = asyncio.run(ask(make(tmp_path / "people.parquet", columns=columns), "programs", "bob"))
    assert by_text.text == "[1] Ada (id: 1)\nwrote programs"
    assert by_title.text.strip() == "[1] Bob (id: 2)"


def test_scripts_without_spaces_and_other_forms_of_letters(tmp_path: Path, make: Callable[..., Search]) -> None:
    (tmp_path / "a.txt").write_text("東京は日本の首都です", encoding="utf-8")
    (tmp_path / "b.txt").write_text("STRASSE ﬁnden C 5", encoding="utf-8")
    tokyo, street, short = asyncio.run(ask(make(tmp_path, max_top_k=1, top_k=1), "首都", "straße finden", "c 5"))
    assert "a.txt" in tokyo.text
    assert "b.txt" in street.text
    assert "b.txt" in short.text


def test_a_long_document_is_shown_where_the_query_is() -> None:
    text = "start " * 500 + "the treaty of Westphalia ended the war " + "end " * 500
    shown = snippet(text, "westphalia treaty", 120)
    assert "treaty of Westphalia" in shown
    assert len(shown) <= 122
    assert shown.startswith("…") and shown.endswith("…")
    assert snippet(text, "nothing", 50).startswith("start start")
    assert snippet("x" * 1000, "y", 50) == "x" * 50 + "…"


def test_an_index_is_built_once_for_all_processes_and_anew_when_the_corpus_changes(
    corpus: Path, tmp_path: Path, make: Callable[..., Search]
) -> None:
    code = (
        "import sys, asyncio\nfrom agentloop.tools.search import Search\n"
        "tool = Search({'corpus': sys.argv[1], 'cache': sys.argv[2]})\n"
        "print(asyncio.run(tool.execute('i', {'query': 'triton'}))[0].text)"
    )
    command = [sys.executable, "-c", code, str(corpus), str(tmp_path / "cache")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert all("neptune" in process.communicate()[0] for process in both)

    def complete() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/complete")}

    built = complete()
    assert len(built) == 1
    make(corpus)
    assert complete() == built
    os.utime(corpus / "mars.md", ns=(1, 1))  # the same contents
    make(corpus)
    assert complete() == built
    (corpus / "mars.md").write_text("# Mars\n\nred")
    (found,) = asyncio.run(ask(make(corpus), "red"))
    assert "[1] Mars" in found.text
    assert len(complete()) == 2


def test_what_a_killed_build_left_is_cleared_away(corpus: Path, tmp_path: Path, make: Callable[..., Search]) -> None:
    leftover = tmp_path / "cache" / f"unfinished-{content_digest(corpus, Columns(), FORMAT)}"
    leftover.mkdir(parents=True)
    (leftover / "scores").write_text("half of it")
    make(corpus)
    assert not leftover.exists()
    assert len(list((tmp_path / "cache").glob("*/complete"))) == 1


def test_a_build_that_is_killed_is_an_infrastructure_failure(tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_text("word " * 2_000_000)
    build = Build(tmp_path / "big.txt", Columns(), tmp_path / "cache")
    build.stop()
    with pytest.raises(ToolInfraError, match=r"building the index of .* failed"):
        build.index()


async def test_the_event_loop_goes_on_while_an_index_is_built_and_searched(tmp_path: Path, make: Callable[..., Search]) -> None:
    rows = [json.dumps({"id": n, "text": " ".join(f"w{(n * k) % 997}" for k in range(1, 40))}) for n in range(20_000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    steps = 0

    async def beat() -> None:
        nonlocal steps
        while True:
            await asyncio.sleep(0.001)
            steps += 1

    heart = asyncio.create_task(beat())
    begun = time.monotonic()
    tool = make(tmp_path / "rows.jsonl")  # an event loop runs: it does not wait
    (found,) = await ask(tool, "w13 w500")
    heart.cancel()
    assert "[1]" in found.text
    assert steps > 20 * (time.monotonic() - begun)  # nowhere near standing still, on any machine


# -- what is wrong with a configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, "config: give either 'corpus' (a folder) or 'url' (a search service)"),
        ({"corpsu": "docs"}, "unknown key 'config.corpsu'; did you mean 'corpus'?"),
        ({"corpus": "{tmp}/corpsu"}, "{tmp}/corpsu: no such file or folder; did you mean 'corpus'?"),
        ({"corpus": "{tmp}/corpus", "topk": 3}, "config: unknown key 'topk'; did you mean 'top_k'?"),
        ({"corpus": "{tmp}/corpus", "top_k": 20}, "config: top_k (20) is more than max_top_k (10)"),
        ({"corpus": "{tmp}/corpus", "url": "http://a/b"}, "not both"),
        (
            {"corpus": "{tmp}/a.jsonl", "columns": {"text": "txt"}},
            "a.jsonl: line 1: there is no column 'txt'; did you mean 'text'?",
        ),
        ({"corpus": "{tmp}/b.jsonl"}, "there is no column 'text'; set config.columns.text to one of: body"),
        ({"corpus": "{tmp}/c.jsonl"}, "c.jsonl: line 2: not valid JSON"),
        ({"corpus": "{tmp}/d.parquet"}, "d.parquet: cannot be read as parquet"),
        ({"corpus": "{tmp}/e.pdf"}, "e.pdf is none of .jsonl, .md, .parquet, .txt"),
        ({"corpus": "{tmp}/empty"}, "holds no file that ends with"),
        ({"url": "localhost:8000/retrieve"}, "config.url: expected http://host:port/retrieve"),
        ({"url": "http://a/b", "headers": {"X-Key": {"env": "NO_SUCH_VARIABLE_HERE"}}}, "'NO_SUCH_VARIABLE_HERE' is not set"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(corpus: Path, tmp_path: Path, config: dict[str, Any], sentence: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    (tmp_path / "b.jsonl").write_text('{"body": "x"}')
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n{')
    (tmp_path / "d.parquet").write_text("no")
    (tmp_path / "e.pdf").write_text("no")
    (tmp_path / "empty").mkdir()
    filled = json.loads(json.dumps(config).replace("{tmp}", str(tmp_path)))
    if "corpus" in config:
        filled["cache"] = str(tmp_path / "cache")
    file = tmp_path / "tools.yaml"
    file.write_text(json.dumps({"tools": [{"class_name": "search", "config": filled}]}))
    with pytest.raises(ConfigError) as caught:
        ToolRegistry.from_yaml(file)
    assert str(caught.value).startswith(f"{file}: tool 'search': ")
    assert sentence.replace("{tmp}", str(tmp_path)) in str(caught.value)
    assert "\n" not in str(caught.value)


# -- a service ----------------------------------------------------------------------------------------------------------


class Service:
    """Answers as Search-R1's server does, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.respond: Callable[[dict[str, Any]], Any] = self.documents

    @staticmethod
    def documents(body: dict[str, Any]) -> Any:
        if any(query == "refused" for query in body["queries"]):
            return web.json_response({"detail": "no"}, status=422)
        hit = [{"document": {"id": str(n), "contents": f'"Title {n}"\ntext {n}'}, "score": 9.5 - n} for n in range(20)]
        return {
            "result": [
                [{**hit[0], "document": {"contents": f'"{q}"\nabout {q}'}}, *hit[1 : body["topk"]]] for q in body["queries"]
            ]
        }

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        self.headers.append(request.headers)
        answer = self.respond(self.asked[-1])
        if asyncio.iscoroutine(answer):
            answer = await answer
        return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/retrieve", service.handle)
    async with TestServer(app) as server:
        yield str(server.make_url("/retrieve"))


async def test_a_service_is_asked_as_search_r1_asks_and_concurrent_queries_travel_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEARCH_TOKEN", "t0ken")
    service = Service()
    async with serving(service) as url:
        headers = {"Authorization": {"env": "SEARCH_TOKEN", "format": "Bearer {}"}}
        tool = Search({"url": url, "top_k": 2, "batch_wait_s": 0.05, "headers": headers})
        found = await ask(tool, "one", "two", {"query": "three", "top_k": 1})
        (repeated,) = await ask(tool, "t0ken")
    assert "t0ken" not in repeated.text
    assert "about [secret]" in repeated.text
    assert found[1].text == "[1] two\nabout two\n\n[2] Title 1 (id: 1)\ntext 1"
    assert found[2].text == "[1] three\nabout three"
    expected = [
        {"queries": ["one", "two"], "topk": 2, "return_scores": True},
        {"queries": ["three"], "topk": 1, "return_scores": True},
    ]
    assert sorted(service.asked[:2], key=lambda body: -body["topk"]) == expected
    assert service.headers[0]["Authorization"] == "Bearer t0ken"
    assert found[0].metrics == {"hits": 2}


async def test_one_query_that_is_refused_does_not_take_the_others_with_it() -> None:
    async with serving(Service()) as url:
        good, bad = await ask(Search({"url": url, "batch_wait_s": 0.05}), "good", "refused")
    assert good.status is CallStatus.OK
    assert (bad.status, "refused the query (status 422)" in bad.text) == (CallStatus.ERROR, True)


async def never(body: Any) -> Any:
    await asyncio.sleep(3600)


@pytest.mark.parametrize(
    ("respond", "status", "text"),
    [
        (lambda body: web.Response(status=503), CallStatus.INFRA, "answered with status 503"),
        (lambda body: web.Response(status=302, headers={"Location": "http://127.0.0.1:1/"}), CallStatus.INFRA, "status 302"),
        (lambda body: web.Response(text="<html>"), CallStatus.INFRA, "something else than its interface"),
        (lambda body: {"result": []}, CallStatus.INFRA, "0 lists for 1 queries"),
        (lambda body: {"result": [[{"document": {"x": 1}}]]}, CallStatus.INFRA, "something else than its interface"),
        (lambda body: web.Response(body=b"x" * 5000), CallStatus.INFRA, "more than 4000 bytes"),
        (never, CallStatus.TIMEOUT, "timed out"),
    ],
)
async def test_failures_of_the_service_are_typed(respond: Any, status: CallStatus, text: str) -> None:
    service = Service()
    service.respond = respond
    async with serving(service) as url:
        (record,) = await ask(Search({"url": url, "timeout_s": 0.5, "max_response_bytes": 4000}), "query")
    assert record.status is status
    assert text in record.text


async def test_a_service_that_is_not_there_is_asked_again_by_policy() -> None:
    (record,) = await ask(Search({"url": "http://127.0.0.1:1/retrieve"}), "query", policies={"search": {"retries": 1}})
    assert (record.status, record.attempts) == (CallStatus.INFRA, 2)


def test_one_tool_serves_several_event_loops() -> None:
    service = Service()
    ready, done = threading.Event(), threading.Event()
    urls: list[str] = []

    async def serve() -> None:
        async with serving(service) as url:
            urls.append(url)
            ready.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    ready.wait()
    try:
        tool = Search({"url": urls[0]})
        assert all("about moon" in asyncio.run(ask(tool, "moon"))[0].text for _ in range(2))
    finally:
        done.set()
        thread.join()
