"""Reads MediaWiki XML dumps: the articles, as plain text under their titles, one page at a time whatever the dump's size.

Pages are cut out of the stream of bytes, and each is parsed apart from the others, in a process of its own (`apart`): a page that is no XML
costs a page. As what is before the first page is not parsed at all, no entity can be declared.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from sparing.data import apart
from sparing.data.blocks import Damaged, blocks
from sparing.data.document import Document, Reject, Rejected, Tick, Unreadable, documents_of, metadata

PAGE_BYTES = 16 << 20
"""A longer page, with all revisions that are in the dump, is not read."""
HEAD_BYTES = 1 << 20
BEGIN, END = b"<page>", b"</page>"
LONG = f"page longer than {PAGE_BYTES >> 20} MiB"
CUT = "truncated: the dump ends inside a page"


def is_dump(path: str) -> bool:
    """Whether an XML file is a MediaWiki dump: its first element says so. Raises OSError."""
    try:
        head = next(blocks(path, lambda size: None), b"")[:4096]
    except Damaged:
        return False
    return b"<mediawiki" in head


def wiki(path: str, text_key: str, reject: Reject, tick: Tick) -> Iterator[Document]:
    """The articles of a dump; redirects and pages that are no articles are quarantined, as what is damaged is."""
    if reason := apart.missing("web", "mwparserfromhell"):
        return reject(Rejected(path, None, f"a MediaWiki dump {reason}"))
    head: dict[str, Any] = {}
    for line, raw in _pages(path, head, reject, tick):
        try:
            text, meta = apart.parse("wiki", raw, head)
        except Unreadable as error:
            reject(Rejected(path, line, str(error)))
        else:
            yield from documents_of(text, path, line, reject, meta)


def _pages(path: str, head: dict[str, Any], reject: Reject, tick: Tick) -> Iterator[tuple[int, bytes]]:
    """(line, XML) of each page; `head` is filled from what is before the first one."""
    rest, line, inside, too_long, seen, ended = b"", 1, False, False, False, False
    begun = 1  # the line of the page

    def skip(size: int) -> None:
        nonlocal rest, line
        line += rest.count(b"\n", 0, size)
        rest = rest[size:]

    try:
        for block in blocks(path, tick):
            searched = max(0, len(rest) - len(END))
            rest += block
            while True:
                if not inside:
                    place = rest.find(BEGIN)
                    if not seen:
                        head |= _head(rest[: place if place >= 0 else HEAD_BYTES])
                    if place < 0:
                        ended = ended or b"</mediawiki>" in rest
                        if seen or len(rest) > HEAD_BYTES:
                            skip(max(0, len(rest) - len(b"</mediawiki>")))
                        break
                    skip(place)
                    inside, seen, begun, searched = True, True, line, 0
                place = rest.find(END, searched)
                again = rest.find(BEGIN, max(1, searched), place if place >= 0 else len(rest))
                if again >= 0:  # the one before has no end
                    reject(Rejected(path, begun, LONG if too_long else "invalid XML (a page without an end)"))
                    skip(again)
                    begun, searched, too_long = line, 0, False
                    continue
                if place < 0:
                    if len(rest) > PAGE_BYTES:
                        too_long = True
                    if too_long:
                        skip(len(rest) - len(END))
                    break
                place += len(END)
                if too_long or place > PAGE_BYTES:
                    reject(Rejected(path, begun, LONG))
                else:
                    yield begun, rest[:place]
                skip(place)
                inside = too_long = False
        if inside:
            reject(Rejected(path, begun, CUT))
        elif not seen:
            reject(Rejected(path, None, "no page in the dump"))
        elif not ended:
            reject(Rejected(path, line, "truncated: the dump has no end"))
    except Damaged as damage:
        reject(Rejected(path, begun if inside else line, str(damage)))


def _head(raw: bytes) -> dict[str, Any]:
    """The wiki's language, its address, and what it calls files and categories."""
    text = raw.decode("utf-8", "replace")
    language, base = re.search(r'<mediawiki[^>]*?\sxml:lang="([\w-]+)"', text), re.search(r"<base>([^<]+)</base>", text)
    names = re.findall(r'<namespace key="(?:-2|6|14)"[^>]*>([^<]+)<', text)
    found = {"language": language and language[1], "base": base and html.unescape(base[1])}
    return found | {"hidden": [html.unescape(name).lower() for name in names]}


# in a process of its own


def parse(raw: bytes, head: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """(text, metadata) of an article's XML. Raises Unreadable."""
    try:
        page = ElementTree.fromstring(raw)
    except ElementTree.ParseError as error:
        raise Unreadable(f"invalid XML ({error})") from None
    title, space = (page.findtext("title") or "").strip(), (page.findtext("ns") or "0").strip()
    if space != "0":
        raise Unreadable(f"no article (namespace {space})")
    if page.find("redirect") is not None:
        raise Unreadable("a redirect")
    revisions = page.findall("revision")
    if not revisions:
        raise Unreadable("no revision in the page")
    last = revisions[-1]
    if (model := last.findtext("model") or "wikitext") != "wikitext":
        raise Unreadable(f"no wikitext ({model})")
    text = plain(last.findtext("text") or "", [*NAMESPACES, *head.get("hidden", [])])
    if not text:
        raise Unreadable("empty")
    base = head.get("base") or ""
    url = f"{base.rsplit('/', 1)[0]}/{quote(title.replace(' ', '_'), safe='/:,()')}" if base and title else ""
    meta = {"id": page.findtext("id"), "url": url, "title": title, "date": last.findtext("timestamp")}
    meta |= {"language": head.get("language"), "format": "mediawiki"}
    return f"{title}\n\n{text}" if title else text, metadata(meta)


HIDDEN = frozenset("ref references table gallery timeline math score graph templatedata imagemap categorytree style script".split())
"""Elements without running text."""
NAMESPACES = ("file", "image", "media", "category")
"""Links to these are no text, under their names in English and in the wiki's own language."""
LEFT = tuple(
    map(re.compile, (r"\{\{[^{}]*\}\}", r"\[\[(?:[^\[\]]*\|)?([^\[\]|]*)\]\]", r"\{\||\|\}|'{2,}|__[A-Z]+__", r"</?[a-zA-Z][^<>]*>"))
)
"""What the parser leaves where brackets, quotes or elements are not closed."""
LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]+)*|simple")
"""A link to the same article in another language."""
MARK = "\ufdd0"
"""Before a heading, while it is not known whether text follows it: once for each level. Not a character (Unicode, section 23.7)."""


def plain(wikitext: str, hidden: Collection[str] = NAMESPACES) -> str:
    """Wikitext without templates, tables, references, files, categories and markup; headings that nothing follows are left out.

    hidden: the namespaces of files and categories, in lower case."""
    import mwparserfromhell

    text = _text(mwparserfromhell.parse(wikitext.replace(MARK, "")), hidden)
    for pattern in LEFT:
        text = pattern.sub(lambda match: match[1] if match.lastindex else "", text)
    lines = [line.strip() for line in html.unescape(text).splitlines()]
    kept: list[str] = []
    for line in lines:
        if line in ("", "*", "#", ":", ";") and (not kept or not kept[-1]):
            continue
        if line.startswith(MARK):
            while kept and (not kept[-1] or kept[-1].startswith(MARK)) and _level(kept[-1]) >= _level(line):
                kept.pop()
            kept += ["", line, ""] if kept else [line, ""]
        else:
            kept.append("" if line in ("*", "#", ":", ";") else line)
    while kept and (not kept[-1] or kept[-1].startswith(MARK)):
        kept.pop()
    text = "\n".join(line.lstrip(MARK) for line in kept)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]{2,}", " ", text)).strip()


def _level(line: str) -> int:
    """Of a marked heading; an empty line is below any."""
    return len(line) - len(line.lstrip(MARK)) or 9


def _text(code: Any, hidden: Collection[str]) -> str:
    """The text of parsed wikitext."""
    from mwparserfromhell import nodes

    parts = []
    for node in code.nodes:
        if isinstance(node, nodes.Text):
            parts.append(str(node))
        elif isinstance(node, nodes.Heading):
            parts.append(f"\n{MARK * node.level}{' '.join(_text(node.title, hidden).split())}\n")
        elif isinstance(node, nodes.Wikilink):
            target = str(node.title).strip()
            prefix = target.split(":", 1)[0].strip().lower() if ":" in target else ""
            if prefix in hidden or (node.text is None and LANGUAGE.fullmatch(prefix)):
                continue
            parts.append(target.lstrip(":") if node.text is None else _text(node.text, hidden))
        elif isinstance(node, nodes.ExternalLink):
            parts.append(_text(node.title, hidden) if node.title is not None else "")
        elif isinstance(node, nodes.HTMLEntity):
            parts.append(str(node))
        elif isinstance(node, nodes.Tag):
            name = str(node.tag).strip().lower()
            if name in HIDDEN:
                continue
            if name == "br":
                parts.append("\n")
            elif node.wiki_markup in ("*", "#", ":", ";"):
                parts.append("* " if node.wiki_markup in "*#" else "")
            elif node.contents is not None:
                parts.append(_text(node.contents, hidden))
    return "".join(parts)
