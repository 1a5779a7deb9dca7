"""What is tokenised between answers is what the chat template writes there, for every family of templates."""

import asyncio
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.rollout.recording.messages import RequestError
from pipeline.rollout.recording.template import ConversationTemplate
from tests.chat_folder import CALLING, ENDS, NAMES
from tests.scripted_model import CHECK, answered, recording, template_of, text_of, user

OWN_END = dict.fromkeys(NAMES, "<|im_end|>") | {"llama3": "<|eot|>", "mistral": "<|end|>", "llama2": "<|end|>"}
WORDS = st.text("ab *=\n?", min_size=1, max_size=12).filter(str.strip)


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    return {name: template_of(folder, name) for name in NAMES}


def talk(template, said, questions, tools=()):
    """The recording of a conversation of plain answers ``said`` (token ids) to ``questions``, and its messages."""
    record, script = recording(template, *said)
    messages = []
    for question in questions:
        messages += [user(question)] if isinstance(question, str) else question
        completion = asyncio.run(record.chat(messages, tools))
        messages.append(answered(completion))
    return record, script, messages


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_models_words_stay_and_the_rest_is_the_templates(templates, name, data):
    """Whatever tokens the model drew, however it ended: each request begins with the whole of the last one and its
    answer, and what comes behind is what the template writes behind an answer.
    """
    template = templates[name]
    tokenizer = template.tokenizer
    ends = st.sampled_from([[], *([tokenizer.encode_rendered(end)[0]] for end in ENDS)])
    word = st.integers(len(ENDS) + 9, 270)  # any piece of a text, also such as no tokenizer would choose
    said = [
        [*data.draw(st.lists(word, min_size=1, max_size=8)), *data.draw(ends)]
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    questions = [data.draw(WORDS) for _ in said]
    record, script, messages = talk(template, said, questions)
    sample = record.sample("done")
    assert [sample.token_ids[turn.start : turn.end].tolist() for turn in sample.turns] == said
    assert sample.of_drawn(sample.token_ids).tolist() == [token for answer in said for token in answer]
    assert not sample.log_probs[~sample.drawn].any()
    assert sample.log_probs[sample.drawn].all()
    asked = [list(request.prompt.token_ids) for request in script.requests]
    assert asked[0] == list(tokenizer.encode_rendered(tokenizer.render_chat(messages[:1])))
    for number, (before, answer, now) in enumerate(zip(asked, said, asked[1:], strict=False)):
        assert now[: len(before) + len(answer)] == before + answer
        between = text_of(template, now[len(before) + len(answer) :])
        plain = [*messages[: 2 * number + 1], {"role": "assistant", "content": "WORDS"}, messages[2 * number + 2]]
        written = tokenizer.render_chat(plain).partition("WORDS")[2]
        ended = text_of(template, answer[-1:])
        closes = ended == OWN_END[name]
        assert written == (written[: written.index(ended) + len(ended)] if closes else "") + between


@pytest.mark.parametrize("name", sorted({*NAMES} - {"qwen3"}))
def test_a_well_formed_conversation_reads_as_rendered_anew(templates, name):
    """Where the template changes no earlier turn, and the answers hold no blanks to trim."""
    template = templates[name]
    blank = {"mistral": " ", "llama2": " "}.get(name, "")  # written before the words, hence drawn
    closing = {"llama2": " <|end|>"}.get(name, OWN_END[name])
    said = [template.tokenizer.encode_rendered(f"{blank}{words}{closing}") for words in ("41?", "42")]
    _, script, messages = talk(template, said, ["6 * 7?", "higher"])
    trimmed = [{**message, "content": message["content"].strip()} for message in messages[:3]]
    assert text_of(template, script.requests[-1].prompt.token_ids) == template.tokenizer.render_chat(trimmed)


def test_thoughts_of_earlier_turns_stay_as_they_were_drawn(templates):
    template = templates["qwen3"]
    said = ["<think>\n6 * 7\n</think>\n\n41<|im_end|>", "42<|im_end|>"]
    _, script, messages = talk(template, said, ["6 * 7?", "higher"])
    read = text_of(template, script.requests[1].prompt.token_ids)
    assert "<think>\n6 * 7\n</think>" in read
    assert "6 * 7\n" not in template.tokenizer.render_chat(messages[:3])  # rendered anew they would be gone
    assert read.endswith("41<|im_end|>\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n")


def test_variables_reach_every_turn(tmp_path):
    template = template_of(tmp_path, "qwen3", enable_thinking=False)
    _, script, _ = talk(template, ["1<|im_end|>", "2<|im_end|>"], ["a", "b"])
    for request in script.requests:
        assert text_of(template, request.prompt.token_ids).endswith("assistant\n<think>\n\n</think>\n\n")


CALLS = {
    "qwen25": '<tool_call>\n{"name": "check", "arguments": {"answer": "6"}}\n</tool_call><|im_end|>',
    "qwen3": 'So.\n<tool_call>\n{"name": "check", "arguments": {"answer": "6"}}\n</tool_call><|im_end|>',
    "coder": "<tool_call>\n<function=check>\n<parameter=answer>\n6\n</parameter>\n</function>\n</tool_call><|im_end|>",
    "llama3": '{"name": "check", "parameters": {"answer": "6"}}<|eot|>',
    "mistral": '[TOOL_CALLS] [{"name": "check", "arguments": {"answer": "6"}}]<|end|>',
}


@pytest.mark.parametrize("name", CALLING)
def test_results_of_tools_follow_the_call_as_it_was_drawn(templates, name):
    template = templates[name]
    results = [{"role": "tool", "content": "wrong", "tool_call_id": "call00000"}]
    end = OWN_END[name]
    drawn = [CALLS[name], CALLS[name], f"42{end}"]
    record, script, messages = talk(template, drawn, ["6 * 7?", results, results], [CHECK])
    assert messages[1]["tool_calls"][0]["function"] == {"name": "check", "arguments": {"answer": "6"}}
    texts = [text_of(template, request.prompt.token_ids) for request in script.requests]
    for before, now in itertools.pairwise(texts):
        assert now.startswith(before + CALLS[name])
        between = now[len(before + CALLS[name]) :]
        assert "wrong" in between
        assert end not in between.partition("wrong")[0]  # the model drew it
    whole = template.tokenizer.render_chat(messages[:3], tools=[CHECK])
    assert whole.endswith(texts[1][len(texts[0] + CALLS[name]) :])
    assert record.sample("done").drawn_tokens == sum(len(template.tokenizer.encode_rendered(each)) for each in drawn)


def test_several_results_at_once(templates):
    template = templates["qwen25"]
    twice = CALLS["qwen25"].removesuffix("<|im_end|>") + "\n" + CALLS["qwen25"]
    results = [{"role": "tool", "content": content, "tool_call_id": "x"} for content in ("wrong", "right")]
    _, script, messages = talk(template, [twice, "42<|im_end|>"], ["6 * 7?", results], [CHECK])
    assert len(messages[1]["tool_calls"]) == 2
    assert text_of(template, script.requests[1].prompt.token_ids).endswith(
        "</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nwrong\n</tool_response>"
        "\n<tool_response>\nright\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_end_within_the_new_messages_closes_nothing(templates):
    """The model drew an end that is not the template's, and the next question holds it."""
    template = templates["chatml"]
    _, script, _ = talk(template, ["1<|eot|>", "2<|im_end|>"], ["a", "say <|eot|>"])
    read = text_of(template, script.requests[1].prompt.token_ids)
    assert "1<|eot|><|im_end|>\n<|im_start|>user\nsay <|eot|>" in read


def test_refusals_say_which_template(templates):
    with pytest.raises(RequestError, match="roles must alternate"):
        templates["mistral"].opening([user("a"), user("b")], ())
    assert {name for name, template in templates.items() if template.renders_tools} == {*CALLING}


def test_a_template_that_hides_the_answer_is_refused(templates):
    hiding = ConversationTemplate(
        templates["chatml"].tokenizer, "{% for m in messages if m.role == 'user' %}x{% endfor %}"
    )
    with pytest.raises(RequestError, match="writes an answer 0 times"):
        hiding.following([user("a"), {"role": "assistant", "content": "b"}, user("c")], 1, 0, ())


def test_rows_of_ids_are_int64(templates):
    record, _, _ = talk(templates["chatml"], ["1<|im_end|>"], ["a"])
    sample = record.sample("done")
    assert (sample.token_ids.dtype, sample.log_probs.dtype, sample.drawn.dtype) == (np.int64, np.float32, bool)
