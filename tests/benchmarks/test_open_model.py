"""The comparison on an imported model: its bits per byte are those of the trained form, and what is measured of the machine is there."""

import json

import pytest
import torch

from benchmarks.open_model import PIECE_BYTES, bits_per_byte, machine_facts
from sparing.base.config import Config, ModelConfig
from sparing.base.config_file import write_config
from sparing.base.run import RunFolder, write_tensors
from sparing.data.tokenizer import Tokenizer, train_tokenizer
from sparing.evals.bpb import bpb, nll_from_logits
from sparing.kernels.decode import PRODUCTS, library
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler")


def test_bits_per_byte_are_those_of_the_trained_form(tmp_path):
    text = open(json.__file__).read()
    tokenizer = train_tokenizer([text], 400)
    c = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=2, num_dense_layers=2, intermediate_size=64, attention="gqa",
        num_heads=3, num_kv_heads=1, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    model, run = Transformer(c), RunFolder.create(tmp_path / "run")
    init_weights(model, 0)
    write_tensors(run.weights_file, model.state_dict())
    run.config_file.write_text(write_config(Config(model=c)))
    tokenizer.save(run.tokenizer_file)
    (tmp_path / "a.txt").write_text(text)
    found = bits_per_byte(str(run.path), "float32", [str(tmp_path / "a.txt")])
    piece = text.encode()[len(text.encode()) // 2 :][:PIECE_BYTES].decode()
    with torch.no_grad():
        expected = bpb(nll_from_logits(model), Tokenizer.load(run.tokenizer_file), [piece], 128)
    assert found["bytes"] == expected["bytes"] == PIECE_BYTES
    assert found["bpb"] == pytest.approx(expected["bpb"], rel=1e-5)
    assert bits_per_byte(str(run.path), "int8", [str(tmp_path / "a.txt")])["bpb"] == pytest.approx(expected["bpb"], rel=0.01)


def test_facts_of_the_machine():
    found = machine_facts()
    assert found["products"] in PRODUCTS
    assert found["memory_GB_per_s"] > 0.1
    assert all(rate > 0.01 for rate in found["int8_Gop_per_s"].values()) and len(found["int8_Gop_per_s"]) == 4
