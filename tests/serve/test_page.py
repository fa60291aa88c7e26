"""The chat page in a real browser, against a real server."""

from __future__ import annotations

import json
import re

import pytest
from tests.serve.chrome import Page

from sparing.serve.app import page_and_policy

WRITING = "!!document.querySelector('#stop') && !document.querySelector('#stop').hidden"
EVIL = """Text <img src=x onerror="window.hit=1"> <script>window.hit=1</script>

# Head <b>ing</b>

- one **bold** and `code <i>`
- [click](javascript:window.hit=1) and [web](https://example.org/a?b=1&c=2)
  1. inner *em*
  2. second

> quote with ~~old~~ https://example.org/x

| a | b |
|---|---|
| 1 | <svg onload="window.hit=1"> |

```python
def f():
    return "<script>window.hit=1</script>"
```

---
last"""


@pytest.fixture
def page(server, tmp_path):
    with Page(tmp_path) as page:
        page.go(server.url)
        page.until("document.querySelector('#model').textContent.startsWith('tiny')")
        yield page
        assert page.problems == []
        asked = page.js("performance.getEntriesByType('resource').map(entry => entry.name)")
        assert all(name.startswith(server.url) for name in asked), asked


def chat(page, **state):
    """The page as somebody left it who uses it for chats."""
    kept = {"mode": "chat", "temperature": 0, "max_tokens": 24, **state}
    page.js(f"localStorage.setItem('sparing.chat.1', {json.dumps(json.dumps(kept))})")
    page.call("Page.reload")
    page.until("document.querySelector('#model')?.textContent.startsWith('tiny') && document.querySelector('#mode').textContent != ''")


def say(page, text: str) -> None:
    page.js("document.querySelector('#prompt').focus()")
    page.type(text)
    page.press("Enter")
    page.until(f"!({WRITING})")


def messages(page) -> list[str]:
    return page.js("[...document.querySelectorAll('#log > li > .text')].map(e => e.textContent)")


def test_a_conversation_by_keyboard(page, client):
    chat(page)
    say(page, "import json")
    mine, theirs = messages(page)
    asked = [{"role": "user", "content": "import json"}]
    answer = client.chat.completions.create(model="tiny", messages=asked, max_tokens=24, temperature=0).choices[0].message.content
    flat = lambda text: re.sub(r"\W+", "", text)  # noqa: E731
    assert mine == "import json" and flat(theirs) == flat(answer)
    note = page.js("document.querySelector('#log > li:last-child .below').innerText")
    assert re.search(r"\d+ tokens", note) and "first after" in note and " J " in note
    assert "The model says" in page.js("document.querySelector('#said').textContent")
    say(page, "again")
    assert len(messages(page)) == 4
    page.call("Page.reload")
    page.until("document.querySelectorAll('#log > li').length === 4")


def test_regenerate_edit_new(page):
    chat(page)
    say(page, "one")
    first = messages(page)[1]
    page.js("[...document.querySelectorAll('button')].find(b => b.textContent === 'Regenerate').click()")
    page.until(f"!({WRITING}) && document.querySelectorAll('#log > li').length === 2")
    assert messages(page)[1] == first, "at temperature 0 the same answer comes again"
    say(page, "two")
    page.js("[...document.querySelectorAll('button')].find(b => b.textContent === 'Edit').click()")
    assert page.js("document.activeElement.id") == "prompt" and not page.js("document.querySelector('#editing').hidden")
    page.js("document.querySelector('#prompt').select()")
    say(page, "three")
    assert [messages(page)[0], len(messages(page))] == ["three", 2]
    page.js("document.querySelector('#fresh').click()")
    assert messages(page) == [] and page.js("document.activeElement.id") == "prompt"


def test_stop_ends_the_answer_here_and_on_the_server(page, server):
    chat(page, max_tokens=400)
    page.js("document.querySelector('#prompt').focus()")
    page.type("write long")
    page.press("Enter")
    page.until("(document.querySelector('#log > li.model .text')?.textContent.length || 0) > 3")
    page.press("Escape")
    page.until(f"!({WRITING})", 5)
    page.until(f"fetch('{server.url}/metrics').then(r => r.text()).then(t => t.includes('requests_running 0\\n'))", 20)


def test_what_a_model_writes_is_text(page):
    chat(page, messages=[{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}])
    page.until("document.querySelectorAll('#log > li').length === 2")
    page.js("new Promise(done => setTimeout(done, 300))")
    assert page.js("window.hit") is None
    text = "document.querySelector('#log > li.model .text')"
    assert page.js(f"{text}.querySelectorAll('img, script, svg, i, b').length") == 0
    assert page.js("document.querySelector('#log > li.user .text').children.length") == 0
    assert page.js(f"[...{text}.querySelectorAll('a')].map(a => a.getAttribute('href'))") == [
        "https://example.org/a?b=1&c=2", "https://example.org/x",
    ]  # fmt: skip
    count = lambda what: page.js(f"{text}.querySelectorAll('{what}').length")  # noqa: E731
    assert [count(w) for w in ("h3", "ul > li", "ul ol > li", "blockquote del", "td", "pre code", "hr", "strong", "em")] == [
        1, 2, 2, 1, 2, 1, 1, 1, 1,
    ]  # fmt: skip
    assert page.js(f"{text}.querySelector('pre code').textContent").splitlines()[1] == '    return "<script>window.hit=1</script>"'
    with pytest.raises(AssertionError, match="TrustedHTML"):  # the policy itself forbids parsing
        page.js(f"{text}.innerHTML = '<b>x</b>'")
    page.problems.clear()  # this was meant


def test_a_base_model_goes_on_with_a_text(page):
    assert page.js("document.querySelector('#mode').textContent") == "Chat", "a base model begins with texts"
    page.js("document.querySelector('#page').focus()")
    page.type("def parse(")
    page.press("Enter", modifiers=2)
    page.until("document.querySelector('#page').value.length > 'def parse('.length")
    page.until(f"!({WRITING})")
    assert page.js("document.querySelector('#page').value").startswith("def parse(")
    page.js("document.querySelector('#undo').click()")
    assert page.js("document.querySelector('#page').value") == "def parse("


def test_errors_are_said(page):
    chat(page, temperature=7)
    say(page, "hi")
    assert "at most 2" in page.js("document.querySelector('#problem').textContent")
    assert page.js("document.querySelector('#problem').getAttribute('role')") == "alert"
    assert messages(page) == ["hi"], "the question stays"
    page.problems.clear()  # the browser logs the 400, which was meant


@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_and_everything_has_a_name(page, width):
    page.size(width, 800)
    chat(page, messages=[{"role": "user", "content": "wide " + "x" * 300}, {"role": "assistant", "content": EVIL + "\n\n" + "y" * 300}])
    page.until("document.querySelectorAll('#log > li').length === 2")
    assert page.overflow() == [] and page.js("document.documentElement.scrollWidth") <= width
    controls = page.controls()
    assert len(controls) >= 8 and [role for role, name in controls if not name] == []
    page.js("document.querySelector('#open').click()")
    assert page.overflow() == [] and [role for role, name in page.controls() if not name] == []
    page.press("Escape")
    page.until("!document.querySelector('#settings').open")
    page.js("document.querySelector('#mode').click()")
    assert page.overflow() == []


def test_everything_can_be_reached_with_tab(page):
    chat(page, messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    page.js("document.activeElement.blur()")
    reached = []
    for _ in range(14):
        page.press("Tab")
        reached.append(page.js("document.activeElement.id || document.activeElement.textContent"))
    assert {"mode", "fresh", "open", "Copy", "Edit", "Regenerate", "prompt", "send"} <= set(reached), reached


def test_a_server_with_keys_asks_for_one(run, tmp_path, home):
    from tests.serve.conftest import Server

    (tmp_path / "keys").write_text("sixteen-characters-long\n")
    with Page(tmp_path) as page:  # first: without a browser the test is skipped here
        server = Server(run, "--api-key-file", str(tmp_path / "keys"), env={"SPARING_HOME": str(home)})
        try:
            page.go(server.url)
            page.until("document.querySelector('#settings').open")
            page.js("document.querySelector('#key').focus()")
            page.type("sixteen-characters-long")
            page.press("Enter")
            page.until("document.querySelector('#model').textContent.startsWith('tiny')")
        finally:
            assert server.stop() == 0


def test_the_policy_names_the_scripts_by_hash():
    text, policy = page_and_policy()
    assert "unsafe" not in policy and policy.count("'sha256-") == 2 and "default-src 'none'" in policy
    assert not re.search(r"""(?:src|href)=["']?https?:|url\(|@import""", text.split("<script>")[0]), "loads from elsewhere"
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text


def test_contrast_is_enough():
    """WCAG 2.2, 1.4.3: 4.5:1 for text, in both colour schemes."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def ratio(one: str, two: str) -> float:
        a, b = sorted((luminance(one), luminance(two)))
        return (b + 0.05) / (a + 0.05)

    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in re.findall(r":root \{(.*?)\}", page_and_policy()[0])]
    assert len(schemes) == 2
    for scheme in schemes:
        for ink in ("ink", "soft", "accent", "bad"):
            for ground in ("ground", "panel"):
                assert ratio(scheme[ink], scheme[ground]) >= 4.5, (ink, ground, scheme)
        assert ratio(scheme["on"], scheme["accent"]) >= 4.5 and ratio(scheme["ink"], scheme["mine"]) >= 4.5
