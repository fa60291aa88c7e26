import random

from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.data.split import content_hash
from sparing.evals.select import SHARES, select


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=40), max_size=80),
    st.integers(1, 300),
    st.randoms(use_true_random=False),
)
def test_equal_beginnings_in_hash_order_whatever_the_order(texts, limit, shuffle):
    chosen = select(texts, limit)
    shuffled = list(texts)
    shuffle.shuffle(shuffled)
    assert select(iter(shuffled), limit) == chosen
    sizes = [len(part.encode()) for part in chosen]
    assert sum(sizes) <= limit
    rest = sorted((text for text in texts if text), key=lambda text: content_hash(text.encode()))
    whole = []
    for part in chosen:  # each is the beginning of a document of its own, in the order of the hashes
        while not rest[0].startswith(part):
            rest.pop(0)
        whole.append(rest.pop(0))
    shortened = [size for size, text in zip(sizes, whole, strict=True) if size < len(text.encode())]
    if shortened:  # nobody gets more than one that was cut, but for the bytes of a character
        assert max(sizes) <= min(shortened) + 3
    if sum(len(text.encode()) for text in texts) <= limit:
        assert sorted(chosen) == sorted(text for text in texts if text)


def test_a_long_document_leaves_room_for_others():
    assert sorted(select(["a" * 1000, "b" * 1000, "c" * 3], 43)) == ["a" * 20, "b" * 20, "ccc"]


def test_a_large_corpus_is_read_in_few_pieces():
    texts = [f"{n:04d}" * 50 for n in range(1000)]
    chosen = select(texts, 20 * SHARES)
    assert len(chosen) == SHARES and {len(part) for part in chosen} == {20}
    first = sorted(texts, key=lambda text: content_hash(text.encode()))[:SHARES]
    assert chosen == [text[:20] for text in first]


def test_short_documents_fill_up_what_is_asked_for():
    texts = [str(n) * 8 for n in range(1000, 2000)]
    random.Random(0).shuffle(texts)
    assert sum(map(len, select(texts, 3200))) == 3200
