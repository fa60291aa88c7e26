"""Several adapters beside one run in one engine: each text gets its own, whatever else is in the step."""

from pathlib import Path

import pytest
import torch

from sparing import api
from sparing.base.config import AdapterConfig, Config, StartConfig, UserError
from sparing.base.config_file import read_config, write_config
from sparing.base.files import link_or_copy
from sparing.base.run import RunFolder, weights_sha256, write_tensors
from sparing.infer.engine import Engine
from sparing.infer.request import Sampling
from sparing.kernels.decode import library
from sparing.model.low_rank import add_low_rank, learned
from sparing.model.transformer import Transformer

compiled = pytest.mark.skipif(library() is None, reason="adapters are the compiled step's, which needs a C compiler")
DENSE = {"attention": "gqa", "num_dense_layers": 3, "mtp_depth": 0}


def adapter_of(base: Path, path: Path, seed: int, rank: int = 3) -> Path:
    """An adapter run of `base` with random factors."""
    config, run, adapter = read_config(base / "config.toml").model, RunFolder.create(path), AdapterConfig(rank, 6.0, "float32")
    model, generator = Transformer(config), torch.Generator().manual_seed(seed)
    add_low_rank(model, adapter, 0)
    factors = {name: torch.randn(t.shape, generator=generator) * (0.5 if "lora_B" in name else 0.2) for name, t in learned(model).items()}
    run.adapter_file.parent.mkdir()
    write_tensors(run.adapter_file, factors)
    start = StartConfig(str(base), weights_sha256(RunFolder(base)))
    link_or_copy(base / "tokenizer.json", run.tokenizer_file)
    run.config_file.write_text(write_config(Config(model=config, start=start, adapter=adapter)))
    return path


def answers(engine: Engine, wanted: list[tuple[str | None, list[int]]]) -> list[list[tuple[int, float]]]:
    """(token, log-probability) of each greedy answer, all asked for at once."""
    requests = [engine.submit(prompt, Sampling(8, temperature=0, logprobs=0, ignore_eos=True, adapter=name)) for name, prompt in wanted]
    return [[(t, row.logprob) for piece in request for t, row in zip(piece.tokens, piece.logprobs, strict=True)] for request in requests]


@pytest.fixture(scope="module")
def runs(make_run, tmp_path_factory):
    """(a run, two adapter runs of it by name, one of rank 3 and one of rank 7)."""
    base, root = make_run(**DENSE), tmp_path_factory.mktemp("adapters")
    return base, {"one": adapter_of(base, root / "one", 1), "two": adapter_of(base, root / "two", 2, rank=7)}


PROMPTS = [list(range(20, 60)), [5, 6, 7], list(range(20, 60)), [9, 200, 33, 4, 5]]


@compiled
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_each_text_gets_its_adapter(runs, tmp_path, weights):
    base, adapters = runs
    wanted = [(name, prompt) for prompt in PROMPTS for name in (None, "one", "two")]
    with Engine(base, weights=weights, threads=2, adapters=adapters) as engine:
        together = answers(engine, wanted)
        assert answers(engine, wanted) == together, "prefixes in the cache are those of the same adapter"
        alone = [answers(engine, [one])[0] for one in wanted]
        assert alone == together, "a text's bits do not depend on the others"
    for name, path in (None, base), *adapters.items():
        merged = path
        if name is not None and weights == "float32":
            merged = tmp_path / name
            api.merge(str(path), str(merged))
        elif name is not None:
            continue  # merged first, int8 rounds other numbers
        with Engine(merged, weights=weights, threads=1) as engine:
            theirs = answers(engine, [(None, prompt) for prompt in PROMPTS])
        ours = [answer for (asked, _), answer in zip(wanted, together, strict=True) if asked == name]
        for a, b in zip(ours, theirs, strict=True):
            assert [token for token, _ in a] == [token for token, _ in b]
            assert [p for _, p in a] == pytest.approx([p for _, p in b], abs=2e-3 if name else 0)
    assert len({tuple(token for token, _ in answer) for answer in together[:3]}) == 3


@compiled
def test_what_is_refused(runs, make_run, tmp_path):
    base, adapters = runs
    with Engine(base, adapters=adapters) as engine, pytest.raises(UserError, match="no adapter 'three': one, two"):
        engine.submit([5], Sampling(1, adapter="three"))
    with pytest.raises(UserError, match="trained on other weights"):
        Engine(make_run(7, **DENSE), adapters=adapters)
    with pytest.raises(UserError, match="is no adapter run"):
        Engine(base, adapters={"it": base})
    mixture = make_run(attention="gqa", mtp_depth=0)
    with pytest.raises(UserError, match=r"experts have no updates there.*merge"):
        Engine(mixture, adapters={"it": adapter_of(mixture, tmp_path / "it", 1)})
    with pytest.raises(UserError, match="absorbed form"):
        latent = make_run(mtp_depth=0, num_dense_layers=3)
        Engine(latent, adapters={"it": adapter_of(latent, tmp_path / "latent", 1)})
