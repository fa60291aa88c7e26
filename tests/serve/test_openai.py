"""The official client against a real server."""

from __future__ import annotations

import json

import pytest

openai = pytest.importorskip("openai")

SAY = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "import json"}]


def ask(client, **more):
    return client.chat.completions.create(**{"model": "tiny", "messages": SAY, "max_tokens": 12, "temperature": 0, **more})


def test_models(client):
    [model] = client.models.list().data
    assert model.id == "tiny" and model.owned_by == "sparing" and model.kind == "base" and model.context_length == 512
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": ""}], ids=["absent", "null", "empty"])
def test_a_request_without_a_model_is_the_served_one_s(server, model):
    """Every path with a body, whole and streamed: what the request that names the model gets."""
    asked = {"max_tokens": 8, "temperature": 0}
    for path, body in (("/v1/chat/completions", {"messages": SAY} | asked), ("/v1/completions", {"prompt": "import json"} | asked)):
        status, _, found = server.ask("POST", path, body | model)
        assert status == 200, found
        named = server.ask("POST", path, body | {"model": "tiny"})[2]
        assert found["model"] == named["model"] == "tiny" and found["choices"] == named["choices"]
        status, _, events = server.ask("POST", path, body | model | {"stream": True})
        chunks = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: {")]
        assert status == 200 and len(chunks) > 1 and {chunk["model"] for chunk in chunks} == {"tiny"}
    tokens = server.ask("POST", "/tokenize", {"prompt": "import json", "add_special_tokens": False} | model)[2]["tokens"]
    assert server.ask("POST", "/detokenize", {"tokens": tokens} | model)[2] == {"prompt": "import json"}


def test_the_client_may_send_an_empty_model(client):
    """`model` is obligatory in the client: a configuration that has none gives an empty one, or null by `extra_body`."""
    named = ask(client)
    for how in ({"model": ""}, {"extra_body": {"model": None}}):
        found = ask(client, **how)
        assert found.model == "tiny" and found.choices[0].message.content == named.choices[0].message.content
    assert client.completions.create(model="", prompt="import json", max_tokens=2).model == "tiny"
    with pytest.raises(openai.NotFoundError, match="`gpt-4` does not exist") as error:
        ask(client, model="gpt-4")
    assert error.value.code == "model_not_found"


def test_chat_whole_and_streamed_are_the_same(client):
    whole = ask(client, max_tokens=30)
    choice = whole.choices[0]
    assert choice.message.role == "assistant" and choice.finish_reason in ("length", "stop")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert 0 < whole.usage.completion_tokens <= 30
    chunks = list(ask(client, max_tokens=30, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == choice.message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == choice.finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_says_what_it_took(client):
    usage = ask(client).usage
    assert usage.energy["how"] in ("estimated", "measured") and usage.energy["joules"] > 0
    assert usage.tier == "exact" and usage.weights
    assert usage.prompt_tokens_details.cached_tokens >= 0
    assert usage.completion_tokens_details.accepted_prediction_tokens >= 0
    again = ask(client, messages=[*SAY, {"role": "assistant", "content": "x" * 100}, {"role": "user", "content": "go on"}]).usage
    assert again.prompt_tokens > usage.prompt_tokens


def test_completion_with_choices_prompts_and_tokens(client):
    whole = client.completions.create(model="tiny", prompt=["def f(", "class A"], n=2, max_tokens=5, seed=3, temperature=1.0)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in whole.choices}) > 1
    again = client.completions.create(model="tiny", prompt=["def f(", "class A"], n=2, max_tokens=5, seed=3, temperature=1.0)
    assert [choice.text for choice in again.choices] == [choice.text for choice in whole.choices]
    alone = client.completions.create(model="tiny", prompt="class A", max_tokens=5, seed=4, temperature=1.0)
    assert alone.choices[0].text == whole.choices[3].text, "choice j of a seeded request has seed + j"
    echoed = client.completions.create(model="tiny", prompt="def f(", echo=True, max_tokens=0)
    assert echoed.choices[0].text == "def f(" and echoed.choices[0].finish_reason == "length"
    more = {"n": 2, "max_tokens": 5, "seed": 3, "temperature": 1.0, "stream": True}
    streamed = client.completions.create(model="tiny", prompt=["def f(", "class A"], **more)
    texts = [""] * 4
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_token_ids_and_text_are_the_same_prompt(client, server):
    _, _, found = server.ask("POST", "/tokenize", {"prompt": "import json"})
    assert found["count"] == len(found["tokens"]) > 1 and found["max_model_len"] == 512
    _, _, plain = server.ask("POST", "/tokenize", {"prompt": "import json", "add_special_tokens": False})
    assert found["tokens"][1:] == plain["tokens"]
    assert server.ask("POST", "/detokenize", {"tokens": plain["tokens"]})[2] == {"prompt": "import json"}
    by_text = client.completions.create(model="tiny", prompt="import json", max_tokens=8, temperature=0)
    by_ids = client.completions.create(model="tiny", prompt=found["tokens"], max_tokens=8, temperature=0)
    assert by_ids.choices[0].text == by_text.choices[0].text
    assert by_ids.usage.prompt_tokens == by_text.usage.prompt_tokens == found["count"]


def test_stop_strings(client):
    free = ask(client, max_tokens=40).choices[0].message.content
    stop = free[5:8]
    held = ask(client, max_tokens=40, stop=[stop, "never written"])
    assert held.choices[0].message.content == free[: free.index(stop)] and held.choices[0].finish_reason == "stop"
    streamed = "".join(c.choices[0].delta.content or "" for c in ask(client, max_tokens=40, stop=stop, stream=True))
    assert streamed == held.choices[0].message.content


def test_logprobs(client):
    content = ask(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert all(row.logprob <= 0 and len(row.top_logprobs) == 3 for row in content)
    assert all(row.top_logprobs[0].token == row.token for row in content), "greedy takes the likeliest"
    assert b"".join(bytes(row.bytes) for row in content).decode(errors="replace").startswith(content[0].token)
    rows = client.completions.create(model="tiny", prompt="import", max_tokens=4, temperature=0, logprobs=2).choices[0].logprobs
    assert len(rows.tokens) == len(rows.token_logprobs) == len(rows.top_logprobs) == len(rows.text_offset) == 4
    assert rows.text_offset[0] == 0 and "".join(rows.tokens[:1]) in rows.top_logprobs[0]
    streamed = [c.choices[0].logprobs for c in ask(client, logprobs=True, top_logprobs=3, stream=True) if c.choices[0].logprobs]
    assert [row.token for part in streamed for row in part.content] == [row.token for row in content]


def test_the_prompt_is_scored_where_asked(client, server, run):
    """As lm-eval asks; the same numbers as the training forward."""
    import torch

    from sparing.infer.generate import load

    ids = server.ask("POST", "/tokenize", {"prompt": "import json\n\nclass JSONDecoder:\n    pass"})[2]["tokens"]
    asked = {"model": "tiny", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1, "seed": 1}
    rows = client.completions.create(prompt=ids, **asked).choices[0].logprobs
    assert len(rows.tokens) == len(rows.token_logprobs) == len(rows.top_logprobs) == len(ids) + 1
    assert rows.token_logprobs[0] is None and rows.top_logprobs[0] is None
    want = load(run).logits([ids])[0].log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert torch.tensor(rows.token_logprobs[1:-1]).sub(want).abs().max() < 0.3, "int8 at most"
    assert torch.tensor(rows.token_logprobs[1:-1]).sub(want).abs().mean() < 0.03
    again = client.completions.create(prompt=ids, **asked).choices[0].logprobs
    assert again.token_logprobs == rows.token_logprobs, "what the cache holds changes nothing"
    text = "import json\n\nclass JSONDecoder:\n    pass"
    whole = client.completions.create(prompt=text, **{**asked, "max_tokens": 0}).choices[0]
    assert whole.text == text and "".join(whole.logprobs.tokens) == text
    assert whole.logprobs.token_logprobs == rows.token_logprobs[1:-1] and whole.logprobs.text_offset[0] == 0


def test_offsets_are_places_in_the_text(client, server):
    """Also behind characters that are several tokens, in a prompt and in an answer."""
    text = "naïve 🙂 = 世界 and so on"
    for prompt in (text, server.ask("POST", "/tokenize", {"prompt": text, "add_special_tokens": False})[2]["tokens"]):
        part = server.ask("POST", "/tokenize", {"prompt": "🙂", "add_special_tokens": False})[2]["tokens"][0]
        forced = {"logit_bias": {str(part): 100}}  # the first byte of a character, again and again
        asked = {"model": "tiny", "echo": True, "logprobs": 0, "temperature": 0, "max_tokens": 3}
        for more in ({}, forced):
            choice = client.completions.create(prompt=prompt, **asked, **more).choices[0]
            rows = choice.logprobs
            assert choice.text.startswith(text) and sum("\ufffd" in token for token in rows.tokens) > 6
            whole = [(token, at) for token, at in zip(rows.tokens, rows.text_offset, strict=True) if "\ufffd" not in token]
            assert all(choice.text[at : at + len(token)] == token for token, at in whole), whole
            assert rows.text_offset == sorted(rows.text_offset) and max(rows.text_offset) < len(choice.text)


def test_json_and_schemas(client):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = ask(client, response_format=form, max_tokens=120, temperature=1.0, seed=seed).choices[0]
        assert answer.finish_reason == "stop"
        found = json.loads(answer.message.content)
        assert set(found) == {"name", "age"} and len(found["name"]) <= 5 and 0 <= found["age"] <= 99
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=200, logit_bias={}, temperature=0).choices[0]
    assert answer.message.content.startswith("{")
    answer = ask(client, extra_body={"response_format": {"type": "grammar", "grammar": 'start: "yes" | "no"'}}, n=2, temperature=1.0)
    assert {choice.message.content for choice in answer.choices} <= {"yes", "no"}
    with pytest.raises(openai.BadRequestError, match=r"grammar cannot be used: at 1\(8\): unknown name"):
        ask(client, extra_body={"response_format": {"type": "grammar", "grammar": "start: nothing"}})
    form = {"type": "json_object", "schema": {"properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}}
    answer = ask(client, extra_body={"response_format": form}, max_tokens=100, temperature=1.0, seed=0).choices[0]
    assert json.loads(answer.message.content) in ({"ok": True}, {"ok": False})


@pytest.mark.parametrize(
    "schema", [{"$ref": "#"}, {"type": "object", "properties": {f"p{i}": {} for i in range(3_000)}}], ids=["itself", "thousands"]
)
def test_a_schema_that_cannot_be_followed_is_refused_beforehand(client, schema):
    """llguidance compiles the first and fails at its first token; an answer would look as if it were complete."""
    pytest.importorskip("llguidance")
    with pytest.raises(openai.BadRequestError, match="The schema cannot be used"):
        ask(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    if len(str(schema)) < 100:  # tools go into the prompt as well
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        with pytest.raises(openai.BadRequestError, match="The functions cannot be used"):
            ask(client, tools=[tool], tool_choice="required")


def test_a_schema_that_fails_on_the_way_is_an_error_and_no_answer(client):
    """The beginning is forced, so that what cannot be followed is not met when the request comes."""
    pytest.importorskip("llguidance")
    many = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(1_300)}}
    schema = {"properties": {"first": {"const": "x" * 40}, "many": many}, "required": ["first", "many"], "type": "object"}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="The answer was cut: its schema cannot be followed to the end"):
        ask(client, response_format=form, max_tokens=200)
    with pytest.raises(openai.APIError, match="The answer was cut"):
        list(ask(client, response_format=form, max_tokens=200, stream=True))


def test_hundreds_of_optional_properties(client):
    pytest.importorskip("llguidance")
    names = [f"p{i}" for i in range(600)]
    schema = {"type": "object", "properties": {name: {"enum": [0, 1]} for name in names}, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(3):
        answer = ask(client, response_format=form, max_tokens=300, temperature=1.0, seed=seed).choices[0]
        if answer.finish_reason == "stop":
            assert set(json.loads(answer.message.content)) <= set(names)
        else:
            assert answer.finish_reason == "length"


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "enum": ["Accra", "Lima"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}


def test_a_tool_that_must_be_called_is_called(client):
    pytest.importorskip("llguidance")
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = ask(client, tools=[TOOL], tool_choice=choice, max_tokens=100).choices[0]
        assert answer.finish_reason == "tool_calls"
        [call] = answer.message.tool_calls
        assert call.function.name == "weather" and json.loads(call.function.arguments)["town"] in ("Accra", "Lima")
    chunks = list(ask(client, tools=[TOOL], tool_choice="required", max_tokens=100, stream=True))
    [streamed] = [chunk.choices[0].delta.tool_calls[0] for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert streamed.function.arguments == call.function.arguments and streamed.index == 0 and streamed.id
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    follow = [
        *SAY,
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "dry"},
    ]
    assert ask(client, messages=follow, tools=[TOOL]).choices[0].message.content is not None
    with pytest.raises(openai.BadRequestError, match="not in 'tools'"):
        ask(client, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "other"}})


def test_parameters_of_tools_may_refer_to_their_own_definitions(client):
    pytest.importorskip("llguidance")
    towns = {"to": {"$ref": "#/$defs/T"}}
    trip = {"$defs": {"T": {"enum": ["Accra", "Lima"]}}, "properties": towns, "required": ["to"], "additionalProperties": False}
    other = {**trip, "$defs": {"T": {"enum": [1, 2]}}}  # the same name for something else
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in (("trip", trip), ("other", other))]
    for name, towns in (("trip", ["Accra", "Lima"]), ("other", [1, 2])):
        chosen = {"type": "function", "function": {"name": name}}
        [call] = ask(client, tools=tools, tool_choice=chosen, max_tokens=60, temperature=1.0, seed=1).choices[0].message.tool_calls
        found = json.loads(call.function.arguments)
        assert call.function.name == name and found["to"] in towns
    answer = ask(client, tools=tools, tool_choice="required", max_tokens=60, temperature=1.0, seed=1).choices[0]
    assert answer.message.tool_calls[0].function.name in ("trip", "other")


def test_a_function_without_parameters_gets_none(client):
    pytest.importorskip("llguidance")
    tool = {"type": "function", "function": {"name": "now"}}
    for seed in range(3):
        [call] = ask(client, tools=[tool], tool_choice="required", max_tokens=60, temperature=1.0, seed=seed).choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {}


def test_a_call_that_is_cut_is_no_text(client):
    pytest.importorskip("llguidance")
    whole = ask(client, tools=[TOOL], tool_choice="required", max_tokens=100)
    for limit in (1, whole.usage.completion_tokens - 3):
        answer = ask(client, tools=[TOOL], tool_choice="required", max_tokens=limit).choices[0]
        assert answer.finish_reason == "length" and not answer.message.content
        calls = answer.message.tool_calls or []
        assert [call.function.name for call in calls] == ["weather"] * (limit > 1)
        made = "".join(whole.choices[0].message.tool_calls[0].function.arguments.split())
        assert all(call.function.arguments and made.startswith("".join(call.function.arguments.split())) for call in calls)


def test_headers(client):
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=SAY, max_tokens=2)
    assert raw.headers["x-request-id"].startswith("req_") and int(raw.headers["openai-processing-ms"]) >= 0
    assert raw.parse()._request_id == raw.headers["x-request-id"]


async def _many(url: str, count: int) -> list[str]:
    import asyncio

    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:

        async def one(i: int) -> str:
            stream = await client.completions.create(model="tiny", prompt=f"def f{i}(", max_tokens=20, seed=i, temperature=1.0, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*map(one, range(count)))


def test_many_streams_at_once_say_what_each_says_alone(client, server):
    import asyncio

    together = asyncio.run(_many(server.url, 24))
    for i in (0, 7, 23):
        alone = client.completions.create(model="tiny", prompt=f"def f{i}(", max_tokens=20, seed=i, temperature=1.0)
        assert together[i] == alone.choices[0].text
