"""The page of a run in a real browser: every page, its links and keys, hostile text, and what appears while it runs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from rewards.records import read_rollouts, rollout_path

CASE = Path(__file__).parents[1] / "cases/run_to_view"
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\x1b[31m \u202eright to left\u202c "
pytestmark = pytest.mark.browser


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.skip("needs the program chromium (apt install chromium), or its path in CHROMIUM")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two runs; in the fourth step of the first is hostile text."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("first", "second"):
        shutil.copytree(CASE, root / name)
    lines = read_rollouts(root / "first", 4)
    lines[0]["text"], lines[0]["prompt_id"] = HOSTILE + "long " * 200_000, "<b>id</b>/%2f"
    for line in lines[:4]:
        line["prompt"], line["parts"] = HOSTILE, {"<i>part</i>": 1.0}
    _write(root / "first", 4, lines)
    return root


def _write(folder: Path, step: int, lines: list[dict]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    rollout_path(folder, step).write_bytes(zstandard.ZstdCompressor().compress(text.encode()))


@pytest.fixture(scope="module")
def address(folders):
    command = [sys.executable, "-m", "grpo", "view", str(folders / "first"), str(folders / "second")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield re.search(r"open (\S+)", process.stdout.readline())[1]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.go = lambda where="": (
        page.goto("about:blank"),
        page.goto(f"{address}#/0/{where}"),
        page.wait_for_selector("h1"),
    )
    yield page
    assert errors == []
    assert page.evaluate("window.hacked") is None
    page.close()


def _title(page, text: str) -> None:
    page.wait_for_function("text => document.querySelector('h1')?.textContent === text", arg=text)


def test_the_overview_draws_what_was_measured_smoothed_and_of_two_runs(page):
    page.go()
    page.wait_for_selector(".card .main-svg")
    assert page.locator(".card h2").first.text_content() == "Reward reward/mean"
    assert "on 16 problems. The difference is" in page.locator("h1 + div .headline").first.text_content()
    assert "finished" in page.text_content("main")
    drawn = page.evaluate("[...document.querySelectorAll('.chart')].map((chart) => chart.data[0].x.length)")
    assert drawn[0] == 4
    before = page.evaluate("document.querySelector('.chart').data[0].y")
    page.locator("input[type=range]").fill("0.5")  # smoothing is an exponential mean
    after = page.evaluate("document.querySelector('.chart').data[0].y")
    assert after[0] == pytest.approx(before[0])
    assert after[1] == pytest.approx((0.5 * before[0] * 0.5 + 0.5 * before[1]) / 0.75)
    page.get_by_label("log scale").check()
    assert page.evaluate("document.querySelector('.chart').layout.yaxis.type") == "log"
    page.get_by_label("second").check()
    page.wait_for_function("() => document.querySelector('.chart').data?.some(({name}) => name.startsWith('second'))")
    assert page.evaluate("view.diff('a b c', 'a x c d')") == [[0, "a "], [-1, "b"], [1, "x"], [0, " c"], [1, " d"]]


def test_the_page_of_a_run_says_its_own_state_beside_others(page, folders):
    """Under the second run stand its configuration and its state, whichever other runs are drawn."""
    config = folders / "second/config.yaml"
    config.write_text(config.read_text() + "# of the second\n")
    page.go()
    page.get_by_label("second").check()
    page.evaluate("location.hash = '#/1/'")
    page.wait_for_function("() => document.querySelector('details pre')?.textContent.includes('# of the second')")


def test_one_goes_from_a_step_to_a_group_to_its_tokens(page):
    page.go("step/2")
    tied = page.locator("details .side > a")  # what teaches comes first, and ties are folded
    assert tied.count() > 0
    assert not tied.first.is_visible()
    for card in page.locator("main > .side > a").all():
        assert len(set(card.locator(".bars i").evaluate_all("bars => bars.map((bar) => bar.style.height)"))) > 1
    assert page.locator(".side > a").count() == 4
    page.locator("summary").click()
    page.click(".side > a:has-text('group 3')")
    _title(page, "step 2, group 3")
    assert page.locator(".side .card").count() == 4
    page.select_option("main select", label="mismatch")
    token = page.locator(".side .text span").nth(2)
    token.hover()
    assert "mismatch" in page.text_content("#tip")
    assert "token 2" in page.text_content("#tip")
    page.keyboard.press("ArrowLeft")
    _title(page, "step 2, group 2")


def test_colours_have_a_scale(page):
    page.go("group/2/0")
    shades = "spans => spans.map((span) => [span.textContent, getComputedStyle(span).backgroundColor])"
    scale = page.locator(".scale span").evaluate_all(shades)
    assert [value for value, _ in scale] == ["0", "-1", "-2", "-3", "-4"]
    assert len({colour for _, colour in scale}) == 5
    page.select_option("main select", label="plain")
    assert page.locator(".scale span").count() == 0


def test_keys_go_everywhere(page):
    page.go()
    for key, title in {"s": "step 4", "ArrowLeft": "step 3", "e": "events"}.items():
        page.keyboard.press(key)
        _title(page, title)
    page.keyboard.press("Tab")
    page.go("group/2/0")
    page.keyboard.press("c")
    assert page.locator("main select").input_value() == "1"
    page.keyboard.press("?")
    assert "light or dark" in page.text_content("dialog")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    colour = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(colour)
    page.keyboard.press("t")
    dark = page.evaluate(colour)
    assert dark != before
    page.go("events")
    assert page.evaluate(colour) == dark


def test_a_field_leaves_the_groups_whose_prompts_hold_a_text_and_a_prompt_leads_to_its_completions(page):
    page.go("step/3")
    cards = page.locator("a.card:visible")
    page.evaluate("for (const folded of document.querySelectorAll('details')) folded.open = true")
    assert cards.count() == 4
    page.fill("input[name=filter]", "no prompt says this")
    assert cards.count() == 0
    page.fill("input[name=filter]", "")
    assert cards.count() == 4
    page.go("group/3/0")
    page.click("a:has-text('this prompt at other steps')")
    page.wait_for_selector("h1:has-text('prompt ')")  # the page of the group has columns of .side, too
    page.wait_for_selector("main .side")


@pytest.mark.parametrize("where", ["step/4", "group/4/0", "diff/%3Cb%3Eid%3C%2Fb%3E%2F%252f"])
def test_hostile_text_is_shown_and_not_executed(page, where):
    page.go(where)
    page.wait_for_selector("main .text, main table, main .side")
    assert page.locator("main script, main img, main b:has-text('id')").count() == 0
    assert "<script>" in page.text_content("main") or "<b>id</b>" in page.text_content("main")


@pytest.mark.parametrize("width", [400, 1280, 3840])
def test_nothing_is_cut_off(browser, address, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    for where in ("overview", "step/3", "group/4/0", "events"):
        page.goto("about:blank")
        page.goto(f"{address}#/0/{where}")
        page.wait_for_selector("h1")
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, where
    page.close()


def test_on_touch_nothing_covers_the_newest_values_and_without_its_token_the_page_says_what_to_do(browser, address):
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(f"{address}#/0/overview")
    page.wait_for_selector(".card .main-svg")
    page.locator(".chart").first.tap(position={"x": 5, "y": 5})
    assert page.locator(".modebar").count() == 0
    page.goto(address.partition("?")[0])
    page.wait_for_selector(".fault")
    assert "open the address that the server has printed" in page.text_content(".fault")
    context.close()


def test_a_new_step_appears_while_the_page_is_open(page, folders):
    page.go()
    page.wait_for_selector(".card .main-svg")
    with open(folders / "first/metrics.jsonl", "a") as metrics:
        metrics.write(json.dumps({"step": 5, "reward/mean": 0.5}) + "\n")
    page.wait_for_function("() => document.querySelector('.chart').data[0].x.at(-1) === 5")
    shutil.copy(rollout_path(folders / "first", 3), rollout_path(folders / "first", 5))
    page.keyboard.press("s")
    _title(page, "step 5")


def test_a_report_in_a_notebook_stays_in_its_frame(browser, tmp_path):
    from review.page.report import Report, report

    page = browser.new_page()
    page.set_content(f"<title>notebook</title>{Report(report(CASE, tmp_path / 'r.html'))._repr_html_()}")
    frame = page.frame_locator("iframe")
    frame.locator(".card .main-svg").first.wait_for()
    for name in ("events", "overview"):
        frame.locator("#bar a", has_text=name).click()
        frame.locator("h1", has_text=name).wait_for()
    assert page.title() == "notebook"
    page.close()


def test_of_a_batch_that_was_sampled_ahead_a_step_has_only_the_wait(browser, tmp_path):
    from review.page.report import report

    shutil.copytree(CASE, tmp_path / "run")
    times = {"time/rollout": 8.0, "time/reward": 1.0, "time/wait": 2.0, "time/learn": 5.0}
    lines = [json.dumps({"step": step, **times}) + "\n" for step in (1, 2)]
    (tmp_path / "run/metrics.jsonl").write_text("".join(lines))
    page = browser.new_page()
    page.goto(report(tmp_path / "run", tmp_path / "r.html").as_uri())
    page.wait_for_selector("[data-title='Seconds of a step'] .main-svg")
    chart = page.locator("[data-title='Seconds of a step'] .chart")
    assert dict(chart.evaluate("(box) => box.data.map((trace) => [trace.name, trace.y])")) == {
        "wait": [2, 2],
        "learn": [3, 3],
    }  # their sum is the five seconds of the step
    page.close()


def test_a_report_works_from_its_file(browser, tmp_path):
    from review.page.report import report

    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(report(CASE, tmp_path / "r.html").as_uri())
    page.wait_for_selector(".card .main-svg")
    page.keyboard.press("s")
    page.wait_for_selector(".side > a")
    page.locator(".side > a").first.click()
    page.wait_for_selector(".side .text span")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("e")
    page.wait_for_selector("table")
    assert errors == []
    page.close()
