"""`dpo`: a run learns to prefer; its loss is TRL's; killed and resumed it is the same bit for bit."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.adapt.test_sft import TRAIN, WISHES, kill_at, losses, say, workplace, write  # noqa: F401

from sparing import api
from sparing.adapt.dpo import PairCutting, Pairs
from sparing.base.config import UserError
from sparing.base.files import file_sha256
from sparing.base.run import RunFolder
from sparing.cli.main import main
from sparing.data.answers import Pieces, Sequenced
from sparing.data.chat import ChatTemplate, taught
from sparing.data.chats import chat_of
from sparing.data.loader import IGNORED
from sparing.data.sources import Row
from sparing.data.tokenizer import Tokenizer, train_tokenizer


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
    summary = api.dpo(str(workplace / "base"), [pairs], "20ktok", str(out), method, wishes=wishes, samples=1)
    before, after = summary["before"]["new"], summary["after"]["new"]
    assert before["loss"] == pytest.approx(0.6931, abs=1e-3) and before["margin"] == pytest.approx(0, abs=1e-3)
    assert after["loss"] < 0.6 and after["accuracy"] > 0.9 and after["margin"] > 0.5


def test_what_is_no_pair(workplace, tmp_path):  # noqa: F811
    """Plain conversations, pairs that are alike, and texts without a prompt are refused in one line, and leave nothing."""
    alike = {"prompt": "Is it?", "chosen": "It is.", "rejected": "It is."}
    for rows, said in (
        ([say(n) for n in range(9)], "there is no worse answer"),
        ([alike], "the chosen and the rejected answer are the same"),
        ([{"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}], "texts without a prompt"),
        ([{"prompt": "a", "chosen": [1], "rejected": ["b"]}], "a message is no object"),
    ):
        with pytest.raises(UserError, match=said) as error:
            api.dpo(str(workplace / "base"), [write(tmp_path / "p.jsonl", rows)], "20ktok", str(tmp_path / "run"), wishes=WISHES)
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="dpo: sft has no use for this section"):
        api.sft(str(workplace / "base"), [str(workplace / "chats.jsonl")], "1ktok", str(tmp_path / "run"), wishes={"dpo": {}})


def test_forms_and_what_is_common():
    """TRL's forms: texts, explicit and implicit prompts; what both answers share is not learnt."""
    made = [chat_of(Row(prefer(n), "p.jsonl", n)) for n in (1, 2, 4)]
    assert [chat.common for chat in made] == [1, 1, 1] and all(chat.kind == "preference" for chat in made)
    assert made[0].messages[1]["content"] == "It is number 1 of the ship." and made[0].rejected[1]["content"] == "The cat number 1 went."
    whole = {"prompt": "Hi", "chosen": prefer(4)["chosen"], "rejected": prefer(4)["rejected"]}
    assert chat_of(Row(whole, "p.jsonl", 1)).messages == made[2].messages, "a prompt beside whole conversations"
    longer = {name: [*say(7)["messages"], {"role": "user", "content": "And?"}, {"role": "assistant", "content": name}] for name in "ab"}
    chat = chat_of(Row({"chosen": longer["a"], "rejected": longer["b"]}, "p.jsonl", 1))
    assert chat.common == 3 and chat.raw != chat._replace(rejected=chat.messages).raw
    tokenizer = Tokenizer(train_tokenizer(["It is number 7 of the ship. What is it? And? " * 9], 300).to_json())
    better, worse = PairCutting(ChatTemplate(taught(tokenizer)), tokenizer, 256)(chat)
    assert tokenizer.decode([n for n, mark in zip(better.ids, better.trained, strict=True) if mark]).strip().startswith("a")
    assert sum(better.trained) == sum(worse.trained) and better.ids[: better.trained.index(True)] == worse.ids[: worse.trained.index(True)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 20), st.integers(2, 20)), min_size=1, max_size=12), st.integers(1, 4), st.integers(0, 5))
def test_rows_hold_whole_pairs(lengths, batch, seed):
    """Each pair once an epoch, its two answers side by side with what the start says of them."""
    sizes = [(3 * n + side, size) for n, pair in enumerate(lengths) for side, size in enumerate(pair)]
    sides = [Sequenced([word] * size, [False] * (size - 1) + [True]) for word, size in sizes]
    reference = np.arange(2.0 * len(lengths)).reshape(-1, 2)
    feed = Pairs(Pieces.of(sides), reference, 40, batch, seed, 0)
    seen, step = Counter(), 0
    while feed.epoch(step) < 1:
        rows = feed.batch(step)
        assert rows.divisor.tolist() == rows.pairs.sum(1).tolist()
        for row in range(len(rows)):
            for pair in rows.pairs[row].nonzero().flatten().tolist():
                inside = [rows.documents[row] == 2 * pair + side for side in range(2)]
                number = int(rows.tokens[row][inside[0]][0]) // 3
                for side in range(2):
                    assert int(inside[side].sum()) == lengths[number][side] - 1
                    assert (rows.targets[row, inside[side], 0] != IGNORED).sum() == 1
                    assert rows.reference[row, 2 * pair + side] == reference[number, side]
                seen[number] += 1
        step += 1
    assert set(seen) == set(range(len(lengths)))


OPTIONS = (
    "--budget 10ktok --samples 0 --train.seq-len 128 --train.batch-size 4 --train.micro-batch-size 4 --train.threads 1 --train.replicas 1"
    " --train.compile false --train.kernels plain --train.dtype float32 --train.evals 2 --train.checkpoint-interval-s 0.2 --optim.lr 0.003"
).split()


@pytest.mark.slow  # the trainer's own; test_sft has a quick one
def test_killed_and_resumed_bit_for_bit(workplace, pairs, tmp_path):  # noqa: F811
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    kill_at(["dpo", workplace / "base", "--data", pairs, "--out", killed, *OPTIONS], killed, 8)
    api.resume(str(killed), samples=0)
    wishes = {"train": TRAIN | {"micro_batch_size": 4, "batch_size": 4, "seq_len": 128, "evals": 2, "checkpoint_interval_s": 0.2}}
    api.dpo(str(workplace / "base"), [pairs], "10ktok", str(straight), wishes=wishes | {"optim": {"lr": 0.003}}, samples=0)
    assert losses(killed) == losses(straight) and len(losses(killed)) > 15
    assert file_sha256(RunFolder(killed).learned_file) == file_sha256(RunFolder(straight).learned_file)
    assert json.loads((killed / "state/summary.json").read_text())["after"]["new"]["accuracy"] > 0.5


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("dpo r --budget 5m --out o", "dpo needs --data"),
        ("dpo r --data d --budget 5m --out o --method esft", "--method esft: not available; choose lora or full"),
        ("dpo r --data d --budget 5m --out o --dpo.loss hinge", "'hinge' is not one of sigmoid, ipo"),
        ("dpo r --data d --budget 5m --out o --dpo.label-smoothing 0.7", "must be at most 0.5"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, line, says):
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err
