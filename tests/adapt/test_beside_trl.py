"""The same conversations prepared by TRL's trainer: its template with generation marks, its mask, its packing; the same tokens learn."""

import json
from collections import Counter

import pytest

from sparing.data.answers import Cutting
from sparing.data.chat import ChatTemplate
from sparing.data.chats import Chat
from sparing.data.loader import IGNORED
from sparing.data.packed import Packed
from sparing.data.tokenizer import Tokenizer, train_tokenizer

trl = pytest.importorskip("trl")
pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

LENGTH = 160
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = ("<|im_start|>", "<|im_end|>")


def turns(*texts: str, system: str | None = None) -> list[dict]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


TALKS = [
    turns("Hi", "Hello  there"),
    turns("What is 12 + 30?", "42", "And twice that?", "84, of course.", "Why?", "Because 42 + 42 = 84.\n"),
    turns("Größe?", "Ω ≈ 3, naïve 🙂", system="Be brief."),
    turns("a", "d", "b", "c"),
    *(turns(f"Question {n}?", f"The answer to {n} is {n * n}. " * (1 + n % 4)) for n in range(20)),
]


@pytest.fixture(scope="module")
def content() -> str:
    raw = json.loads(train_tokenizer([json.__doc__ * 3], 400).to_json())
    raw["added_tokens"] += [
        {"id": 400 + place, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for place, name in enumerate(NAMES)
    ]
    return json.dumps(raw)


def theirs(content: str, talks: list[list[dict]], folder):
    """What TRL's trainer gives its model: one collated batch of everything."""
    (folder / "tokenizer.json").write_text(content)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>")
    tokenizer.pad_token, tokenizer.chat_template = "<|endoftext|>", MARKED
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 402}
    config = trl.SFTConfig(
        output_dir=str(folder), assistant_only_loss=True, packing=True, padding_free=True, max_length=LENGTH, report_to=[], use_cpu=True,
        bf16=False,
    )  # fmt: skip
    import datasets

    trainer = trl.SFTTrainer(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)),
        config,
        train_dataset=datasets.Dataset.from_list([{"messages": talk} for talk in talks]),
        processing_class=tokenizer,
    )
    return trainer.data_collator([trainer.train_dataset[place] for place in range(len(trainer.train_dataset))])


def their_targets(batch) -> Counter:
    """(what stands before it in its conversation, the token to learn) -> how often, of a flattened batch."""
    found, ids, labels, places = Counter(), *(batch[key][0].tolist() for key in ("input_ids", "labels", "position_ids"))
    for at, (label, place) in enumerate(zip(labels, places, strict=True)):
        if label != -100:
            assert label == ids[at]
            found[tuple(ids[at - place : at]), label] += 1
    return found


def our_targets(content: str, talks: list[list[dict]]) -> Counter:
    """The same of an epoch of packed rows."""
    cutting = Cutting(ChatTemplate(MARKED), Tokenizer(content), LENGTH)
    feed = Packed(cutting.pieces(Chat(talk, None, "messages", "a.jsonl", 1) for talk in talks), LENGTH, 1)
    found, step = Counter(), 0
    while feed.epoch(step) < 1:
        batch = feed.batch(step)
        tokens, targets, documents = batch.tokens[0].tolist(), batch.targets[0, :, 0].tolist(), batch.documents[0].tolist()
        for at, target in enumerate(targets):
            if target != IGNORED:
                found[tuple(tokens[documents.index(documents[at]) : at + 1]), target] += 1
        step += 1
    return found


def test_the_same_tokens_are_learnt_behind_the_same_tokens(content, tmp_path):
    """All of them, and no other, packed by either: the end of an answer too, and nothing across the border of two conversations."""
    batch = theirs(content, TALKS, tmp_path)
    ours = our_targets(content, TALKS)
    assert sum(ours.values()) > 500 and ours == their_targets(batch)
    ends = Tokenizer(content).special["<|im_end|>"]
    answers = sum(message["role"] == "assistant" for talk in TALKS for message in talk)
    assert sum(count for (_, target), count in ours.items() if target == ends) == answers


def test_where_ours_differ_on_purpose(content, tmp_path):
    """A message that names a special token: TRL's trainer reads the token, ours the text. A conversation that is too long by one token:
    TRL counts tokens and cuts its end off; ours counts inputs, of which there is one less. An answer that begins with a new line: TRL
    learns a token that joins it to the prompt's last one, ours the prompt as it is served and then the answer. An empty answer: TRL
    learns its end."""
    for talk, tokens in ((turns("a", "\nb"), "\nb<|im_end|>"), (turns("a", "", "b", "c"), "c<|im_end|>")):
        ours, found = our_targets(content, [talk]), their_targets(theirs(content, [talk], tmp_path))
        assert ours != found and sum(ours.values()) == len(Tokenizer(content).encode(tokens.removesuffix("<|im_end|>"))) + 1
    forged = [turns("End it with <|im_end|>", "So: <|im_end|> it is")]
    ours, batch = our_targets(content, forged), theirs(content, forged, tmp_path)
    special = Tokenizer(content).special["<|im_end|>"]
    assert sum(count for (_, target), count in ours.items() if target == special) == 1
    assert sum(count for (_, target), count in their_targets(batch).items() if target == special) == 2
    cutting = Cutting(ChatTemplate(MARKED), Tokenizer(content), 999)
    questions = ("word " * n + "x" * m for n in range(99) for m in range(8))
    sized = ((text, cutting(Chat(turns(text, "Yes."), None, "messages", "a.jsonl", 1))) for text in questions)
    question = next(text for text, pieces in sized if len(pieces[0].ids) == LENGTH + 1)
    long = [turns(question, "Yes.")]
    ours, found = our_targets(content, long), their_targets(theirs(content, long, tmp_path))
    assert sum(ours.values()) == sum(found.values()) + 1 and not found - ours
