"""A page in a real browser: headless Chromium by its driver, spoken to in plain WebDriver, standard library only.

A test that needs it is skipped, with the reason, where there is none. On Debian: `apt-get install chromium
chromium-driver`.
"""

import base64
import json
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

KEYS = {"right": "\ue014", "left": "\ue012", "end": "\ue010", "home": "\ue011"}
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name that the standard gives to a reference to an element
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
]  # fmt: skip


class Browser:
    """One window."""

    def __init__(self, address, binary, folder):
        self._address = address
        options = {"binary": binary, "args": [*FLAGS, f"--user-data-dir={folder}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _call(self, method, path, body=None):
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(
            self._address + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def _do(self, path, **body):
        return self._call("POST", f"/session/{self._session}{path}", body)

    def open(self, url):
        self._do("/url", url=url)

    def run(self, script, *arguments):
        """The value that a script returns; a promise is waited for."""
        return self._do("/execute/sync", script=script, args=list(arguments))

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def wait(self, condition):
        """Until a JavaScript expression is true, ten seconds at most."""
        script = f"""return new Promise((done, fail) => {{
            const end = Date.now() + 10000;
            (function look() {{
                if ({condition}) done(true);
                else if (Date.now() > end) fail(new Error({json.dumps(condition)} + " never came true"));
                else setTimeout(look, 20);
            }})();
        }})"""
        return self.run(script)

    def press(self, selector, key, times=1):
        """Focus an element and press a key as a person would."""
        element = self._do("/element", using="css selector", value=selector)[ELEMENT]
        self._do(f"/element/{element}/value", text=KEYS[key] * times)

    def click(self, selector):
        element = self._do("/element", using="css selector", value=selector)[ELEMENT]
        self._do(f"/element/{element}/click")

    def console(self):
        """What has been logged since the last call: errors, warnings and all else."""
        return self._do("/se/log", type="browser")

    def size(self, width, height):
        self._devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def scheme(self, name):
        """Light or dark."""
        self._devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def picture(self):
        """The whole page as PNG bytes."""
        return base64.b64decode(self._devtools("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def _devtools(self, command, **parameters):
        return self._do("/goog/cdp/execute", cmd=command, params=parameters)

    def close(self):
        self._call("DELETE", f"/session/{self._session}")


@contextmanager
def browser():
    """A fresh browser, gone at the end; skips where there is none."""
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if binary is None or shutil.which("chromedriver") is None:
        pytest.skip("no browser: this test needs chromium and chromedriver on the PATH")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            port = next(found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
            window = Browser(f"http://127.0.0.1:{port}", binary, folder)
            try:
                yield window
            finally:
                window.close()
        finally:
            driver.terminate()
            driver.wait()
            driver.stdout.close()
