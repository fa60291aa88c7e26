"""A page in a real headless Chromium, at a width of its own: served from this machine, in a frame, measured by a script around it."""

from __future__ import annotations

import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FRAME = """<!DOCTYPE html><style>body{margin:0} iframe{border:0;display:block}</style>
<iframe id="page" src="PAGE" width="WIDTH" height="HEIGHT"></iframe><script id="measured" type="application/json"></script>
<script>
const frame = document.getElementById("page");
frame.addEventListener("load", () => {
  const inner = frame.contentWindow, doc = frame.contentDocument, root = doc.documentElement;
  const errors = [];
  inner.addEventListener("error", event => errors.push(event.message));
  for (const details of doc.querySelectorAll("details")) details.open = OPEN;
  setTimeout(() => {
    const plots = [...doc.querySelectorAll(".plot")];
    const wide = [...doc.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > inner.innerWidth + 1
      && e.getBoundingClientRect().width > 0 && !e.closest(".skip") && !e.closest("thead"));
    document.getElementById("measured").textContent = JSON.stringify({
      width: inner.innerWidth, scroll: root.scrollWidth, height: root.scrollHeight, plots: plots.length,
      drawn: plots.filter(plot => plot.querySelector(".main-svg")).length,
      overflowing: wide.slice(0, 5).map(e => e.tagName + "." + (e.getAttribute("class") || "") + " " + e.textContent.slice(0, 40)),
      requests: inner.performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
      errors, focusable: doc.querySelectorAll("a[href], summary, button").length,
      unlabelled: plots.filter(plot => !plot.getAttribute("aria-label")).length,
    });
  }, 2500);
});
</script>"""


def chromium() -> str:
    """The browser's path. Skips without one, saying so; fails instead where SPARING_REQUIRE_BROWSER is set (.ci/run does)."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        message = f"no browser found ({', '.join(NAMES)}): the report was not looked at in one"
        if os.environ.get("SPARING_REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    return found


def look(page: Path, width: int, *, height: int = 1000, screenshot: Path | None = None, unfold: bool = False) -> dict:
    """Show `page` `width` pixels wide; -> what the script in FRAME measured."""
    browser = chromium()
    frame = page.with_name("frame.html")
    values = {"PAGE": page.name, "WIDTH": str(width), "HEIGHT": str(height), "OPEN": "true" if unfold else "details.open"}
    frame.write_text(re.sub("PAGE|WIDTH|HEIGHT|OPEN", lambda match: values[match[0]], FRAME))
    handler = functools.partial(_Quiet, directory=str(page.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
            f"--user-data-dir={page.parent / 'profile'}", f"--window-size={max(width, 600)},{height}", "--virtual-time-budget=15000",
        ]  # fmt: skip
        command += [f"--screenshot={screenshot}"] if screenshot else ["--dump-dom"]
        url = f"http://127.0.0.1:{server.server_address[1]}/frame.html"
        done = subprocess.run([*command, url], capture_output=True, text=True, timeout=120)
        server.shutdown()
    if screenshot:
        return {}
    found = re.search(r'<script id="measured"[^>]*>(.*?)</script>', done.stdout, re.DOTALL)
    assert found and found[1], f"the page was not measured; the browser said: {done.stderr[-2000:]}"
    return json.loads(html.unescape(found[1]))


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments) -> None:
        pass
