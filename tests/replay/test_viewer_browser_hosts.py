"""The viewer's core in its hosts: a notebook's page (anywidget), one page from disk, and a frame."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.replay.browser import DIST, Site, ready, serving
from tests.replay.viewer_data import MadeRun, big_run, make, page, planted_run, report, worst_token

RUN = planted_run()

# What anywidget does with a module, and what Jupyter does with keys: Lumino listens at the document before anybody else, and
# leaves alone what is typed in an element that, or an ancestor of which, carries the attribute.
NOTEBOOK = """<!doctype html><html><head><meta charset="utf-8"><style>* { color: red !important; margin: 7px; }</style></head>
<body data-jp-theme-light="true"><div id="cell" tabindex="0">a cell</div><div id="out"></div>
<script type="module">
  import viewer from "./viewer.js";
  window.shortcuts = 0; window.leaked = 0; window.hacked = null;
  document.addEventListener("keydown", (event) => {
    for (let el = event.target; el; el = el.parentElement) if (el.hasAttribute("data-lm-suppress-shortcuts")) return;
    window.shortcuts += 1;
  }, true);
  for (const kind of ["keydown", "keyup", "keypress"]) document.addEventListener(kind, () => { window.leaked += 1; });
  class Model {
    constructor() { this.listeners = {}; this.options = {theme: "auto", height: 520, link: null}; this.sent = []; }
    get(name) { return this[name]; }
    on(name, fn) { (this.listeners[name] ??= new Set()).add(fn); }
    off(name, fn) { this.listeners[name]?.delete(fn); }
    emit(name, ...args) { for (const fn of this.listeners[name] ?? []) fn(...args); }
    count() { return Object.values(this.listeners).reduce((n, set) => n + set.size, 0); }
    async send(message) {
      this.sent.push(message);
      if (window.dead) return;
      const answer = await fetch("request", {method: "POST", body: JSON.stringify(message.request)});
      const bytes = await answer.arrayBuffer();
      const length = new DataView(bytes).getUint32(0, true), start = (8 + length + 7) & ~7;
      const header = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 8, length)));
      const odd = new Uint8Array(bytes.byteLength - start + 3);  // buffers come at any offset
      odd.set(new Uint8Array(bytes, start), 3);
      const buffers = bytes.byteLength > start ? [new DataView(odd.buffer, 3)] : [];
      this.emit("msg:custom", {type: "answer", n: message.n, header}, buffers);
      this.emit("msg:custom", {type: "answer", n: message.n + 1, header: {kind: "error", message: "another view's"}}, []);
    }
  }
  window.show = () => {
    const el = document.createElement("div");
    document.querySelector("#out").append(el);
    const model = new Model(), stop = viewer.render({model, el});
    return {el, model, stop() { stop(); el.remove(); }};
  };
  window.shown = window.show();
</script></body></html>"""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving() as site:
        site.pages["/notebook"] = NOTEBOOK
        site.serve(RUN)
        yield site


@pytest.fixture
def tab(context: Any) -> Iterator[Any]:
    tab = context.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield tab
    tab.close()
    assert [error for error in errors if "favicon" not in error and "404" not in error] == []


# -- a notebook ------------------------------------------------------------------------------------------------------------


def test_a_widget_shows_samples_from_messages(tab: Any, site: Site) -> None:
    site.serve(RUN)
    tab.goto(f"{site.url}/notebook")
    ready(tab, "run")
    assert tab.locator(".frame").bounding_box()["height"] == 520
    tab.locator('.row[data-group="train/1/0"]').click()
    ready(tab, "group")
    tab.wait_for_selector("[data-strips='4']")
    tab.locator('.row[data-key="train/1/0_1"]').click()
    ready(tab, "conversation", "train/1/0_1")
    assert tab.locator(".problem.top").is_hidden()
    colour = tab.locator(".crumb").first.evaluate("(el) => getComputedStyle(el).color")
    assert colour != "rgb(255, 0, 0)", "the notebook's style reached into the viewer"
    sent = tab.evaluate("() => window.shown.model.sent")
    assert all(message["type"] == "request" for message in sent) and len({message["n"] for message in sent}) == len(sent)


def test_python_can_point_and_tell_of_changes(tab: Any, site: Site) -> None:
    site.serve(RUN)
    tab.goto(f"{site.url}/notebook")
    ready(tab, "run")
    tab.evaluate("""() => window.shown.model.emit("msg:custom",
        {type: "event", event: {kind: "goto", link: {key: "train/2/2_1", token: 77}}}, [])""")
    ready(tab, "tokens", "train/2/2_1")
    assert tab.locator(".tokens-pane").get_attribute("data-token") == "77"
    tab.locator(".tokens").focus()
    tab.keyboard.press("ArrowRight")
    grown = MadeRun([*RUN.trajectories, make(uid="new", step=3)])
    site.serve(grown)
    tab.evaluate('() => window.shown.model.emit("msg:custom", {type: "event", event: {kind: "changed"}}, [])')
    tab.wait_for_selector(".status-line:has-text('Up to date')")
    assert tab.locator(".frame").get_attribute("data-sample") == "train/2/2_1"
    assert tab.locator(".tokens-pane").get_attribute("data-token") == "78"  # the reader is left where they were
    assert "train/2/2_1" not in [request.get("key") for request in site.requests]
    tab.evaluate("""() => { window.shown.model.options = {theme: "auto", height: 600, link: null};
        window.shown.model.emit("change:options"); document.body.dataset.jpThemeLight = "false"; }""")
    tab.wait_for_selector(".frame.theme-dark")
    assert tab.locator(".frame").bounding_box()["height"] == 600


def test_a_dead_kernel_is_said_and_what_is_loaded_works(tab: Any, site: Site) -> None:
    site.serve(RUN)
    tab.goto(f"{site.url}/notebook")
    ready(tab, "run")
    tab.evaluate("""() => window.shown.model.emit("msg:custom",
        {type: "event", event: {kind: "goto", link: {key: "train/2/2_1", view: "conversation"}}}, [])""")
    ready(tab, "conversation", "train/2/2_1")
    tab.evaluate("""() => { window.dead = true; window.shown.model.emit("msg:custom",
        {type: "event", event: {kind: "goto", link: {key: "train/1/2_1"}}}, []); }""")
    tab.wait_for_selector(".frame[data-busy]", timeout=2500)
    tab.click("button[data-turn='2']")
    start = RUN["train/2/2_1"].header["turns"][2]["start"]
    tab.wait_for_selector(f'.tokens-pane[data-token="{start}"]')


@pytest.mark.parametrize("view", ["run", "consistency", "group", "conversation", "tokens"])
def test_keys_never_reach_the_notebook(tab: Any, site: Site, view: str) -> None:
    run = planted_run()
    run.can = ["search", "fork", "refresh", "consistency"]
    run.consistency = report([worst_token("train/1/0_0", 130, -2.0)])
    site.serve(run)
    tab.set_viewport_size({"width": 1280, "height": 760})
    tab.goto(f"{site.url}/notebook")
    ready(tab, "run")
    if view == "consistency":
        tab.click('[data-value="consistency"]')
        tab.wait_for_selector(".consistency .worst button")
    elif view != "run":
        tab.evaluate(
            """(view) => window.shown.model.emit("msg:custom",
            {type: "event", event: {kind: "goto", link: {view, key: "train/1/2_2"}}}, [])""",
            view,
        )
        ready(tab, view)
    tab.evaluate("() => document.querySelector('#cell').focus()")
    tab.keyboard.type("a")
    before = tab.evaluate("() => [window.shortcuts, window.leaked]")
    assert before[0] == 1  # the page does listen
    count = tab.evaluate("""() => {
      window.focusable = [...document.querySelector("#out > div").shadowRoot.querySelectorAll(
        "button, input, select, textarea, summary, a, [tabindex]")].filter((el) => el.checkVisibility() && !el.disabled);
      return window.focusable.length;
    }""")
    assert count > 10
    for i in range(count):
        state = tab.evaluate(
            """(i) => { const el = window.focusable[i]; if (!el.isConnected || !el.checkVisibility()) return "gone";
            el.focus(); return el.hasAttribute("data-lm-suppress-shortcuts") ? "" : el.outerHTML; }""",
            i,
        )
        if state != "gone":
            assert state == "", "this element lets the notebook's shortcuts through"
            tab.keyboard.type("abdd")
    # What removes the element that has the focus must not hand the keyboard to the notebook either.
    tab.keyboard.press("g")
    tab.keyboard.press("Escape")
    tab.keyboard.type("abdd")
    assert tab.evaluate("() => [window.shortcuts, window.leaked]") == before


def test_clicks_keep_the_keyboard_in_the_viewer(tab: Any, site: Site) -> None:
    site.serve(RUN)
    tab.goto(f"{site.url}/notebook")
    ready(tab, "run")
    tab.locator('.chip[data-filter="error"]').click()
    tab.keyboard.type("abdd")
    tab.locator('.chip[data-filter="error"]').click()
    tab.locator('.row[data-group="train/1/0"]').click()
    ready(tab, "group")
    tab.keyboard.type("abdd")
    tab.wait_for_selector("[data-strips='4']")
    tab.locator('.row[data-key="train/1/0_2"] .mark').click()
    tab.keyboard.type("abdd")
    tab.locator(".crumb").first.click()
    ready(tab, "run")
    tab.keyboard.type("abdd")
    assert tab.evaluate("() => [window.shortcuts, window.leaked]") == [0, 0]


@pytest.mark.parametrize(
    ("view", "inside"),
    [
        ("run", ".chip[data-filter=error]"),
        ("run", ".sort"),
        ("group", ".mark"),
        ("group", ".side"),
        ("tokens", ".sample-head .tool"),
    ],
)
def test_what_is_drawn_anew_keeps_the_keyboard(tab: Any, site: Site, view: str, inside: str) -> None:
    site.serve(RUN)
    tab.goto(f"{site.url}/notebook")
    ready(tab, "run")
    tell = "(event) => window.shown.model.emit('msg:custom', {type: 'event', event}, [])"
    tab.evaluate(tell, {"kind": "goto", "link": {"view": view, "key": "train/1/0_1"}})
    ready(tab, view)
    tab.wait_for_selector(inside)
    if view == "group":
        tab.wait_for_selector(".side")
    tab.locator(inside).last.focus()
    for _ in range(3):
        tab.evaluate(tell, {"kind": "changed"})
        tab.keyboard.type("xyz")
        tab.wait_for_timeout(100)
        tab.keyboard.type("xyz")
    assert tab.evaluate("() => [window.shortcuts, window.leaked]") == [0, 0]
    assert tab.evaluate("() => Boolean(document.querySelector('#out > div').shadowRoot.activeElement)")


def test_cells_run_again_leave_nothing_behind(tab: Any, site: Site) -> None:
    site.serve(big_run(siblings=4, tokens=8192))
    tab.goto(f"{site.url}/notebook")
    ready(tab, "run")
    script = """async (times) => {
      const settle = (ms) => new Promise((done) => setTimeout(done, ms));
      let listeners = 0;
      for (let i = 0; i < times; i++) {
        const shown = window.show();
        const frame = () => shown.el.shadowRoot.querySelector(".frame");
        while (!frame().dataset.ready) await settle(5);
        shown.model.emit("msg:custom", {type: "event", event: {kind: "goto", link: {key: "train/1/0_1", token: 900}}}, []);
        while (frame().dataset.ready !== "tokens") await settle(5);
        shown.stop();
        listeners += shown.model.count();
      }
      for (let i = 0; i < 6; i++) { gc(); await settle(60); }
      return [listeners, performance.memory.usedJSHeapSize, document.querySelectorAll("*").length];
    }"""
    tab.evaluate(script, 4)
    first = tab.evaluate(script, 1)
    last = tab.evaluate(script, 20)
    assert first[0] == last[0] == 0
    assert last[1] < 1.2 * first[1], f"the heap grew from {first[1]} to {last[1]} bytes"
    assert last[2] == first[2]


# -- one page ------------------------------------------------------------------------------------------------------------


def policy() -> str:
    digest = base64.b64encode(hashlib.sha256((DIST / "page.js").read_bytes()).digest()).decode()
    return f"default-src 'none'; script-src 'sha256-{digest}'"


def test_one_page_opens_from_disk_under_a_strict_policy(tab: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    run = MadeRun(RUN.trajectories, RUN.steps, prompts=RUN.prompts)
    path.write_text(
        page(run, (DIST / "page.js").read_text(), policy(), 'data-link="key=train%2F1%2F2_2&amp;view=conversation"')
    )
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    ready(tab, "conversation", "train/1/2_2")
    assert "failed: timeout" in tab.locator(".call").first.inner_text()
    tab.keyboard.press("g")
    ready(tab, "group")
    tab.wait_for_selector("[data-strips='4']")
    tab.keyboard.press("r")
    ready(tab, "run")
    tab.fill(".run-view .search", "more than 5 s")
    tab.press(".run-view .search", "Enter")
    tab.wait_for_selector("[data-searched]")
    assert tab.locator(".row[data-key]").count() == 1
    assert asked == [path.as_uri()]
    tab.goto(f"{path.as_uri()}#key=train/2/0_0&token=50")
    ready(tab, "tokens", "train/2/0_0")


def test_a_frame_without_an_origin_works(tab: Any, site: Site) -> None:
    inner = page(MadeRun(RUN.trajectories[:4]), (DIST / "page.js").read_text(), policy(), 'data-theme="dark"')
    site.pages["/framed"] = (
        '<!doctype html><meta charset="utf-8"><iframe sandbox="allow-scripts" width="1000" height="700" '
        f'srcdoc="{html.escape(inner)}"></iframe>'
    )
    tab.goto(f"{site.url}/framed")
    frame = tab.frame_locator("iframe")
    frame.locator('.frame[data-ready="run"]').wait_for()
    frame.locator('.row[data-group="train/1/0"]').click()
    frame.locator("[data-strips='4']").wait_for()
    frame.locator('.row[data-key="train/1/0_3"]').click()
    frame.locator('.frame[data-sample="train/1/0_3"]').wait_for()
    assert frame.locator(".frame.theme-dark").count() == 1


def test_built_files_can_stand_in_a_page() -> None:
    for name in ("page.js", "viewer.js"):
        text = (DIST / name).read_text()
        assert text.isascii() and "</script" not in text.lower() and "<!--" not in text
        for word in ("eval(", "new Function", "innerHTML", "localStorage", "https://"):
            assert word not in text, word
