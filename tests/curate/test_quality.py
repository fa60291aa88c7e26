import random

import numpy as np
import pytest
from tests.curate.prose import prose, words

from sparing.base.config import UserError
from sparing.curate.document import Document
from sparing.curate.quality import BITS, Quality, QualityModel, features, train


def sample(vocabulary, count, dice):
    return [" ".join(dice.choices(vocabulary, k=dice.randint(30, 200))) for _ in range(count)]


@pytest.fixture(scope="module")
def samples():
    """Two kinds of text that share half of their words."""
    dice = random.Random(5)
    return [sample(words(300, start), 120, dice) for start in (0, 150)]


@pytest.fixture(scope="module")
def model(samples):
    return train(samples[0][:80], samples[1][:80])


def test_unseen_texts_are_told_apart(samples, model):
    good, bad = ([model.score(Document(text)) for text in sample[80:]] for sample in samples)
    assert np.mean([score > 0.5 for score in good]) > 0.95
    assert np.mean([score < 0.5 for score in bad]) > 0.95
    assert all(0 <= score <= 1 for score in good + bad)


def test_the_order_of_words_counts():
    dice = random.Random(3)
    pairs = [tuple(dice.sample(words(40), 2)) for _ in range(60)]
    good = [" ".join(f"{a} {b}." for a, b in dice.choices(pairs, k=20)) for _ in range(80)]
    bad = [" ".join(f"{b} {a}." for a, b in dice.choices(pairs, k=20)) for _ in range(80)]
    model = train(good[:60], bad[:60])
    assert np.mean([model.score(Document(text)) for text in good[60:]]) > 0.6 > 0.4 > np.mean([model.score(Document(t)) for t in bad[60:]])


def test_a_small_sample_is_not_outvoted(samples):
    model = train(samples[0][:8], samples[1][:80])
    assert np.mean([model.score(Document(text)) > 0.5 for text in samples[0][80:]]) > 0.5


def test_the_same_texts_and_seed_give_the_same_model(samples, model):
    again = train(iter(samples[0][:80]), samples[1][:80])
    assert again.weights.tobytes() == model.weights.tobytes() and again.bias == model.bias
    assert train(samples[0][:80], samples[1][:80], seed=1).weights.tobytes() != model.weights.tobytes()


def test_saved_and_loaded(tmp_path, samples, model):
    path = tmp_path / "model.safetensors"
    model.save(path)
    loaded = QualityModel.load(path)
    text = Document(samples[0][90])
    assert loaded.score(text) == pytest.approx(model.score(text), abs=1e-6)  # the bias is float32 on disk
    rule = Quality(model=str(path))
    rule.load()
    assert rule.verdict(rule.scores(text)) is None
    assert rule.verdict(rule.scores(Document(samples[1][90]))) == "quality: min_score"
    assert Quality(model=str(path), min_score=None).verdict({"good": 0.0}) is None


def test_thresholds():
    assert Quality(min_score=0.5).verdict({"good": 0.5}) is None
    assert Quality(min_score=0.5).verdict({"good": 0.499999}) == "quality: min_score"


def test_features_are_buckets():
    found = features(Document("one two one two"))
    assert found.size == 4  # one, two, "one two", "two one"
    assert found.min() >= 0 and found.max() < 1 << BITS
    assert features(Document(" ")).size == 0
    assert features(Document("one")).size == 1


@pytest.mark.parametrize("name", ["good", "bad"])
def test_an_empty_sample_is_refused(name):
    with pytest.raises(UserError, match=f"the {name} sample has no text"):
        train(**({"good": [prose(2)], "bad": [prose(2)]} | {name: [" "]}))


def test_other_files_are_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"weights": np.zeros(3, np.float32)}, tmp_path / "other")
    (tmp_path / "text").write_text("no model")
    for name in ("other", "text", "missing"):
        with pytest.raises(UserError, match=name):
            QualityModel.load(tmp_path / name)
