"""The same decisions as datatrove's filters, on mangled text. `python -m benchmarks.curation decisions` asks about thousands."""

import random

import pytest
from tests.curate.prose import prose, sentence

from benchmarks.curation import MANGLINGS, compare

MISSING = "datatrove or spaCy is not installed: pip install 'sparing[bench]'"
TEXTS = {
    "prose": prose(12),
    "paragraphs": "\n\n".join(prose(3, start) for start in (0, 30, 60, 90)),
    "dialogue": '"Don\'t go," she said. "It\'s late—and Mr. Brown isn\'t here yet."\n' * 2 + prose(6).replace("\n", " \n "),
    "code": "def f(x):\n    return {x: 1}\n\n\n" + "for i in range(10):\n    print(i, f(i))\n" * 6,
    "numbers": "\n".join(f"{sentence(start=at)} It cost ${at}.50, or 15°C and {at}km." for at in range(8)),
}


@pytest.mark.parametrize("mangling", MANGLINGS)
@pytest.mark.parametrize("name", TEXTS)
def test_decisions_are_datatroves(name, mangling):
    for module in ("datatrove", "spacy", "regex"):
        pytest.importorskip(module, reason=MISSING)
    compared = compare(name, mangling, MANGLINGS[mangling](TEXTS[name], random.Random(name)))
    for rule, (theirs, ours) in compared["filters"].items():
        assert theirs == ours, (rule, compared)
    assert compared.get("c4_text_equal", True)
