"""Splits English text into words, as the published filters count them, and keeps what they ask of each word.

The filters of Gopher and FineWeb are defined over words and punctuation marks. datatrove takes both from spaCy's blank English pipeline
(spacy/lang/punctuation.py, spacy/lang/en). `split` follows the same conventions: punctuation, quotes, currency signs and units are cut
from both ends of what stands between spaces; hyphens, slashes and commas between letters are words of their own; "don't" is "do" "n't";
abbreviations, addresses and emoticons stay whole. It differs from spaCy's in rare emoticons, in exotic URLs, and in scripts whose letters
spaCy does not list.

How a piece of text between spaces is split depends on that piece alone. So each is split once, and looked up after that.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from hashlib import blake2b
from itertools import chain, product

import numpy as np

MAX_PIECES = 1 << 18
"""A vocabulary of more pieces is dropped for a new one: about 100 MB."""
LONG_PIECE = 64
"""Longer pieces are not remembered: they seldom come twice, and can be megabytes."""


def _characters(ranges: str) -> frozenset[str]:
    """The characters of hexadecimal code points and ranges of them, "21 2e 61-7a"."""
    pairs = (part.partition("-")[::2] for part in ranges.split())
    return frozenset(chr(code) for first, last in pairs for code in range(int(first, 16), int(last or first, 16) + 1))


SENTENCE_ENDS = _characters(
    "21 2e 3f 589 61d-61f 6d4 700-702 7f9 837 839 83d-83e 964-965 104a-104b 1362 1367-1368 166e 1735-1736 17d4-17d6 17d9-17da 1803 1809 "
    "1944-1945 1aa8-1aab 1b5a-1b5b 1b5e-1b5f 1b7d-1b7e 1c3b-1c3c 1c7e-1c7f 203c-203d 2047-2049 2e2e 2e3c 2e53-2e54 3002 a4ff a60e-a60f "
    "a6f3 a6f7 a876-a877 a8ce-a8cf a92f a9c8-a9c9 aa5d-aa5f aaf0-aaf1 abeb fe52 fe56-fe57 ff01 ff0e ff1f ff61 10a56-10a57 10f55-10f59 "
    "10f86-10f89 11047-11048 110be-110c1 11141-11143 111c5-111c6 111cd 111de-111df 11238-11239 1123b-1123c 112a9 1144b-1144c 115c2-115c3 "
    "115c9-115d7 11641-11642 1173c-1173e 11944 11946 11a42-11a43 11a9b-11a9c 11c41-11c42 11ef7-11ef8 11f43-11f44 16a6e-16a6f 16af5 "
    "16b37-16b38 16b44 16e98 1bc9f 1da88"
)
"""Unicode's property Sentence_Terminal, as FineWeb's filter lists it (datatrove, utils/text.py)."""
SYMBOLS = SENTENCE_ENDS | _characters(
    "0-8 b-1f 22-2d 2f 3a-3e 40 5b-60 7b-9f ab b4 bb 2013-2014 2019 201c-201e 2026 2236 2501 25ba 3001 3008-300d 3010-3011 ff05 "
    "ff08-ff09 ff0c ff11 ff1a-ff1b ff5e"
)
"""Punctuation of many scripts, and control characters: a word of these alone is no word to Gopher's filter (datatrove, utils/text.py)."""
PAUSES = SENTENCE_ENDS - _characters(
    "61d-61e 837 839 83d-83e 17d4-17d6 17d9-17da 1b7d-1b7e 2e53-2e54 10f55-10f59 10f86-10f89 11944 11946 11ef7-11ef8 11f43-11f44 16e98"
)
"""What ends a sentence to spaCy's sentencizer (spacy/pipeline/sentencizer.pyx)."""

PUNCTUATION = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
QUOTES = "'\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉⟦⟧"
CURRENCY = "$£€¥฿₽﷼₴₠₡₢₣₤₥₦₧₨₩₪₫₭₮₯₰₱₲₳₵₶₷₸₹₺₻₼₾₿"
UNITS = """km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz m/s km/h kmh mph hPa Pa mbar mb MB kb
KB gb GB tb TB T G M K %""".split()
ABBREVIATIONS = """a.m. p.m. Adm. Bros. co. Co. Corp. D.C. Dr. e.g. E.g. E.G. Gen. Gov. i.e. I.e. I.E. Inc. Jr. Ltd. Md. Messrs. Mo.
Mont. Mr. Mrs. Ms. Ph.D. Prof. Rep. Rev. Sen. St. vs. v.s. Mt. Ak. Ala. Apr. Ariz. Ark. Aug. Calif. Colo. Conn. Dec.
Del. Feb. Fla. Ga. Ia. Id. Ill. Ind. Jan. Jul. Jun. Kan. Kans. Ky. La. Mar. Mass. Mich. Minn. Miss. N.C. N.D. N.H.
N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. Oct. Okla. Ore. Pa. S.C. Sep. Sept. Tenn. Va. Wash. Wis. and/or w/o 'Cause 'cause
'cos 'Cos 'coz 'Coz 'cuz 'Cuz 'bout 'em 'nuff 'll 're 'd 's 'S ma'am Ma'am o'clock O'clock lovin' Lovin' havin' Havin'
doin' Doin' goin' Goin' nothin' Nothin' nuthin' Nuthin' somethin' Somethin' ol' Ol' C++ ''""".split()
EMOTICONS = """:) :-) :)) :))) :-)) (: (-: (; ): )-: [: [-: =) (= =] =[ [= ]= =| =D =3 :] :-] :} :-} :D :-D 8D 8-D XD xD ;) ;-) ;D
;-D :( :-( :(( :-(( =( :'( :'-( :') :'-) :/ :-/ =/ :| :-| :P :-P :p :-p :O :-O :o :-o :o) (o: :0 :-0 :1 :3 :-3 :x :-x
:X :-X :> :-> :* :-* <3 <33 </3 ^_^ ^__^ -_- -__- o_o O_O o_O O_o 0_0 o.o O.O o.O O.o 0.0 8) 8-) (-8 ;_; ._. >.< >.>
<.< @_@ (^_^) (-_-) (._.) (*_*) (>_<) \\")""".split()


def _contractions() -> dict[str, tuple[str, ...]]:
    """English contractions and their parts, with straight, curly and no apostrophe."""
    words: dict[str, tuple[str, ...]] = {}

    def add(heads: str, *tails: str) -> None:
        for head, tail in product(heads.split(), tails):
            for first in (head, head.title()):
                parts = (first, *tail.split())
                words["".join(parts)] = parts
                bare = tuple(part.replace("'", "") for part in parts)
                words["".join(bare)] = bare

    asked, shown = "who what when where why how there", "these those"
    add(f"i you he she it we they {asked} that this {shown}", "'ll", "'d", "'ll 've", "'d 've")
    add(f"i you we they {asked} {shown}", "'ve")
    add(f"you we they {asked} {shown}", "'re")
    add(f"he she it {asked} that this", "'s")
    add("i", "'m", "'m a")
    helpers = "ca could do does did had may might must need ought sha should wo would"
    add(helpers, "n't", "n't 've")
    add("ai are is was were have has dare", "n't")
    add("could might must should would not", "'ve")
    for real in "Ill ill Its its Hell hell Shell shell Shed shed were Were Well well Whore whore".split():
        words.pop(real, None)
    for text in ("can not", "gon na", "got ta"):
        words[text.replace(" ", "")] = tuple(text.split())
        words[text.replace(" ", "").title()] = tuple(text.title().split())[:1] + tuple(text.split())[1:]
    others = ("y' all", "y all", "let 's", "Let 's", "c'm on", "C'm on", "how 'd 'y", "How 'd 'y")
    words |= {text.replace(" ", ""): tuple(text.split()) for text in others}
    for hour, half in product(range(1, 13), ("am", "pm", "a.m.", "p.m.")):
        words[f"{hour}{half}"] = (str(hour), half)
    for letter in "abcdefghijklmnopqrstuvwxyzäöü":
        words[f"{letter}."] = (f"{letter}.",)
    words |= {text: (text,) for text in (*ABBREVIATIONS, *EMOTICONS)}
    words |= {text.replace("'", "’"): tuple(part.replace("'", "’") for part in parts) for text, parts in words.items()}
    return words


CONTRACTIONS = _contractions()
LONGEST_WHOLE = max(map(len, CONTRACTIONS))
LONGEST_SUFFIX = 16
"""Characters; none of what is cut from an end is as long, except an ellipsis."""


def _class(test) -> str:
    """The inside of a regular expression's class: every character of the planes in use that passes."""
    codes = [code for code in chain(range(0xD800), range(0xE000, 0x11000), range(0x1D000, 0x1FB00)) if test(chr(code))]
    starts = [code for code, before in zip(codes, [None, *codes]) if before is None or code != before + 1]
    ends = [code for code, after in zip(codes, [*codes[1:], None]) if after is None or after != code + 1]
    return "".join(f"\\U{first:08x}" + (f"-\\U{last:08x}" if last > first else "") for first, last in zip(starts, ends))


@cache
def _patterns() -> tuple[re.Pattern, re.Pattern, re.Pattern, re.Pattern]:
    """(prefix, suffix, infix, address); compiled on first use, which takes tens of milliseconds."""
    letter = r"[^\W\d_]"
    lower = _class(lambda char: char.isalpha() and not char.isupper())
    upper = _class(lambda char: char.isalpha() and not char.islower())
    icon = _class(lambda char: unicodedata.category(char) == "So")
    marks, quotes, money = (re.escape(text) for text in (PUNCTUATION, QUOTES, CURRENCY))
    units = "|".join(map(re.escape, UNITS))
    prefix = rf"\.\.+|(?:US|C|A)\$|\+(?![0-9])|[§%=—–{marks}{quotes}{money}{icon}]"
    suffix = (
        rf"(?:\.\.+|['’][sS]|(?<=[0-9])(?:US\$|C\$|A\$|{units}|[+{money}])|[—–{marks}{quotes}{icon}]"
        rf"|(?<=°[FfCcKk])\.|(?<=[0-9{lower}%²\-+{marks}{quotes}])\.|(?<=[{upper}][{upper}])\.)\Z"
    )
    infix = (
        rf"\.\.+|[…{icon}]|(?<=[0-9])[+\-*^](?=[0-9-])|(?<=[{lower}{quotes}])\.(?=[{upper}{quotes}])|(?<={letter}),(?={letter})"
        rf"|(?<=[0-9{lower}{upper}])(?:---?|——?|[-–~:<>=/])(?={letter})"
    )
    address = (
        r"(?:[\w+\-.]{2,}://)?(?:\S+@)?(?:(?:[0-9]{1,3}\.){3}[0-9]{1,3}"
        rf"|(?:[A-Za-z0-9¡-￿](?:[\w\-]{{0,62}}[A-Za-z0-9¡-￿])?\.)+[{lower}]{{2,63}})(?::\d{{2,5}})?(?:[/?#]\S*)?\Z"
    )
    return re.compile(prefix), re.compile(suffix), re.compile(infix), re.compile(address)


def split_piece(piece: str) -> tuple[str, ...]:
    """The words of text without spaces. Joined they are `piece` again."""
    if piece.isascii() and piece not in CONTRACTIONS:  # the two commonest kinds need no patterns
        if piece.isalpha():
            return (piece,)
        word, mark = piece[:-1], piece[-1]
        if word.isalpha() and word not in CONTRACTIONS and (mark in ",;:!?" or (mark == "." and word[-1].islower())):
            return (word, mark)
    prefix, suffix, infix, address = _patterns()
    before: list[str] = []
    after: list[str] = []
    first, last = 0, len(piece)  # what is not cut off yet; no copies of it, because there are pieces of megabytes
    while first < last and not _is_whole(piece, first, last):
        start = match.end() if (match := prefix.match(piece, first, last)) else first
        if start > first and _is_whole(piece, start, last):
            before.append(piece[first:start])
            first = start
            break
        end = match.start() if (match := suffix.search(piece, max(start, last - LONGEST_SUFFIX), last)) else last
        if end == last - LONGEST_SUFFIX:  # an ellipsis may be longer
            end = start + len(piece[start:last].rstrip("."))
        if end < last and _is_whole(piece, first, end):
            after.append(piece[end:last])
            last = end
            break
        if start == first and end == last:
            break
        if start > first:
            before.append(piece[first:start])
        if end < last:
            after.append(piece[end:last])
        first, last = start, end
    rest = piece[first:last]
    if not rest:
        middle: list[str] = []
    elif _is_whole(piece, first, last) or ("." in rest and address.match(rest)):
        middle = [rest]
    else:
        middle, at = [], 0
        for match in infix.finditer(rest):
            if match.start() == 0:
                continue
            middle += [rest[at : match.start()]] * (match.start() > at) + [match[0]]
            at = match.end()
        middle += [rest[at:]] * (at < len(rest))
    return tuple(_whole([*before, *middle, *reversed(after)]))


def _is_whole(piece: str, first: int, last: int) -> bool:
    return last - first <= LONGEST_WHOLE and piece[first:last] in CONTRACTIONS


def _whole(parts: list[str]) -> Iterable[str]:
    """`parts`, in which neighbours that make up an abbreviation or emoticon are one again, and contractions are cut as they should be."""
    at = 0
    while at < len(parts):
        for size in range(min(4, len(parts) - at), 0, -1):
            if (together := "".join(parts[at : at + size])) in CONTRACTIONS:
                yield from CONTRACTIONS[together]
                break
        else:
            yield parts[at]
        at += size


def split(text: str) -> list[str]:
    """The words and punctuation marks of a text, in their order."""
    return [word for piece in text.split() for word in split_piece(piece)]


def stable_hash(text: str) -> int:
    """64 bits that are the same on every machine, on every day."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Vocabulary(dict):
    """Pieces of text between spaces → the numbers of their words; and by number, what rules ask of a word.

    Numbers are given in the order in which words are met. So they differ between processes, and no rule's answer may depend on them.
    """

    def __init__(self):
        self.numbers: dict[str | int, int] = {}
        self._grow(1 << 12)

    def _grow(self, size: int) -> None:
        old = getattr(self, "hashes", np.zeros(0, np.uint64)).size
        for name, kind in (("hashes", np.uint64), ("lengths", np.int64), ("is_word", np.bool_), ("has_letter", np.bool_)):
            larger = np.zeros(size, kind)
            larger[:old] = getattr(self, name, larger[:0])
            setattr(self, name, larger)

    def __missing__(self, piece: str) -> tuple[int, ...]:
        numbers = tuple(self.number(word) for word in split_piece(piece))
        if len(piece) <= LONG_PIECE:
            self[piece] = numbers
        return numbers

    def number(self, word: str) -> int:
        """The word's number; a new one where it has none."""
        key = word if len(word) <= LONG_PIECE else stable_hash(word)
        if (number := self.numbers.get(key)) is None:
            self.numbers[key] = number = len(self.numbers)
            if number == self.hashes.size:
                self._grow(2 * number)
            self.hashes[number] = stable_hash(word)
            self.lengths[number] = len(word)
            self.is_word[number] = not SYMBOLS.issuperset(word)
            self.has_letter[number] = any(map(str.isalpha, word))
        return number

    def of(self, pieces: Iterable[str]) -> np.ndarray:
        """int64 [words]: the numbers of all words of the pieces."""
        return np.fromiter(chain.from_iterable(map(self.__getitem__, pieces)), np.int64)


class Pauses(dict):
    """Pieces of text between spaces → one letter a word: "." ends a sentence, "w" begins one after that; other punctuation does neither."""

    def __missing__(self, piece: str) -> str:
        kinds = "".join(
            "." if word in PAUSES else "" if all(unicodedata.category(char)[0] == "P" for char in word) else "w"
            for word in split_piece(piece)
        )
        if len(piece) <= LONG_PIECE:
            self[piece] = kinds
        return kinds

    def sentences(self, pieces: Iterable[str]) -> int:
        """Sentences in a line of these pieces; an empty line is one."""
        return 1 + "".join(map(self.__getitem__, pieces)).count(".w")


_vocabulary, _pauses = Vocabulary(), Pauses()


def vocabulary() -> Vocabulary:
    """The process's vocabulary. A full one is left to those who hold it, and a new one begun."""
    global _vocabulary
    if max(len(_vocabulary), len(_vocabulary.numbers)) > MAX_PIECES:
        _vocabulary = Vocabulary()
    return _vocabulary


def pauses() -> Pauses:
    """The process's table of sentence ends, bounded as `vocabulary`."""
    if len(_pauses) > MAX_PIECES:
        _pauses.clear()
    return _pauses
