"""A real headless Chromium, driven over its debugging pipe (chromedevtools.github.io/devtools-protocol)."""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import time
from pathlib import Path

from tests.account.browser import chromium


class Page:
    """One page. Close it, or use it in a `with`."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 900, dark: bool = False):
        command_in, self._out = os.pipe()
        self._in, command_out = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe"]

        def at_3_and_4() -> None:  # where Chromium looks for the pipe
            high = [os.dup2(fd, 100 + i) for i, fd in enumerate((command_in, command_out))]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self._process = subprocess.Popen(
            [chromium(), *options, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            preexec_fn=at_3_and_4, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(command_in)
        os.close(command_out)
        self._numbers, self._held, self._session = itertools.count(1), b"", None
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.size(width, height)
        if dark:
            self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **parameters) -> dict:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": self._session} if self._session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._held:
                part = os.read(self._in, 1 << 16)
                assert part, "the browser has gone"
                self._held += part
            line, _, self._held = self._held.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer.get("method"), answer.get("params", {}))

    def _note(self, method: str | None, event: dict) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(event["exceptionDetails"].get("exception", event["exceptionDetails"]).get("description", event)))
        elif method == "Log.entryAdded" and event["entry"]["level"] == "error":
            self.problems.append(event["entry"]["text"] + " " + event["entry"].get("url", ""))

    def size(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def js(self, expression: str):
        """The value of an expression; promises are waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < deadline, f"still not {expression}: {self.js('document.body.innerText')} {self.problems}"
            time.sleep(0.05)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, **more) -> None:
        text = {"Enter": "\r"}.get(key)
        codes = {"Enter": 13, "Tab": 9, "Escape": 27}
        event = {"key": key, "code": key, "windowsVirtualKeyCode": codes.get(key, 0), **more}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def overflow(self) -> list[str]:
        """Elements that stick out to the right, but for what scrolls inside its own box."""
        return self.js(
            "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().width > 0"
            " && e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('pre, .table, .hidden, .skip'))"
            ".slice(0, 5).map(e => e.tagName + '.' + e.className)"
        )

    def controls(self) -> list[tuple[str, str]]:
        """(role, name) of everything that can be operated, as a screen reader hears it."""
        roles = {"button", "textbox", "link", "spinbutton", "combobox", "checkbox"}
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        found = [node for node in nodes if not node.get("ignored") and node.get("role", {}).get("value") in roles]
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in found]
