"""The exported tokenizer: transformers loads it and encodes as we do."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparing.base.config import UserError
from sparing.interop.huggingface import export_hf, import_hf

TEXTS = ["def f(x):\n    return x + 123456", "Grüße, 世界! 🙂", "  two  spaces\tand a tab ", "<|endoftext|>again<|endoftext|>", ""]


def byte_level(path, special=("<|endoftext|>",), size=280) -> Tokenizer:
    """A byte-level BPE like the ones that runs train; 256 bytes, the special tokens, some merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["return the spaces and the tabs again and again"] * 3, trainer)
    tokenizer.save(str(path))
    return tokenizer


@pytest.fixture
def export(small, random_model, tmp_path):
    """(tokenizer path, **options) -> (folder, notes)."""
    from dataclasses import replace

    def make(tokenizer, vocab_size=300, **options):
        config = replace(small, vocab_size=vocab_size)
        notes = export_hf(config, random_model(config).state_dict(), tokenizer, tmp_path / "hf", **options)
        return tmp_path / "hf", notes

    return make


def test_encodes_identically(export, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = byte_level(tmp_path / "tokenizer.json")
    folder, notes = export(tmp_path / "tokenizer.json")
    assert notes == []
    end = ours.token_to_id("<|endoftext|>")
    for load in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        theirs = load.from_pretrained(folder)
        assert (theirs.eos_token_id, theirs.bos_token_id) == (end, end)
        assert theirs.model_max_length == 128
        for text in TEXTS:
            ids = ours.encode(text).ids
            assert theirs(text)["input_ids"] == [end, *ids], "a text begins as the run's texts do"
            assert theirs(text, add_special_tokens=False)["input_ids"] == ids
            assert theirs.decode(ids) == ours.decode(ids, skip_special_tokens=False) == text
    raw = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    assert raw["eos_token_id"] == generation["eos_token_id"] == end
    assert not any("tokenizer" in note for note in import_hf(folder)[2])


def test_generation_stops_at_the_end_of_text(export, tmp_path):
    transformers = pytest.importorskip("transformers")
    byte_level(tmp_path / "tokenizer.json")
    folder, _ = export(tmp_path / "tokenizer.json")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == transformers.AutoTokenizer.from_pretrained(folder).eos_token_id


def test_chat_template(export, tmp_path):
    transformers = pytest.importorskip("transformers")
    byte_level(tmp_path / "tokenizer.json")
    template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    folder, _ = export(tmp_path / "tokenizer.json", chat_template=template)
    text = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "hé"}], tokenize=False)
    assert text.strip() == "[user] hé"


def test_no_tokenizer_and_no_end_of_text(export, tmp_path):
    folder, notes = export(None)
    assert any("no tokenizer" in note for note in notes)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] is None
    assert any("no tokenizer.json" in note for note in import_hf(folder)[2])


def test_a_tokenizer_without_an_end_is_refused(export, tmp_path):
    byte_level(tmp_path / "tokenizer.json", special=("<nothing>",))
    with pytest.raises(UserError, match="no end-of-text token"):
        export(tmp_path / "tokenizer.json")


def test_another_name_for_the_end(export, tmp_path):
    ours = byte_level(tmp_path / "tokenizer.json", special=("</s>",))
    folder, notes = export(tmp_path / "tokenizer.json")
    assert notes == [] and json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == ours.token_to_id("</s>")


def test_tokenizers_that_do_not_fit(export, tmp_path):
    byte_level(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="vocabulary ends at 255"):
        export(tmp_path / "tokenizer.json", vocab_size=256)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        export(tmp_path / "broken.json")
    assert not (tmp_path / "hf").exists()
