"""`dpo`: a run learns to prefer; its loss is TRL's; killed and resumed it is the same bit for bit."""

import json

import pytest
from tests.adapt.test_sft import TRAIN, WISHES, losses, say, workplace, write  # noqa: F401

from sparing import api


def prefer(number: int) -> dict:
    prompt = say(number)["messages"][:1]
    good, bad = "It is number {} of the ship.", "The cat number {} went."
    if number % 2:
        return {"prompt": prompt[0]["content"], "chosen": good.format(number), "rejected": bad.format(number)}
    sides = {name: [{"role": "assistant", "content": text.format(number)}] for name, text in (("chosen", good), ("rejected", bad))}
    return {"prompt": prompt} | sides if number % 4 else {name: prompt + side for name, side in sides.items()}


@pytest.fixture(scope="module")
def pairs(workplace):  # noqa: F811
    return write(workplace / "pairs.jsonl", map(prefer, range(200)))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_it_learns_to_prefer(workplace, pairs, method):  # noqa: F811
    lr = 0.003 if method == "lora" else 0.0005
    wishes = {"train": WISHES["train"] | {"seq_len": 128, "batch_size": 4}, "optim": {"lr": lr}}
    out = workplace / f"dpo-{method}"
    summary = api.dpo(str(workplace / "base"), [pairs], "40ktok", str(out), method, wishes=wishes, samples=1)
    before, after = summary["before"]["new"], summary["after"]["new"]
    assert before["loss"] == pytest.approx(0.6931, abs=1e-3) and before["margin"] == pytest.approx(0, abs=1e-3)
    assert after["loss"] < 0.5 and after["accuracy"] > 0.9 and after["margin"] > 1
