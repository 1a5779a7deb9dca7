"""One episode: what continues, what branches, what is trained on, where it ends."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import DataError
from pipeline.rollout.recording.messages import RequestError
from pipeline.rollout.recording.recording import Limits
from pipeline.seeds import turn_seed
from pipeline.types import Prompt, WeightSpan
from tests.scripted_model import CHECK, answered, recording, template_of, text_of, user

END = "<|im_end|>"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return template_of(tmp_path_factory.mktemp("chat"), "qwen25")


def say(record, messages, tools=()):
    return asyncio.run(record.chat(messages, tools))


def test_a_conversation_of_two_turns(template):
    record, script = recording(template, "41" + END, "42" + END)
    first = say(record, [user("6 * 7?")])
    second = say(record, [user("6 * 7?"), answered(first), user("no")])
    assert (first.text, first.finish_reason, second.text) == ("41", "stop", "42")
    sample = record.sample("done")
    assert (sample.stop_reason, sample.finish_reason, sample.seed) == ("done", "stop", 5)
    assert text_of(template, sample.token_ids).endswith(
        "assistant\n41<|im_end|>\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n42<|im_end|>"
    )
    assert [request.seeds for request in script.requests] == [(5,), (turn_seed(5, 1),)]
    assert second.prompt_tokens == len(script.requests[1].prompt.token_ids) == sample.turns[1].start
    assert record.dropped == (0, 0)


def test_edited_history_is_a_branch_and_the_newest_is_trained(template):
    record, script = recording(template, "41" + END, "42" + END, "43" + END)
    first = say(record, [user("6 * 7?")])
    say(record, [user("6 * 7?"), answered(first), user("no")])
    edited = {"role": "assistant", "content": "40"}
    say(record, [user("6 * 7?"), edited, user("no")])
    sample = record.sample("done")
    assert [text_of(template, sample.of_drawn(sample.token_ids))] == ["43" + END]
    assert "40<|im_end|>" in text_of(template, script.requests[2].prompt.token_ids)
    lost = sum(len(template.tokenizer.encode_rendered(each + END)) for each in ("41", "42"))
    assert record.dropped == (1, lost)
    assert sample.dropped_tokens == lost


def test_a_fork_keeps_what_it_shares(template):
    """The client goes back to the first answer: it is in the trained branch, the abandoned second one is not."""
    record, script = recording(template, "41" + END, "42" + END, "43" + END)
    first = say(record, [user("6 * 7?")])
    say(record, [user("6 * 7?"), answered(first), user("no")])
    say(record, [user("6 * 7?"), answered(first), user("higher")])
    sample = record.sample("done")
    assert text_of(template, sample.of_drawn(sample.token_ids)) == "41" + END + "43" + END
    assert record.dropped == (1, len(template.tokenizer.encode_rendered("42" + END)))
    assert script.requests[2].seeds == (turn_seed(5, 2),)


def test_the_same_question_twice_is_drawn_twice(template):
    record, script = recording(template, "1" + END, "2" + END)
    assert [say(record, [user("?")]).text for _ in range(2)] == ["1", "2"]
    assert script.requests[0].seeds != script.requests[1].seeds
    assert record.dropped[0] == 1


def test_two_conversations_by_turns(template):
    """Of an agent and its helper: each continues its own."""
    record, _ = recording(template, *(f"{number}{END}" for number in range(4)))
    agent, helper = [user("agent")], [user("helper")]
    for messages in (agent, helper, agent, helper):
        messages += [answered(say(record, messages)), user("go on")]
    sample = record.sample("done")
    assert text_of(template, sample.of_drawn(sample.token_ids)) == f"1{END}3{END}"
    assert record.dropped[0] == 1


def test_blanks_around_an_answer_and_ids_of_calls_may_be_lost(template):
    call = '\n<tool_call>\n{"name": "check", "arguments": {"answer": "6"}}\n</tool_call>'
    record, script = recording(template, " So." + call + END, "42 \n" + END, "7" + END)
    messages = [user("6 * 7?")]
    first = answered(say(record, messages, [CHECK]))
    del first["tool_calls"][0]["id"]
    messages += [first, {"role": "tool", "content": "wrong"}]
    second = answered(say(record, messages, [CHECK]))
    messages += [{**second, "content": second["content"].strip()}, user("thanks")]
    say(record, messages, [CHECK])
    assert [turn.finish_reason for turn in record.sample("done").turns] == ["tool_calls", "stop", "stop"]
    assert "wrong" in text_of(template, script.requests[1].prompt.token_ids)


def test_other_tools_are_another_conversation(template):
    record, _ = recording(template, "41" + END, "42" + END)
    messages = [user("6 * 7?")]
    messages += [answered(say(record, messages)), user("no")]
    say(record, messages, [CHECK])
    assert record.dropped[0] == 1


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_whatever_a_client_does_every_drawn_token_is_trained_or_counted(template, data):
    """And what is trained on is what the engine was asked, followed by what it drew, token for token."""
    turns = data.draw(st.integers(1, 7))
    word = st.integers(20, 270)
    said = [[*data.draw(st.lists(word, min_size=1, max_size=4)), 0] for _ in range(turns)]
    record, script = recording(template, *said)
    known = [[]]  # conversations that a client may continue
    for number in range(turns):
        history = known[data.draw(st.integers(0, len(known) - 1))]
        messages = [*history, user(f"question {data.draw(st.integers(0, 1))}")]
        known.append([*messages, answered(say(record, messages))])
        sample = record.sample("done")
        asked = [*script.requests[number].prompt.token_ids, *said[number]]
        assert sample.token_ids.tolist() == asked
        total = sum(len(each) for each in said[: number + 1])
        assert sample.drawn_tokens + record.dropped[1] == total
        for turn in sample.turns:
            assert sample.drawn[turn.start : turn.end].all()
        assert sum(turn.end - turn.start for turn in sample.turns) == sample.drawn_tokens


def test_spans_of_weights_lie_on_drawn_tokens(template):
    record, script = recording(template, "41" + END, "42" + END)
    first = say(record, [user("6 * 7?")])
    script.version = 3
    say(record, [user("6 * 7?"), answered(first), user("no")])
    sample = record.sample("done")
    spans = [WeightSpan(version, turn.start, turn.end) for version, turn in zip((0, 3), sample.turns, strict=True)]
    assert sample.weight_versions == tuple(spans)


def test_the_prompts_own_tokens_are_no_part_of_the_sample(template):
    messages = [user("6 * 7?")]
    ids = template.opening(messages, ())
    prompt = Prompt("p", ids, "", None, "exact")
    record, script = recording(template, "42" + END, prompt=prompt)
    say(record, messages)
    assert script.requests[0].prompt.token_ids == ids
    sample = record.sample("done")
    assert text_of(template, sample.token_ids) == "42" + END
    assert sample.drawn.all()
    with pytest.raises(RequestError, match="must begin with prompt 'p'"):
        say(record, [user("7 * 6?")])


def test_limits(template):
    record, _ = recording(template, "1" + END, limits=Limits(64, 4096, max_turns=1))
    say(record, [user("?")])
    with pytest.raises(RequestError, match="has had its 1 turns") as caught:
        say(record, [user("again")])
    assert (record.ended, caught.value.code) == ("turn_limit", "turn_limit")

    opening = len(template.opening([user("?")], ()))
    record, _ = recording(template, "12345678" + END, limits=Limits(64, opening + 3, 9))
    cut = say(record, [user("?")])
    assert (cut.finish_reason, record.ended, len(cut.drawn.token_ids)) == ("length", "token_limit", 3)
    with pytest.raises(RequestError, match="maximum context length is 21 tokens") as caught:
        say(record, [user("?"), answered(cut), user("go on")])
    assert caught.value.code == "context_length_exceeded"

    record, _ = recording(template, "12345678" + END, limits=Limits(3, 4096, 9))
    assert say(record, [user("?")]).finish_reason == "length"
    assert record.ended == ""  # an answer was cut, the episode goes on


def test_nothing_asked_is_an_aborted_sample(template):
    sample = recording(template)[0].sample("environment_error")
    assert (len(sample.token_ids), sample.finish_reason, sample.stop_reason) == (0, "abort", "environment_error")


def test_a_failed_draw_is_no_turn(template):
    record, script = recording(template, OSError("gone"), "42" + END)
    with pytest.raises(OSError, match="gone"):
        say(record, [user("?")])
    assert say(record, [user("?")]).text == "42"
    assert [request.seeds for request in script.requests] == [(5,), (5,)]


def test_requests_at_once_are_answered_one_by_one(template):
    record, script = recording(template, *(f"{number}{END}" for number in range(3)))

    async def together():
        return await asyncio.gather(*(record.chat([user(str(number))]) for number in range(3)))

    assert [each.text for each in asyncio.run(together())] == ["0", "1", "2"]
    assert len({request.seeds for request in script.requests}) == 3


def test_plain_text_and_ids_continue_too(template):
    prompt = Prompt(
        "p", template.tokenizer.encode_rendered("<|im_start|>6 * 7 = "), "<|im_start|>6 * 7 = ", None, "exact"
    )
    record, script = recording(template, "41" + END, "42" + END, prompt=prompt)
    first = asyncio.run(record.complete(prompt.text))
    asyncio.run(record.complete(prompt.text + first.text + " no: "))
    assert text_of(template, script.requests[1].prompt.token_ids) == f"<|im_start|>6 * 7 = 41{END} no: "
    assert text_of(template, record.sample("done").token_ids) == f"41{END} no: 42{END}"

    record, script = recording(template, "41" + END, "42" + END)
    first = asyncio.run(record.complete("6 * 7 = "))
    asyncio.run(record.complete("6 * 7 = " + first.text + END + " no: "))  # the client writes the end too
    assert text_of(template, script.requests[1].prompt.token_ids) == f"6 * 7 = 41{END} no: "

    record, script = recording(template, [30, 31, 0], [32, 0])
    asyncio.run(record.complete([5, 6]))
    asyncio.run(record.complete([5, 6, 30, 31, 0, 9]))
    sample = record.sample("done")
    assert sample.token_ids.tolist() == [5, 6, 30, 31, 0, 9, 32, 0]
    assert sample.drawn.tolist() == [False, False, True, True, True, False, True, True]


def test_tools_for_a_model_without_them(tmp_path):
    record, _ = recording(template_of(tmp_path, "chatml"), "1" + END)
    with pytest.raises(DataError, match="shows the model no tools"):
        say(record, [user("?")], [CHECK])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "at least one message"),
        ([], "at least one message"),
        (["hello"], r"messages\[0\] must be an object"),
        ([{"role": "robot", "content": "x"}], "role='robot' must be one of"),
        ([{"role": "user", "content": 3}], "content must be a text or a list"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url': the model reads text only"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "in a message of the assistant"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "a function with a name"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "is not JSON"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "3"}}]}],
            "must be a JSON object",
        ),
    ],
)
def test_messages_that_cannot_be_read(template, messages, message):
    with pytest.raises(RequestError, match=message):
        say(recording(template)[0], messages)


def test_parts_of_text_are_joined(template):
    record, script = recording(template, "1" + END)
    parts = [{"type": "text", "text": "6 *"}, {"type": "text", "text": " 7"}]
    say(record, [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    read = text_of(template, script.requests[0].prompt.token_ids)
    assert "system\nBe brief.<|im_end|>" in read
    assert "user\n6 * 7<|im_end|>" in read


def test_seeds_of_turns():
    seeds = {turn_seed(seed, turn) for seed in range(50) for turn in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert turn_seed(2**63 - 1, 0) == 2**63 - 1


def test_cached_tokens_are_added_up(template):
    record, script = recording(template, "1" + END, "2" + END)
    script.cached = 7
    messages = [user("?")]
    messages += [answered(say(record, messages)), user("?")]
    say(record, messages)
    assert record.sample("done").cached_tokens == 14


def test_log_probs_are_those_of_the_draw(template):
    record, _ = recording(template, [30, 31, 0], temperature=1.3)
    say(record, [user("?")])
    sample = record.sample("done")
    np.testing.assert_allclose(sample.of_drawn(sample.log_probs), [-0.01, -0.02, -0.03])
    assert sample.temperature == 1.3


def test_experts_are_those_that_read_each_token_for_the_answer_behind_it(template):
    record, script = recording(template, "1" + END, "2" + END)
    script.routed = True
    messages = [user("?")]
    messages += [answered(say(record, messages)), user("?")]
    say(record, messages)
    sample = record.sample("done")
    first = sample.turns[0].end - 1  # the last token of the first answer was read for the second
    assert sample.routes.shape == (len(sample.token_ids) - 1, 1, 1)
    assert sample.routes[:, 0, 0].tolist() == [1] * first + [2] * (len(sample.token_ids) - 1 - first)
    script.answers, script.routed = ["3" + END], False
    say(record, messages)
    assert record.sample("done").routes is None
