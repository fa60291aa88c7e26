"""The pool of `benchmarks.selection`, and its table from arms that are there already."""

import json

from benchmarks.selection import HALVES, by_focus, main, write


def medquad(path):
    rows = [{"focus": f"Disease {n % 30}", "question": f"What is {n} ?", "answer": f"Answer {n}. " * 20} for n in range(120)]
    rows.append({"focus": "Another", "question": "The same ?", "answer": rows[0]["answer"]})
    rows.append({"focus": "Empty", "question": "Nothing ?", "answer": ""})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_no_disease_and_no_answer_is_on_two_sides(tmp_path):
    groups = by_focus(medquad(tmp_path / "medquad.jsonl"))
    texts = []
    for name in ("scored", "sample"):
        size = write(tmp_path / f"{name}.jsonl", groups, 3000)
        found = [json.loads(line)["text"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert 3000 <= size == sum(map(len, found)) < 5000
        texts.append(found)
    texts.append([text for group in groups for text in group])
    answers = [{text.split("\n\n")[1] for text in side} for side in texts]
    assert sum(map(len, answers)) == len(set.union(*answers)) == 120
    diseases = [{int(answer.split()[1].rstrip(".")) % 30 for answer in side} for side in answers]
    assert not diseases[0] & diseases[1] and not diseases[1] & diseases[2] and not diseases[0] & diseases[2]


def arms(tmp_path):
    (tmp_path / "pool.json").write_text(json.dumps({"pool": {"books": 20_000_000, "code": 20_000_000}, "sample": 1, "scored": 1}))
    for arm in ("random", *HALVES, "loss"):
        half = arm != "random"
        learnt = {"tokens": 4_000_000 if half else 8_000_000, "seconds": 100.0 if half else 200.0}
        chosen = {"out": "nowhere", "seconds": 10.0, "told_apart": 0.93 if arm in ("overlap", "quality") else None, "medicine": 0.1}
        (tmp_path / f"selected-{arm}.json").write_text(json.dumps(chosen))
        (tmp_path / f"{arm}-0.json").write_text(json.dumps(learnt))
        (tmp_path / "sample.jsonl").write_text("")
        (tmp_path / "reference.json").write_text(json.dumps({"seconds": 5.0}))
        (tmp_path / f"{arm}-0-scored.json").write_text(json.dumps({"bpb": 1.9 if arm == "quality" else 2.0}))


def test_the_table(tmp_path, capsys):
    arms(tmp_path)
    main(["--loss", "--books", "nowhere", "--medicine", "nowhere", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "2.0000 bpb (+0.00%)  8.00 M tokens (100%)" in lines[0]
    assert "quality  1.9000 bpb (-5.00%)  4.00 M tokens (50%)  100 s and 10 s of selecting (52%)" in lines[3]
    assert "medicine 10.0%, told apart 0.930" in lines[3]


def test_the_table_of_an_imported_model(tmp_path, capsys):
    arms(tmp_path)
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps({"text": f"{number} " + "word " * 200}) + "\n" for number in range(20)))
    for arm in ("random", *HALVES):
        for name in (f"{arm}-0", f"{arm}-0-scored", f"selected-{arm}"):
            told = json.loads((tmp_path / f"{name}.json").read_text())
            (tmp_path / (f"selected-base-{arm}.json" if "selected" in name else f"base-{name}.json")).write_text(json.dumps(told))
    (tmp_path / "base-scored.json").write_text(json.dumps({"bpb": 1.5}))
    main(["--base", "nowhere", "--base-scored", "0.005", "--books", "nowhere", "--medicine", "nowhere", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[4] == "            base  1.5000 bpb"
    assert lines[8].startswith("    base quality  1.9000 bpb (-5.00%)")
    assert len((tmp_path / "scored-0.005.jsonl").read_text().splitlines()) == 5
