"""Expert-specialised fine-tuning: the experts that conversations use most learn, everything else stays to the last bit."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.adapt.test_sft import OPTIONS, TRAIN, WISHES, killed_and_straight, losses, say, write
from tests.losses import loss_of
from tests.model.shapes import TINY
from tests.model.test_frozen import filled

from sparing import api
from sparing.adapt import esft
from sparing.base.config import Config, EsftConfig, StartConfig, UserError
from sparing.base.config_file import read_config
from sparing.base.config_limits import checked, chosen_experts
from sparing.base.files import file_sha256
from sparing.base.run import RunFolder, read_tensors
from sparing.kernels import native
from sparing.kernels.products import Chosen, Weight
from sparing.model.experts import update_biases
from sparing.train.optim import Optimizer
from sparing.train.replicas import sharing

MIXTURE = {
    "model": {
        "hidden_size": 64, "num_layers": 3, "num_heads": 2, "vocab_size": 512, "num_dense_layers": 1, "max_position_embeddings": 256,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 128, "mtp_depth": 1,
    },
    "train": TRAIN | {"seq_len": 64, "batch_size": 8, "evals": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("esft")
    (root / "text").mkdir()
    for i in range(40):
        lines = [f"The {word} number {j} of book {i} went to the sea. What is it?" for j, word in enumerate(["cat", "dog", "ship"] * 20)]
        (root / "text" / f"{i:02d}.txt").write_text("\n".join(lines))
    write(root / "chats.jsonl", map(say, range(300)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(root / "home"))
        api.train([str(root / "text")], "40ktok", str(root / "base"), MIXTURE, seed=3, samples=0)
        yield root


def tuned(workplace, out, wishes=None, budget="16ktok") -> dict:
    wishes = {"train": WISHES["train"], "optim": {"lr": 0.003}, "esft": wishes or {}}
    return api.sft(str(workplace / "base"), [str(workplace / "chats.jsonl")], budget, str(out), "esft", wishes=wishes, samples=1)


def tensors(run) -> dict[str, torch.Tensor]:
    return dict(read_tensors(RunFolder(run).weights_file))


@pytest.mark.parametrize("score", ["gate", "token"])
def test_chosen_experts_learn_and_nothing_else_changes(workplace, tmp_path, score, capsys):
    summary = tuned(workplace, tmp_path / "run", {"score": score})
    assert summary["after"]["new"]["loss"] < summary["before"]["new"]["loss"] - 0.05
    config = read_config(tmp_path / "run/config.toml")
    chosen = chosen_experts(config)
    assert list(chosen) == [1, 2], "of each layer that has experts, and not of the module that drafts"
    assert config.esft.share == {"gate": 0.1, "token": 0.2}[score]
    assert config.train.bias_update_rate == config.train.sequence_balance == config.train.mtp_weight == 0
    before, after = tensors(workplace / "base"), tensors(tmp_path / "run")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        learns = [] if ".experts." not in name or ".mlp." not in name else list(chosen.get(layer, ()))
        for number in range(len(tensor)) if learns else ():
            same = torch.equal(tensor[number].view(torch.int32), after[name][number].view(torch.int32))
            assert same != (number in learns), (name, number)
        assert learns or torch.equal(tensor.view(torch.int32), after[name].view(torch.int32)), name
    c = config.model
    count = sum(map(len, chosen.values()))
    assert summary["trainable_parameters"] == count * 3 * c.hidden_size * c.moe_intermediate_size
    assert summary["experts"] == chosen
    said = capsys.readouterr().err
    assert f"{count} of 16 experts learn" in said and f"esft.experts = {', '.join(config.esft.experts)}" in said
    card = (tmp_path / "run/MODEL_CARD.md").read_text()
    assert all(text in card for text in config.esft.experts)
    newest = max((tmp_path / "run/state").glob("step-*"))
    moments = [name for name, _ in read_tensors(newest / "optimizer.safetensors") if "exp_avg/" in name]
    assert len(moments) == 2 * count, "moments of what learns alone"


def test_other_options(workplace, tmp_path):
    """Experts that the user names; shared experts and all else learn too, but not routers, other experts and drafting modules."""
    tuned(workplace, tmp_path / "run", {"experts": ["2: 5"], "shared": True, "rest": True}, "4ktok")
    before, after = tensors(workplace / "base"), tensors(tmp_path / "run")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    drafts = {name for name in before if name.startswith("model.layers.3.")}
    stays = {name for name in before if ".mlp.gate." in name or "model.layers.1.mlp.experts" in name}
    assert changed == before.keys() - drafts - stays
    name = "model.layers.2.mlp.experts.down_proj"
    assert [number for number in range(8) if not torch.equal(before[name][number], after[name][number])] == [5]


@pytest.mark.slow  # the trainer's own; test_sft has a quick one
def test_killed_and_resumed_bit_for_bit(workplace, tmp_path):
    killed, straight = killed_and_straight(workplace, tmp_path, "esft", [*OPTIONS])
    assert losses(killed) == losses(straight) and len(losses(killed)) > 25
    assert file_sha256(RunFolder(killed).weights_file) == file_sha256(RunFolder(straight).weights_file)
    assert read_config(killed / "config.toml").esft == read_config(straight / "config.toml").esft


def test_refused_in_one_line(workplace, tmp_path):
    dense = {"model": MIXTURE["model"] | {"num_dense_layers": 3, "mtp_depth": 0}, "train": MIXTURE["train"]}
    api.train([str(workplace / "text")], "4ktok", str(tmp_path / "dense"), dense, seed=3, samples=0)
    chats = [str(workplace / "chats.jsonl")]

    def refused(base, wishes, method="esft") -> str:
        with pytest.raises(UserError) as error:
            api.sft(str(base), chats, "16ktok", str(tmp_path / "run"), method, wishes=wishes)
        assert "\n" not in str(error.value) and not (tmp_path / "run/config.toml").exists()
        return str(error.value)

    assert "this model has none; nearest: --method lora, or full" in refused(tmp_path / "dense", {})
    base = workplace / "base"
    assert "leave it out with esft" in refused(base, {"adapter": {}}) and "leave it out with full" in refused(base, {"esft": {}}, "full")
    assert "layer 0 has no experts; those with are 1 to 2" in refused(base, {"esft": {"experts": ["0: 1"]}})
    assert "different experts of 0 to 7" in refused(base, {"esft": {"experts": ["1: 8"]}})
    assert "such as" in refused(base, {"esft": {"experts": ["1"]}})
    assert "float32" in refused(base, {"esft": {}, "precision": {"weights": "bfloat16"}})
    with pytest.raises(UserError, match="sparing sft --method esft"):
        api.train([str(workplace / "text")], "20ktok", str(tmp_path / "run"), {"esft": {}})


def test_shares_are_the_papers():
    """By hand, from the routing of each layer's input."""
    model = filled(TINY)
    sample = [np.arange(3, 30), np.arange(40, 60)]
    seen: dict[int, list] = {1: [], 2: []}
    for number, rows in seen.items():
        gate = model.model.layers[number].mlp.gate
        gate.register_forward_hook(lambda _m, _i, routing, rows=rows: rows.append(routing))
    found = esft.shares(model, sample)
    assert model.training and list(found) == [1, 2]
    for number, routings in seen.items():
        gates, hits = np.zeros(8), np.zeros(8)
        for routing in routings:
            for weights, experts in zip(routing.weights_NK.tolist(), routing.experts_NK.tolist(), strict=True):
                for weight, expert in zip(weights, experts, strict=True):
                    gates[expert] += weight
                    hits[expert] += 1
        assert np.allclose(found[number].gate, gates / gates.sum()) and np.allclose(found[number].token, hits / hits.sum())
        assert hits.sum() == 2 * 47
    assert not any(router.tokens_per_expert.any() for router in (model.model.layers[n].mlp.gate for n in (1, 2))), "no tokens to balance"


def test_the_fewest_experts():
    assert esft.choose(np.array([0.1, 0.4, 0.2, 0.3]), 0.4) == (1,)
    assert esft.choose(np.array([0.1, 0.4, 0.2, 0.3]), 0.41) == (1, 3)
    assert esft.choose(np.array([0.25] * 4), 0.5) == (0, 1)
    assert esft.choose(np.array([0.1] * 10), 1.0) == tuple(range(10))


@pytest.mark.parametrize("path", ["plain", "compiled", "vectors", "tiles"])
@pytest.mark.usefixtures("one_thread")
def test_gradients_are_those_of_full_training(path):
    dtypes = [dtype for dtype in (torch.float32, torch.bfloat16) if native.can(path, dtype)]
    if not dtypes:
        pytest.skip("this machine cannot run these kernels")
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(64, (2, 30), generator=generator)
    targets = torch.randint(64, (2, 30, 1), generator=generator)
    chosen = {1: (0, 5), 2: (7,)}
    for dtype in dtypes:
        full, part = filled(TINY), filled(TINY)
        esft.learn_only(part, EsftConfig(), chosen)
        part.load_state_dict(full.state_dict())
        twin = sharing(part)
        with native.path(path):
            for model in (full, part, twin):
                model.compute_dtype = dtype
                loss_of(model, tokens, targets).total.backward()
        # Frozen linears are multiplied one by one on the plain path, learning ones in one product.
        tolerance = 0.0 if path != "plain" else 1e-5 if dtype == torch.float32 else 3e-2
        for model in (part, twin):
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            assert len(found) == 6
            for layer, numbers in chosen.items():
                whole, experts = full.model.layers[layer].mlp.experts, model.model.layers[layer].mlp.experts
                for number in numbers:
                    for name in whole.weights:
                        expected, gradient = getattr(whole, name).grad[number], getattr(experts.chosen[str(number)], name).grad[0]
                        assert (gradient - expected).norm() <= tolerance * expected.norm(), (layer, number, name)


@pytest.mark.parametrize("path", ["plain", "compiled", "vectors", "tiles"])
@pytest.mark.usefixtures("one_thread")
def test_an_expert_without_tokens_has_no_gradient(path):
    if not native.can(path, torch.bfloat16):
        pytest.skip("this machine cannot run these kernels")
    stack, x, grad = torch.randn(3, 32, 16), torch.randn(8, 16).bfloat16(), torch.randn(8, 32).bfloat16()
    chosen = Chosen(Weight(stack), {number: stack[number : number + 1] for number in (1, 2)})
    with native.path(path):
        none, all_of_it = chosen.grouped_tn(grad, x, torch.tensor([3, 3, 8]))
    assert none.shape == all_of_it.shape == (1, 32, 16) and not none.any()
    assert torch.allclose(all_of_it[0].float(), grad[3:].float().t() @ x[3:].float(), atol=0.1)


def test_muon_takes_gate_and_up_of_a_chosen_expert_apart():
    full, part = filled(TINY), filled(TINY)
    esft.learn_only(part, EsftConfig(), {1: (3,), 2: (1,)})
    optim = replace(Config().optim, matrix="muon", weight_decay=0.0)
    tokens, targets = torch.arange(30)[None], torch.arange(1, 31)[None, :, None]
    for model in (full, part):
        optimizer = Optimizer(model, optim, torch.float32)
        loss_of(model, tokens, targets).total.backward()
        optimizer.step(1.0, 0.9)
    for name in ("gate_up_proj", "down_proj"):
        one, other = (getattr(model.model.layers[1].mlp.experts, name) for model in (full, part))
        assert torch.allclose(one[3], other[3], atol=1e-6) and not torch.allclose(one[2], other[2], atol=1e-6)


def test_a_bias_that_is_not_moved_keeps_its_bits():
    model = filled(TINY)
    router = model.model.layers[1].mlp.gate
    router.e_score_correction_bias[0] = -0.0
    router.tokens_per_expert += torch.arange(8.0)
    assert update_biases(model, 0.0)[0] > 0
    assert torch.signbit(router.e_score_correction_bias[0]) and not router.tokens_per_expert.any()


def test_on_another_device_the_views_follow():
    model = filled(TINY)
    esft.learn_only(model, EsftConfig(), {1: (2,)})
    model._apply(torch.clone)
    experts = model.model.layers[1].mlp.experts
    experts.chosen["2"].down_proj.data.zero_()
    assert not experts.down_proj[2].any() and experts.down_proj[1].any()


def test_a_configuration_that_names_experts():
    config = Config(TINY, start=StartConfig("r", "0"), esft=EsftConfig(experts=("1: 3 0", "2: 7")))
    config = replace(config, train=replace(config.train, seq_len=32))
    assert checked(config) is config and chosen_experts(config) == {1: (0, 3), 2: (7,)}
    assert json.loads(json.dumps(chosen_experts(replace(config, esft=None)))) == {}
