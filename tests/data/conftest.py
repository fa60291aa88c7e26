"""Small corpora, made on the spot and the same every time."""

import random

import pytest

WORDS = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all were when we".split()
)


def prose(seed: int, sentences: int = 40) -> str:
    """Readable nonsense with numbers, quotes, accents and two lines that are not Latin."""
    rng = random.Random(seed)
    lines = []
    for number in range(sentences):
        words = rng.choices(WORDS, k=rng.randint(4, 14))
        words[rng.randrange(len(words))] = rng.choice(["café", "it's", f"{seed * 7919 + number}", "“so”", "x_1 += 2;", "naïve"])
        lines.append(" ".join(words).capitalize() + rng.choice([".", "?", " ...", "!\n"]))
    if seed % 5 == 0:
        lines.insert(len(lines) // 2, "日本語の文と 🎉 and ελληνικά, привет")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [prose(seed) for seed in range(120)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts) -> str:
    """A folder of 120 small text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for index, text in enumerate(texts):
        (folder / f"{index:03d}.txt").write_text(text, encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="session")
def trained(texts):
    from sparing.data.tokenizer import train_tokenizer

    return train_tokenizer(texts, 400)
