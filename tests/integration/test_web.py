"""The web page in headless Chromium, on runs that the recorder writes."""

import io
import json
import re
import shutil
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from pipeline.monitoring.web.server import PageServer
from pipeline.monitoring.web.view import RunView
from pipeline.types import Prompt, SampleGroup
from tests.unit.pipeline.monitoring.run_writer import collapsing, open_run, record_step, sample, write_run
from tools.bench.web_page import write_long_run

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements/browser.txt")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
STEPS = 100_000


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, *run_dirs, drawn="#chart-reward canvas", **options):
    """The page of some runs, drawn. Whatever the console complains of, or is asked of another host, fails the test."""
    with PageServer([RunView(run_dir) for run_dir in run_dirs], "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        page = browser.new_page(**{"viewport": {"width": 1440, "height": 900}, **options})
        page.set_default_timeout(60_000)
        complaints, elsewhere = [], []
        page.on(
            "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith(server.url) else elsewhere.append(request.url)
        )
        page.goto(server.url)
        page.wait_for_selector(drawn)
        yield page
        page.close()
        server.shutdown()
    assert (complaints, elsewhere) == ([], [])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """60 steps that fall into the band; an alert, a restart, samples with tokens."""
    run_dir = tmp_path_factory.mktemp("web") / "run"
    recorder = open_run(run_dir)
    tokenizer = _Letters()
    recorder._tokenizer = tokenizer
    for step in range(60):
        state, reason = (
            ("saturated", "target not reachable: held at H=0.43") if 20 <= step < 30 else ("tracking", "in band")
        )
        prompt = Prompt(f"q{step}", (1, 2), f"<img src=x onerror=alert(1)> question {step}", "10", "countdown")
        drawn = sample(reward=float(step % 2), tokens=4)
        metrics = {"entropy_change_positive": 1e-4, "entropy_change_negative": -2e-4, "covariance": 0.1}
        record_step(
            recorder, step, 0.3 + 0.3 * 0.9**step, state, reason, [SampleGroup(prompt, (drawn,), drawn.role)], metrics
        )
    recorder._lock.close()
    resumed = open_run(run_dir, resumed=True, step=60)
    record_step(resumed, 60)
    resumed._lock.close()
    return run_dir


class _Letters:
    """What the recorder asks of a tokenizer."""

    def pieces(self, token_ids):
        return [chr(ord("a") + token) for token in token_ids.tolist()]


def chart(page, title):
    """What a chart says of itself to a screen reader."""
    return page.get_by_role("img", name=re.compile(f"^{re.escape(title)}, ")).get_attribute("aria-label")


def pixels(page, selector):
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")).astype(int)


def colours(page, selector):
    return {tuple(colour) for colour in pixels(page, selector).reshape(-1, 3)}


def tile(page, name):
    return (
        page.locator(".tiles div", has=page.locator("dt", has_text=re.compile(f"^{re.escape(name)}$")))
        .locator(".value")
        .inner_text()
    )


def test_a_run_is_drawn(browser, run_dir):
    with opened(browser, run_dir) as page:
        assert (
            chart(page, "Policy entropy")
            == "Policy entropy, last values: measured 0.3000, filtered 0.3000, target 0.2985"
        )
        assert chart(page, "Command") == "Command, last values: T+ 1.200"
        assert (
            chart(page, "Entropy change by sign")
            == "Entropy change by sign, last values: positives 1.0e-4, negatives -2.0e-4"
        )
        assert (tile(page, "Step"), tile(page, "Entropy"), tile(page, "Settled")) == (
            "61",
            "0.300",
            "28",
        )  # EMA: .54 * .9**k - .24 * .8**k is below .03 from k = 28 on
        green = [(r, g, b) for r, g, b in colours(page, "#band figure:first-child canvas") if g > r + 15 and g > b + 10]
        assert green, "the band is filled"
        assert page.locator("#missing").inner_text() == "Not reported: engine against learner, load of the experts."
        assert page.get_by_text("alert not_reachable: target not reachable: held at H=0.43").is_visible()
        assert page.locator("#events li").first.inner_text().startswith("step 60restart")


def test_the_timeline_shows_who_was_at_work(browser, run_dir):
    with opened(browser, run_dir) as page:
        told = page.locator("#timeline svg").get_attribute("aria-label")
        assert re.fullmatch(r"Timeline: engine 0 at work \d+ %, learner at work \d+ %, sync at work 0 %", told)
        assert page.locator("#timeline rect.engine").count() == 12, "of the last twelve steps"
        assert page.locator("#timeline line").count() == 12
        page.keyboard.press("+")
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector("#range:has-text('steps 23 to 53')")
        page.wait_for_selector("#timeline text:text-is('53')")
        assert page.locator("#chart-idle canvas").is_visible()


def test_marks_tell_themselves_to_the_pointer(browser, run_dir):
    with opened(browser, run_dir) as page:
        plot = page.locator("#band figure:first-child .u-over").bounding_box()
        page.mouse.move(plot["x"] + plot["width"] * 29 / 60, plot["y"] + 60)
        page.wait_for_selector(
            "#band .tip:has-text('step 29 · alert: not_reachable: target not reachable: held at H=0.43')"
        )
        page.mouse.move(plot["x"] + plot["width"] * 40 / 60, plot["y"] + 60)
        page.locator("#band figure:first-child .tip").wait_for(state="hidden")
        page.wait_for_selector(
            "#chart-reward .u-series:first-child .u-value:text-is('40')"
        )  # all charts share the cursor


def test_the_page_follows_the_run(browser, tmp_path):
    recorder = open_run(tmp_path / "run")
    record_step(recorder, 0, entropy=0.5)
    with opened(browser, tmp_path / "run") as page:
        page.wait_for_selector("#live:has-text('running')")
        assert tile(page, "Step") == "1"
        record_step(recorder, 1, entropy=0.25)
        page.wait_for_selector(".tiles .value:text-is('2')")
        page.wait_for_selector("[aria-label*='measured 0.2500']")
        page.get_by_role("button", name="Newer samples, step 1").click()
        page.wait_for_selector("#sample-1-0[aria-selected='true']")
        recorder.event("run_end", status="completed", error="")
        page.wait_for_selector("#live:has-text('completed')")
    recorder._lock.close()


def test_a_run_before_its_first_step(browser, tmp_path):
    recorder = open_run(tmp_path / "run")
    with opened(browser, tmp_path / "run", drawn="#band :text('No step yet.')") as page:
        page.get_by_text("No samples yet.").wait_for()
        assert tile(page, "Step") == "0"
        record_step(recorder, 0, entropy=0.5)
        page.wait_for_selector("[aria-label*='measured 0.5000']")
        page.wait_for_selector("#sample-0-0[aria-selected='true']")
    recorder._lock.close()


def test_runs_are_compared(browser, run_dir, tmp_path):
    write_run(tmp_path / "free", "name=free", "entropy.controller=none", entropy=collapsing, finish=False, state="off")
    with opened(browser, tmp_path / "free", run_dir) as page:
        rows = page.locator("#figures tbody tr")
        assert [rows.nth(i).locator("th").inner_text().strip() for i in range(2)] == ["free", "pm4"]
        assert "focus" in rows.nth(1).get_attribute("class"), "a controlled run is looked at first"
        assert chart(page, "Policy entropy").startswith("Policy entropy, last values: free 0.0")
        page.get_by_label("Draw free").uncheck()
        page.wait_for_selector("[aria-label^='Policy entropy, last values: measured']")
        page.keyboard.press("1")
        page.wait_for_selector("#figures tr.focus:has-text('free')")


def test_dragging_zooms_every_chart_and_reads_that_range(browser, run_dir):
    with opened(browser, run_dir) as page:
        page.locator("#chart-reward").scroll_into_view_if_needed()
        plot = page.locator("#chart-reward .u-over").bounding_box()
        with page.expect_request(re.compile("api/series.*first=15&last=30")):
            page.mouse.move(plot["x"] + plot["width"] * 0.255, plot["y"] + 20)
            page.mouse.down()
            page.mouse.move(plot["x"] + plot["width"] * 0.495, plot["y"] + 30, steps=4)
            page.mouse.up()
        assert page.locator("#range").inner_text().startswith("steps 15 to 30")
        page.wait_for_selector("[aria-label*='measured 0.3127']")  # 0.3 + 0.3 * 0.9**30
        page.locator("#chart-reward .u-over").dblclick()
        page.wait_for_selector("#range", state="hidden")


def test_keys(browser, run_dir):
    with opened(browser, run_dir) as page:
        page.keyboard.press("?")
        assert page.get_by_role("dialog").is_visible()
        page.keyboard.press("Escape")
        assert page.get_by_role("dialog").is_hidden()
        page.keyboard.press("+")
        assert page.locator("#range").inner_text().startswith("steps 30 to 60")
        page.keyboard.press("ArrowLeft")
        assert page.locator("#range").inner_text().startswith("steps 23 to 53")
        page.keyboard.press("0")
        assert page.locator("#range").is_hidden()
        light = pixels(page, "body")[5, 5]
        page.keyboard.press("t")
        page.keyboard.press("t")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert pixels(page, "body")[5, 5].sum() < light.sum() / 3
        page.reload()
        page.wait_for_selector("#chart-reward canvas")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark", "the choice is kept"


def test_samples_are_listed_searched_and_coloured(browser, run_dir):
    with opened(browser, run_dir) as page:
        page.wait_for_selector("#sample-60-0[aria-selected='true']")
        page.keyboard.press("j")
        page.wait_for_selector("#sample-59-0[aria-selected='true']")
        page.locator("#list").focus()
        page.keyboard.press("ArrowDown")
        page.wait_for_selector("#sample-58-0[aria-selected='true']")
        page.wait_for_selector("#sample pre:has-text('question 58')")
        assert page.locator("#sample pre").first.inner_text() == "<img src=x onerror=alert(1)> question 58"
        page.keyboard.press("/")
        page.keyboard.type("QUESTION 7")
        page.wait_for_selector("#sample-7-0[aria-selected='true']")
        assert page.locator("#list [role=option]").count() == 1
        assert page.locator("#list mark").inner_text() == "question 7"
        tokens = page.locator("#sample .tokens span")
        assert tokens.all_inner_texts() == ["a", "b", "c", "d"]
        assert tokens.first.get_attribute("title") == '"a": log p 0, p 1, entropy 0'
        page.get_by_label("Search samples").fill("nowhere")
        page.get_by_text("No sample holds this text.").wait_for()


def shades(page):
    """Of the tokens shown: 0 none, 1 three nats or more."""
    spans = page.locator("#sample .tokens span").all()
    return [span.evaluate("span => span.style.getPropertyValue('--shade')") for span in spans]


def test_tokens_are_coloured_by_entropy_or_by_log_prob_as_the_reader_chooses(browser, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    path = tmp_path / "run" / "samples" / "step-000060.jsonl"
    line = json.loads(path.read_text())
    drawn = {"pieces": ["so", " 1", "\n"], "log_probs": [-3.0, -1.5, 0.0], "entropies": [0.0, 0.75, 3.0]}
    path.write_text(json.dumps(line | drawn) + "\n")
    with opened(browser, tmp_path / "run") as page:
        by_entropy, by_log_prob = (
            page.get_by_role("group", name="Colour tokens by").get_by_role("button", name=name)
            for name in ("entropy", "log-prob")
        )
        told = page.locator("#sample .measure")
        by_entropy.wait_for()
        assert page.locator("#sample .tokens span").nth(1).get_attribute("title") == (
            '" 1": log p -1.50, p 0.223, entropy 0.750'
        )
        assert shades(page) == ["0", "0.25", "1"]
        assert told.inner_text().startswith("exact entropy of the policy")
        by_log_prob.click()
        assert shades(page) == ["1", "0.5", "0"]
        assert told.inner_text().endswith("log p of the token, under the policy and at the temperature that drew it")
        assert [button.get_attribute("aria-pressed") for button in (by_entropy, by_log_prob)] == ["false", "true"]
        page.keyboard.press("c")
        assert shades(page) == ["0", "0.25", "1"]
        page.keyboard.press("c")
        page.keyboard.press("j")
        page.wait_for_selector("#sample-59-0[aria-selected='true']")
        page.wait_for_selector("#sample .tokens span:has-text('d')")
        assert shades(page) == ["0"] * 4, "the choice stays: entropies 0, 0.5, 1 and 1.5, log-probs 0"
        by_entropy.click()
        assert [round(36 * float(shade)) for shade in shades(page)] == [0, 6, 12, 18]
        page.reload()
        page.wait_for_selector("#sample .measure:has-text('exact entropy')")


def test_a_run_that_recorded_no_entropies_shows_log_probs(browser, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    path = tmp_path / "run" / "samples" / "step-000059.jsonl"
    line = json.loads(path.read_text()) | {"log_probs": [-3.0, -1.5, None, 0.0], "stop_reason": "done"}
    line["turns"] = [[0, 2, "tool_calls"], [3, 4, "stop"]]  # an episode, whose third token is a tool's
    del line["entropies"]
    path.write_text(json.dumps(line) + "\n")
    (tmp_path / "run" / "samples" / "step-000060.jsonl").unlink()
    with opened(browser, tmp_path / "run") as page:
        page.wait_for_selector("#sample .measure:has-text('the entropy is recorded every tenth step')")
        assert page.get_by_role("group", name="Colour tokens by").get_by_role("button", name="entropy").is_disabled()
        page.keyboard.press("c")
        assert shades(page) == ["1", "0.5", "", "0"]
        assert page.locator("#sample .tokens .turn").all_inner_texts() == ["turn 1, a tool call", "turn 2"]
        assert page.locator("#sample .tokens .given").all_inner_texts() == [line["pieces"][2]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_one_column(browser, run_dir, scheme):
    phone = {"width": 390, "height": 844}
    with opened(browser, run_dir, viewport=phone, color_scheme=scheme, has_touch=True) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        boxes = [page.locator(f"#chart-{name}").bounding_box() for name in ("reward", "length", "change")]
        assert len({box["x"] for box in boxes}) == 1
        assert (pixels(page, "body")[5, 5].sum() > 600) == (scheme == "light")


def test_a_hundred_thousand_steps(browser, tmp_path):
    """The bounds are wide: what was measured is in docs/monitoring.md."""
    write_long_run(tmp_path / "run", STEPS)
    with opened(browser, tmp_path / "run") as page:
        assert tile(page, "Step") == "100,000"
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable")
        metrics = {metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]}
        assert metrics["JSHeapUsedSize"] < 200e6
        painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        assert painted < 20_000
        page.keyboard.press("+")
        page.wait_for_selector("#range:has-text('steps 49,999 to 99,999')")
