"""A headless Chromium of its own, and the playground as a person sees it: fields, buttons, cards."""

import shutil
import time
from pathlib import Path

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
DEADLINE_S = 60

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None,
    reason="no Chromium here; on Debian: apt-get install chromium chromium-driver",
)

# Bodies that the page sends are changed on their way by what a test puts into `window.extra`.
EXTRA = """
window.extra = {ignore_eos: true};
const stockFetch = window.fetch;
window.fetch = (url, options) => {
  if (options && options.body) options = {...options, body: JSON.stringify({...JSON.parse(options.body), ...window.extra})};
  return stockFetch(url, options);
};
"""


def start_chromium(folder: Path, dark: bool = False, phone: bool = False):
    """A driver of a fresh Chromium whose profile is `folder`."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={folder}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if phone:
        metrics = {"width": 360, "height": 740, "pixelRatio": 2, "touch": True}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    driver.set_script_timeout(DEADLINE_S)
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": EXTRA})
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    return driver


class Playground:
    """The page in one Chromium."""

    def __init__(self, driver, url: str) -> None:
        self.driver = driver
        self.driver.get(url + "/playground")

    def js(self, code: str, *arguments):
        """What a piece of JavaScript returns."""
        return self.driver.execute_script(code, *arguments)

    def all(self, selector: str) -> list:
        """The elements of a CSS selector."""
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str):
        """The first of them."""
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """Its text, shown or not."""
        return self.one(selector).get_property("textContent")

    def until(self, what: str, condition) -> None:
        """Wait until a condition holds."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, f"after {DEADLINE_S} s still not: {what}; page: {self.text('main')[:2000]}"
            time.sleep(0.05)

    def connected(self) -> "Playground":
        """Wait until the page has heard of its model."""
        self.until("connected", lambda: self.text("#model") != "connecting…")
        return self

    def set(self, selector: str, value) -> None:
        """Put a value into a field, as if it were typed."""
        field = self.one(selector)
        self.js(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
            field,
            str(value),
        )

    def settings(self, **values) -> None:
        """Sampling settings, by their names in requests."""
        for name, value in values.items():
            self.set(f"[data-param={name}]", value)

    def send(self, text: str, wait: bool = True) -> None:
        """Write a message and press Enter; wait for both lanes."""
        turns = len(self.all(".turn"))
        self.one("#prompt").send_keys(text + "\ue007")
        self.until("a turn more", lambda: len(self.all(".turn")) == turns + 1)
        if wait:
            self.finish()

    def give_key(self, key: str) -> None:
        """Enter an API key under Settings."""
        if not self.one("#settings").is_displayed():
            self.one("#open-settings").click()
        field = self.one("#api-key")
        field.clear()
        field.send_keys(key + "\ue007")

    def finish(self) -> None:
        """Wait until nothing is written any more."""
        self.until("finished", lambda: self.js("return state.running === null"))

    def stats(self, lane: str) -> dict[str, str]:
        """The figures of the last card of a lane, by their labels."""
        card = self.all(f".card.{lane}")[-1]
        items = card.find_elements("css selector", ".stats div")
        return {item.find_element("tag name", "dt").text: item.find_element("tag name", "dd").text for item in items}

    def complaints(self) -> list[str]:
        """What the console said that is not about a failed request."""
        return [entry["message"] for entry in self.driver.get_log("browser") if "status of 4" not in entry["message"]]
