"""The table of `benchmarks.fine_tuning speed`, from arms that are there already."""

import json

from benchmarks.fine_tuning import OURS, PEERS, main


def test_ratios_are_of_peers_of_one_kind(tmp_path, capsys):
    """Speed beside the fastest of the method, memory beside the smallest of equal micro-batch and recomputation; an arm that failed is told
    and counts nowhere, and none that was not asked for is run."""
    arms = {
        "ours-lora-2": (600, 1000), "ours-lora-2-again": (500, 800), "ours-full-8": (300, 4000), "loop-lora-autocast-2": (150, 3000),
        "loop-lora-float32-2": (70, 5000), "trl-lora-autocast-8": (200, 9000), "trl-full-autocast-8-again": (100, 5000),
    }  # fmt: skip
    for arm, (speed, memory) in arms.items():
        row = {"tokens_per_s": speed, "memory_bytes": memory * 2**20, "loss": 2.0}
        (tmp_path / f"{arm}.json").write_text(json.dumps(row))
    (tmp_path / "trl-lora-autocast-2.json").write_text(json.dumps({"failed": "not ready after 1200 s"}))
    main(["speed", "--out", str(tmp_path), "--hf", "nowhere", "--run", "nowhere", "--only", "nothing"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == {*arms, "trl-lora-autocast-2"}
    assert "3.0 x the speed of their fastest, 0.33 of the memory of their smallest" in lines["ours-lora-2"]
    assert "2.5 x" in lines["ours-lora-2-again"] and "memory" not in lines["ours-lora-2-again"].replace("MiB", "")
    assert "3.0 x" in lines["ours-full-8"] and "of the memory" not in lines["ours-full-8"]
    assert "failed: not ready after 1200 s" in lines["trl-lora-autocast-2"]


def test_every_kind_of_ours_has_a_peer():
    """TRL too, and both methods; so that no ratio is left out."""
    kinds = {(method, micro, again) for _, method, _, micro, again in PEERS}
    assert kinds == {(method, micro, again) for method, micro, again, _ in OURS}
    assert {(trainer, method) for trainer, method, *_ in PEERS} == {(t, m) for t in ("loop", "trl") for m in ("lora", "full")}
