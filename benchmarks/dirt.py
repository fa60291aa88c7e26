"""Dirt: what a crawl has beside the text that is wanted, made of a clean text, or of random numbers alone.

Each maker is a function of (random numbers, a text) -> another text. The same numbers make the same dirt.
"""

from __future__ import annotations

import gzip
import quopri
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

CHANGED = (0.005, 0.04)
"""Least and largest share of the words that a near-duplicate has changed. At 0.022 the 5-grams of both have a Jaccard similarity of 0.8,
at 0.037 of 0.7."""
LANGUAGES = ("de", "fr", "es")


# near-duplicates


def near_duplicate(dice: random.Random, text: str) -> str:
    """The text with a share of its words changed: for another of its words, left out, written twice, or misspelt."""
    parts, share = re.split(r"(\s+)", text), dice.uniform(*CHANGED)
    words = [at for at in range(0, len(parts), 2) if parts[at]]
    for at in dice.sample(words, max(1, round(share * len(words)))):
        word, how = parts[at], dice.randrange(4)
        if how == 0:
            parts[at] = parts[dice.choice(words)]
        elif how == 1:
            parts[at] = ""
        elif how == 2:
            parts[at] = f"{word} {word}"
        else:
            place = dice.randrange(len(word))
            parts[at] = word[:place] + dice.choice("abcdefghilmnoprstu") + word[place + 1 :]
    return "".join(parts)


# mojibake


def as_cp1252(dice: random.Random, text: str) -> str:
    """UTF-8 that was read as Windows-1252, up to three times over, of a text with typographic quotes and dashes, as e-books have them."""
    text = re.sub(r'(^|[\s(—-])"', r"\1“", text).replace('"', "”").replace("'", "’").replace("--", "—")
    for _ in range(dice.choice([1, 1, 2, 3])):
        text = "".join(_as_cp1252(byte) for byte in text.encode())
    return text


def _as_cp1252(byte: int) -> str:
    try:
        return bytes([byte]).decode("cp1252")
    except UnicodeDecodeError:  # five bytes are no characters there; browsers keep them as they are
        return chr(byte)


def swapped_bytes(dice: random.Random, text: str) -> str:
    """UTF-16 that was read in the other byte order."""
    return text.encode("utf-16-le", "ignore").decode("utf-16-be", "ignore")


def from_ebcdic(dice: random.Random, text: str) -> str:
    """A mainframe's code page that was read as Latin-1."""
    return text.encode("cp500", "ignore").decode("latin-1")


def quoted_printable(dice: random.Random, text: str) -> str:
    """The body of a mail that nobody decoded."""
    return quopri.encodestring(text.replace('"', "”").replace("'", "’").encode()).decode("ascii")


MOJIBAKE: dict[str, Callable[[random.Random, str], str]] = {
    "as-cp1252": as_cp1252, "swapped-bytes": swapped_bytes, "from-ebcdic": from_ebcdic, "quoted-printable": quoted_printable,
}  # fmt: skip


# other languages


def manual_pages(folder: str, language: str) -> Iterator[str]:
    """The pages in FOLDER/LANGUAGE/man*/*.gz as plain text, an empty line between paragraphs."""
    for path in sorted(Path(folder, language).glob("man*/*.gz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        if not text.startswith(".so "):  # the page of another name
            yield plain(text)


_BREAK = re.compile(r"\.(?:PP|P|LP|TP|IP|HP|SH|SS|Sh|Ss|Pp|It|sp|RS|RE)\b")
_KEPT = re.compile(r"\.(?:SH|SS|Sh|Ss|B|I|BR|BI|IR|RB|RI|IB|SB|SM|IP|It)\s+(.*)")
_ESCAPES = (
    (re.compile(r"\\f(?:\[\w*\]|\(\w\w|\w)"), ""), (re.compile(r'\\".*'), ""), (re.compile(r"\\-"), "-"), (re.compile(r"\\e"), r"\\"),
    (re.compile(r"\\\(aq|\\\[aq\]"), "'"), (re.compile(r"\\\[[^\]]*\]|\\\(..|\\\*\(..|\\[&/,|^%:~0 ]|\\s[-+]?\d+"), ""),
)  # fmt: skip


def plain(page: str) -> str:
    """The words of a page of roff, without requests, fonts and tables."""
    paragraphs: list[list[str]] = [[]]
    for line in page.splitlines():
        for pattern, instead in _ESCAPES:
            line = pattern.sub(instead, line)
        if _BREAK.match(line):
            paragraphs.append([])
        if line.startswith((".", "'")):
            kept = _KEPT.match(line)
            line = kept[1].replace('"', "") if kept else ""
        if line.strip():
            paragraphs[-1].append(line.strip())
    return "\n\n".join(" ".join(paragraph) for paragraph in paragraphs if paragraph) + "\n"


# words for spam and boilerplate

BANKS = {
    "product": """slimming tea | memory pills | designer watch | replica handbag | wireless earbuds | garden shed | electric razor | night
    cream | hair tonic | miracle mop | knee brace | gold coin | herbal patch | power drill | air fryer | travel mattress | phone case |
    solar lamp | diet plan | detox juice | joint oil | mini drone | car polish | water filter | teeth whitener | sleep spray | fitness
    band | smart ring | massage chair | ink cartridge""",
    "service": """payday loan | online casino | search ranking | debt relief | crypto wallet | dating club | essay writing | tarot reading
    | web hosting | car insurance | roof repair | private investigator | credit repair | forex signals | translation desk | visa help |
    cleaning crew | lottery syndicate | follower boost | email blast | stock tips | mortgage refinance | timeshare exit | phone
    unlocking""",
    "great": """amazing | unbeatable | exclusive | incredible | guaranteed | premium | risk-free | revolutionary | certified | world-class
    | number one | trusted | secret | limited | brand new | award-winning | all-natural | instant | effortless | legendary | lowest-priced
    | doctor-approved | once-in-a-lifetime""",
    "gain": """save thousands | lose ten pounds | double your income | sleep like a baby | get rich | look ten years younger | win big |
    rank first | pay off everything | meet your match | stop worrying | work from the sofa | beat the house | triple your traffic | feel
    young again | earn daily | wipe out your debt | turn heads | pass every exam | quit your job""",
    "urge": """Click now | Order today | Call us right away | Do not wait | Act before midnight | Claim yours | Sign up in seconds | Grab
    it while it lasts | Hurry | Reply with YES | Tap the link | Book your slot | Visit the shop | Send this to a friend | Start your trial
    | Unlock the offer""",
    "who": """busy mothers | students | retired drivers | small firms | gamblers | gardeners | night workers | beginners | dog owners |
    frequent flyers | bargain hunters | single men | landlords | athletes | home cooks | bloggers | seniors | first-time buyers""",
    "time": """in 24 hours | this weekend only | until Friday | within minutes | for the next 50 callers | in just seven days | overnight
    | before it is gone | while stocks last | in three easy steps | from your phone | without leaving home | with no paperwork | at no
    extra cost""",
    "proof": """as seen on television | backed by experts | tested in our own laboratory | with over a million happy users | rated five
    stars | loved in forty countries | recommended by nine out of ten people | copied by our rivals | with a full refund | no questions
    asked""",
    "person": """Brenda | Carlos | Mrs. Tanaka | Big Joe | Ingrid | our client Paul | Dr. Smith | Linda from Ohio | a plumber | my
    neighbour | Svetlana | Uncle Raj | Coach Mike | Grandma Rose | an honest reader | Kwame | Pauline | the whole office""",
    "section": """Home | About us | Contact | News | Blog | Careers | Help centre | Shop | Gallery | Events | Press | Partners | Support |
    Downloads | Forum | Archive | Sitemap | Newsletter | Login | Register | My account | Basket | Checkout | Search | FAQ | Privacy |
    Terms | Accessibility | Feedback | Store finder | Gift cards | Returns | Delivery | Investors | Community | Videos | Podcasts |
    Weather | Sport | Travel | Recipes | Jobs | Obituaries | Classifieds | Subscribe""",
    "firm": """Northgate | Bluefin | Harbour & Sons | Oakridge | Vantage | Lumen | Pinewood | Summit | Cobalt | Meridian | Fairview |
    Kestrel | Redbrick | Silverline | Tidewater | Granite | Willow | Beacon | Copperfield | Larkspur | Everhart | Quayside | Millbrook |
    Stonebridge | Foxglove | Ironwood""",
    "kind": """Media | Group | Limited | Holdings | Online | Stores | Publishing | Systems | Network | Foundation | Digital | Partners |
    Services | Trust | Labs""",
    "data": """your browser type | the pages that you visit | your approximate location | log files | device identifiers | your
    preferences | the items in your basket | referring addresses | session length | screen size | your language | form entries |
    advertising identifiers""",
    "purpose": """to measure our audience | to remember your settings | to show relevant offers | to keep the site secure | to improve our
    services | to comply with the law | to prevent fraud | to share content with partners | to limit how often you see a banner | to test
    new features""",
    "duty": """copy any part of the site | resell the content | use automated tools | remove notices of ownership | upload unlawful
    material | interfere with the servers | create several accounts | pretend to be somebody else | link to inner pages | reverse engineer
    the software""",
    "part": """These terms | This notice | This agreement | Our policy | This page | The service | Your account | This licence | The
    newsletter | Any order""",
    "verb": """may change without notice | is governed by the laws of the place where we are registered | is provided as it is | applies
    to all visitors | does not affect your legal rights | can be ended by either side | replaces all earlier versions | takes effect on
    the date above | is available on request | will be reviewed every year""",
}
WORDS = {name: " ".join(bank.split()).split(" | ") for name, bank in BANKS.items()}
ADS = (
    "{Great} {product} for {who}: {gain} {time}!",
    "Tired of your old {product}? Our {great} {product} lets you {gain} {time}.",
    "{urge} and {gain} with the {great} {service}, {proof}.",
    "{Person} tried the {great} {product} and was able to {gain} {time}.",
    "Why pay more? The {service} for {who} starts at ${n} and comes {proof}.",
    "{urge}! Only {n} left of the {great} {product}.",
    "Use code {CODE} at {site} and get {n} % off every {product} {time}.",
    "The {great} secret that {who} do not want you to know: {gain}.",
    "With one {product} and a {great} {service} you will {gain}, {proof}.",
    "{Person} says: I never believed it, but now I {gain} {time}.",
    "Compare every {service} at {site}, {proof}, and {gain}.",
    "No contract, no fees, just a {great} {service} that helps {who} {gain}.",
    "Dear friend, you were chosen out of {n} people for a {great} {product}.",
    "Free shipping on each {product}. {urge}.",
    "Our {product} is {great}, our {service} is {great}, and you can {gain} {time}.",
    "{urge}: {site} has the {great} {product} you deserve.",
    "Doctors, {who} and {who} agree that the {product} works {time}.",
    "Earn ${n} a week {time} with our {great} {service}.",
    "If you want to {gain}, then {site} is the {great} place for {who}.",
    "More than {n} {who} switched to the {product}, {proof}.",
    "Stop looking for a {service} near you and {gain} with {firm} {kind}.",
    "Limited offer for {who}. {urge} and {gain}.",
    "We ship the {great} {product} in plain boxes, {proof}.",
    "Write to {person} at {site} and ask for the {service} price list.",
)
NOTICES = (
    "We use cookies {purpose} and {purpose}.",
    "We and our {n} partners store {data} and {data} {purpose}.",
    "By using this site you agree that {firm} {kind} collects {data} {purpose}.",
    "You may not {duty} or {duty}.",
    "{part} {verb}.",
    "{part} of {firm} {kind} {verb} and {verb}.",
    "Visitors who {duty} lose their account at once.",
    "Copyright {year} {firm} {kind}. All rights reserved.",
    "{firm} {kind} is registered under number {n}{n}.",
    "If you do not accept this, change the settings of your browser or write to the office of {firm} {kind}.",
    "We keep {data} for {n} days {purpose}.",
    "{section} and {section} are run by {firm} {kind}, which is not responsible for other sites.",
    "Please enable JavaScript to see {section}.",
    "The page that you asked for was moved to {section}; try {section} or {section}.",
    "Enter your e-mail address below to receive news about {section}, {section} and {section}.",
    "Required fields are marked with a star.",
    "You can withdraw your consent under {section} at any time.",
    "Posted in {section} by admin in {month} {year}. {n} comments.",
)
MONTHS = "January February March April May June July August September October November December".split()


def _said(dice: random.Random, template: str, banks: dict[str, list[str]]) -> str:
    """A template with each of its slots filled anew."""

    def fill(match: re.Match) -> str:
        name = match[1]
        if name == "n":
            return str(dice.choice([3, 5, 7, 12, 19, 25, 40, 49, 60, 75, 90, 99, 120, 199, 250, 500, 999, 1500, 5000]))
        if name == "CODE":
            return "".join(dice.choice("ABCDEFGHJKLMNPRSTUVW23456789") for _ in range(6))
        if name == "site":
            return f"www.{dice.choice(WORDS['great'])}-{dice.choice(WORDS['service'])}{dice.randint(1, 99)}.example".replace(" ", "-")
        if name in ("year", "month"):
            return str(dice.randint(1998, 2026)) if name == "year" else dice.choice(MONTHS)
        found = dice.choice(banks[name.lower()])
        return found[0].upper() + found[1:] if name[0].isupper() else found

    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", re.sub(r"\{(\w+)\}", fill, template))


def spam(dice: random.Random, text: str = "") -> str:
    """An advertisement in sentences, a page stuffed with keywords, or a page of links, by 6, 2 and 2 in ten. A few words of each kind are
    drawn for a page and used again and again on it."""
    banks = {name: dice.sample(words, min(len(words), dice.randint(2, 8))) for name, words in WORDS.items()}
    form = dice.random()
    if form < 0.6:
        paragraphs = []
        for _ in range(dice.randint(2, 8)):
            sentences = [_said(dice, dice.choice(ADS), banks) for _ in range(dice.randint(2, 6))]
            paragraphs.append(" ".join(one.upper() if dice.random() < 0.05 else one for one in sentences))
        return "\n\n".join(paragraphs) + "\n"
    if form < 0.8:
        keys = [_said(dice, "{great} {product}|{great} {service}|{service} for {who}|{product} {time}", banks) for _ in range(20)]
        words = [dice.choice("|".join(keys).split("|")) for _ in range(dice.randint(60, 300))]
        return dice.choice([", ", " ", " | "]).join(words) + "\n"
    links = (
        _said(dice, dice.choice(["{Great} {product} {site}", "{urge}: {site}", "{service} {site} - {n} % off"]), banks) for _ in range(99)
    )
    return "\n".join(link for link, _ in zip(links, range(dice.randint(15, 80)), strict=False)) + "\n"


def boilerplate(dice: random.Random, text: str = "") -> str:
    """What stands around a page: menus, and notices about cookies, terms and forms, mixed."""
    banks = {name: dice.sample(words, min(len(words), dice.randint(4, 20))) for name, words in WORDS.items()}
    blocks = []
    for _ in range(dice.randint(4, 14)):
        if dice.random() < 0.5:
            menu = dice.sample(WORDS["section"], dice.randint(5, 25))
            blocks.append(dice.choice(["\n", " | ", " > ", "\n* "]).join(menu))
        else:
            blocks.append(dice.choice([" ", "\n"]).join(_said(dice, dice.choice(NOTICES), banks) for _ in range(dice.randint(1, 6))))
    return "\n\n".join(blocks) + "\n"
