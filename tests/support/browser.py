"""A headless Chromium, driven through WebDriver: a few HTTP requests to `chromedriver`, and no package."""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""Key of an element's id in WebDriver's JSON."""


class Browser:
    """One window."""

    def __init__(self, address: str) -> None:
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,1000"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
        self._address = address
        self._session = ""
        answer = self._ask("POST", "", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/{answer['sessionId']}"

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"{self._address}/session{self._session}{path}",
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """What a function body returns in the page."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> str:
        """The id of the first element that a CSS selector has. Raises HTTPError if there is none."""
        found: str = self._ask("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]
        return found

    def click(self, selector: str) -> None:
        self._ask("POST", f"/element/{self.find(selector)}/click", {})

    def type(self, selector: str, keys: str) -> None:
        self._ask("POST", f"/element/{self.find(selector)}/value", {"text": keys})

    def press(self, keys: str) -> None:
        """Keys, for the element that has the focus."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def text(self, selector: str) -> str:
        """The text of an element, as it is shown."""
        return str(self._ask("GET", f"/element/{self.find(selector)}/text"))

    def resize(self, width: int, height: int) -> None:
        self._ask("POST", "/window/rect", {"width": width, "height": height})

    def set_scheme(self, scheme: str) -> None:
        """`dark` or `light`, as the user's setting."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._ask("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}})

    def screenshot(self) -> bytes:
        """The visible part of the page as PNG."""
        return base64.b64decode(self._ask("GET", "/screenshot"))

    def wait_for(self, selector: str) -> None:
        """Wait until an element exists: what fills a `details` runs after it has been opened."""
        deadline = time.monotonic() + 20
        while not self.run("return !!document.querySelector(arguments[0])", selector):
            assert time.monotonic() < deadline, selector
            time.sleep(0.02)

    def log(self, kind: str) -> list[dict[str, Any]]:
        """New entries of a log: `browser` is the console."""
        entries: list[dict[str, Any]] = self._ask("POST", "/se/log", {"type": kind})
        return entries

    def requested(self) -> list[str]:
        """URLs of the requests since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        self._ask("DELETE", "")


def missing() -> str:
    """Why there is no browser; empty if there is one."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(absent)} not installed (Debian: chromium, chromium-driver)" if absent else ""


@contextlib.contextmanager
def headless() -> Iterator[Browser]:
    """A browser that ends with the block."""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        port = next(m[1] for line in driver.stdout if (m := re.search(r"started successfully on port (\d+)", line)))
        browser = Browser(f"http://127.0.0.1:{port}")
        try:
            yield browser
        finally:
            browser.close()
    finally:
        driver.kill()
        driver.wait()
