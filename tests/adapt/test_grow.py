"""`grow`: a domain's experts beside a model that stays to the last bit, and what takes them apart and joins them again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.adapt.test_sft import TRAIN, losses

from sparing import api
from sparing.account.history import ancestors_of
from sparing.account.report.charts import wakes_map
from sparing.account.report.story import story
from sparing.adapt import grow, grown, slices
from sparing.base.config import ModelConfig, StartConfig, UserError
from sparing.base.config_file import read_config
from sparing.base.config_limits import chosen_experts
from sparing.base.files import file_sha256
from sparing.base.layers import mixtures
from sparing.base.run import RunFolder, StoredTensors, read_tensors, stream_tensors, write_folder, write_tensors
from sparing.cli.main import main
from sparing.infer.engine import Engine
from sparing.infer.generate import load, score_tokens

MODEL = {
    "hidden_size": 64, "num_layers": 3, "num_heads": 2, "vocab_size": 512, "max_position_embeddings": 256, "intermediate_size": 128,
}  # fmt: skip
MODELS = {
    "dense": MODEL | {"num_dense_layers": 3, "attention": "gqa", "num_kv_heads": 1, "head_dim": 32},
    "mixture": MODEL
    | {"num_dense_layers": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mtp_depth": 1},
}
BASE = {"train": TRAIN | {"seq_len": 64, "batch_size": 8, "evals": 0}}
WISHES = {"train": TRAIN | {"seq_len": 64, "batch_size": 8, "evals": 2}, "optim": {"lr": 0.01}, "growth": {"eps": 0.003}}
WORDS = ["cat", "dog", "ship", "bird", "wave"]


def old_text(number: int) -> str:
    return "\n".join(f"The {WORDS[(number + 7 * j) % 5]} number {j * number % 97} went to the sea. What is it?" for j in range(30))


def new_text(number: int, word: str) -> str:
    return "\n".join(f"{word}_{j} = {word.upper()}[{number}] + ({j} * {word}_{j - 1}); assert {word}" for j in range(20))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("grow")
    for name, make in (("old", old_text), ("code", lambda i: new_text(i, "x")), ("sums", lambda i: new_text(i, "total"))):
        (root / name).mkdir()
        for i in range(60):
            (root / name / f"{i:02d}.txt").write_text(make(i))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(root / "home"))
        for name, model in MODELS.items():
            api.train([str(root / "old"), str(root / "code")], "40ktok", str(root / name), BASE | {"model": model}, seed=3, samples=0)
        yield root


def growing(workplace, base, domain, out, worse: float = 0.01, **options) -> dict:
    """worse: how much the guard lets old text lose; ten times the default, because what so small a model loses depends on the processor."""
    options = {"keep": [str(workplace / "old")], "wishes": WISHES, "samples": 1} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grow, "WORSE", worse)
        return api.grow(str(base), domain, [str(workplace / domain)], "16ktok", str(out), **options)


@pytest.fixture(scope="module", params=MODELS)
def grown_run(workplace, request):
    """(summary, its base, the run)."""
    out = workplace / f"{request.param}-code"
    return growing(workplace, workplace / request.param, "code", out), RunFolder(workplace / request.param), RunFolder(out)


@pytest.fixture(scope="module")
def two(workplace, grown_run):
    """(base, packs of two domains that were grown beside it apart from each other)."""
    _, base, run = grown_run
    other = workplace / f"{base.path.name}-sums"
    growing(workplace, base.path, "sums", other)
    packs = []
    for folder, domain in ((run.path, "code"), (other, "sums")):
        packs.append(str(workplace / f"{base.path.name}-{domain}.pack"))
        made = api.pack(str(folder), domain, packs[-1])
        assert made["bytes"] < 0.3 * base.weights_file.stat().st_size
    return base, packs


def test_it_learns_the_domain_and_all_else_stays(grown_run):
    summary, base, run = grown_run
    before, after = summary["before"], summary["after"]
    assert after["new"]["loss"] < before["new"]["loss"] - 0.02 and after["old"]["loss"] <= 1.001 * before["old"]["loss"]
    config = read_config(run.config_file)
    old, new = StoredTensors(base.weights_file), StoredTensors(run.weights_file)
    for name, tensor in old.items():
        other = new[name.replace(".mlp.", ".mlp.shared_experts.") if config.growth.dense else name][: len(tensor)]
        assert torch.equal(tensor.view(torch.int32), other.view(torch.int32)), name
    digest = file_sha256(base.weights_file)
    assert summary["base"] == digest == config.growth.root_sha256 and config.growth.domains == ("code",)
    expert = 3 * config.model.hidden_size * config.model.moe_intermediate_size
    assert summary["trainable_parameters"] == len([layer for layer in mixtures(config.model) if not layer.mtp]) * expert
    moments = [name for name, _ in read_tensors(max((run.state).glob("step-*")) / "optimizer.safetensors") if "exp_avg/" in name]
    assert len(moments) == 2 * len(chosen_experts(config)), "moments of what learns alone"


def test_texts_that_wake_nothing_have_the_same_bits(grown_run):
    _, base, run = grown_run
    before, after = load(str(base)), load(str(run))
    config, same, woken = after.config, 0, []
    for layer in grow.mixtures_of(after.network).values():
        layer.gate.register_forward_hook(lambda _m, _i, routing: woken.append(routing.experts_NK == config.model.n_routed_experts - 1))
    for line in (base.path.parent / "old/07.txt").read_text().splitlines():
        tokens = torch.tensor([before.tokenizer.encode_prompt(line)])[:, :-1]  # no line ends without its end in what is old
        woken.clear()
        logits = after.network(tokens)
        if not any(chosen.any() for chosen in woken):
            same += 1
            difference = (logits - before.network(tokens)).abs().max()
            assert difference == 0 if config.growth.dense else difference < 1e-4
    assert same > 20


def test_before_the_first_step_a_dense_model_computes_the_same_bits(workplace):
    base = load(str(workplace / "dense"))
    config = read_config(workplace / "dense/config.toml")
    root = grown.Grown.open(workplace / "dense")
    model = grown.grown_model(config.model, 1)
    growth = replace(root.growth, domains=("x",), domain="x")
    start = StartConfig(str(workplace / "dense"), file_sha256(workplace / "dense/weights/model.safetensors"))
    network = grow.Beside().model(replace(config, model=model, growth=growth, start=start))
    tokens = torch.arange(3, 60)[None]
    for number in (0, 1):  # asleep, and awake in every token
        for layer in grow.mixtures_of(network).values():
            layer.gate.e_score_correction_bias[1] = (grown.ASLEEP, 10.0)[number]
        assert torch.equal(network(tokens), base.network(tokens))


def test_retired_the_old_model_is_back_byte_for_byte(grown_run, tmp_path):
    _, base, run = grown_run
    made = api.retire(str(run), "code", str(tmp_path / "old"))
    assert (tmp_path / "old/weights/model.safetensors").read_bytes() == base.weights_file.read_bytes()
    assert made["weights_sha256"] == file_sha256(base.weights_file) and made["domains"] == []
    back, first = read_config(tmp_path / "old/config.toml"), read_config(base.config_file)
    assert back.growth is None and mixtures(back.model) == mixtures(first.model)
    assert (tmp_path / "old/tokenizer.json").read_bytes() == base.tokenizer_file.read_bytes()


def test_packs_are_joined_in_any_order_and_taken_apart(two, grown_run, tmp_path):
    base, packs = two
    run = grown_run[2]
    joined = [api.merge(str(base), str(tmp_path / str(n)), packs=order)["weights_sha256"] for n, order in enumerate((packs, packs[::-1]))]
    joined.append(api.merge(str(run), str(tmp_path / "2"), packs=packs[1:])["weights_sha256"])
    assert len(set(joined)) == 1
    both = tmp_path / "0"
    grew = {row.relation: row for row in ancestors_of(RunFolder(both))}
    assert grew.keys() >= {"merged", "grew code", "grew sums"} and all(row.flops > 0 for row in grew.values()), "what the domains cost"
    assert read_config(both / "config.toml").growth.domains == ("code", "sums")
    assert set(json.loads((both / "state/wakes.json").read_text())) == {"code", "sums"}
    alone = api.slice(str(both), "code", str(tmp_path / "code"))
    assert alone["weights_sha256"] == file_sha256(run.weights_file), "of two domains one is what it was before"
    assert (tmp_path / "code/weights/model.safetensors").stat().st_size < 1.3 * base.weights_file.stat().st_size
    api.retire(str(both), "code", str(tmp_path / "sums"))
    again = api.pack(str(tmp_path / "sums"), "sums", str(tmp_path / "pack"))
    assert again["base"] == file_sha256(base.weights_file)
    assert (tmp_path / "pack" / grown.PACK).read_bytes() == open(f"{packs[1]}/{grown.PACK}", "rb").read()


def test_a_slice_by_text_has_what_the_text_wakes(two, workplace, tmp_path):
    base, packs = two
    both = api.merge(str(base), str(tmp_path / "both"), packs=packs)
    text, joined = [str(workplace / "code")], read_config(tmp_path / "both/config.toml").model

    def made(name: str, **options) -> tuple[dict, dict]:
        summary = api.slice(str(tmp_path / "both"), "code", str(tmp_path / name), **options)
        model = read_config(tmp_path / name / "config.toml").model
        assert summary.get("experts") == model.n_routed_experts
        return summary, dict(StoredTensors(tmp_path / name / "weights/model.safetensors").items())

    whole, _ = made("whole", least=0.0, data=text)
    assert whole["experts"] == joined.n_routed_experts and whole["documents"]["in"] == whole["documents"]["out"] > 0
    if not joined.mtp_depth:
        assert whole["weights_sha256"] == both["weights_sha256"]
    _, alone = made("alone")
    least, fewest = made("fewest", least=1.0, data=text)
    if read_config(tmp_path / "both/config.toml").growth.dense:
        assert least["experts"] == 2 and all(torch.equal(tensor, alone[name]) for name, tensor in fewest.items())
    else:
        assert least["experts"] == 3, "two of the mixture's own, which a token uses, and the domain's"
    (tmp_path / "empty.txt").write_text("")
    for data, message in (([str(tmp_path / "empty.txt")], "no usable text"), ([str(tmp_path / "none.txt")], "none.txt")):
        with pytest.raises(UserError, match=message):
            api.slice(str(tmp_path / "both"), "code", str(tmp_path / "refused"), data=data)
        assert not (tmp_path / "refused").exists()


def test_each_layer_keeps_as_many_and_those_that_wake_most():
    shares = {1: [0.0, 0.9, 0.002, 0.0005], 2: [0.0, 0.8, 0.0001, 0.0004]}
    assert slices.used(shares, {0, 1}, 1e-3, 0) == {1: [0, 1, 2], 2: [0, 1, 3]}
    assert slices.used(shares, {0, 1}, 0.01, 0) == {1: [0, 1], 2: [0, 1]}
    assert slices.used(shares, {0, 1}, 0.01, 1) == {1: [0, 1, 2], 2: [0, 1, 3]}
    assert slices.used(shares, {0, 1}, 0.0, 0) == {layer: [0, 1, 2, 3] for layer in shares}


def test_a_slice_leaves_out_what_its_domain_does_not_wake(grown_run, tmp_path):
    _, _, run = grown_run

    def refused(least: float, folder=run.path) -> str:
        with pytest.raises(UserError) as error:
            api.slice(str(folder), "code", str(tmp_path / "out"), least=least)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    if read_config(run.config_file).growth.dense:
        assert "--data" in refused(0.1)
        return
    wakes = json.loads((run.state / "wakes.json").read_text())["code"]
    shares = {int(layer): [by_expert[str(number)] for number in range(8)] for layer, by_expert in wakes.items()}
    least = max(sorted(by_expert)[3] for by_expert in shares.values()) + 1e-6  # so that four or more go in each layer
    count = max(2, *(sum(share >= least for share in by_expert) for by_expert in shares.values()))
    made = api.slice(str(run), "code", str(tmp_path / "few"), least=least)
    config = read_config(tmp_path / "few/config.toml")
    assert made["experts"] == config.model.n_routed_experts == count + 1 <= 5 and (config.growth, config.model.mtp_depth) == (None, 0)
    kept = {layer: [*sorted(sorted(range(8), key=lambda n, by=by: (-by[n], n))[:count]), 8] for layer, by in shares.items()}
    whole = StoredTensors(run.weights_file)
    for name, tensor in StoredTensors(tmp_path / "few/weights/model.safetensors").items():
        layer, _, part = name.removeprefix("model.layers.").partition(".mlp.")
        assert torch.equal(tensor, whole[name][kept[int(layer)]] if part in grown.PARTS else whole[name]), name
    tokens = torch.tensor([[3, *range(40, 90)]])
    before, after, chosen = load(str(run)).network, load(str(tmp_path / "few")).network, []
    for layer, mixture in grow.mixtures_of(before).items():
        stays = torch.isin(torch.arange(9), torch.tensor(kept[layer]))
        mixture.gate.e_score_correction_bias[~stays] = grown.ASLEEP  # the whole model, held to what stays
        mixture.gate.register_forward_hook(lambda _m, _i, routing, stays=stays: chosen.append(stays[routing.experts_NK].all()))
    assert (before(tokens) - after(tokens)).abs().max() < 1e-4 and all(chosen)
    assert api.slice(str(run), "code", str(tmp_path / "all"), least=0.0)["experts"] == 9
    assert file_sha256(tmp_path / "all/weights/model.safetensors") == file_sha256(run.weights_file)
    assert "from 0 to 1" in refused(1.5)
    shutil.copytree(run.path, tmp_path / "silent")
    (tmp_path / "silent/state/wakes.json").unlink()
    assert "does not say" in refused(0.1, tmp_path / "silent")


def test_a_grown_run_grows_again(grown_run, workplace, tmp_path):
    _, base, run = grown_run
    summary = growing(workplace, run, "sums", tmp_path / "both")
    config = read_config(tmp_path / "both/config.toml")
    assert config.growth.domains == ("code", "sums") and config.growth.root_sha256 == file_sha256(base.weights_file)
    assert summary["base"] == file_sha256(run.weights_file) and summary["after"]["new"]["loss"] < summary["before"]["new"]["loss"]
    wakes = json.loads((tmp_path / "both/state/wakes.json").read_text())
    assert set(wakes) == {"code", grown.OLD, "sums"}
    back = api.rollback(str(tmp_path / "both"), str(tmp_path / "back"))
    assert back["weights_sha256"] == summary["base"]
    assert (tmp_path / "back/state/wakes.json").read_bytes() == (run.state / "wakes.json").read_bytes()
    api.retire(str(tmp_path / "both"), "sums", str(tmp_path / "one"))
    assert file_sha256(tmp_path / "one/weights/model.safetensors") == file_sha256(run.weights_file)


def test_exported_imported_and_served(grown_run, tmp_path):
    transformers = pytest.importorskip("transformers")
    _, _, run = grown_run
    model = load(str(run))
    text = (run.path.parent / "code/03.txt").read_text()[:200]
    tokens = torch.tensor([model.tokenizer.encode_prompt(text)])
    expected = model.network(tokens)
    api.export(str(run), "hf", str(tmp_path / "hf"))
    kind = json.loads((tmp_path / "hf/config.json").read_text())["model_type"]
    assert kind == ("glm4_moe" if model.config.growth.dense else "deepseek_v3")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    with torch.no_grad():
        assert (theirs(tokens).logits - expected).abs().max() < 1e-4 * expected.abs().max()
    api.import_(str(tmp_path / "hf"), str(tmp_path / "back"))
    assert file_sha256(tmp_path / "back/weights/model.safetensors") == file_sha256(run.weights_file)
    with Engine(str(run), weights="float32", speculate=False) as engine:
        (scored,) = score_tokens(engine, [tokens[0].tolist()])
    chosen = expected[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    assert torch.allclose(torch.tensor([logprob for logprob, _ in scored]), chosen, atol=2e-3), "in the compiled step"


def test_the_report_shows_what_wakes_what(grown_run):
    pytest.importorskip("plotly")
    _, _, run = grown_run
    told = story(run)
    chart = wakes_map(told, named=False)
    assert set(told.wakes) == {grown.OLD, "code"} and "code wakes code with" in chart.says
    by_layer = told.wakes["code"]
    assert list(by_layer) == [str(layer) for layer in chosen_experts(read_config(run.config_file))]
    assert sum(shares["code"] for shares in by_layer.values()) > 10 * sum(shares["code"] for shares in told.wakes[grown.OLD].values())
    assert api.report(str(run))["bytes"] > 1000 and "What each domain wakes" in run.report_file.read_text()


@pytest.mark.parametrize("base", ["dense"])
def test_killed_and_resumed_bit_for_bit(workplace, tmp_path, base):
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    options = (
        "--budget 16ktok --samples 0 --train.seq-len 64 --train.batch-size 8 --train.micro-batch-size 8 --train.threads 1"
        " --train.replicas 1 --train.compile false --train.kernels plain --train.dtype float32 --train.evals 3"
        " --train.checkpoint-interval-s 0.1 --optim.lr 0.01 --growth.eps 0.003"
    ).split()
    command = [sys.executable, "-m", "sparing", "grow", workplace / base, "--domain", "code", "--data", workplace / "code", *options]
    command = [*map(str, command), "--keep", str(workplace / "old"), "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(killed)], env=environment, stdout=-1, stderr=-1, text=True)
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        if (killed / "metrics.jsonl").exists() and any(line.get("step", 0) >= 8 for line in losses(killed)):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    api.resume(str(killed), samples=0)
    wishes = {"train": WISHES["train"] | {"evals": 3, "checkpoint_interval_s": 0.1}, "optim": WISHES["optim"], "growth": WISHES["growth"]}
    growing(workplace, workplace / base, "code", straight, wishes=wishes, samples=0)
    assert losses(killed) == losses(straight) and len(losses(killed)) > 15
    assert file_sha256(killed / "weights/model.safetensors") == file_sha256(straight / "weights/model.safetensors")


def test_what_is_no_domain_of_its_own_is_turned_down_and_leaves_nothing(workplace, tmp_path, capsys):
    """Text that the model was made of: no router can tell it from old text."""
    out = tmp_path / "run"
    texts = ["--data", workplace / "old", "--keep", workplace / "old"]
    options = ["--budget", "16ktok", "--train.seq-len", "64", "--train.batch-size", "8", "--json"]
    call = ["grow", workplace / "dense", "--domain", "old", *texts, "--out", out, *options]
    assert main(list(map(str, call))) == 3
    said = capsys.readouterr()
    assert "old cannot be told from old text" in said.err.splitlines()[-1] and not out.exists()
    told = json.loads(said.out)
    counts = told["documents"]
    assert not told["grown"] and counts["in"] == counts["out"] + counts["rejected"] + counts["quarantined"] > 0


def test_old_text_gets_worse_so_the_routing_becomes_stricter(workplace, tmp_path, capsys):
    """No rise is allowed: neither one below the limit, nor one that is no number."""
    with pytest.raises(grow.TurnedDown, match="however strict"):
        growing(workplace, workplace / "dense", "code", tmp_path / "run", worse=float("nan"))
    said = capsys.readouterr().err
    assert all(f"stricter, {step} of 4" in said for step in (1, 2, 3, 4)) and not (tmp_path / "run").exists()


def test_without_named_text_the_old_is_what_the_model_writes(workplace, tmp_path):
    wishes = WISHES | {"growth": {"eps": 0.01, "tokens": 600}}
    summary = growing(workplace, workplace / "dense", "code", tmp_path / "run", keep=[], wishes=wishes)
    assert summary["before"]["old"]["loss"] > 0 and (tmp_path / "run/state/old.jsonl").exists()


def test_told_apart_another_domains_expert_stays_asleep(two, workplace, tmp_path):
    """Two routers that were fitted against old text alone both claim a token of either domain."""
    base, packs = two

    def strays(paths: list[str], name: str) -> float:
        """Share of the tokens of both domains, over layers, that wake the other one's expert where the two are joined."""
        api.merge(str(base), str(tmp_path / name), packs=paths)
        model, woken = load(str(tmp_path / name)), []
        first = model.config.model.n_routed_experts - 2
        for layer in grow.mixtures_of(model.network).values():
            layer.gate.register_forward_hook(lambda _m, _i, routing: woken.append(routing.experts_NK))
        counts = []
        for number, domain in enumerate(("code", "sums")):
            woken.clear()
            text = (workplace / domain / "07.txt").read_text()[:400]
            model.network(torch.tensor([model.tokenizer.encode_prompt(text)]))
            counts.append(sum(float((experts == first + 1 - number).any(-1).float().mean()) for experts in woken) / len(woken))
        return sum(counts) / 2

    apart = []
    for domain, other in (("code", "sums"), ("sums", "code")):
        run = tmp_path / domain
        growing(workplace, base.path, domain, run, apart=[str(workplace / other)])
        assert read_config(run / "config.toml").growth.apart == (str(workplace / other),)
        uses = [json.loads(line)["for"] for line in (run / "state/old.jsonl").read_text().splitlines()]
        assert set(uses) == {*grow.USES, grow.APART}
        apart.append(str(tmp_path / f"{domain}.pack"))
        api.pack(str(run), domain, apart[-1])
    before, after = strays(packs, "before"), strays(apart, "after")
    assert before > 0.1 and after < 0.75 * before


def test_refused_in_one_line(workplace, grown_run, tmp_path):
    _, base, run = grown_run

    def refused(call, *arguments, **options) -> str:
        with pytest.raises(UserError) as error:
            call(*map(str, arguments), **options)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
        return str(error.value)

    out = tmp_path / "out"
    code = {"data": [str(workplace / "code")], "budget": "16ktok", "out": str(out)}
    assert "has it already" in refused(api.grow, run, "code", **code)
    assert "a name has letters" in refused(api.grow, base, "a b", **code)
    assert "needs --data" in refused(api.grow, base, "x", **code | {"data": []})
    assert "stay as they are" in refused(api.grow, base, "x", **code, wishes={"train": {"bias_update_rate": 0.1}})
    assert "not to be chosen" in refused(api.grow, base, "x", **code, wishes={"growth": {"root_sha256": "0"}})
    assert "grow has no use for this section" in refused(api.grow, base, "x", **code, wishes={"adapter": {}})
    assert "no such" in refused(api.grow, base, "x", **code, keep=[str(tmp_path / "none.txt")])
    assert "no such" in refused(api.grow, base, "x", **code, apart=[str(workplace / "old"), str(tmp_path / "none.txt")])
    (tmp_path / "blank.txt").write_text(" \n")
    for name in ("keep", "apart"):
        assert f"--{name} {tmp_path / 'blank.txt'}: there is no text" in refused(
            api.grow, base, "x", **code, **{name: [str(tmp_path / "blank.txt")]}
        )
    assert "nearest: code" in refused(api.retire, run, "coda", out)
    assert "has no domains" in refused(api.slice, base, "code", out)
    assert "has no domains" in refused(api.pack, base, "code", out)
    assert "is no pack" in refused(api.merge, base, out, packs=[str(tmp_path)])
    assert "no pack of a domain is named" in refused(api.merge, base, out)
    assert "for `sparing grow`" in refused(
        lambda folder: api.train([str(workplace / "old")], "8ktok", folder, BASE | {"growth": {"eps": 0.1}}), out
    )


@pytest.mark.parametrize("base", MODELS)
def test_a_root_stored_in_bfloat16_is_given_back(workplace, tmp_path, base):
    """And one whose file could not be made again is refused."""
    config, tensors = read_config(workplace / base / "config.toml"), StoredTensors(RunFolder(workplace / base).weights_file)
    run = RunFolder.create(tmp_path / "half")
    kinds = grown.layout(config.model, "bfloat16")
    stream_tensors(run.weights_file, kinds, ((name, tensors[name].to(kind)) for name, (kind, _) in kinds.items()))
    shutil.copy(workplace / base / "config.toml", run.config_file)
    one, packs = grown.Grown.open(run.path), []
    assert one.growth.stored == "bfloat16" and one.growth.dense == (base == "dense")
    for domain in ("b", "a"):
        own = {name: torch.randn(shape) for name, shape in grown.own_names(grown.grown_model(config.model, 1)).items()}
        packs.append(str(tmp_path / domain))
        write_folder(
            tmp_path / domain,
            {grown.PACK: own, grown.ABOUT: json.dumps({"format": 1, "domain": domain, "base": file_sha256(run.weights_file)})},
        )
        if domain == "b":
            kept = own
    api.merge(str(run), str(tmp_path / "both"), packs=packs)
    both = grown.Grown.open(tmp_path / "both")
    assert [pack.domain for pack in both.packs] == ["a", "b"]
    assert all(torch.equal(both.packs[1].tensors[name], tensor) for name, tensor in kept.items())
    api.retire(str(tmp_path / "both"), "a", str(tmp_path / "one"))
    api.retire(str(tmp_path / "one"), "b", str(tmp_path / "none"))
    assert (tmp_path / "none/weights/model.safetensors").read_bytes() == run.weights_file.read_bytes()
    backwards = RunFolder.create(tmp_path / "backwards")
    write_tensors(backwards.weights_file, {name: tensors[name] for name in reversed(list(tensors))})
    shutil.copy(workplace / base / "config.toml", backwards.config_file)
    with pytest.raises(UserError, match="in another form than float32 or bfloat16"):
        grown.Grown.open(backwards.path)


def test_a_root_that_cannot_grow():
    softmax = ModelConfig(scoring_func="softmax")
    for model in (softmax, ModelConfig(selection_bias=False), ModelConfig(n_group=2)):
        with pytest.raises(UserError, match="do not depend on each other"):
            grown.grown_model(model, 1)
    with pytest.raises(UserError, match="must divide"):
        grown.grown_model(ModelConfig(num_dense_layers=6, intermediate_size=100), 1, 30)
    narrow = grown.grown_model(ModelConfig(num_dense_layers=6, intermediate_size=1536), 2)
    assert (narrow.moe_intermediate_size, narrow.n_shared_experts, narrow.n_routed_experts) == (384, 4, 3)


def test_a_pack_of_another_base_and_damaged_ones(two, workplace, tmp_path):
    base, packs = two
    other = workplace / ("mixture" if base.path.name == "dense" else "dense")
    with pytest.raises(UserError, match="was grown beside other weights"):
        api.merge(str(other), str(tmp_path / "out"), packs=packs[:1])
    with pytest.raises(UserError, match="there already"):
        api.merge(str(base), str(tmp_path / "out"), packs=[packs[0], packs[0]])
    for there in (packs[0], base.path):
        with pytest.raises(UserError, match="is not empty"):
            api.pack(str(workplace / f"{base.path.name}-code"), "code", str(there))
    shutil.copytree(packs[0], tmp_path / "cut")
    with open(tmp_path / "cut" / grown.PACK, "r+b") as file:
        file.truncate(5000)
    with pytest.raises(UserError, match="is no usable pack"):
        api.merge(str(base), str(tmp_path / "out"), packs=[str(tmp_path / "cut")])
    tensors = dict(StoredTensors(f"{packs[0]}/{grown.PACK}"))
    about = json.loads(open(f"{packs[0]}/{grown.ABOUT}").read())
    name = next(iter(tensors))
    for field, wrong in (
        ("flops", "1"),
        ("flops", 1e999),
        ("tokens", 1 << 63),
        ("tokens", 0.5),
        ("name", "\x1b[2J"),
        ("usd", -1),
        ("more", 1),
    ):
        strange = about | {"ancestors": [about["ancestors"][0] | {field: wrong}]}
        write_folder(tmp_path / "bad", {grown.PACK: tensors, grown.ABOUT: json.dumps(strange)})
        with pytest.raises(UserError, match="is no usable pack"):
            api.merge(str(base), str(tmp_path / "out"), packs=[str(tmp_path / "bad")])
    for damage in (tensors | {name: tensors[name] * torch.nan}, {name: tensors[name]}, tensors | {"more": tensors[name]}):
        write_folder(tmp_path / "bad", {grown.PACK: damage, grown.ABOUT: json.dumps(about)})
        with pytest.raises(UserError, match="is no usable pack"):
            api.merge(str(base), str(tmp_path / "out"), packs=[str(tmp_path / "bad")])
    assert not (tmp_path / "out").exists()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    about=json_values
    | st.fixed_dictionaries({"format": st.just(1)}, optional=dict.fromkeys(("domain", "base", "wakes", "ancestors"), json_values))
)
def test_whatever_a_pack_says_of_itself(about, workplace):
    one = grown.Grown.open(workplace / "dense")
    folder = workplace / "strange.pack"
    write_folder(folder, {grown.PACK: {"x": torch.zeros(1)}, grown.ABOUT: json.dumps(about)})
    with pytest.raises(UserError) as error:
        grown.read_pack(folder, one)
    assert "\n" not in str(error.value)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60),
    st.lists(st.floats(-1, 1, width=32), max_size=5),
    st.floats(0, 0.5),
)
def test_no_more_than_the_share_exceeds_a_threshold(old, first, eps):
    limit = grow.threshold(torch.tensor(old), torch.tensor(first), eps)
    assert sum(margin > limit for margin in old) <= eps * len(old) and not any(margin > limit for margin in first)


def test_rows_tell_two_kinds_of_states_apart():
    generator = torch.Generator().manual_seed(1)
    centre = torch.randn(2, 16, generator=generator)
    new, old = (centre[kind] + 0.3 * torch.randn(400, 16, generator=generator) for kind in (0, 1))
    both = torch.cat([new, old]).double()
    rows = grow.rows_of(both.T @ both / len(both), new.double().mean(0), old.double().mean(0)).float()
    for row in rows:
        assert (new @ row).min() > (old @ row).max()
        assert max((new @ row).mean(), -(old @ row).mean()) == pytest.approx(grow.STEEP, rel=1e-3)


def test_text_parts_are_whole():
    texts = ["one two three four five " * 40, "short", ""]
    parts = grow._parts(texts, 100)
    assert "".join(parts).replace(" ", "") == "".join(texts).replace(" ", "") and len(parts) >= 8
    assert all(len(part) < 140 for part in parts)
