"""The endpoint over plain HTTP: keys, errors, streams, what is refused, clients that go away."""

import asyncio
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from pipeline.rollout.engine import EngineError
from pipeline.rollout.recording.recording import Limits
from tests.scripted_model import CHECK, recording, template_of, text_of, user

pytest.importorskip("aiohttp")
END = "<|im_end|>"
ASK = {"model": "any", "messages": [user("6 * 7?")]}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return template_of(tmp_path_factory.mktemp("chat"), "qwen25")


@pytest.fixture
def endpoint():
    from pipeline.rollout.recording.endpoint import Endpoint

    served = Endpoint("policy")
    served.url = served.start()
    yield served
    served.close()
    served.close()  # once more does no harm


def post(endpoint, key, body, path="/chat/completions", **more):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(
        endpoint.url + path, content=content, headers={"Authorization": f"Bearer {key}"}, timeout=30, **more
    )


def failed(response):
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} == error.keys()
    return response.status_code, error["code"], error["message"]


def events(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_an_answer(template, endpoint):
    record, script = recording(template, "42" + END)
    script.cached = 3
    key = endpoint.open(record)
    body = post(endpoint, key, {**ASK, "logprobs": True}).json()
    read = len(script.requests[0].prompt.token_ids)
    assert body["object"] == "chat.completion"
    assert body["model"] == "policy"
    choice = body["choices"][0]
    assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": "42"}, "stop")
    usage = {"prompt_tokens": read, "completion_tokens": 2, "total_tokens": read + 2}
    assert body["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 3}}
    assert [(each["token"], round(each["logprob"], 6)) for each in choice["logprobs"]["content"]] == [
        ("42", -0.01),
        (END, -0.02),
    ]
    assert text_of(template, record.sample("done").token_ids[-2:]) == "42" + END


def test_a_stream_holds_the_same(template, endpoint):
    call = '\n<tool_call>\n{"name": "check", "arguments": {"answer": "6"}}\n</tool_call>'
    record, _ = recording(template, "So." + call + END)
    asked = {**ASK, "tools": [CHECK], "stream": True, "logprobs": True, "stream_options": {"include_usage": True}}
    response = post(endpoint, endpoint.open(record), asked)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    first, words, called, last, usage = events(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert words["choices"][0]["delta"] == {"content": "So."}
    assert len(words["choices"][0]["logprobs"]["content"]) == usage["usage"]["completion_tokens"]
    (delta,) = called["choices"][0]["delta"]["tool_calls"]
    assert (delta["index"], delta["id"], delta["function"]["name"]) == (0, "call00000", "check")
    assert json.loads(delta["function"]["arguments"]) == {"answer": "6"}
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert usage["choices"] == []


def test_completions(template, endpoint):
    record, _ = recording(template, "42" + END, "43" + END, [30, 0])
    key = endpoint.open(record)
    body = post(endpoint, key, {"model": "any", "prompt": "6 * 7 = ", "logprobs": 1}, "/completions").json()
    choice = body["choices"][0]
    assert (body["object"], choice["text"], choice["finish_reason"]) == ("text_completion", "42", "stop")
    assert choice["logprobs"]["tokens"] == ["42", END]
    assert choice["logprobs"]["text_offset"] == [0, 2]
    streamed = post(endpoint, key, {"model": "any", "prompt": ["6 * 7 = 42, no: "], "stream": True}, "/completions")
    assert "".join(event["choices"][0]["text"] for event in events(streamed)) == "43"
    assert len(record.sample("done").turns) == 2
    assert post(endpoint, key, {"prompt": [[5, 6]]}, "/completions").json()["choices"][0]["finish_reason"] == "stop"


def test_models(endpoint, template):
    key = endpoint.open(recording(template)[0])
    listed = httpx.get(endpoint.url + "/models", headers={"Authorization": f"Bearer {key}"}).json()
    assert [model["id"] for model in listed["data"]] == ["policy"]


def test_keys(template, endpoint):
    keys = [endpoint.open(recording(template, "42" + END)[0]) for _ in range(2)]
    assert len({*keys}) == 2
    assert failed(post(endpoint, "guess", ASK))[:2] == (401, "invalid_api_key")
    assert failed(httpx.post(endpoint.url + "/chat/completions", json=ASK))[:2] == (401, "invalid_api_key")
    endpoint.close_episode(keys[0])
    assert failed(post(endpoint, keys[0], ASK))[:2] == (401, "invalid_api_key")
    assert post(endpoint, keys[1], ASK).status_code == 200


def with_schema(parameters):
    return {**CHECK, "function": {**CHECK["function"], "parameters": parameters}}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        (b"[" * 50_000, "not JSON"),
        (b"[]", "must be a JSON object, not list"),
        ({**ASK, "stream": True, "stream_options": "usage"}, "stream_options must be an object"),
        ({**ASK, "n": 2}, "n=2 answers at once"),
        ({**ASK, "tool_choice": "required"}, "a forced call is not drawn from the policy"),
        ({**ASK, "response_format": {"type": "json_object"}}, "response_format must be text"),
        ({**ASK, "functions": [{}]}, "use tools"),
        ({**ASK, "tools": "check"}, "tools must be a list of objects"),
        ({**ASK, "tools": [CHECK, "check"]}, 'tools[1] must be {"type": "function"'),
        ({**ASK, "tools": [CHECK["function"]]}, 'tools[0] must be {"type": "function"'),
        ({**ASK, "tools": [{"type": "function", "function": {"description": "?"}}]}, "tools[0].function must be"),
        ({**ASK, "tools": [with_schema([])]}, "tools[0].function.parameters of check must be a JSON schema"),
        ({**ASK, "tools": [with_schema({"type": "string"})]}, "must be a JSON schema of type object"),
        ({**ASK, "tools": [with_schema({"properties": ["answer"]})]}, "must be a JSON schema of type object"),
        ({"model": "any"}, "at least one message"),
        ({**ASK, "stop": [""]}, "stop must be a text, or a list of at most 4 texts, none of them empty"),
        ({**ASK, "stop": ["a"] * 5}, "at most 4 texts"),
        ({**ASK, "stop": 3}, "stop must be a text"),
        ({**ASK, "stop": "\ud800"}, "stop must be a text"),
    ],
)
def test_what_is_refused(template, endpoint, body, message):
    status, code, said = failed(post(endpoint, endpoint.open(recording(template)[0]), body))
    assert (status, code) == (400, "invalid_request")
    assert message in said


def test_prompts_that_are_refused(template, endpoint):
    key = endpoint.open(recording(template)[0])
    for prompt in ("", [], ["a", "b"], [1, "a"], [-1], None):
        assert "one list of token ids" in failed(post(endpoint, key, {"prompt": prompt}, "/completions"))[2]


def test_tools_for_a_model_without_them(tmp_path, endpoint):
    key = endpoint.open(recording(template_of(tmp_path, "chatml"))[0])
    status, _, said = failed(post(endpoint, key, {**ASK, "tools": [CHECK]}))
    assert status == 400
    assert "data.chat_template_file" in said


def test_other_addresses(template, endpoint):
    key = endpoint.open(recording(template)[0])
    assert failed(post(endpoint, key, ASK, "/embeddings"))[:2] == (404, "not_found")
    assert failed(httpx.get(endpoint.url + "/completions"))[:2] == (405, "method_not_allowed")


def test_sampling_is_the_runs(template, endpoint, caplog):
    record, script = recording(template, "1" + END, "2" + END, temperature=1.25)
    key = endpoint.open(record)
    own = {"temperature": 0, "seed": 3, "max_tokens": 1, "logit_bias": {}, "user": "me", "top_p": None, "a\nb": 1}
    with caplog.at_level(logging.WARNING):
        answers = [post(endpoint, key, {**ASK, **own}) for _ in range(2)]
    assert {answer.headers["Isentrope-Unused"] for answer in answers} == {"logit_bias, max_tokens, seed, temperature"}
    told = [each.getMessage() for each in caplog.records if "is not used" in each.getMessage()]
    assert len(told) == 4
    assert "temperature=0" in told[0]
    assert [(request.temperature, request.max_new_tokens) for request in script.requests] == [(1.25, 64)] * 2
    assert script.requests[0].seeds == (5,)


def test_a_client_has_stops_of_its_own(template, endpoint):
    """As of OpenAI it is not told of the stop text. The conversation goes on behind what was drawn, to the last id."""
    drawn = "Action: check\nObservation:"
    record, script = recording(template, drawn, "42" + END, *["6\n"] * 4)
    key = endpoint.open(record)
    choice = post(endpoint, key, {**ASK, "stop": ["nobody says this", "\nObservation"]}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Action: check", "stop")
    assert script.requests[0].stop == ("nobody says this", "\nObservation")
    follow = {"messages": [*ASK["messages"], choice["message"], user("right")], "stop": None}
    assert post(endpoint, key, follow).status_code == 200
    assert script.requests[1].stop == ()
    assert drawn + END + "\n<|im_start|>user" in text_of(template, script.requests[1].prompt.token_ids)
    assert (len(record.sample("done").turns), record.dropped) == (2, (0, 0))
    text = "2 * 3 = "
    for _ in range(2):  # an agent that writes on behind the stop text, which it knows
        asked = {"prompt": text, "stop": "\n", "stream": True}
        assert (
            "".join(event["choices"][0]["text"] for event in events(post(endpoint, key, asked, "/completions"))) == "6"
        )
        text += "6\nand 2 * 3 = "
    post(endpoint, key, {"prompt": text.rstrip() + " ", "stop": "\n"}, "/completions")
    assert [len(record.sample("done").turns), record.dropped[0]] == [3, 1]


def test_limits_are_told_as_openai_does(template, endpoint):
    record, _ = recording(template, "1" + END, limits=Limits(64, 9, 1))
    assert failed(post(endpoint, endpoint.open(record), ASK))[:2] == (400, "context_length_exceeded")
    assert record.ended == "token_limit"


def test_a_huge_body_is_refused_before_it_is_read(template, endpoint):
    record, script = recording(template)
    key = endpoint.open(record)
    huge = {**ASK, "messages": [user("x" * 10_000_000)]}
    status, code, said = failed(post(endpoint, key, huge))
    assert (status, code, record.ended) == (400, "context_length_exceeded", "token_limit")
    assert "maximum context length is 4096 tokens" in said
    assert script.requests == []

    def parts():  # of unknown length
        for _ in range(40):
            yield b"x" * 500_000

    sent = httpx.post(endpoint.url + "/chat/completions", content=parts(), headers={"Authorization": f"Bearer {key}"})
    assert failed(sent)[:2] == (413, "request_too_large")


def test_an_engines_failure_is_the_servers(template, endpoint):
    record, _ = recording(template, EngineError("engine 0 died"))
    assert failed(post(endpoint, endpoint.open(record), ASK)) == (503, "engine_failed", "engine 0 died")


def test_episodes_at_once(template, endpoint):
    """Each gets its own answers, whatever the others do."""
    found = {number: recording(template, *(f"{number}.{turn}{END}" for turn in range(3))) for number in range(12)}
    keys = {number: endpoint.open(record) for number, (record, _) in found.items()}

    def play(number):
        messages = [user("?")]
        for _ in range(3):
            messages += [
                post(endpoint, keys[number], {"messages": messages}).json()["choices"][0]["message"],
                user("?"),
            ]
        return [message["content"] for message in messages[1::2]]

    with ThreadPoolExecutor(12) as threads:
        said = list(threads.map(play, found))
    assert said == [[f"{number}.{turn}" for turn in range(3)] for number in found]
    assert {len(record.sample("done").turns) for record, _ in found.values()} == {3}


def test_a_client_that_goes_away_while_the_model_draws(template, endpoint):
    """Its answer is given up, and the next request is drawn under the same seed."""
    record, script = recording(template, "42" + END)
    begun, cancelled, draw = threading.Event(), threading.Event(), record._draw

    async def slow(request):
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    record._draw = slow
    key = endpoint.open(record)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            endpoint.url + "/chat/completions", json=ASK, headers={"Authorization": f"Bearer {key}"}, timeout=0.5
        )
    assert begun.is_set()
    assert cancelled.wait(10)
    record._draw = draw
    assert post(endpoint, key, ASK).status_code == 200
    assert [request.seeds for request in script.requests] == [(5,)]


def test_a_client_that_goes_away_in_mid_stream(template, endpoint):
    """What was drawn stays recorded, and the episode goes on."""
    record, _ = recording(template, "a" * 40 + END, "42" + END)
    key = endpoint.open(record)
    with httpx.stream(
        "POST",
        endpoint.url + "/chat/completions",
        json={**ASK, "stream": True, "logprobs": True},
        headers={"Authorization": f"Bearer {key}"},
    ) as response:
        next(response.iter_raw(16))
    follow = [*ASK["messages"], {"role": "assistant", "content": "a" * 40}, user("and?")]
    assert post(endpoint, key, {"messages": follow}).json()["choices"][0]["message"]["content"] == "42"
    assert len(record.sample("done").turns) == 2
