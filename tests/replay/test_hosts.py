"""Pages, the server and `view()`, without a browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from agentloop import replay
from agentloop.commands import convert
from agentloop.commands import view as view_command
from agentloop.errors import ConfigError
from agentloop.journal import JournalWriter, Run
from agentloop.replay.forks import forker
from agentloop.replay.html import DIST, Page
from agentloop.replay.notebook import detect_mode, link_to
from agentloop.replay.payload import Payload
from agentloop.replay.server import ReplayServer
from tests.journal.conversations import conversation, decode
from tests.replay.runs import HOSTILE, Recorded, going_on
from tests.replay.test_payload import opened

needs_build = pytest.mark.skipif(not (DIST / "page.js").is_file(), reason="the viewer's built file is not there")


class Blocks(HTMLParser):
    """What a browser's parser sees: data blocks by name, scripts, and every attribute that could fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.blocks: dict[str, str] = {}
        self.scripts: list[str] = []
        self.fetches: list[tuple[str, str]] = []
        self.meta: list[dict[str, str | None]] = []
        self.root: dict[str, str | None] = {}
        self._into: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.fetches += [(tag, name) for name, value in attrs if name in ("src", "href", "action", "data") and value]
        if tag == "meta":
            self.meta.append(given)
        if given.get("id") == "agentloop-replay":
            self.root = given
        if tag == "script":
            self._into = given.get("data-agentloop") or "script"

    def handle_data(self, data: str) -> None:
        if self._into == "script":
            self.scripts.append(data)
        elif self._into is not None:
            self.blocks[self._into] = self.blocks.get(self._into, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._into = None


def unpacked(block: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return opened(gzip.decompress(base64.b64decode(block, validate=True)))


@needs_build
def test_a_page_holds_what_it_shows_and_nothing_that_fetches(recorded: Recorded, tmp_path: Path) -> None:
    path = replay.view(recorded.path, "trouble_3", mode="html", steps=[1, 3], file=tmp_path / "run.html", turn=0)
    page = Blocks((tmp_path / "run.html").read_text("utf-8"))
    assert page.fetches == []
    overview, _ = unpacked(page.blocks.pop("overview"))
    assert set(overview["trajectories"]["step"]) == {1, 3} and overview["can"] == ["consistency"] and overview["commands"] == {}
    compared, _ = unpacked(page.blocks.pop("consistency"))
    assert {token["step"] for token in compared["report"]["worst_tokens"]} == {1}, "of what the page holds"
    assert list(page.blocks) == [f"sample:{key}" for key in overview["trajectories"]["key"]]
    _, columns = unpacked(page.blocks["sample:train/1/even_0"])
    assert columns["ids"].tolist() == recorded.trajectories["train", 1, "even_0"].input_ids
    (script,) = page.scripts
    (policy,) = [meta["content"] for meta in page.meta if meta.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None and policy.startswith(f"default-src 'none'; script-src 'sha256-{digest}'")
    assert "unsafe" not in policy and "http" not in policy
    assert page.root["data-link"] == "key=train%2F3%2Ftrouble_3&turn=0"
    assert isinstance(path, Page)


@needs_build
def test_hostile_text_is_nowhere_in_a_page_as_it_is(recorded: Recorded) -> None:
    page = replay.view(recorded.path, mode="html").html
    assert "onerror=" not in page.replace(DIST.joinpath("page.js").read_text("utf-8"), "")
    assert HOSTILE[:20] not in page


@needs_build
def test_names_are_escaped(tmp_path: Path) -> None:
    with JournalWriter(tmp_path / "a<script>b&", decode=decode) as writer:
        conversation(writer, 1, uid='"><img src=x>', step=1)
    page = Blocks(replay.view(tmp_path / "a<script>b&", mode="html").html)
    assert page.fetches == [] and len(page.scripts) == 1
    assert set(page.blocks) == {"overview", 'sample:train/1/"><img src=x>_1'}


@needs_build
def test_a_frame_in_a_notebook_has_an_origin_of_its_own(recorded: Recorded) -> None:
    page = replay.view(recorded.path, mode="iframe", ids="even_0", height=500)
    shown = page._repr_html_()
    assert 'sandbox="allow-scripts"' in shown and 'height="500"' in shown
    match = re.fullmatch(r'<iframe [^>]*srcdoc="([^"]*)"></iframe>', shown)
    assert match and html.unescape(match[1]) == page.html


@needs_build
def test_what_is_too_large_is_said_before_it_is_written(recorded: Recorded, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"50 trajectories of \d+ tokens .* limit is 0.2 MB; choose .* steps 1 to 3 .*--ids"):
        replay.view(recorded.path, mode="html", file=tmp_path / "x.html", max_mb=0.2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="nowhere"):
        replay.view(recorded.path, mode="html", file=tmp_path / "nowhere" / "x.html", ids="even_0")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"mode": "ifram"}, "no mode 'ifram'; did you mean 'iframe'"),
        ({"theme": "drak"}, "no theme 'drak'; did you mean 'dark'"),
        ({"view": "token"}, "no view 'token'; did you mean 'tokens'"),
        ({"trajectory": "even_7"}, "no trajectory 'even_7'; did you mean 'even_"),
        ({"trajectory": "even_0", "step": 9}, "no trajectory 'even_0' in step 9"),
        ({"trajectory": "even_0", "token": 10**6}, "trajectory even_0 has tokens 0 to"),
        ({"trajectory": "even_0", "turn": 7}, "trajectory even_0 has turns 0 to 1, not 7"),
        ({"token": 3}, "name the trajectory too"),
        ({"step": 3}, "to narrow what is shown use steps"),
        ({"steps": 8}, "no trajectories of step 8; it has steps 1 to 3"),
        ({"mode": "widget", "file": "x.html"}, "a widget cannot be written to a file"),
    ],
)
def test_wrong_arguments_are_one_sentence(recorded: Recorded, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        replay.view(recorded.path, **arguments)


def test_links_name_the_last_of_several(recorded: Recorded) -> None:
    payload = Payload(Run(recorded.path))
    assert link_to(payload, "even_0", partition="train") == {"key": "train/3/even_0"}
    assert link_to(payload, "even_0", step=1, token=430) == {"key": "train/1/even_0", "token": 430}
    assert link_to(payload, "train/2/flat_1", view="tokens") == {"key": "train/2/flat_1", "view": "tokens"}


# -- the widget -------------------------------------------------------------------------------------------------------


@needs_build
def test_the_widgets_state_holds_no_data(recorded: Recorded) -> None:
    pytest.importorskip("anywidget", reason="the widget needs anywidget")
    widget = replay.view(recorded.path, "even_0", mode="widget", step=1, token=430)
    sent: list[tuple[Any, Any]] = []
    widget.send = lambda content, buffers=None: sent.append((content, buffers))
    state = {name: value for name, value in widget.get_state().items() if name != "_esm"}
    assert len(json.dumps(state, default=str)) < 2000
    assert state["options"] == {"theme": "auto", "height": 640, "link": {"key": "train/1/even_0", "token": 430}}
    widget._handle_custom_msg({"type": "request", "n": 7, "request": {"kind": "sample", "key": "train/1/even_0"}}, [])
    widget._handle_custom_msg({"type": "request", "n": 8, "request": {"kind": "overview"}}, [])
    (content, buffers), (overview, none) = sent
    assert (content["type"], content["n"], content["header"]["n"]) == ("answer", 7, 481)
    assert len(buffers) == 1 and none is None and overview["header"]["can"] == ["search", "refresh", "changes", "consistency"]
    json.dumps([content, overview], allow_nan=False).encode()
    widget.goto("even_1", step=2, turn=1)
    assert sent[-1][0] == {"type": "event", "event": {"kind": "goto", "link": {"key": "train/2/even_1", "turn": 1}}}
    widget.refresh()
    assert sent[-1][0]["event"] == {"kind": "changed"}


def test_auto_takes_what_the_place_can_show(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    for name in ("VSCODE_PID", "VSCODE_CWD", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    assert detect_mode() == "html", "a script"
    shell = SimpleNamespace(kernel=object(), user_ns={})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert detect_mode() == "widget"
    shell.user_ns["__vsc_ipynb_file__"] = "x.ipynb"
    assert detect_mode() == "iframe", "VS Code"
    shell.user_ns.clear()
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert detect_mode() == "iframe", "Colab"
    monkeypatch.setitem(sys.modules, "marimo", SimpleNamespace(running_in_notebook=lambda: True))
    assert detect_mode() == "widget", "marimo"


# -- forks ------------------------------------------------------------------------------------------------------------


def test_a_conversation_is_forked_from_the_viewer(recorded: Recorded, tmp_path: Path) -> None:
    shutil.copytree(recorded.path, tmp_path / "run")
    run = Run(tmp_path / "run")
    payload = Payload(run, fork=forker(run, lambda: going_on("Then it is \\boxed{right}.")))
    assert "fork" in payload.answer({"kind": "overview"}).header["can"]
    parent = recorded.trajectories["train", 1, "even_1"]
    told = payload.answer({"kind": "fork", "key": "train/1/even_1", "turn": 0, "call": 0, "text": "43"}).header
    assert told["kind"] == "fork" and "reward 1" in told["text"], told
    (forked,) = Run(run.path / "forks" / "0001").trajectories()
    made = Run(run.path / "forks" / "0001").load(forked)
    assert [turn.calls[0].text for turn in made.turns if turn.calls] == ["43"]
    shared = parent.turns[0].end
    assert made.input_ids[:shared] == parent.input_ids[:shared] and made.texts[1] == "Then it is \\boxed{right}.<|im_end|>"
    told = payload.answer({"kind": "fork", "key": "train/1/even_1", "turn": 0, "call": None, "text": "And 1 + 1?"}).header
    assert "0002" in told["text"]
    wrong = payload.answer({"kind": "fork", "key": "train/1/even_1", "turn": 0, "call": 7, "text": "43"}).header
    assert wrong["kind"] == "error"


# -- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(recorded: Recorded) -> Iterator[ReplayServer]:
    server = ReplayServer(Payload(Run(recorded.path)), title="a <b>run</b>")
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    yield server
    server.close()
    thread.join()


def ask(
    server: ReplayServer, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


JSON = {"Content_Type": "application/json"}


@needs_build
def test_the_server_shows_a_run_to_who_has_the_token(server: ReplayServer, recorded: Recorded) -> None:
    assert server.url().startswith(f"http://127.0.0.1:{server.port}/?token=")
    status, headers, page = ask(server, "GET", f"/?token={server.token}")
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
    found = Blocks(page.decode())
    assert b"a &lt;b&gt;run" in page
    assert found.root["data-host"] == "http" and found.root["data-url"] == f"request?token={server.token}"
    assert ask(server, "GET", "/page.js")[0] == 200
    body = json.dumps({"kind": "sample", "key": "train/1/even_0"}).encode()
    status, _, frame = ask(server, "POST", f"/request?token={server.token}", body, **JSON)
    header, columns = opened(frame)
    assert status == 200 and columns["ids"].tolist() == recorded.trajectories["train", 1, "even_0"].input_ids
    for malformed in (b"{", b"[]", b'"x"', b"\xff"):
        header, _ = opened(ask(server, "POST", f"/request?token={server.token}", malformed, **JSON)[2])
        assert header["kind"] == "error"


@needs_build
def test_the_server_refuses_everybody_else(server: ReplayServer) -> None:
    token, body = f"token={server.token}", b'{"kind": "overview"}'
    own = f"127.0.0.1:{server.port}"
    assert ask(server, "GET", "/")[0] == 403
    assert ask(server, "GET", "/?token=wrong")[0] == 403
    assert ask(server, "GET", "/?token=w%C3%A4")[0] == 403
    assert ask(server, "POST", "/request", body, **JSON)[0] == 403
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1", "", f"127.0.0.1:{server.port}.evil.example"):
        assert ask(server, "GET", f"/?{token}", Host=host)[0] == 403, host
        assert ask(server, "GET", "/page.js", Host=host)[0] == 403
        assert ask(server, "POST", f"/request?{token}", body, Host=host, **JSON)[0] == 403
    assert ask(server, "GET", f"/?{token}", Host=f"localhost:{server.port}")[0] == 200
    assert ask(server, "POST", f"/request?{token}", body, Origin="http://evil.example", **JSON)[0] == 403
    assert ask(server, "POST", f"/request?{token}", body, Origin="null", **JSON)[0] == 403
    assert ask(server, "POST", f"/request?{token}", body, Origin=f"http://{own}", **JSON)[0] == 200
    assert ask(server, "POST", f"/request?{token}", body, Content_Type="text/plain")[0] == 404
    assert ask(server, "POST", f"/request?{token}", Content_Length="99999999", **JSON)[0] == 413
    assert ask(server, "GET", f"/../run.json?{token}")[0] == 404
    assert ask(server, "DELETE", f"/?{token}")[0] == 501


@needs_build
def test_a_taken_port_is_one_sentence(server: ReplayServer, recorded: Recorded) -> None:
    with pytest.raises(ConfigError, match=f"port {server.port} of 127.0.0.1 cannot be listened on"):
        ReplayServer(Payload(Run(recorded.path)), port=server.port)


# -- the commands -----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    return run_command(view_command.view, *arguments)


def run_command(function: Any, *arguments: str) -> Any:
    app = typer.Typer()
    app.command()(function)
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "1-x"], "--steps: '1-x' is neither a step nor a range; write them as 1,4-6"),
        (["--steps", "9"], "no trajectories of step 9; it has steps 1 to 3"),
        (["--ids", "even_0,evn_1"], "no trajectory 'evn_1'; did you mean 'even_1'"),
        (["flat_9"], "no trajectory 'flat_9'; did you mean 'flat_"),
    ],
)
def test_view_says_what_is_wrong_before_it_serves(recorded: Recorded, arguments: list[str], sentence: str) -> None:
    error = command(str(recorded.path), "--no-browser", *arguments).exception
    assert isinstance(error, ConfigError) and sentence in str(error)


@needs_build
def test_export_writes_a_page(recorded: Recorded, tmp_path: Path) -> None:
    def export(*arguments: str) -> Any:
        return run_command(convert.export, str(recorded.path), str(tmp_path / "x.html"), "--to", "html", *arguments)

    assert "2 trajectories written" in export("--steps", "1,3", "--ids", "even_0", "--partition", "train").output
    page = Blocks((tmp_path / "x.html").read_text("utf-8"))
    assert set(page.blocks) == {"overview", "consistency", "sample:train/1/even_0", "sample:train/3/even_0"}
    assert "limit is 0.01 MB" in str(export("--max-mb", "0.01").exception)
    assert "no trajectories of step 7" in str(export("--steps", "1,7").exception)
    error = run_command(convert.export, str(recorded.path), str(tmp_path / "x.jsonl"), "--ids", "even_0").exception
    assert isinstance(error, ConfigError) and "--ids goes with --to html" in str(error)


@needs_build
def test_view_serves_until_it_is_interrupted(recorded: Recorded) -> None:
    arguments = [sys.executable, "-m", "agentloop.cli", "view", str(recorded.path), "even_0", "--step", "1", "--no-browser"]
    # Whoever runs the tests in the background of a shell has SIGINT ignored, and children inherit that.
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listens) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            match = re.search(r"http://127\.0\.0\.1:(\d+)(/\?token=\S+)#key=train%2F1%2Feven_0$", line)
            assert match, line
            connection = http.client.HTTPConnection("127.0.0.1", int(match[1]), timeout=20)
            connection.request("GET", match[2])
            assert connection.getresponse().status == 200
            connection.close()
        finally:
            process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=30)
    assert process.returncode == 0 and not complaints
