"""The tables of `benchmarks.distilling`, from arms that are there already."""

import json

from benchmarks.distilling import TRUTHS, main


def test_students_beside_those_without_a_teacher(tmp_path, capsys):
    teacher = {"seconds": 60.0, "cache_bytes": 24e6, "top_128_bytes": 512e6}
    row = {"bpb": 1.5, "eval_loss": 3.0, "tokens": 1_000_000, "seconds": 300.0, "parameters": 2e6}
    for truth in TRUTHS:
        (tmp_path / f"taught-{truth:g}-0.json").write_text(json.dumps(row | {"eval_loss": 2.9, "teacher": teacher}))
    for name in ("tokens", "time"):
        (tmp_path / f"alone-{name}-0.json").write_text(json.dumps(row))
    main(["students", "--data", "nowhere", "--run", "nowhere", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "0.9048" in lines[1] and "24.0 MB (0.047 of top-128)" in lines[1] and "1.0000" in lines[-1]


def test_drafts_by_what_the_bench_gives(tmp_path, capsys):
    module = {"trainable_parameters": 4.2e6, "tokens": 1e6, "after": {"drafts": {"agreement": 0.4}}}
    (tmp_path / "module.json").write_text(json.dumps(module))
    for temperature in (0, 0.8):
        rows = [{"ours": 120.0, "peer": 100.0}, {"ours": 0.5, "peer": 0.5}]
        (tmp_path / f"val-int8-{temperature}.json").write_text(json.dumps({"rows": rows}))
    main(["drafts", "--run", "nowhere", "--data", "nowhere", "--val", "some/val.txt", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "module: 4.20 M parameters, 1.00 M tokens, agreement 0.400"
    assert lines[1:] == [f"val-int8-{t}: 1.200 times as fast, 50.0% of drafts accepted" for t in (0, 0.8)]
