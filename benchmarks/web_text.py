"""Text of web pages beside warcio and trafilatura: `python -m benchmarks.curation web`.

Pages are rendered from real text with what websites put around it, so the main text is known. A WARC file of them is read by our reader
(FastWARC, with Resiliparse or trafilatura) and by warcio with trafilatura, in turn, on one core.
"""

from __future__ import annotations

import html
import json
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from benchmarks.curation import pieces_in_turn
from benchmarks.curation_speed import CPU, run_on
from sparing.base.files import atomic_path, write_atomic
from sparing.base.messages import say
from sparing.bench.results import stored_result

ARMS = ("resiliparse", "trafilatura", "warcio")
"""Our reader with either extractor; warcio with trafilatura, as datatrove sets it."""
SITES = 50
"""Kinds of pages: each has its own menus, elements and names of classes."""
LEAST = 500
"""Characters of a page's main text."""
WARM = 20
"""Pages before the time is taken: processes start, patterns are compiled."""
WORDS = """Home News Sport Business Travel Culture Health Science Weather Contact About Careers Privacy Terms Imprint Help Shop Cart Login
Register Subscribe Newsletter Archive Events Gallery Videos Podcasts Jobs Support Downloads Community Forum Blog Press Partners Sitemap
Accessibility Cookies Advertise Feedback""".split()
COOKIES = (
    "We use cookies to improve your experience on our website.",
    "By continuing to browse you agree to our use of cookies and similar technologies.",
    "You can change your preferences at any time in the settings.",
    "We and our 842 partners store and access information on a device, such as unique identifiers.",
    "Some of them are essential, while others help us to show you relevant advertising.",
    "Read more in our privacy policy.",
)
LEGAL = (
    "All rights reserved.",
    "Reproduction in whole or in part without permission is prohibited.",
    "Prices include VAT and exclude delivery.",
    "The content on this site is for information only and is no substitute for professional advice.",
    "Registered in England and Wales under company number 01234567.",
    "This site is protected by reCAPTCHA and the Google Privacy Policy and Terms of Service apply.",
)
CALLS = (
    "Sign up for our newsletter and never miss a story.",
    "Download our app for the best experience.",
    "Share this page with your friends.",
    "Enjoying this? Support us from as little as five pounds a month.",
    "You have 2 free articles left this month.",
    "Follow us on Facebook, Twitter and Instagram.",
)


class Page(NamedTuple):
    url: str
    html: str
    text: str
    """The main text, without markup."""


@dataclass
class Web:
    """Pages a second from WARC files, and how much of the text kept is the page's own."""

    data: tuple[str, ...]
    """Files and folders of text and Markdown: the pages' main text."""
    out: str
    """Folder for the pages and the results."""
    pages: int = 2000
    rounds: int = 3
    """Every arm reads the file so often, in turn with the others."""
    cpu: int = CPU
    """The core that everything runs on (taskset)."""

    def __call__(self) -> dict:
        """{"pages", "arms": {name: {"pages_per_s", "cpu_s", "f1", "precision", "recall", "without_text"}}}, also in OUT/web.json."""
        folder = Path(self.out) / "web"
        folder.mkdir(parents=True, exist_ok=True)
        made = stored_result(folder / "pages.json", lambda: write_pages(self.data, folder, self.pages))
        times: dict[str, list[dict]] = {arm: [] for arm in ARMS}
        for number in range(self.rounds):
            for arm in ARMS:
                file = folder / f"{arm}-{number}.json"
                times[arm].append(stored_result(file, lambda arm=arm: self._measure(arm, folder)))
        arms = {
            arm: {
                "pages_per_s": made["pages"] / statistics.median(row["loop_s"] for row in rows),
                "cpu_s": statistics.median(row["cpu_s"] for row in rows),
                **score(folder / "pages.jsonl", folder / f"{arm}.jsonl"),
            }
            for arm, rows in times.items()
        }
        result = {"pages": made, "rounds": self.rounds, "arms": arms}
        write_atomic(Path(self.out) / "web.json", json.dumps(result, indent=1))
        return result

    def _measure(self, arm: str, folder: Path) -> dict:
        command = [sys.executable, "-m", "benchmarks.web_text", arm, str(folder), str(folder / f"{arm}.jsonl")]
        row = run_on(self.cpu, command, folder / f"{arm}.log")
        return row | json.loads(row.pop("said"))

    @staticmethod
    def told(result: dict) -> None:
        for arm, row in result["arms"].items():
            say(f"{arm}: {row['pages_per_s']:.0f} pages/s, F1 {row['f1']:.3f} (precision {row['precision']:.3f}, recall "
                f"{row['recall']:.3f}), {row['without_text']:.1%} of the pages without text")  # fmt: skip


# pages


def write_pages(data: tuple[str, ...], folder: Path, count: int) -> dict:
    """Write pages.warc.gz, warm.warc.gz (the first WARM pages) and pages.jsonl (their main texts)."""
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    found = list(islice(rendered(data), count))
    for name, pages in (("warm", found[:WARM]), ("pages", found)):
        with atomic_path(folder / f"{name}.warc.gz") as beside, open(beside, "wb") as file:
            writer = WARCWriter(file, gzip=True)
            for page in pages:
                headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.1")
                payload = BytesIO(page.html.encode())
                writer.write_record(writer.create_warc_record(page.url, "response", payload=payload, http_headers=headers))
    write_atomic(folder / "pages.jsonl", "".join(json.dumps({"url": page.url, "text": page.text}) + "\n" for page in found))
    own, whole = sum(len(tokens(page.text)) for page in found), sum(len(tokens(text_of(page.html))) for page in found)
    return {"pages": len(found), "html_mb": sum(len(page.html) for page in found) / 1e6, "main_share_of_words": own / max(1, whole)}


def rendered(data: tuple[str, ...]) -> Iterator[Page]:
    """Pages, always the same ones in the same order; of SITES sites in turn."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt().enable("table")
    others: list[str] = []
    """Sentences of earlier pages, for teasers and comments."""
    for number, (_, text) in enumerate(piece for piece in pieces_in_turn(data) if len(piece[1]) >= LEAST):
        main = markdown.render(text)
        own = text_of(main)
        site, dice = number % SITES, random.Random(number)
        page = around(main, Site(site), dice, others or [*CALLS])
        others = (others + [sentence.strip() for sentence in own.split(". ") if 30 < len(sentence) < 300][:5])[-500:]
        if own.strip():
            yield Page(f"https://site-{site}.example/{number}.html", page, own)


class Site:
    """How the pages of one site look."""

    def __init__(self, number: int):
        dice = random.Random(f"site {number}")
        self.menu = dice.sample(WORDS, dice.randint(6, 18))
        self.footer = dice.sample(WORDS, dice.randint(5, 15))
        self.name = f"{dice.choice(WORDS)} {dice.choice(('Daily', 'Online', 'Hub', 'World', 'Today'))}"
        self.cookies = " ".join(dice.sample(COOKIES, dice.randint(2, len(COOKIES))))
        self.legal = " ".join(dice.sample(LEGAL, dice.randint(1, 4)))
        self.semantic = dice.random() < 0.5
        """With HTML 5's elements, or with div alone."""
        self.main = dice.choice(("article", "post-content", "entry-content", "main-content", "content", "story", "c1x7q"))
        self.sidebar = dice.choice(("left", "right", "none"))
        self.table = dice.random() < 0.1
        """The page is a table, as they once were."""
        self.comments, self.related = dice.random() < 0.4, dice.random() < 0.7
        self.cookies_first = dice.random() < 0.5
        self.bytes_of_script = dice.randint(500, 20_000)

    def element(self, name: str, css: str, content: str) -> str:
        tag = name if self.semantic else "div"
        return f'<{tag} class="{css}">\n{content}\n</{tag}>\n'


def around(main: str, site: Site, dice: random.Random, others: list[str]) -> str:
    """A whole page with `main` in it."""

    def links(words: list[str]) -> str:
        return "<ul>" + "".join(f'<li><a href="/{word.lower()}">{word}</a></li>' for word in words) + "</ul>"

    def teasers(count: int) -> str:
        chosen = dice.choices(others, k=count)
        return "".join(f'<div class="teaser"><a href="/{dice.randrange(9999)}">{html.escape(text)}</a></div>\n' for text in chosen)

    banner = f'<div id="cookie-consent" class="cookie-banner"><p>{site.cookies}</p><button>Accept all</button><button>Reject</button></div>'
    header = site.element("header", "site-header", f'<a href="/">{site.name}</a><form><input name="q"><button>Search</button></form>')
    menu = site.element("nav", "navigation", links(site.menu))
    crumbs = f'<div class="breadcrumb"><a href="/">Home</a> » <a href="/{site.menu[0].lower()}">{site.menu[0]}</a></div>'
    byline = f'<p class="byline">By {dice.choice(WORDS)} staff | {dice.randint(1, 28)} May 20{dice.randint(10, 25)} | 4 min read</p>'
    share = f'<div class="share"><a href="#">Facebook</a> <a href="#">Twitter</a> <a href="#">Email</a></div><p>{dice.choice(CALLS)}</p>'
    body = site.element("article", site.main, main)
    if site.semantic:
        body = f"<main>{crumbs}{byline}{body}{share}</main>"
    else:
        body = f'<div id="main">{crumbs}{byline}{body}{share}</div>'
    if site.related:
        body += site.element("section", "related", "<h3>You may also like</h3>" + teasers(dice.randint(3, 8)))
    if site.comments:
        said = "".join(f'<div class="comment"><b>user{dice.randrange(999)}</b><p>{html.escape(dice.choice(others))}</p></div>'
                       for _ in range(dice.randint(1, 8)))  # fmt: skip
        body += f'<div id="comments"><h3>Comments</h3>{said}<a href="/login">Log in to reply</a></div>'
    aside = site.element("aside", "sidebar", f"<h3>Most read</h3>{teasers(5)}<p>{dice.choice(CALLS)}</p>{links(dice.sample(WORDS, 6))}")
    columns = {"left": aside + body, "right": body + aside, "none": body}[site.sidebar]
    if site.table:
        columns = f"<table><tr><td>{menu}</td><td>{columns}</td></tr></table>"
    footer = site.element("footer", "site-footer", f"{links(site.footer)}<p>© 2025 {site.name}. {site.legal}</p>")
    script = f"<script>var data = {json.dumps('x' * site.bytes_of_script)};</script>"
    head = f'<head><meta charset="utf-8"><title>{site.name}</title><style>body {{ margin: 0 }}</style>{script}</head>'
    first, last = (banner, "") if site.cookies_first else ("", banner)
    return (
        f'<!DOCTYPE html>\n<html lang="en">{head}<body>{first}{header}{menu}<div id="wrapper">{columns}</div>{footer}{last}</body></html>'
    )


class _Text(HTMLParser):
    """The text between tags, but for that of scripts and styles."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.found.append(data)


def text_of(page: str) -> str:
    parser = _Text()
    parser.feed(page)
    parser.close()
    return " ".join(parser.found) if page.lstrip().startswith("<!DOCTYPE") else "".join(parser.found)


# scores


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def overlap(found: str, own: str) -> tuple[float, float, float]:
    """(precision, recall, F1) of the words of a text, as often as they occur in it."""
    mine, known = Counter(tokens(found)), Counter(tokens(own))
    common = (mine & known).total()
    precision, recall = common / max(1, mine.total()), common / max(1, known.total())
    return precision, recall, 2 * precision * recall / (precision + recall) if common else 0.0


def score(own: Path, found: Path) -> dict:
    """Means over all pages; one without text counts as 0."""
    with open(found, encoding="utf-8") as file:
        texts = {row["url"]: row["text"] for row in map(json.loads, file)}
    with open(own, encoding="utf-8") as file:
        rows = [overlap(texts.get(row["url"], ""), row["text"]) for row in map(json.loads, file)]
    names = ("precision", "recall", "f1")
    means = {name: statistics.fmean(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    return means | {"without_text": 1 - len(texts) / len(rows)}


# arms, each in a process of its own


def ours(path: Path, extract: str) -> Iterator[tuple[str, str]]:
    from sparing.data.sources import documents

    for document in documents([str(path)], extract=extract):
        yield document.meta["url"], document.text


def warcio(path: Path) -> Iterator[tuple[str, str]]:
    import trafilatura
    from warcio.archiveiterator import ArchiveIterator

    with open(path, "rb") as file:
        for record in ArchiveIterator(file):
            if record.rec_type == "response":
                page = record.content_stream().read().decode("utf-8", "replace")
                # favor_precision, include_comments, deduplicate: datatrove, extractors/trafilatura.py
                text = trafilatura.extract(page, favor_precision=True, include_comments=False, deduplicate=True)
                if text:
                    yield record.rec_headers.get_header("WARC-Target-URI"), text


def extract(arm: str, folder: Path, out: Path) -> dict:
    """Read the pages, write their texts; -> the seconds that reading took, without the start."""
    read: Callable[[Path], Iterator] = warcio if arm == "warcio" else lambda path: ours(path, arm)
    list(read(folder / "warm.warc.gz"))
    begun = time.perf_counter()
    found = list(read(folder / "pages.warc.gz"))
    seconds = time.perf_counter() - begun
    write_atomic(out, "".join(json.dumps({"url": url, "text": text}) + "\n" for url, text in found))
    return {"loop_s": seconds, "texts": len(found)}


if __name__ == "__main__":
    print(json.dumps(extract(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
