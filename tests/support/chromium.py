"""A real Chromium that is driven through its pipe of the DevTools protocol, so that tests press real keys without a package."""

import itertools
import json
import os
import shutil
import subprocess
import time

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, _NAMES)), None)
needs_chromium = pytest.mark.skipif(BROWSER is None, reason=f"none of the programs {', '.join(_NAMES)} is on the PATH")

# In the coordinates of the page, not of the window.
_BOX = """
const { x, y, width, height } = part.getBoundingClientRect();
return { x: x + scrollX, y: y + scrollY, width, height };
"""
_KEYS = {"Tab": 9, "Enter": 13, " ": 32, "Escape": 27, "Backspace": 8}


class Chromium:
    """One page of a browser of its own, in a `with` block."""

    def __init__(self, folder, *, dark=False):
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        own = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        # The browser reads from descriptor 3 and writes to 4.
        command = 'exec "$0" "$@" 3<&%d 4>&%d' % (to_browser, from_browser)  # noqa: UP031  # braces are of the shell
        self._process = subprocess.Popen(
            ["bash", "-c", command, BROWSER, *own, scheme, "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._rest, self._numbers, self._session = b"", itertools.count(1), None

    def __enter__(self):
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._target = target
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def _call(self, method, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self):
        while b"\0" not in self._rest:
            found = os.read(self._in, 1 << 16)
            assert found, "the browser has ended"
            self._rest += found
        first, self._rest = self._rest.split(b"\0", 1)
        return json.loads(first)

    def open(self, url):
        """Loads an address, and waits until `document.readyState` is complete."""
        self._call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def close_page(self):
        """Closes the page, as its user does."""
        session, self._session = self._session, None
        self._call("Target.closeTarget", targetId=self._target)
        self._session = session

    def run(self, script):
        """The value of an expression on the page."""
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition):
        """Waits until an expression is true, at most a minute."""
        for _ in range(1200):
            if self.run(condition):
                return
            time.sleep(0.05)
        raise AssertionError(f"never true: {condition}")

    def emulate(self, *, system="light", blindness="none", scripts=True, size=(1000, 700), scale=3):
        """Sets what the system prefers, the reader's eyes, whether pages run scripts, and the window."""
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": system}])
        self._call("Emulation.setEmulatedVisionDeficiency", type=blindness)
        self._call("Emulation.setScriptExecutionDisabled", value=not scripts)
        width, height = size
        window = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **window)

    def picture(self, part=None):
        """A picture as PNG in base64: of the window, or of the element that an expression on the page is."""
        clip = {}
        if part is not None:
            box = self.run(f"(() => {{ const part = {part}; part.scrollIntoView({{ block: 'nearest' }}); {_BOX} }})()")
            assert box["width"] > 0, part
            assert box["height"] > 0, part
            clip = {"clip": {**box, "scale": 1}}
        return self._call("Page.captureScreenshot", format="png", **clip)["data"]

    def press(self, *keys):
        """Presses keys: names such as Tab, or characters."""
        for key in keys:
            code = _KEYS.get(key, 0)
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            own = {"key": key, "windowsVirtualKeyCode": code, "text": text}
            self._call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **own)
            self._call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)
