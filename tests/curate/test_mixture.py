"""`data select --by mixture`: proportions of sources from small models that learn from some."""

import json

import numpy as np
import pytest
from tests.curate.test_data_select import ids, text_of, write

from sparing.base.config import UserError
from sparing.cli.main import main
from sparing.curate import mixture, select
from sparing.curate.mixture import Law, MixedRows, draw_mixtures


def test_the_law_is_found_again():
    law = Law(0.5, np.array([0.1, 0.05, 0.0]), 0.01)
    tried = draw_mixtures(np.array([0.5, 0.3, 0.2]), 12)
    found = Law.of(tried, law.bpb(tried))
    assert np.allclose(found.worth, law.worth, atol=1e-9) and found.start == pytest.approx(0.5) and found.floor == 0.01
    harm = Law.of(tried, np.exp(0.2 * tried[:, 2]))
    assert harm.worth[2] == 0 and harm.worth[:2].all(), "a source that does harm is worth nothing"


def test_the_best_mixture():
    law, plenty = Law(0.0, np.array([0.2, 0.1, 0.0]), 0.02), np.full(3, 9.0)
    best = law.best(plenty)
    assert best.sum() == pytest.approx(1) and best[2] == 0 and (best[0] + 0.02) / (best[1] + 0.02) == pytest.approx(2)
    for other in draw_mixtures(best, 200)[1:]:
        assert law.bpb(best) <= law.bpb(other)
    assert law.best(np.array([0.3, 9.0, 9.0])) == pytest.approx([0.3, 0.7, 0.0]), "no more than there is"
    assert law.best(np.array([0.3, 0.4, 9.0])) == pytest.approx([0.3, 0.4, 0.0]), "and nothing that is worth nothing"
    with pytest.raises(UserError, match="no source lowers the loss"):
        Law(0.0, np.zeros(2), 0.1).best(np.ones(2))


def test_mixtures_are_drawn_all_over():
    own = np.array([0.7, 0.2, 0.1])
    tried = draw_mixtures(own, 40)
    assert np.allclose(tried.sum(1), 1) and (tried >= 0).all() and np.array_equal(tried[0], own)
    assert (tried.max(0) > 0.8).all() and (tried.min(0) < 0.05).all() and np.array_equal(tried, draw_mixtures(own, 40))


def test_rows_come_in_proportion(monkeypatch):
    monkeypatch.setattr(mixture, "SEQ_LEN", 8)
    sources = [np.full(100, number) for number in range(3)]
    rows = MixedRows(sources, np.array([0.5, 0.25, 0.25]))
    batch = rows.batch(3)
    assert batch.tokens.shape == (mixture.ROWS, 8) and batch.targets.shape == (mixture.ROWS, 8, 1)
    drawn = np.bincount(np.concatenate([rows.batch(step).tokens[:, 0] for step in range(20)]))
    assert drawn.tolist() == [160, 80, 80]
    assert np.array_equal(batch.tokens, rows.batch(3).tokens)


@pytest.fixture
def small(monkeypatch):
    """Proxies that take less than a second."""
    monkeypatch.setattr(mixture, "cores", lambda: 1)
    for name, value in {"PROXY_TOKENS": 16_384, "VOCABULARY": 320, "SEQ_LEN": 64}.items():
        monkeypatch.setattr(mixture, name, value)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two sources of 400 documents, and samples: of the first kind, and of both."""
    root = tmp_path_factory.mktemp("sources")
    made = {}
    for kind in ("looms", "tides"):
        made[kind] = write(root / f"{kind}.jsonl", [{"text": text_of(kind, n), "id": f"{kind}-{n}"} for n in range(400)])
    made["sample"] = write(root / "sample.jsonl", [{"text": text_of("tides", n)} for n in range(1000, 1040)])
    made["both"] = write(root / "both.jsonl", [{"text": text_of(kind, n)} for n in range(1000, 1020) for kind in ("looms", "tides")])
    return made


def run(sources, sample, out, capsys, *more) -> dict:
    command = ["data", "select", sources["looms"], sources["tides"], "--for", sources[sample], "--by", "mixture", "--budget", "30%"]
    assert main([*command, "--proxies", "5", "--workers", "1", "--json", "--out", str(out), *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_wanted_source_gets_most_of_the_budget(small, sources, tmp_path, capsys, monkeypatch):
    summary = run(sources, "sample", tmp_path / "one", capsys)
    shares = summary["mixture"]
    assert shares[sources["tides"]] > 0.7 and sum(shares.values()) == pytest.approx(1)
    assert summary["expected"] < summary["own"] and summary["rank"] > 0.5 and len(summary["tried"]) == summary["proxies"] == 5
    assert [stage["name"] for stage in summary["stages"]] == ["setup", "read", "score", "proxies", "write"]
    kinds = [name.split("-")[0] for name in ids(tmp_path / "one")]
    assert kinds.count("tides") / len(kinds) == pytest.approx(shares[sources["tides"]], abs=0.02)
    assert summary["documents"]["in"] == 800 and summary["rejected"] == {select.REASON: 800 - len(kinds)}

    class Full(Exception):
        pass

    def full(*_):
        raise Full

    trained = []
    train = mixture.proxy_bpb
    monkeypatch.setattr(mixture, "proxy_bpb", lambda *given: full() if len(trained) == 2 else trained.append(0) or train(*given))
    with pytest.raises(Full):
        run(sources, "sample", tmp_path / "two", capsys)
    monkeypatch.setattr(mixture, "proxy_bpb", lambda *given: trained.append(0) or train(*given))
    again = run(sources, "sample", tmp_path / "two", capsys)
    assert len(trained) == 5, "proxies that are done are not trained again"
    assert again["mixture"] == pytest.approx(shares, abs=0.02)


def test_a_sample_of_both_gets_both(small, sources, tmp_path, capsys):
    shares = run(sources, "both", tmp_path / "out", capsys)["mixture"]
    assert all(0.2 < share < 0.8 for share in shares.values())


def test_refused_in_one_line(sources, tmp_path, capsys):
    looms, tides, sample = sources["looms"], sources["tides"], sources["sample"]
    (tmp_path / "blank.txt").write_text(" \n")
    mixed = ("--by", "mixture")
    for words, line in {
        (looms, "--for", sample, *mixed): "needs two PATHs or more",
        (looms, tides, *mixed): "--by mixture needs --for SAMPLE",
        (looms, tides, "--for", sample, *mixed, "--proxies", "4"): "2 sources need 5 or more",
        (looms, tides, "--for", sample, "--proxies", "5"): "--proxies goes with --by mixture",
        (looms, looms, "--for", sample, *mixed): "every file needs one source",
        (looms, str(tmp_path / "blank.txt"), "--for", sample, *mixed): "blank.txt: no usable text",
        (looms, tides, "--for", str(tmp_path / "none"), *mixed): "no such file or folder",
        (looms, tides, "--for", str(tmp_path / "blank.txt"), *mixed): "blank.txt: no text in it",
    }.items():
        assert main(["data", "select", *words, "--budget", "10%", "--workers", "1", "--out", str(tmp_path / "x")]) == 2, words
        said = capsys.readouterr().err.strip().splitlines()
        assert line in said[-1] and said[:-1] in ([], ["reading: 0.2 MB"]) and not (tmp_path / "x").exists(), said
