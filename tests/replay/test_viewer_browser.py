"""The viewer's core in a real browser, over HTTP and under a strict policy, with runs of which every value is known."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.replay.browser import Site, ready, serving
from tests.replay.viewer_data import (
    EMOJI,
    HALF,
    PLANTED,
    MadeRun,
    Trajectory,
    figures,
    frame,
    make,
    planted_run,
    report,
    worst_token,
)

RUN = planted_run()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving() as site:
        yield site


@pytest.fixture
def page(context: Any, site: Site) -> Iterator[Any]:
    site.serve(RUN)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert [error for error in errors if "favicon" not in error and "404" not in error] == []


def open_run(page: Any, site: Site, link: str = "", path: str = "/") -> None:
    page.goto(f"{site.url}{path}{'#' + link if link else ''}", wait_until="commit")
    ready(page)


def open_sample(page: Any, site: Site, key: str, view: str = "tokens", **link: Any) -> Trajectory:
    open_run(page, site, "&".join([f"view={view}", f"key={key}", *(f"{name}={value}" for name, value in link.items())]))
    ready(page, view, key)
    return next(item for item in RUN.trajectories if item.key == key)


def goto(page: Any, **link: Any) -> None:
    page.evaluate("(link) => document.querySelector('#agentloop-replay').viewer.goto(link)", link)


def tooltips(page: Any, tokens: list[int]) -> list[dict[str, str]]:
    """The fields of the tooltips that pointing at these tokens brings."""
    script = """async (tokens) => {
      const root = document.querySelector("#agentloop-replay"), out = [];
      for (const token of tokens) {
        await root.viewer.goto({view: "tokens", key: root.shadowRoot.querySelector(".frame").dataset.sample, token});
        const at = root.shadowRoot.querySelector(".tok.cursor");
        at.dispatchEvent(new PointerEvent("pointermove", {bubbles: true}));
        const fields = {drawn: at.textContent, code: at.className.match(/\\bc(\\d+)/)[1]};
        for (const dd of root.shadowRoot.querySelectorAll(".tip dd")) fields[dd.dataset.field] = dd.textContent;
        out.push(fields);
      }
      return out;
    }"""
    return list(page.evaluate(script, tokens))


def cursor_in_sight(page: Any) -> bool:
    """Whether the token that the cursor is on lies within its pane."""
    return bool(
        page.evaluate("""() => {
          const pane = document.querySelector("#agentloop-replay").shadowRoot.querySelector(".tokens");
          const [box, around] = [pane.querySelector(".tok.cursor")?.getBoundingClientRect(), pane.getBoundingClientRect()];
          return Boolean(box) && box.top >= around.top && box.bottom <= around.bottom + 1;
        }""")
    )


def shown_keys(page: Any) -> set[str]:
    return set(page.locator(".row[data-key]").evaluate_all("(rows) => rows.map((row) => row.dataset.key)"))


def drawn_tokens(page: Any) -> dict[int, str]:
    """Class of every token, by its position: scrolls over all of them."""
    script = """async () => {
      const shadow = document.querySelector("#agentloop-replay").shadowRoot;
      const pane = shadow.querySelector(".tokens"), found = {};
      for (let top = 0; ; top += pane.clientHeight) {
        pane.scrollTop = top;
        await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
        for (const tok of pane.querySelectorAll(".tok")) found[tok.token] = tok.className;
        if (top + pane.clientHeight >= pane.scrollHeight) return found;
      }
    }"""
    return {int(token): name for token, name in page.evaluate(script).items()}


# -- the run -------------------------------------------------------------------------------------------------------------


def test_from_a_trend_to_a_conversation_in_three_clicks(page: Any, site: Site) -> None:
    open_run(page, site)
    box = page.locator(".plot").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + 40)  # the second of two steps
    assert page.locator(".chip.step").inner_text().startswith("step 2")
    assert page.locator("[data-group]").count() == 4
    page.locator('.row[data-group="train/2/1"]').click()
    ready(page, "group")
    page.locator('.row[data-key="train/2/1_2"]').click()
    ready(page, "conversation", "train/2/1_2")
    assert "case 1" in page.locator(".conversation").inner_text()


def test_charts_say_what_they_show_and_work_by_keyboard(page: Any, site: Site) -> None:
    open_run(page, site)
    chart = page.locator(".chart").first
    chart.focus()
    page.keyboard.press("Home")
    rewards = [item.row["reward"] for item in RUN.trajectories if item.row["step"] == 1]
    assert f"step 1: mean {np.mean(rewards):.3f}" in chart.get_attribute("aria-valuetext")
    page.keyboard.press("Enter")
    assert page.locator(".chip.step").inner_text().startswith("step 1")
    assert "of 4 groups" in page.locator(".chart").nth(1).get_attribute("aria-valuetext")
    words = page.locator(".chart").nth(2).get_attribute("aria-valuetext")
    assert "final answer 12" in words and "engine failed 1" in words and "incomplete 1" in words
    assert "timeout 1 of 32 calls" in page.locator(".chart").nth(3).get_attribute("aria-valuetext")


def test_filters_show_exactly_what_was_planted(page: Any, site: Site) -> None:
    page.set_viewport_size({"width": 1280, "height": 1700})  # all rows in sight
    open_run(page, site)
    page.click('[data-value="trajectories"]')
    for name, planted in PLANTED.items():
        chip = page.locator(f'.chip[data-filter="{name}"]')
        assert chip.locator("b").inner_text() == str(len(planted))
        assert page.locator(f'.row [data-badge="{name}"]').count() == len(planted)
        chip.click()
        assert shown_keys(page) == planted
        assert page.locator(f'.row [data-badge="{name}"]').count() == len(planted)
        chip.click()


def test_reward_range(page: Any, site: Site) -> None:
    open_run(page, site)
    page.click('[data-value="trajectories"]')
    page.fill('[data-filter="low"]', "0.2")
    page.fill('[data-filter="high"]', "0.6")
    assert shown_keys(page) == PLANTED["zero_variance"]


def test_lists_are_sorted_by_a_column(page: Any, site: Site) -> None:
    items = [make(uid=str(i), reward=reward, seed=i) for i, reward in enumerate([0.25, None, 1.0, -0.5])]
    site.serve(MadeRun(items))
    open_run(page, site)
    page.click('[data-value="trajectories"]')
    in_order = "(rows) => rows.map((row) => Number(row.dataset.key.match(/(\\d+)_0$/)[1]))"
    for expected in ([2, 0, 3, 1], [3, 0, 2, 1], [0, 1, 2, 3]):
        page.click('[data-sort="reward"]')
        shown = page.locator(".row[data-key]").evaluate_all(
            f"(rows) => ({in_order})(rows.sort((a, b) => a.getAttribute('aria-rowindex') - b.getAttribute('aria-rowindex')))"
        )
        assert shown == expected


def test_search_finds_text_and_opens_its_turn(page: Any, site: Site) -> None:
    open_run(page, site)
    page.fill(".run-view .search", "took more than 5 S")
    page.press(".run-view .search", "Enter")
    page.wait_for_selector("[data-searched]")
    assert shown_keys(page) == {"train/1/2_2"}
    page.locator(".row[data-key]").click()
    ready(page, "conversation", "train/1/2_2")


def test_a_host_that_cannot_search_is_searched_by_the_core(page: Any, site: Site) -> None:
    plain = MadeRun(RUN.trajectories)
    site.serve(plain)
    open_run(page, site)
    page.fill(".run-view .search", "took MORE than")
    page.press(".run-view .search", "Enter")
    page.wait_for_selector("[data-searched]")
    row = page.locator(".row[data-key]")
    assert row.count() == 1 and "result\nThe tool took more than 5 s." in row.inner_text()
    assert {request["kind"] for request in site.requests} == {"overview", "sample"}


def test_train_side_says_how_much_has_arrived(page: Any, site: Site) -> None:
    open_run(page, site)
    assert page.locator(".arrived").inner_text() == "train side: 31 of 32 arrived"
    site.serve(MadeRun(RUN.trajectories[:4]))
    open_run(page, site)
    page.reload()
    ready(page, "run")
    assert page.locator(".arrived").inner_text() == "train side: not recorded"


def test_trainer_against_rollout_leads_to_the_tokens_that_are_furthest_apart(page: Any, site: Site) -> None:
    at = int(np.flatnonzero(RUN["train/1/0_2"].mask)[5])
    hostile = "<img src=x onerror=hacked=1>\u202e\n"
    worst = [
        worst_token("train/1/0_1", 130, None),
        worst_token("train/1/0_2", at, -8.5, text=hostile, update=1, trained_step=2),
        worst_token("train/7/9_9", 12, 3.25, text=None),
    ]
    site.serve(
        MadeRun(
            RUN.trajectories, can=["consistency"], consistency=report(worst, findings=["2 trained tokens were <not> sampled"])
        )
    )
    open_run(page, site)
    page.reload()
    ready(page, "run")
    page.click('[data-value="consistency"]')
    page.wait_for_selector('.consistency[data-compared="400"]')
    panel = page.locator(".consistency")
    assert not page.locator(".run-view .list").is_visible()
    assert "31 of 32 arrived" in panel.inner_text() and "400 compared, 3 not recorded" in panel.inner_text()
    assert "2 trained tokens were <not> sampled" in panel.locator(".problem").inner_text()
    assert panel.locator('[data-field="mean_abs"]').inner_text() == "mean 0.375, most 0.375"
    rows = panel.locator('table[data-table="By turn"] tbody tr').all_inner_texts()
    assert [row.split() for row in rows] == [["0", "300", *["0.125"] * 3, "25%"], ["1", "100", *["0.750"] * 3, "25%"]]
    assert panel.locator('table[data-table="By position in the response"] tbody tr').count() == 1
    chart = panel.locator(".chart")
    chart.focus()
    page.keyboard.press("End")
    assert chart.get_attribute("aria-valuetext") == "step 2.1: mean 0.500, most 0.500"
    page.keyboard.press("Enter")
    assert panel.locator('table[data-table="By turn"] tbody tr').count() == 1
    assert panel.locator(".worst tbody tr").count() == 1, "the others are not of this step"
    assert page.evaluate("() => document.querySelector('#agentloop-replay').shadowRoot.activeElement.className") == "chart"
    page.keyboard.press("Enter")
    assert panel.locator(".worst tbody tr").count() == 3
    first, second, third = panel.locator(".worst tbody tr").all()
    assert first.locator("[data-field=diff]").inner_text() == "infinite" and "\u2212\u221e" in first.inner_text()
    assert third.locator("button").count() == 0, "it is not among what is shown here"
    assert "#7" in third.inner_text()
    assert "\u27e8U+202E\u27e9" in second.inner_text() and panel.locator("img").count() == 0
    second.locator("button").click()
    ready(page, "tokens", "train/1/0_2")
    page.wait_for_selector(f'.tokens-pane[data-token="{at}"][data-mode="difference"]')
    page.wait_for_timeout(100)
    assert cursor_in_sight(page)
    page.keyboard.press("r")
    ready(page, "run")
    assert panel.is_visible(), "where the reader was"
    page.click('[data-value="groups"]')
    assert page.locator(".row[data-group]").first.is_visible() and not panel.is_visible()


def test_trainer_against_rollout_says_what_was_not_recorded(page: Any, site: Site) -> None:
    nothing = report([], all=figures(0, None), by={"step": [], "turn": [], "position": [], "in_turn": []})
    for run in (MadeRun(RUN.trajectories), MadeRun(RUN.trajectories, can=["consistency"], consistency=nothing)):
        site.serve(run)
        open_run(page, site)
        page.reload()
        ready(page, "run")
        page.click('[data-value="consistency"]')
        page.wait_for_selector(".consistency .missing:has-text('not recorded')")
        assert page.locator(".consistency table").count() == 0
    site.answer = lambda request: (
        frame({"kind": "error", "message": "w0.rows: damaged"}) if request["kind"] == "consistency" else run.answer(request)
    )
    page.reload()
    ready(page, "run")
    page.click('[data-value="consistency"]')
    page.wait_for_selector(".consistency .problem:has-text('w0.rows: damaged')")


def test_a_turn_says_how_far_trainer_and_rollout_are_apart(page: Any, site: Site) -> None:
    item = open_sample(page, site, "train/1/0_0", "conversation")
    turn = item.header["turns"][1]
    span = slice(turn["start"], turn["end"])
    apart = (item.columns["train_logprob"] - item.columns["logprob"])[span]
    apart = np.where(item.columns["train_mask"][span] == 1, apart, 0.0)
    place = turn["start"] + int(np.abs(apart).argmax())
    page.click("button[data-turn='1']")
    words = page.locator('article[data-turn="1"] [data-field="drift"]')
    assert f"most {apart[place - turn['start']]:+.3f} at token {place}" in words.inner_text()
    words.locator("button").click()
    page.wait_for_selector(f'.tokens-pane[data-token="{place}"][data-mode="difference"]')
    bare = next(other for other in RUN.trajectories if "train_logprob" not in other.columns)
    goto(page, view="conversation", key=bare.key)
    ready(page, "conversation", bare.key)
    assert page.locator('.sample-about [data-field="train \u2212 rollout"]').inner_text().endswith("not recorded")
    assert page.locator('[data-field="drift"]').count() == 0


# -- the conversation ----------------------------------------------------------------------------------------------------


def test_a_turn_brings_its_first_token(page: Any, site: Site) -> None:
    item = open_sample(page, site, "train/1/0_0", "conversation")
    for index in (2, 0, 1):
        page.click(f'button[data-turn="{index}"]')
        start = item.header["turns"][index]["start"]
        page.wait_for_selector(f'.tokens-pane[data-token="{start}"]')
        assert cursor_in_sight(page)
        assert page.locator(".tok.cursor").evaluate("(el) => el.token") == start
    page.keyboard.press("j")
    page.wait_for_selector(f'.tokens-pane[data-token="{item.header["turns"][2]["start"]}"]')
    page.keyboard.press("k")
    page.keyboard.press("k")
    page.wait_for_selector('.sample-view[data-turn="0"]')
    page.keyboard.press("]")
    ready(page, "conversation", "train/1/0_1")
    page.keyboard.press("[")
    ready(page, "conversation", "train/1/0_0")


def test_calls_show_arguments_result_latency_and_failure_in_words(page: Any, site: Site) -> None:
    open_sample(page, site, "train/1/2_2", "conversation")
    call = page.locator(".card[data-turn='0'] .call")
    text = call.inner_text()
    assert "failed: timeout" in text and "The tool took more than 5 s." in text
    assert "ran 400 ms" in text and "waited 100 ms" in text and "3 (2 retries)" in text and "120 tokens of the result" in text
    assert "6 * 7" in call.locator("[data-field=arguments]").inner_text()
    assert "line one\nline two" in call.locator("[data-field=arguments]").inner_text()
    good = page.locator(".card[data-turn='1'] .call").inner_text()
    assert "\u2713 ok" in good and "result of turn 1: 48" in good and "retries" not in good
    about = page.locator(".sample-about").inner_text()
    assert "correct 0" in about and "format +0.250" in about and "train side arrived" in about


def test_errors_stop_reasons_and_parse_errors_in_words(page: Any, site: Site) -> None:
    open_sample(page, site, "train/1/1_0", "conversation")
    assert "The engine could not answer: connection refused." in page.locator("[data-field=error]").inner_text()
    open_sample(page, site, "train/1/1_1", "conversation")
    assert "cut off: token budget ran out" in page.locator("button[data-turn='2']").inner_text()
    assert "token limit" in page.locator(".end-card").inner_text()
    open_sample(page, site, "train/1/2_0", "conversation")
    assert "ends too early, at character 17" in page.locator("[data-field=parse-error]").inner_text()
    open_sample(page, site, "train/1/1_2", "conversation")
    assert "has not ended" in page.locator(".end-card").inner_text()


def test_playing_back_in_time(page: Any, site: Site) -> None:
    open_sample(page, site, "train/1/0_0", "conversation")
    clock = page.locator(".clock")
    clock.evaluate("(el) => { el.value = 300; el.dispatchEvent(new Event('input')); }")  # 0.3 of 5.25 s: tools of turn 0
    assert "turn 0: tools" in page.locator("[data-field=clock]").inner_text()
    assert page.locator(".card.future").count() == 2
    clock.evaluate("(el) => { el.value = 480; el.dispatchEvent(new Event('input')); }")
    assert "turn 1: generating" in page.locator("[data-field=clock]").inner_text()
    written = page.locator(".card[data-turn='1'] [data-field=text]").inner_text()
    assert 0 < len(written) < len("Turn 1: I compute, then I answer.")
    page.select_option(".speed", "64")
    page.click(".play")
    page.wait_for_selector(".play[aria-label='play back in time']")
    assert "ended" in page.locator("[data-field=clock]").inner_text()
    assert page.locator(".card[data-turn='1'] [data-field=text]").inner_text() == "Turn 1: I compute, then I answer."


def test_forks_from_a_turn_and_from_the_prompt(page: Any, site: Site) -> None:
    run = MadeRun(RUN.trajectories, can=["fork"], commands=RUN.commands)
    site.serve(run)
    open_sample(page, site, "train/1/0_0", "conversation")
    call = page.locator(".card[data-turn='1'] .call")
    call.locator(".fork .link").click()
    assert call.locator("textarea").input_value() == "result of turn 1: 48"
    call.locator("textarea").fill("it is 49")
    call.locator(".fork .tool").click()
    page.wait_for_selector(".notice:has-text('Forked train/1/0_0 at turn 1, call 0: it is 49')")
    prompt = page.locator("[data-role=user]")
    prompt.locator(".fork .link").click()
    prompt.locator("textarea").fill("What is 7 times 7?")
    prompt.locator(".fork .tool").click()
    page.wait_for_selector(".notice:has-text('call None: What is 7 times 7?')")
    button = page.locator(".card[data-turn='1'] .meta > .link")
    assert button.get_attribute("title") == "agentloop fork runs/x 0_0 --step 1 --turn 1"


# -- the tokens ----------------------------------------------------------------------------------------------------------


def test_tooltips_tell_the_truth_of_200_tokens(page: Any, site: Site) -> None:
    rng = np.random.default_rng(7)
    looked_at: set[bytes] = set()
    for key in ("train/1/0_2", "train/1/2_1"):
        item = open_sample(page, site, key)
        n = item.header["n"]
        tokens = sorted(rng.choice(n, 100, replace=False).tolist())
        versions = np.concatenate([np.full(length, str(version)) for version, length in item.header["versions"]])
        turns = np.concatenate([np.full(length, index) for _, length, index in item.header["segments"]])
        for i, fields in zip(tokens, tooltips(page, tokens), strict=True):
            piece = item.pieces[i]
            looked_at.add(piece)
            assert fields["id"] == str(item.columns["ids"][i])
            assert fields["mask"] == str(item.mask[i])
            assert fields["turn"] == ("prompt" if turns[i] < 0 else f"turn {turns[i]}")
            try:
                text = piece.decode()
                assert json.loads(fields["text"]) == text
            except UnicodeDecodeError:
                assert fields["text"] == "bytes " + piece.hex(" ")
                assert piece.hex(" ") in fields["drawn"]
            for name in ("logprob", "entropy"):
                if item.mask[i]:
                    assert float(fields[name]) == pytest.approx(float(item.columns[name][i]), abs=1e-6)
                else:
                    assert fields[name] == "—"
            if item.mask[i]:
                assert fields["version"] == ("mixed" if versions[i] == "mixed" else f"v{versions[i]}")
                difference = np.float32(item.columns["train_logprob"][i]) - np.float32(item.columns["logprob"][i])
                assert float(fields["difference"]) == pytest.approx(float(difference), abs=1e-6)
                assert float(fields["advantage"]) == pytest.approx(float(item.columns["advantage"][i]), abs=1e-4)
    assert {HALF, b"<|im_end|>", b"\n", b"    ", "界".encode()} <= looked_at, "split, special, newline, indent, CJK"
    assert any(piece in looked_at for piece in EMOJI), "a part of an emoji"


def test_special_tokens_and_split_characters_are_seen(page: Any, site: Site) -> None:
    item = open_sample(page, site, "train/1/3_1")
    places = {piece: item.pieces.index(piece) for piece in (b"<|im_end|>", b"\n", b"    ", HALF, b"", b" answer")}
    fields = dict(zip(places, tooltips(page, list(places.values())), strict=True))
    assert fields[b"<|im_end|>"]["drawn"] == "<|im_end|>"
    assert fields[b"\n"]["drawn"] == "\u21b5" and fields[b"    "]["drawn"] == "\u00b7" * 4
    assert fields[HALF]["drawn"] == "\u2039e6 95\u203a"
    assert fields[b""]["drawn"] == "\u2205" and fields[b" answer"]["drawn"] == " answer"
    whole = next(i for i in range(30, 40) if item.pieces[i : i + 2] == [HALF, "数".encode()[2:]])
    assert "“数”" in tooltips(page, [whole])[0]["character"]
    special = page.evaluate(
        "() => document.querySelector('#agentloop-replay').shadowRoot.querySelectorAll('.tok.k-special').length"
    )
    assert special > 0


def test_untrained_tokens_never_carry_heat(page: Any, site: Site) -> None:
    for key in ("train/1/0_3", "train/1/2_3"):  # the second is masked as a whole
        item = open_sample(page, site, key)
        for mode in ("probability", "entropy", "difference"):
            page.click(f'.tokens-pane [data-value="{mode}"]')
            codes = {token: int(name.split(" c")[1].split()[0]) for token, name in drawn_tokens(page).items()}
            assert len(codes) == item.header["n"]
            for token, code in codes.items():
                trained = bool(item.mask[token]) and not item.header["masked"]
                assert (code >= 10) == trained, (mode, token, code)
            legend = page.locator(".tokens-pane .legend").inner_text()
            assert "not trained" in legend
            assert ("masked" in legend) == item.header["masked"]


def test_missing_values_say_so(page: Any, site: Site) -> None:
    item = open_sample(page, site, "train/2/0_1")
    sampled = int(np.flatnonzero(item.mask)[5])
    fields = tooltips(page, [sampled, 0])
    for name in ("entropy", "train_logprob", "difference", "advantage"):
        assert fields[0][name] == "not recorded"
        assert fields[1][name] == "—"
    page.click('.tokens-pane [data-value="difference"]')
    assert "not recorded" in page.locator(".tokens-pane .legend").inner_text()
    codes = {name.split(" c")[1].split()[0] for name in drawn_tokens(page).values()}
    assert codes == {"0", "1"}  # plain and «not recorded»; no heat
    assert "train values: not recorded" in page.locator("[data-field=jump]").inner_text()
    page.click('[data-action="next"]')
    assert page.locator(".tokens-pane").get_attribute("data-token") == "0"
    assert "train side not recorded" in page.locator(".sample-about").inner_text()


def test_next_visits_exactly_the_planted_differences(page: Any, site: Site) -> None:
    item = make(uid="9", seed=99, turns=5, tokens=300)
    sampled = np.flatnonzero(item.mask)
    planted = sorted(np.random.default_rng(3).choice(sampled, 7, replace=False).tolist())
    item.columns["train_logprob"][planted] = item.columns["logprob"][planted] + np.array(
        [0.6, -0.7, 0.9, -1.4, 2.0, 0.51, -3.0]
    )
    untrained = np.flatnonzero((item.mask == 0) & (np.arange(item.header["n"]) > 24))[:3]
    item.columns["logprob"][untrained] = -9.0  # an engine that told more than was asked; still not trained
    item.columns["train_mask"][int(sampled[0])] = 0
    item.columns["train_logprob"][int(sampled[0])] = 5.0  # rejected by the trainer
    site.serve(MadeRun([item]))
    open_run(page, site, f"view=tokens&key={item.key}")
    ready(page, "tokens", item.key)
    page.click('.tokens-pane [data-value="difference"]')
    assert "7 over 0.5" in page.locator("[data-field=jump]").inner_text()
    visited = []
    for _ in range(8):
        page.click('[data-action="next"]')
        visited.append(int(page.locator(".tokens-pane").get_attribute("data-token")))
        assert page.locator(".tok.cursor").evaluate("(el) => el.classList.contains('over')")
    assert visited == [*planted, planted[0]]
    page.keyboard.press("p")
    page.wait_for_selector(f'.tokens-pane[data-token="{planted[-1]}"]')
    page.fill(".jumps .number", "1")
    assert "3 over 1" in page.locator("[data-field=jump]").inner_text()
    page.fill(".jumps .number", "4")
    assert "none over 4" in page.locator("[data-field=jump]").inner_text()


def test_find_and_copy_in_tokens(page: Any, site: Site) -> None:
    item = open_sample(page, site, "train/1/0_2")
    page.fill(".search.small", "数")
    starts = [i for i in range(item.header["n"] - 1) if item.pieces[i : i + 2] == [HALF, "数".encode()[2:]]]
    page.press(".search.small", "Enter")
    assert int(page.locator(".tokens-pane").get_attribute("data-token")) == starts[0]
    assert page.locator(".search.small + span").inner_text() == f"1 of {len(starts)} place{'s' * (len(starts) > 1)}"
    page.fill(".search.small", "no such text")
    assert page.locator(".search.small + span").inner_text() == "not found"
    goto(page, view="tokens", key="train/1/0_2", token=40)
    page.locator(".tokens").focus()
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Control+c")
    page.wait_for_selector(".status-line:has-text('Copied')")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    assert page.evaluate("() => navigator.clipboard.readText()") == b"".join(item.pieces[40:44]).decode("utf-8", "replace")


def test_records_without_text_or_tokens(page: Any, site: Site) -> None:
    ids_only, empty = make(uid="ids"), make(uid="none", complete=False, end_reason=None, reward=None)
    for name in ("piece_len", "piece_bytes", "logprob"):
        del ids_only.columns[name]
    empty.columns = {"ids": np.empty(0)}
    empty.header |= {"n": 0, "segments": [], "versions": [], "turns": [], "messages": []}
    empty.row |= dict.fromkeys(("tokens", "turns", "tool_calls", "sampled_tokens", "tool_failures", "versions", "advantage"))
    site.serve(MadeRun([ids_only, empty]))
    open_run(page, site)
    page.click('[data-value="trajectories"]')
    assert page.locator(f'.row[data-key="{empty.key}"]').inner_text().count("not recorded") == 6
    goto(page, view="tokens", key=ids_only.key)
    ready(page, "tokens", ids_only.key)
    sampled = int(np.flatnonzero(ids_only.mask)[3])
    (fields,) = tooltips(page, [sampled])
    assert fields["drawn"] == f"#{ids_only.columns['ids'][sampled]}" and fields["text"] == "not recorded"
    assert fields["logprob"] == "not recorded" and "probability" not in fields
    goto(page, view="tokens", key=empty.key)
    ready(page, "tokens", empty.key)
    assert "has no tokens" in page.locator(".detail").inner_text()
    goto(page, view="group", key=empty.key)
    page.wait_for_selector("[data-strips='1']")


def test_deep_links(page: Any, site: Site) -> None:
    open_sample(page, site, "train/2/1_3", "tokens", token=133)
    assert page.locator(".tokens-pane").get_attribute("data-token") == "133"
    page.wait_for_timeout(100)  # what is above the tokens is drawn, and takes its room
    assert cursor_in_sight(page)
    last = RUN["train/2/1_3"].header["n"] - 1
    page.evaluate("() => (location.hash = '')")
    ready(page, "run")
    goto(page, view="tokens", key="train/2/1_3", token=last)
    page.wait_for_timeout(100)
    assert cursor_in_sight(page), "the last one too"
    open_sample(page, site, "train/2/1_3", "tokens", token=last)
    page.reload()
    ready(page, "tokens", "train/2/1_3")
    page.wait_for_timeout(100)
    assert cursor_in_sight(page)
    page.set_viewport_size({"width": 1280, "height": 500})
    page.wait_for_timeout(100)
    assert cursor_in_sight(page)
    open_sample(page, site, "train/2/1_3", "tokens", token=133)
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => location.hash.includes('token=134')")
    page.reload()
    ready(page, "tokens", "train/2/1_3")
    assert page.locator(".tokens-pane").get_attribute("data-token") == "134"
    page.keyboard.press("Escape")
    ready(page, "group")
    page.go_back()
    ready(page, "tokens", "train/2/1_3")
    open_run(page, site, "key=train/9/9_9")
    page.reload()
    ready(page, "run")
    assert "holds no trajectory 'train/9/9_9'" in page.locator(".problem.top").inner_text()


# -- the group -----------------------------------------------------------------------------------------------------------


def test_group_shows_rewards_advantages_and_where_siblings_part(page: Any, site: Site) -> None:
    open_run(page, site, "view=group&key=train/1/0_0")
    page.wait_for_selector("[data-strips='4']")
    siblings = [item for item in RUN.trajectories if item.row["group"] == "train/1/0"]
    reference = siblings[1]
    page.click('.row[data-key="train/1/0_1"] .mark')
    page.wait_for_selector("[data-strips='4']")
    for item in siblings:
        row = page.locator(f'.row[data-key="{item.key}"]')
        assert float(row.locator("[data-field=reward]").inner_text()) == item.row["reward"]
        assert float(row.locator("[data-field=advantage]").inner_text()) == item.row["advantage"]
        parts = row.locator("[data-field=parts]").inner_text()
        if item is reference:
            assert parts == "—"
        else:
            assert int(parts) == int(np.flatnonzero(item.columns["ids"] != reference.columns["ids"])[0])
    stats = page.locator(".group-view .run-facts")
    assert stats.locator("[data-field=std]").inner_text() == f"{np.std([1, 0, 0, 1], ddof=1):.3f}"
    page.click('.row[data-key="train/1/0_3"] .parts-at')
    at = int(np.flatnonzero(siblings[3].columns["ids"] != reference.columns["ids"])[0])
    page.wait_for_selector(f'.compare[data-parts="{at}"]')
    page.locator(".side").nth(1).click()
    ready(page, "tokens", "train/1/0_3")
    assert page.locator(".tokens-pane").get_attribute("data-token") == str(at)


def test_zero_variance_is_flagged(page: Any, site: Site) -> None:
    open_run(page, site, "view=group&key=train/2/3_0")
    assert "no gradient" in page.locator(".group-title [data-badge=zero_variance]").inner_text()
    open_run(page, site, "view=group&key=train/2/2_0")
    page.wait_for_selector('.group-view[data-group="train/2/2"]')
    assert page.locator(".group-title [data-badge=zero_variance]").count() == 0


def test_strips_show_every_origin(page: Any, site: Site) -> None:
    open_run(page, site, "view=group&key=train/1/0_0")
    page.wait_for_selector("[data-strips='4']")
    colours = page.evaluate("""() => {
      const canvas = document.querySelector("#agentloop-replay").shadowRoot.querySelector(".row.siblings .strip");
      const pixels = canvas.getContext("2d").getImageData(0, canvas.height >> 1, canvas.width, 1).data, found = new Set();
      for (let i = 0; i < pixels.length; i += 4) found.add([pixels[i], pixels[i + 1], pixels[i + 2]].join());
      return [...found];
    }""")
    assert {"179,188,200", "59,125,216", "230,159,0", "168,115,201"} <= set(colours)


# -- what must never happen ----------------------------------------------------------------------------------------------


HOSTILE = (
    '<img src=x onerror="window.hacked = 1"><script>window.hacked = 2</script></script></textarea><svg onload="hacked=3">'
    " \x1b[31mred\x1b[2J\x1b]0;title\x07 \x9b31m \u202egnp.exe\u202c \u2066x\u2069 \u200b\x00 javascript:alert(1)"
)


def test_hostile_text_never_runs(page: Any, site: Site) -> None:
    item = make(uid="<b>7", seed=5)
    call = item.header["turns"][0]["calls"][0]
    call |= {"text": HOSTILE, "name": HOSTILE, "arguments": {HOSTILE: HOSTILE}, "id": HOSTILE, "metrics": {HOSTILE: 1.0}}
    item.header["turns"][1] |= {"text": HOSTILE, "parse_errors": [HOSTILE], "stop_reason": HOSTILE}
    item.header["messages"] += [{"role": HOSTILE, "content": HOSTILE}]
    item.header |= {"error": HOSTILE, "ground_truth": HOSTILE}
    item.header["reward"] |= {"components": {HOSTILE: 1.0}, "info": {HOSTILE: HOSTILE}}
    item.row |= {"error": HOSTILE, "end_reason": HOSTILE, "id": HOSTILE, "partition": HOSTILE}
    content = HOSTILE.encode()
    lengths = np.zeros(item.header["n"], np.uint16)
    lengths[:3] = [len(content), 1, 3]
    item.columns |= {"piece_len": lengths, "piece_bytes": np.frombuffer(content + b"\x1b" + "\u202e".encode(), np.uint8)}
    run = MadeRun([item], prompts={item.row["group"]: HOSTILE})
    site.serve(run)
    open_run(page, site)
    page.click('[data-value="trajectories"]')
    page.locator(".row[data-key]").click()
    ready(page, "conversation", item.key)
    tooltips(page, [0, 1, 2])
    goto(page, view="group", key="train/1/<b>7_0")
    ready(page, "group")
    page.keyboard.press("Escape")
    goto(page, view="conversation", key="train/1/<b>7_0")
    ready(page, "conversation")
    state = page.evaluate("""() => {
      const shadow = document.querySelector("#agentloop-replay").shadowRoot;
      return {hacked: window.hacked ?? null, made: shadow.querySelectorAll("img, script, iframe, object, a[href]").length,
              text: shadow.querySelector(".frame").textContent};
    }""")
    assert state["hacked"] is None and state["made"] == 0
    assert (
        "<img src=x onerror" in state["text"]
        and "\u241b[31mred" in state["text"]
        and "\u27e8U+202E\u27e9gnp.exe" in state["text"]
    )
    assert not set(state["text"]) & set("\x00\x07\x1b\x9b\u202e\u202c\u2066\u2069\u200b")


def test_errors_and_damage_are_said_and_the_rest_works(page: Any, site: Site) -> None:
    def answer(request: dict[str, Any]) -> bytes:
        if request.get("key") == "train/1/0_1":
            return frame({"kind": "error", "message": "runs/x/w0.g1.tok: the checksum of a token frame differs"})
        if request.get("key") == "train/1/0_2":
            return RUN["train/1/0_2"].frame()[:-4000]
        return RUN.answer(request)

    site.answer = answer
    open_run(page, site, "view=conversation&key=train/1/0_0")
    ready(page, "conversation", "train/1/0_0")
    page.keyboard.press("]")
    page.wait_for_selector(".problem.top:has-text('checksum')")
    assert page.locator(".frame").get_attribute("data-sample") == "train/1/0_0"
    goto(page, key="train/1/0_2")
    page.wait_for_selector(".problem.top:has-text('cut off')")
    goto(page, key="train/1/0_3")
    ready(page, "conversation", "train/1/0_3")
    assert not page.locator(".problem.top").is_visible()
    site.answer = lambda request: frame({"kind": "error", "message": "runs/x: no run here"})
    page.reload()
    page.wait_for_selector(".problem.top:has-text('no run here')")


def test_a_busy_host_is_said_within_a_second_and_what_is_loaded_works(page: Any, site: Site) -> None:
    open_sample(page, site, "train/1/0_0", "conversation")
    site.delay = 5.0
    page.evaluate("() => { void document.querySelector('#agentloop-replay').viewer.goto({key: 'train/2/2_2'}); }")
    page.wait_for_selector(".frame[data-busy]", timeout=2000)
    assert "No answer yet" in page.locator(".status-line").inner_text()
    page.click("button[data-turn='1']")
    page.wait_for_selector(f'.tokens-pane[data-token="{RUN["train/1/0_0"].header["turns"][1]["start"]}"]')
    assert page.locator(".frame").get_attribute("data-sample") == "train/1/0_0"
    site.delay = 0.0
    page.wait_for_selector(".frame:not([data-busy])")


# -- for everyone --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_can_be_read_and_told_apart_by_the_colour_blind(page: Any, site: Site, theme: str) -> None:
    open_run(page, site)
    rules = page.evaluate("""() => {
      const out = {};
      for (const rule of document.querySelector("#agentloop-replay").shadowRoot.adoptedStyleSheets[0].cssRules) {
        const match = rule.selectorText?.match(/^\\.theme-(light|dark) \\.c(\\d+)$/);
        if (match) (out[match[1]] ??= {})[match[2]] = [rule.style.backgroundColor, rule.style.color];
      }
      return out;
    }""")[theme]
    page_colour = (255, 255, 255) if theme == "light" else (20, 23, 28)

    def rgb(text: str) -> tuple[float, ...]:
        return page_colour if text == "transparent" else tuple(float(x) for x in text.split("(")[1].rstrip(")").split(",")[:3])

    def linear(colour: tuple[float, ...]) -> Any:
        x = np.array(colour) / 255
        return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)

    def luminance(colour: Any) -> float:
        return float(colour @ np.array([0.2126, 0.7152, 0.0722]))

    assert len(rules) > 30
    drawn = page.evaluate(
        """(theme) => {
          const frame = document.querySelector("#agentloop-replay").shadowRoot.querySelector(".frame");
          frame.classList.replace(theme === "dark" ? "theme-light" : "theme-dark", `theme-${theme}`);
          const chart = frame.querySelector(".chart"), probe = document.createElement("div");
          const found = [getComputedStyle(chart).backgroundColor];
          chart.append(probe);
          for (let i = 0; i < 10; i++) {
            probe.className = `bar${i}`;
            found.push(getComputedStyle(probe).color);
          }
          for (const line of frame.querySelectorAll(".plot .line")) found.push(getComputedStyle(line).stroke);
          return found;
        }""",
        theme,
    )
    panel, *marks = (luminance(linear(rgb(colour))) for colour in drawn)
    assert len(marks) > 12
    for name, mark in zip(drawn[1:], marks, strict=True):
        assert (max(mark, panel) + 0.05) / (min(mark, panel) + 0.05) >= 3, (theme, name)
    for code, (back, front) in rules.items():
        light, dark = sorted([luminance(linear(rgb(back))), luminance(linear(rgb(front)))], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (theme, code)
    # Machado et al. 2009, severity 1: what protanopes, deuteranopes and tritanopes see.
    simulations = [
        np.eye(3),
        np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
        np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
        np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
    ]
    for simulation in simulations:
        seen = {int(code): np.clip(simulation @ linear(rgb(back)), 0, 1) for code, (back, _) in rules.items()}
        ramp = [luminance(seen[code]) for code in range(10, 18)]
        assert all(np.sign(b - a) == np.sign(ramp[-1] - ramp[0]) for a, b in itertools.pairwise(ramp)), (theme, ramp)
        for weak, strong in zip(range(34, 38), range(35, 39), strict=True):  # each side away from the middle
            direction = -1 if theme == "light" else 1
            assert direction * (luminance(seen[strong]) - luminance(seen[weak])) > 0
            assert direction * (luminance(seen[68 - strong]) - luminance(seen[68 - weak])) > 0
        for size in range(1, 5):
            assert np.abs(seen[34 + size] - seen[34 - size]).max() > 0.02, (theme, size)


def test_every_part_has_a_name_and_a_role(page: Any, site: Site) -> None:
    open_sample(page, site, "train/1/0_0", "tokens")
    unnamed = page.evaluate("""() => [...document.querySelector("#agentloop-replay").shadowRoot
      .querySelectorAll("button, input, select, textarea, [tabindex='0']")]
      .filter((el) => !(el.getAttribute("aria-label") || el.textContent.trim() || el.closest("label")))
      .map((el) => el.outerHTML)""")
    assert unnamed == []
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    active = page.locator(".tokens").get_attribute("aria-activedescendant")
    label = page.locator(f"#{active}").get_attribute("aria-label")
    assert label.startswith("token 1, ") and f"id {RUN['train/1/0_0'].columns['ids'][1]}" in label
    assert page.locator(f"#{active}").get_attribute("role") == "option"


def test_the_whole_way_by_keyboard(page: Any, site: Site) -> None:
    open_run(page, site)
    page.locator(".list").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    ready(page, "group")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    ready(page, "conversation", "train/1/1_1")
    page.keyboard.press("t")
    ready(page, "tokens", "train/1/1_1")
    page.keyboard.press("c")
    assert page.locator(".tokens-pane").get_attribute("data-mode") == "mask"
    page.keyboard.press("?")
    assert page.locator(".help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator(".help").is_visible()
    page.keyboard.press("g")
    ready(page, "group")
    page.keyboard.press("r")
    ready(page, "run")


def test_a_far_turn_comes_to_the_top_of_a_long_conversation(page: Any, site: Site) -> None:
    item = make(uid="long", turns=60, tokens=40)
    site.serve(MadeRun([item]))
    open_run(page, site, f"view=conversation&key={item.key}&turn=41")
    ready(page, "conversation", item.key)
    for index in (41, 7, 59, 30):
        goto(page, view="conversation", key=item.key, turn=index)
        page.wait_for_timeout(150)  # what comes into sight near it is drawn
        gap = page.evaluate(
            """(index) => {
              const shadow = document.querySelector("#agentloop-replay").shadowRoot;
              const pane = shadow.querySelector(".conversation"), card = shadow.querySelector(`article[data-turn="${index}"]`);
              const end = pane.scrollHeight - pane.clientHeight - pane.scrollTop;
              return [card.getBoundingClientRect().top - pane.getBoundingClientRect().top, end];
            }""",
            index,
        )
        assert abs(gap[0]) < 12 or gap[1] < 2, (index, gap)
    assert page.locator(".turn .lazy:empty").count() > 30
