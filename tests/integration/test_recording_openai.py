"""OpenAI's own client, synchronous and not, talks to the recording endpoint as to OpenAI."""

import asyncio
import json

import pytest

from pipeline.rollout.recording.recording import Limits
from tests.scripted_model import CHECK, recording, template_of, text_of, user

openai = pytest.importorskip("openai")
pytest.importorskip("aiohttp")
END = "<|im_end|>"
CALL = '<tool_call>\n{"name": "check", "arguments": {"answer": "6"}}\n</tool_call>'


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return template_of(tmp_path_factory.mktemp("chat"), "qwen3")


@pytest.fixture(scope="module")
def endpoint():
    from pipeline.rollout.recording.endpoint import Endpoint

    served = Endpoint("policy")
    served.url = served.start()
    yield served
    served.close()


def client_of(endpoint, record, kind=openai.OpenAI):
    return kind(base_url=endpoint.url, api_key=endpoint.open(record), max_retries=0, timeout=30)


def test_a_tool_is_called_and_its_result_read(template, endpoint):
    record, script = recording(template, "Let me see.\n" + CALL + END, CALL + CALL + END, "42" + END)
    client = client_of(endpoint, record)
    messages = [{"role": "system", "content": "Use the tool."}, user("6 * 7?")]
    for results in (["wrong"], ["wrong", "right"], []):
        answer = client.chat.completions.create(model="policy", messages=messages, tools=[CHECK])
        message = answer.choices[0].message
        messages.append(message)  # as the client's own documentation does
        calls = message.tool_calls or []
        assert [json.loads(call.function.arguments) for call in calls] == [{"answer": "6"}] * len(results)
        assert answer.choices[0].finish_reason == ("tool_calls" if results else "stop")
        for call, result in zip(calls, results, strict=True):
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    sample = record.sample("done")
    assert message.content == "42"
    assert [len(sample.turns), record.dropped] == [3, (0, 0)]
    assert (
        text_of(template, sample.of_drawn(sample.token_ids))
        == "Let me see.\n" + CALL + END + CALL + CALL + END + "42" + END
    )
    assert text_of(template, script.requests[2].prompt.token_ids).count("<tool_response>") == 3


def test_streams(template, endpoint):
    record, _ = recording(template, "Let me see.\n" + CALL + END, "42" + END, "43" + END)

    async def talk():
        client = client_of(endpoint, record, openai.AsyncOpenAI)
        strict = {**CHECK, "function": {**CHECK["function"], "strict": True}}  # as the client's helper wants it
        with_tools = {"model": "policy", "messages": [user("6 * 7?")], "tools": [strict]}
        async with client.chat.completions.stream(**with_tools) as stream:
            async for _ in stream:
                pass
            message = (await stream.get_final_completion()).choices[0].message
        assert (message.content, message.tool_calls[0].function.name) == ("Let me see.", "check")
        follow = [user("6 * 7?"), message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "no"}]
        asked = {**with_tools, "messages": follow, "stream": True, "stream_options": {"include_usage": True}}
        chunks = [chunk async for chunk in await client.chat.completions.create(**asked)]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "42"
        assert chunks[-1].usage.completion_tokens == 2
        plain = await client.completions.create(model="policy", prompt="6 * 7 = ", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in plain]) == "43"
        await client.close()

    asyncio.run(talk())
    assert record.dropped[0] == 1  # the chat, after which a text was continued


def test_log_probs_and_models(template, endpoint):
    record, _ = recording(template, "42" + END, "42" + END)
    client = client_of(endpoint, record)
    answer = client.chat.completions.create(model="policy", messages=[user("?")], logprobs=True)
    assert [round(token.logprob, 5) for token in answer.choices[0].logprobs.content] == [-0.01, -0.02]
    plain = client.completions.create(model="policy", prompt="? ", logprobs=0)
    assert [round(value, 5) for value in plain.choices[0].logprobs.token_logprobs] == [-0.01, -0.02]
    assert [model.id for model in client.models.list()] == ["policy"]


def test_errors_have_the_clients_own_types(template, endpoint):
    record, _ = recording(template, "1" + END, limits=Limits(64, 4096, 1))
    client = client_of(endpoint, record)
    with pytest.raises(openai.BadRequestError, match="n=3 answers at once"):
        client.chat.completions.create(model="policy", messages=[user("?")], n=3)
    client.chat.completions.create(model="policy", messages=[user("?")])
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="policy", messages=[user("again")])
    assert (caught.value.code, record.ended) == ("turn_limit", "turn_limit")
    with pytest.raises(openai.AuthenticationError, match="no episode has this key"):
        client.with_options(api_key="guess").chat.completions.create(model="policy", messages=[user("?")])
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="policy", input="?")


def test_many_episodes_at_once(template, endpoint):
    async def play(number):
        record, _ = recording(template, *(f"{number}.{turn}{END}" for turn in range(4)))
        client = client_of(endpoint, record, openai.AsyncOpenAI)
        messages = [user("?")]
        for turn in range(4):
            answer = await client.chat.completions.create(model="policy", messages=messages)
            assert answer.choices[0].message.content == f"{number}.{turn}"
            messages += [answer.choices[0].message, user("?")]
        await client.close()
        return record.dropped, len(record.sample("done").turns)

    async def together():
        return await asyncio.gather(*map(play, range(16)))

    assert asyncio.run(together()) == [((0, 0), 4)] * 16
