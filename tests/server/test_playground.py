"""The playground in a real Chromium, before a real `pipo serve`."""

import base64
import hashlib
import json
import re
import statistics
from importlib import resources

import pytest

from playground_browser import Playground, needs_chromium, start_chromium
from server_process import served
from tiny_checkpoints import make_checkpoints

PAGE = resources.files("pipo.server").joinpath("playground/index.html").read_text(encoding="utf-8")
EVIL = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"


def luminance(colour: str) -> float:
    """Relative luminance of `#rgb` or `#rrggbb`, as WCAG 2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_only_the_pages_own_script_may_run():
    script = re.search(r"<script>(.*?)</script>", PAGE, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in PAGE, (
        f"the script has changed: put sha256-{digest} into the page's policy"
    )
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\bon\w+=", script)


def test_the_page_loads_nothing_from_elsewhere():
    assert not re.search(r"""(src|href)=["'](?!data:|#)|@import|url\(""", PAGE)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", PAGE)
    assert not re.search(r"localStorage|sessionStorage|document\.cookie", PAGE)


@pytest.mark.parametrize("theme", [":root {", ':root[data-theme="dark"] {'])
def test_text_stands_out_from_its_ground(theme):
    block = PAGE[PAGE.index(theme) :]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})\b", block[: block.index("}")]))
    for ink, ground in [
        ("ink", "bg"), ("ink", "panel"), ("ink", "user"), ("soft", "bg"), ("soft", "panel"), ("accent", "panel"),
        ("kept-ink", "kept"), ("rejected", "rejected-bg"), ("ink", "rejected-bg"), ("on-accent", "accent"),
    ]:  # fmt: skip
        high, low = sorted((luminance(colours[ink]), luminance(colours[ground])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{ink} on {ground}: {colours[ink]} on {colours[ground]}"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory):
    with served(checkpoints[1], tmp_path_factory.mktemp("log") / "serve.txt") as running:
        yield running


@pytest.fixture(scope="module")
def desktop(tmp_path_factory):
    driver = start_chromium(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture
def page(desktop, server):
    playground = Playground(desktop, server.url).connected()
    playground.settings(temperature=0, max_tokens=48)
    yield playground
    assert playground.complaints() == []


def confidences(page) -> list[float]:
    """Of all drafts in the last answer, as a screen reader hears them."""
    labels = [draft.get_attribute("aria-label") for draft in page.all(".turn:last-child .draft")]
    return [float(re.search(r"confidence ([\d.]+)", label).group(1)) for label in labels]


@needs_chromium
def test_kept_drafts_are_green_and_rejected_ones_struck_through(page):
    page.send("Hello")
    assert page.all(".drafts .draft")
    median = statistics.median(confidences(page))
    page.one("#new").click()
    page.set("#threshold", round(median, 2))
    page.send("Hello")
    kept, rejected = page.all(".turn:last-child .kept"), page.all(".turn:last-child .rejected")
    assert kept
    assert rejected
    assert kept[0].value_of_css_property("border-bottom-width") != "0px"
    red, green, blue = map(int, re.findall(r"\d+", kept[0].value_of_css_property("background-color"))[:3])
    assert green > red
    assert green > blue
    assert "line-through" in rejected[0].value_of_css_property("text-decoration")
    assert "kept" in kept[0].get_attribute("aria-label")
    assert "rejected" in rejected[0].get_attribute("aria-label")
    # What is counted is what is shown, and the other lane writes one token a step.
    tokens, steps, num_kept, drafts = map(int, re.findall(r"\d+", page.text(".turn:last-child .pipo footer")))
    assert (tokens, num_kept, drafts) == (48, len(kept), len(kept) + len(rejected))
    assert steps == tokens - num_kept
    assert page.stats("pipo")["tokens/step"] == f"{tokens / steps:.2f}"
    assert page.stats("regular")["tokens/step"] == "1.00"
    assert all(re.fullmatch(r"[\d.]+( m?s)?", figure) for figure in page.stats("regular").values())
    assert "not a model trained for regular decoding" in page.text(".turn:last-child .regular h3")


@needs_chromium
def test_a_draft_tells_its_confidence(page):
    from selenium.webdriver import ActionChains

    page.send("Hello")
    draft = page.all(".draft")[3]
    confidence = re.search(r"confidence ([\d.]+)", draft.get_attribute("aria-label")).group(1)
    assert not page.one("#tip").is_displayed()
    page.js("arguments[0].scrollIntoView({block: 'center'})", draft)
    ActionChains(page.driver).move_to_element(draft).pause(0.2).perform()
    assert page.one("#tip").is_displayed()
    assert f"confidence {confidence}" in page.text("#tip")
    ActionChains(page.driver).move_to_element(page.one("#prompt")).perform()
    page.until("no tip", lambda: not page.one("#tip").is_displayed())


@needs_chromium
@pytest.mark.parametrize(("threshold", "tokens_per_step"), [("0", "2.00"), ("1.01", "1.00")])
def test_the_threshold_decides_how_many_tokens_a_step_writes(page, threshold, tokens_per_step):
    page.set("#threshold", threshold)
    assert page.text("#threshold-value") == f"{float(threshold):.2f}"
    page.send("Hello")
    assert page.stats("pipo")["tokens/step"] == tokens_per_step


@needs_chromium
def test_the_slider_says_what_another_threshold_would_have_kept(page):
    page.set("#threshold", "0.30")
    page.send("Hello")
    values = confidences(page)
    page.set("#threshold", "0.38")
    kept = int(re.search(r"would keep (\d+)", page.text("#effect")).group(1))
    assert abs(kept - sum(value >= 0.38 for value in values)) <= sum(abs(value - 0.38) < 0.001 for value in values)


@needs_chromium
def test_stop_ends_both_lanes_and_frees_their_slots(page, server):
    page.settings(max_tokens=4000)
    page.send("Hello", wait=False)
    page.until("text", lambda: len(page.all(".turn:last-child .draft")) > 5)
    assert not page.one("#send").is_displayed()
    page.one("#stop").click()
    page.finish()
    for footer in page.all(".turn:last-child footer"):
        assert footer.text.startswith("stopped")
    server.wait_until_idle(within_s=10)
    page.settings(max_tokens=8)
    page.send("And on")
    assert page.text(".turn:last-child .pipo footer").startswith("cut off")


@needs_chromium
def test_what_a_model_writes_stays_text(page):
    schema = {"type": "json_schema", "json_schema": {"name": "evil", "schema": {"const": EVIL}}}
    page.js("window.extra = {response_format: arguments[0]}", schema)
    page.settings(max_tokens=400)
    page.send(EVIL)
    for lane in ("pipo", "regular"):
        assert json.loads(page.text(f".turn:last-child .{lane} .answer p")) == EVIL
    assert EVIL in page.text(".turn:last-child .user")
    assert page.all("#log img") == []
    assert page.all("#log script") == []
    assert page.js("return window.hacked") is None


@needs_chromium
def test_by_keyboard_alone(page):
    from selenium.webdriver.common.keys import Keys

    def press(*keys):
        page.driver.switch_to.active_element.send_keys(*keys)

    def focused() -> str:
        return page.js("return document.activeElement.id || document.activeElement.className")

    def tab_to(name: str, key=Keys.TAB) -> None:
        for _ in range(20):
            if focused() == name:
                return
            press(key)
        raise AssertionError(f"tab never came to {name}")

    page.js("document.activeElement.blur()")
    tab_to("threshold")
    press(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.text("#threshold-value") == "0.02"
    tab_to("prompt")
    press("Hello", Keys.ENTER)
    page.until("a turn", lambda: page.all(".turn"))
    page.finish()
    page.js("document.activeElement.blur(); document.querySelector('#open-settings').focus()")
    tab_to("drafts")
    first = page.one("[role=listbox]").get_attribute("aria-activedescendant")
    press(Keys.ARROW_RIGHT)
    second = page.one("[role=listbox]").get_attribute("aria-activedescendant")
    assert first != second
    assert page.one("#tip").is_displayed()
    assert "confidence" in page.text("#tip")
    press(Keys.ESCAPE)
    assert not page.one("#tip").is_displayed()
    tab_to("open-settings", Keys.SHIFT + Keys.TAB)
    press(Keys.ENTER)
    assert page.one("#settings").is_displayed()
    assert focused() == "api-key"
    press(Keys.ESCAPE)
    assert not page.one("#settings").is_displayed()
    assert focused() == "open-settings"


@needs_chromium
def test_whatever_takes_the_focus_has_a_name(page):
    page.send("Hello")
    page.js("document.querySelector('#settings').showModal()")
    for tree in (page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {}),):
        nodes = [node for node in tree["nodes"] if not node.get("ignored")]
        roles = {"button", "textbox", "spinbutton", "slider", "listbox", "option", "combobox", "checkbox", "dialog"}
        for node in nodes:
            if node["role"].get("value") in roles:
                assert node.get("name", {}).get("value"), node
    said = page.text("#live")
    assert "tokens per step" in said


@needs_chromium
def test_an_error_is_told_plainly(page):
    page.settings(max_tokens=10)
    page.set("#prompt", "x" * 40000)
    page.send("!")
    alerts = page.all(".turn:last-child [role=alert]")
    assert len(alerts) == 2
    assert "maximum context length is 8192" in alerts[0].text
    assert page.one("#prompt").get_property("value") == "x" * 40000 + "!", "the message is not lost"
    page.set("#prompt", "")
    page.send("Hello")
    assert page.all(".turn:last-child [role=alert]") == []


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_nothing_is_wider_than_the_screen(server, tmp_path, dark):
    driver = start_chromium(tmp_path, dark=dark, phone=True)
    try:
        page = Playground(driver, server.url).connected()
        page.settings(temperature=0, max_tokens=200)
        page.send("w" * 120)
        assert page.js("return document.documentElement.scrollWidth <= innerWidth")
        lanes = [card.rect for card in page.all(".card")]
        assert lanes[1]["y"] >= lanes[0]["y"] + lanes[0]["height"], "lanes are stacked"
        light = sum(map(int, re.findall(r"\d+", page.one("body").value_of_css_property("background-color"))[:3])) / 3
        assert light < 60 if dark else light > 200
        page.js("document.querySelector('#settings').showModal()")
        assert page.js(
            "const b = document.querySelector('#settings').getBoundingClientRect(); return b.left >= 0 && b.right <= innerWidth"
        )
    finally:
        driver.quit()


@needs_chromium
def test_a_server_that_wants_a_key_and_has_models_beside(checkpoints, desktop, tmp_path):
    options = ["--api-key", "sesame", "--regular-model", str(checkpoints[0]), "--beside", str(checkpoints[1])]
    with served(checkpoints[1], tmp_path / "serve.txt", *options) as server:
        # A browser opens the page with the key as a password. The page can also be given the key, and forgets it.
        page = Playground(desktop, server.url.replace("//", "//any:sesame@")).connected()
        assert page.text("#model") == "pipo"
        page.settings(temperature=0, max_tokens=24)
        page.give_key("wrong")
        page.until("told", lambda: page.one("#problem").is_displayed())
        assert "API key" in page.text("#problem")
        page.give_key("sesame")
        page.until("connected", lambda: not page.one("#problem").is_displayed())
        page.send("Hello")
        assert page.text(".regular h3").startswith("Regular decoding")
        assert page.stats("regular")["tokens/step"] == "1.00"
        assert page.text(".beside h3").startswith("PIPO, other checkpoint")
        assert page.stats("beside")["tokens/step"] == page.stats("pipo")["tokens/step"]  # the same checkpoint here
        assert page.js("return localStorage.length + sessionStorage.length + document.cookie.length") == 0
