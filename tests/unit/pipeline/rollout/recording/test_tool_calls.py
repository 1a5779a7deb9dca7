"""Tool calls are read from every family's form, and what is no call stays words."""

import json

import pytest

from pipeline.data import DataError
from pipeline.data.tokenizer import load_tokenizer
from pipeline.rollout.recording.template import ConversationTemplate
from pipeline.rollout.recording.tool_calls import ToolCallReader
from tests.chat_folder import write_chat_folder
from tests.scripted_model import template_of

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "note": {"type": "string"}}},
    },
}
GIVEN = {"a": 3, "note": "7"}
AS_JSON = json.dumps(GIVEN)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("qwen25", f'Let me.\n<tool_call>\n{{"name": "add", "arguments": {AS_JSON}}}\n</tool_call>', "Let me."),
        ("qwen3", f'<think>\nx\n</think>\n\n<tool_call>{{"name": "add", "arguments": {AS_JSON}}}</tool_call>', None),
        ("llama3", f'{{"name": "add", "parameters": {AS_JSON}}}', ""),
        ("llama3", f'<|python_tag|>{{"name": "add", "parameters": {AS_JSON}}}', ""),
        ("mistral", f'[TOOL_CALLS] [{{"name": "add", "arguments": {AS_JSON}}}]', ""),
        (
            "coder",
            "So:\n<tool_call>\n<function=add>\n<parameter=a>\n3\n</parameter>\n<parameter=note>\n7\n</parameter>\n"
            "</function>\n</tool_call>",
            "So:",
        ),
    ],
)
def test_one_call(tmp_path, name, text, words):
    found, calls = ToolCallReader(template_of(tmp_path, name)).read(text, [ADD])
    assert [(call.name, call.arguments) for call in calls] == [("add", GIVEN)]
    assert found == ("<think>\nx\n</think>" if words is None else words)


def test_several_calls_and_one_without_arguments(tmp_path):
    reader = ToolCallReader(template_of(tmp_path, "coder"))
    text = "<function=now>\n</function><function=add>\n<parameter=a>\nmany\n</parameter>\n</function>"
    assert [(call.name, call.arguments) for call in reader.read(text, [ADD])[1]] == [
        ("now", {}),
        ("add", {"a": "many"}),
    ]
    reader = ToolCallReader(template_of(tmp_path, "qwen25"))
    both = f'<tool_call>{{"name": "add", "arguments": {AS_JSON}}}</tool_call>' * 2
    assert len(reader.read(both, [ADD])[1]) == 2


def test_the_newer_form_of_mistral(tmp_path):
    own = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}"
        "{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' + (c.function.arguments | tojson) }}"
        "{% endfor %}{% endfor %}"
    )
    template = ConversationTemplate(load_tokenizer(write_chat_folder(tmp_path, "")), own)
    text = f"Ja.[TOOL_CALLS]add[ARGS]{AS_JSON}[TOOL_CALLS]now[ARGS]{{}}"
    found, calls = ToolCallReader(template).read(text, [ADD])
    assert found == "Ja."
    assert [(call.name, call.arguments) for call in calls] == [("add", GIVEN), ("now", {})]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen25", "42"),
        ("qwen25", '<tool_call>{"name": "add", "arguments": </tool_call>'),
        ("qwen25", '<tool_call>{"name": "add"}</tool_call>'),
        ("qwen25", '<tool_call>{"name": "add", "arguments": "a"}</tool_call>'),
        ("qwen25", "<tool_call>[1]</tool_call>"),
        ("qwen25", '<tool_call>{"name": "add", "arguments": {"a": 3}}'),  # cut
        ("llama3", '{"answer": 42}'),
        ("llama3", "{"),
        ("mistral", '[TOOL_CALLS] [{"name": "add"}]'),
        ("mistral", "[TOOL_CALLS] add"),
        ("coder", "<function=add>"),
    ],
)
def test_what_is_no_call_stays_words(tmp_path, name, text):
    assert ToolCallReader(template_of(tmp_path, name)).read(text, [ADD]) == (text, [])


def test_a_folders_own_schema_goes_first(tmp_path):
    folder = write_chat_folder(tmp_path, "qwen25")
    path = folder / "tokenizer_config.json"
    call = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "arguments": {"type": "object", "x-parser": "json"}},
    }
    calls = {"type": "array", "x-regex-iterator": r"CALL (?P<name>\w+) (?P<arguments>\{.*?\});", "items": call}
    schema = {
        "type": "object",
        "properties": {"content": {"type": "string", "x-regex": "^(.*?)CALL"}, "tool_calls": calls},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"response_schema": schema}))
    reader = ToolCallReader(ConversationTemplate(load_tokenizer(folder)))
    found, read = reader.read(f"Now CALL add {AS_JSON};", [ADD])
    assert (found, [(call.name, call.arguments) for call in read]) == ("Now", [("add", GIVEN)])


def test_a_template_of_unknown_calls_is_refused(tmp_path):
    own = "{{ messages[0].content }}{% if tools %}{{ tools | tojson }}{% endif %}"
    with pytest.raises(DataError, match="Put a response_schema into"):
        ToolCallReader(ConversationTemplate(load_tokenizer(write_chat_folder(tmp_path, "")), own))
    with pytest.raises(DataError, match="shows the model no tools"):
        ToolCallReader(template_of(tmp_path / "other", "smollm2"))
