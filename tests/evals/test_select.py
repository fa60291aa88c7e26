from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.data.split import content_hash
from sparing.evals.select import select

documents = st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=30), max_size=30)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(documents, st.integers(1, 300), st.randoms(use_true_random=False))
def test_whole_documents_in_hash_order_and_the_last_cut_between_characters(texts, limit, rng):
    chosen = select(texts, limit)
    shuffled = list(texts)
    rng.shuffle(shuffled)
    assert select(iter(shuffled), limit) == chosen
    ordered = [text for text in sorted(texts, key=lambda text: content_hash(text.encode())) if text]
    size = sum(len(text.encode()) for text in chosen)
    assert size <= limit and (size > limit - 4 or chosen == ordered)
    assert chosen[:-1] == ordered[: max(0, len(chosen) - 1)]
    if chosen:
        assert ordered[len(chosen) - 1].startswith(chosen[-1])


def test_large_documents_stop_early():
    assert select(["a" * 1000, "b" * 1000], 10) == [min(("a" * 1000, "b" * 1000), key=lambda text: content_hash(text.encode()))[:10]]
