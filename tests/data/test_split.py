import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.data.split import EXACT, SPACE, WHOLE_SHARE, HashHistogram, Split, choose_split, content_hash, held_out_bound, mix, threshold

bounded = settings(deadline=None, max_examples=150, derandomize=True)


def table(raws: list[bytes]):
    result = HashHistogram()
    for raw in raws:
        result.add(content_hash(raw), len(raw))
    return result.entries()


def split_of(raws: list[bytes], fraction: float) -> Split:
    return choose_split(table(raws), fraction, max(raws, key=lambda raw: (len(raw), -content_hash(raw))))


def sides(raws: list[bytes], split: Split) -> tuple[list[bytes], list[bytes]]:
    """(training texts, held-out texts)"""
    train, held = [], []
    for raw in raws:
        if split.holds_out(content_hash(raw)):
            held.append(raw)
        elif content_hash(raw) == split.tail_hash:
            cut = split.cut(raw)
            train.append(raw[:cut])
            held.append(raw[cut:])
        else:
            train.append(raw)
    return train, held


corpora = st.lists(st.text(min_size=1, max_size=60).map(str.encode), min_size=1, max_size=30)


@bounded
@given(corpora, st.sampled_from([0.02, 0.1, 0.5]), st.randoms(use_true_random=False))
def test_split_survives_reordering_and_both_sides_exist(raws, fraction, rng):
    split = split_of(raws, fraction)
    shuffled = list(raws)
    rng.shuffle(shuffled)
    assert split_of(shuffled, fraction) == split
    train, held = sides(raws, split)
    assert (len(held), sum(map(len, held))) == (split.documents, split.bytes)
    assert sum(map(len, train)) + sum(map(len, held)) == sum(map(len, raws))
    if len(set(raws)) > 1 or len(raws[0].decode()) > 1:
        assert train and held and all(train) and all(held)
        for raw in train + held:
            raw.decode()  # cut between characters
    whole = {raw for raw in held if split.holds_out(content_hash(raw))}
    assert not whole & set(train)


@pytest.mark.parametrize("documents", [500, 5000])
def test_many_documents_are_held_out_by_their_hash_alone(documents):
    raws = [f"document {index} {'x' * (index % 50)}".encode() for index in range(documents)]
    split = split_of(raws, 0.1)
    held = [raw for raw in raws if split.holds_out(content_hash(raw))]
    assert held == [raw for raw in raws if content_hash(raw) < 0.1 * SPACE or content_hash(raw) >> 48 < 6554]
    assert 0.05 < split.bytes / sum(map(len, raws)) < 0.2
    more = [*raws, b"something else entirely"]
    after = split_of(more, 0.1)
    assert held == [raw for raw in raws if after.holds_out(content_hash(raw))]


def test_few_documents_hold_out_a_whole_one_near_the_fraction():
    raws = [bytes([65 + index]) * 1000 for index in range(8)]
    split = split_of(raws, 0.02)
    assert split.documents == 1 and split.bytes == 1000 and split.tail_hash is None and "few documents" in split.reason


def test_a_single_document_gives_its_end():
    raw = b"".join(b"line %d\n" % index for index in range(10_000))
    split = split_of([raw], 0.02)
    (head,), (tail,) = sides([raw], split)
    assert head + tail == raw and head.endswith(b"\n") and 0.01 < len(tail) / len(raw) < 0.03 and "end of the largest" in split.reason


def test_a_giant_among_dwarfs_gives_its_end_too():
    raws = [b"giant " * 100_000, b"readme", b"licence"]
    split = split_of(raws, 0.02)
    train, held = sides(raws, split)
    assert split.tail_hash == content_hash(raws[0]) and 0.01 < sum(map(len, held)) / sum(map(len, raws)) < 0.03
    assert max(map(len, train)) > 500_000


def test_repeated_content_stays_on_one_side_and_is_weighed_together():
    raws = [b"spam " * 100] * 50 + [b"%d ham" % index * 5 for index in range(50)]
    train, held = sides(raws, split_of(raws, 0.02))
    assert raws[0] in train and raws[0] not in held and held
    copies = [b"all the same " * 10] * 5
    train, held = sides(copies, split_of(copies, 0.1))
    assert len(train) == len(held) == 5


def test_nothing_held_out_on_request():
    assert split_of([b"a", b"b"], 0.0) == Split()


def test_large_tables_are_binned_and_do_not_depend_on_order():
    rng = random.Random(0)
    entries = [(rng.getrandbits(64), rng.randint(1, 1000)) for _ in range(3 * EXACT)]
    results = []
    for order in (entries, sorted(entries), entries[::-1]):
        result = HashHistogram()
        for hash, size in order:
            result.add(hash, size)
        results.append(result.entries())
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))
    first, _last, size, count = results[0]
    assert len(first) == EXACT and int(size.sum()) == sum(size for _, size in entries) and int(count.sum()) == len(entries)
    split = choose_split(results[0], 0.02, b"the largest")
    assert split.bytes == sum(size for hash, size in entries if split.holds_out(hash)) == pytest.approx(0.02 * size.sum(), rel=0.1)
    assert split.documents == sum(split.holds_out(hash) for hash, _ in entries)
    bound = threshold(results[0], size.sum() / 4)
    assert sum(size for hash, size in entries if hash < bound) == pytest.approx(size.sum() / 4, rel=0.01)


@bounded
@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 100)), min_size=1, max_size=50), st.floats(1, 3000))
def test_threshold_is_the_smallest_bound_that_suffices(entries, target):
    made = HashHistogram()
    for hash, size in entries:
        made.add(hash, size)
    bound = threshold(made.entries(), target)
    below = [hash for hash, _ in entries if hash < bound]
    total = sum(size for hash, size in entries if hash < bound)
    assert total >= target or bound == SPACE
    assert sum(size for hash, size in entries if hash < max(below)) < target


def test_held_out_bound_keeps_to_the_target():
    raws = [b"%d" % index * 10 for index in range(2000)]
    split = split_of(raws, 0.5)
    bound = held_out_bound(table(raws), split, 3000)
    kept = [raw for raw in raws if split.holds_out(content_hash(raw)) and content_hash(raw) < bound]
    assert 3000 <= sum(map(len, kept)) < 3100 and held_out_bound(table(raws), split, 10**9) == split.bound


def test_mix_is_a_permutation_that_scatters():
    assert len({mix(value) for value in range(10_000)}) == 10_000
    assert abs(sum(mix(value) >> 63 for value in range(10_000)) - 5000) < 200
    assert WHOLE_SHARE < 0.5
