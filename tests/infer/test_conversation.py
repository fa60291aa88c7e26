"""Conversations: the same ids as the server's, turns that are forgotten when the context is full, answers that are stopped."""

import pytest

from sparing.base.config import UserError
from sparing.base.run import RunFolder
from sparing.data.chat import ChatTemplate
from sparing.infer.conversation import Conversation
from sparing.infer.engine import Engine
from sparing.infer.request import Sampling

GREEDY = Sampling(12, 0.0, ignore_eos=True)
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def engine(make_run):
    run = make_run()
    (run / "chat_template.jinja").write_text(TEMPLATE)
    with Engine(run, weights="float32", max_batch=1, speculate=False) as engine:
        yield engine
    (run / "chat_template.jinja").unlink()


@pytest.fixture
def conversation(engine, make_run):
    return Conversation(engine, RunFolder(make_run()), GREEDY, "Be brief.")


def test_it_asks_what_the_template_says(conversation, engine):
    shown = []
    first = conversation.answer("Hello", shown.append)
    assert first["answer"] == "".join(shown) and first["completion_tokens"] == 12 and first["finish_reason"] == "length"
    second = conversation.answer("Go on")
    system = {"role": "system", "content": "Be brief."}
    messages = [system, *conversation.turns[0], {"role": "user", "content": "Go on"}]
    ids = ChatTemplate(TEMPLATE).encode(engine.tokenizer, messages)
    assert second["prompt_tokens"] == len(ids) and engine.submit(ids, GREEDY).text() == second["answer"]
    conversation.reset()
    assert conversation.answer("Hello")["answer"] == first["answer"], "nothing of the turns is left, the system's message is"


def test_the_oldest_turns_make_room(conversation, engine):
    turns = [conversation.answer(f"question {number} " + "word " * 12) for number in range(8)]
    assert turns[0]["forgotten_turns"] == 0 < turns[-1]["forgotten_turns"]
    assert all(turn["prompt_tokens"] + 12 <= engine.context for turn in turns)
    assert len(conversation.turns) + conversation.forgotten == 8


def test_a_message_that_cannot_fit_is_no_part_of_it(conversation):
    conversation.answer("Hello")
    with pytest.raises(UserError, match=r"the message is too long: \d+ tokens"):
        conversation.answer("word " * 2000)
    assert len(conversation.turns) == 1 and conversation.forgotten == 0


def test_an_answer_can_be_stopped(conversation):
    seen = []

    def stop(piece: str) -> None:
        seen.append(piece)
        if len(seen) == 1:
            raise KeyboardInterrupt

    conversation.sampling = Sampling(200, 0.0, ignore_eos=True)
    turn = conversation.answer("Hello", stop)
    assert turn["finish_reason"] == "cancelled" and turn["completion_tokens"] < 200
    assert conversation.turns[0][1]["content"] == turn["answer"] != ""
    assert conversation.answer("Go on", lambda piece: None)["finish_reason"] == "length", "and the conversation goes on"


def test_a_template_that_refuses(engine, make_run):
    conversation = Conversation(engine, RunFolder(make_run()), GREEDY)
    conversation.template = ChatTemplate("{{ raise_exception('no') }}")
    with pytest.raises(UserError, match="refuses these messages: no"):
        conversation.answer("Hello")
    assert conversation.turns == []
