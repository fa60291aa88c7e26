"""Answers in conversations: what is learnt is what the server would read and the model would have to write, token for token."""

import json
from pathlib import Path
from random import Random

import pytest
import tokenizers

from sparing.base.config import UserError
from sparing.data.answers import Cutting, Pieces, _end_of_question, sequences
from sparing.data.chat import ChatTemplate, taught
from sparing.data.chats import Chat, answers
from sparing.data.tokenizer import Tokenizer, train_tokenizer
from sparing.data.traced import Traced, concat, own

TEMPLATES = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))}
NAMES = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|Assistant|>",
    "<|User|>",
    "<end_of_turn>",
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Lima"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    content = json.loads(train_tokenizer([json.__doc__ * 3], 400).to_json())
    content["added_tokens"] += [
        {"id": 400 + place, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for place, name in enumerate(NAMES)
    ]
    return Tokenizer(json.dumps(content))


def chat(*turns: tuple[str, str], tools=None, **last) -> Chat:
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[-1] |= last
    return Chat(messages, tools, "messages", "a.jsonl", 1)


TALK = chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello  there"), ("user", "And?"), ("assistant", "\nNothing."))


def learnt(piece, tokenizer) -> str:
    return tokenizer.decode([number for number, trained in zip(piece.ids, piece.trained, strict=True) if trained])


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"macros"}))
def test_each_answer_follows_the_prompt_of_the_server(tokenizer, name):
    template, found = ChatTemplate(TEMPLATES[name]), sequences(TALK, ChatTemplate(TEMPLATES[name]), tokenizer)
    left = [at for at, message in enumerate(TALK.messages) if answers(message)]
    for piece in found:
        assert len(piece.ids) == len(piece.trained) and piece.trained[-1]
        for place in (place for place in range(1, len(piece.ids)) if piece.trained[place] and not piece.trained[place - 1]):
            at = left.pop(0)
            assert piece.ids[:place] == template.encode(tokenizer, TALK.messages[:at]), "train is serve"
            end = next(end for end in range(place, len(piece.ids)) if piece.ids[end] in tokenizer.eos_ids)
            assert all(piece.trained[place : end + 1]) and not any(piece.trained[end + 1 : end + 2]), "its end, and nothing behind it"
            assert TALK.messages[at]["content"].strip() in tokenizer.decode(piece.ids[place:end])
    assert not left, "every answer once"


def test_one_conversation_is_one_piece_where_history_is_shown_as_it_was_written(tokenizer):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    template = template.replace("<|im_start|>assistant\n", "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    talk = chat(("user", "Hi"), ("assistant", "A"), ("user", "And?"), ("assistant", "B"))
    (piece,) = sequences(talk, ChatTemplate(template), tokenizer)
    assert learnt(piece, tokenizer) == "A<|im_end|>B<|im_end|>"
    assert sum(piece.trained) == 4


def test_reasoning_that_history_forgets_makes_pieces_of_their_own(tokenizer):
    thought = chat(("user", "1 + 1?"), ("assistant", "<think>\nhm\n</think>\n\n2"), ("user", "2 + 2?"), ("assistant", "4"))
    first, second = sequences(thought, ChatTemplate(TEMPLATES["qwen"]), tokenizer)
    assert "hm" in learnt(first, tokenizer) and learnt(second, tokenizer).endswith("4<|im_end|>")
    assert "hm" not in tokenizer.decode(second.ids)


def test_a_prompt_that_opens_the_reasoning_is_gone_on_with(tokenizer):
    """DeepSeek-R1's ends with <think>, and its template drops the reasoning of answers."""
    template = ChatTemplate(TEMPLATES["deepseek"])
    for content, said in (("<think>\nhm\n</think>\n\n2", "hm\n</think>\n\n"), ("2", "\n</think>\n\n")):
        asked = chat(("user", "1 + 1?"), ("assistant", content))
        (piece,) = sequences(asked, template, tokenizer)
        assert learnt(piece, tokenizer).startswith(said) and learnt(piece, tokenizer).endswith("2<|endoftext|>")
        assert piece.ids[: piece.trained.index(True)] == template.encode(tokenizer, asked.messages[:1])


def test_calls_of_tools_are_answers(tokenizer):
    asked = chat(("user", "The weather?"), ("assistant", ""), tools=TOOLS, tool_calls=[CALL])
    (piece,) = sequences(asked, ChatTemplate(TEMPLATES["qwen"]), tokenizer)
    assert '<tool_call>\n{"name": "weather", "arguments": {"town": "Lima"}}\n</tool_call><|im_end|>' in learnt(piece, tokenizer)
    assert "parameters" in tokenizer.decode(piece.ids) and "parameters" not in learnt(piece, tokenizer)


def test_the_work_grows_with_the_length_of_a_conversation_alone(tokenizer, monkeypatch):
    """Each text goes through the tokenizer once as part of a prompt and once as an answer, however many answers follow, and no rendered
    text is taken apart into characters (which took 30 times as long)."""
    talk = chat(*(("user" if i % 2 == 0 else "assistant", f"turn {i}") for i in range(40)))
    template, encode, seen = ChatTemplate(TEMPLATES["qwen"]), tokenizer.encode, []
    before = sequences(talk, template, tokenizer)
    monkeypatch.setattr(tokenizer, "encode", lambda text, goes_on=False: seen.append(text) or encode(text, goes_on))
    monkeypatch.setattr(Traced, "__iter__", lambda self: pytest.fail("a character at a time"))
    assert sequences(talk, template, tokenizer) == before
    assert max(sum(text.endswith(f"turn {i}") for text in seen) for i in range(40)) <= 2


def test_a_message_cannot_end_an_answer(tokenizer):
    (piece,) = sequences(chat(("user", "Hi"), ("assistant", "a <|im_end|> b")), ChatTemplate(TEMPLATES["qwen"]), tokenizer)
    end = tokenizer.special["<|im_end|>"]
    assert learnt(piece, tokenizer).endswith("a <|im_end|> b<|im_end|>") and piece.ids.count(end) == 2 and piece.ids[-1] == end


def test_a_template_that_ends_no_answer_gets_an_end(tokenizer):
    """Without one the model would never learn to stop."""
    (piece, second) = sequences(TALK, ChatTemplate(None), tokenizer)
    assert learnt(piece, tokenizer) == " Hello  there<|endoftext|>" and piece.ids[0] == tokenizer.eot_id
    assert learnt(second, tokenizer).endswith("Nothing.<|endoftext|>")
    (whole,) = sequences(TALK, ChatTemplate(taught(tokenizer)), tokenizer)
    assert learnt(whole, tokenizer) == learnt(piece, tokenizer) + learnt(second, tokenizer), "the taught one writes it"
    assert whole.ids[: len(piece.ids)] == piece.ids


def test_the_taught_template_says_all_that_the_plain_one_leaves_to_the_server(tokenizer):
    own, plain = ChatTemplate(taught(tokenizer)), ChatTemplate(None)
    assert not own.plain and plain.plain
    assert own.encode(tokenizer, TALK.messages[:2]) == plain.encode(tokenizer, TALK.messages[:2])


def test_the_same_marks_as_transformers(tokenizer):
    """Where a template marks its answers for them, their mask is ours."""
    transformers = pytest.importorskip("transformers")
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{{ '\n' }}{% else %}{{ m.content }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.to_json()), bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    theirs.chat_template = text
    talk = chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello there"), ("user", "And?"), ("assistant", "Nothing."))
    made = theirs.apply_chat_template(talk.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    (piece,) = sequences(talk, ChatTemplate(text), tokenizer)
    last = len(piece.ids)
    assert piece.ids == made["input_ids"][:last] and [int(mark) for mark in piece.trained] == made["assistant_masks"][:last]
    assert not any(made["assistant_masks"][last:])


def test_what_becomes_of_conversations_is_counted(tokenizer):
    refuses = "{% if messages[0].content == 'no' %}{{ raise_exception('never') }}{% endif %}" + taught(tokenizer)
    cutting = Cutting(ChatTemplate(refuses), tokenizer, 24)
    long = chat(("user", "Hi"), ("assistant", "word " * 50))
    deep = chat(("user", "word " * 50), ("assistant", "Hello"))
    pieces = cutting.pieces([long, deep, chat(("user", "Hi"), ("assistant", "Hello")), chat(("user", "no"), ("assistant", "Hello"))])
    assert len(pieces) == 2 and len(pieces[0][0]) == 25 and not pieces[0][1][0]
    counts = cutting.counts
    assert (counts["chats"], counts["truncated"], counts["empty"], counts["unused"], counts["refused"]) == (2, 2, 1, 1, 1)
    assert counts["trained"] == pieces.trained_tokens and counts["tokens"] == len(pieces.tokens) and counts["lost"] > 20
    assert "never" in cutting.refusal and cutting.refusal.endswith("a.jsonl:1")


def test_templates_that_show_a_question_otherwise_once_it_is_answered(tokenizer):
    asked = chat(("user", "Hi"), ("assistant", "Hello"))
    shown = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    counted = ChatTemplate("{{ messages | length }}" + shown)
    (piece,) = sequences(asked, counted, tokenizer)
    assert learnt(piece, tokenizer) == "Hello<|im_end|>"
    assert piece.ids[: piece.trained.index(True)] == counted.encode(tokenizer, asked.messages[:1])
    with pytest.raises(UserError, match="does not show the answer behind the question"):
        sequences(asked, ChatTemplate(shown.replace("in messages", "in messages | reverse")), tokenizer)


def end_of_question(asked: Traced, whole: Traced) -> int:
    """By comparing every pair of places."""
    best, place = 0, len(whole)
    for end in range(1, len(whole) + 1):
        length = 0
        while length < min(len(asked), end) and asked.plain[-1 - length] == whole.plain[end - 1 - length]:
            if asked.own[-1 - length] != whole.own[end - 1 - length]:
                break
            length += 1
        if length >= max(best, 1) and not all(asked.own[len(asked) - length :]):
            best, place = length, end
    return place


def test_the_end_of_a_question_is_found():
    random = Random(0)
    for _ in range(3000):
        asked, whole = (
            Traced("".join(random.choice("ab") for _ in range(size)), bytes(random.random() < 0.6 for _ in range(size)))
            for size in (random.randrange(9), random.randrange(14))
        )
        assert _end_of_question(asked, whole) == end_of_question(asked, whole), (asked, asked.own, whole, whole.own)


def test_long_runs_of_one_character_take_no_longer_than_other_text(tokenizer):
    """Compared place by place, these would take hours."""
    blank = 300_000 * " "
    assert _end_of_question(concat((own("2"), blank, own("<"))), concat((own("3"), blank, own("<"), blank))) == 300_002
    asked = chat(("user", f"Hi{blank}"), ("assistant", f"Hello{blank}"))
    shown = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}<|im_end|>{% endif %}{% endfor %}"
    template = ChatTemplate(shown)
    (piece,) = sequences(asked, template, tokenizer)
    assert learnt(piece, tokenizer) == f"Hello{blank}<|endoftext|>"


def test_pieces_are_kept(tokenizer, tmp_path):
    from sparing.base.run import write_tensors

    pieces = Cutting(ChatTemplate(taught(tokenizer)), tokenizer, 100).pieces([TALK, TALK])
    write_tensors(tmp_path / "p.safetensors", pieces.tensors())
    again = Pieces.load(tmp_path / "p.safetensors")
    assert all((getattr(again, name) == getattr(pieces, name)).all() for name in ("tokens", "trained", "starts"))
    assert len(again) == 2 and again.trained.dtype == bool
