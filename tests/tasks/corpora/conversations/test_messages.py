"""Rows of every form become the same messages; what is not a conversation is named by its place."""

import json

import pytest

from elastic_core.errors import UserError
from tasks.corpora.conversations.messages import Fields, NoContent, conversation

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}


def read(row, **fields):
    return conversation(row, Fields(**fields), "a.jsonl, line 7")


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"messages": [USER, ANSWER]}, {}),
        ({"messages": json.dumps([USER, ANSWER])}, {}),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, {}),
        ({"conversations": [USER, ANSWER]}, {}),
        ({"prompt": "2 + 2?", "completion": "4"}, {}),
        ({"prompt": [USER], "completion": [ANSWER]}, {}),
        ({"question": "2 + 2?", "answer": "4", "messages": []}, {"prompt": "question", "completion": "answer"}),
        ({"data": {"chat": [USER, ANSWER]}}, {"messages": "data.chat"}),
        (
            {
                "messages": [
                    USER | {"content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]},
                    ANSWER,
                ]
            },
            {},
        ),
        ({"messages": [USER | {"tool_calls": None, "name": None}, ANSWER | {"reasoning_content": None}]}, {}),
    ],
)
def test_forms(row, fields):
    found = read(row, **fields)
    assert found.messages == [USER, ANSWER] and found.is_target == [False, True] and found.tools is None
    assert found.first_request() == "2 + 2?" and len(found) == 7 and found.text() == "2 + 2?\n4"


def test_roles_thinking_calls_and_line_ends():
    row = {
        "system": "Be short.",
        "tools": '[{"name": "add"}]',
        "conversations": [
            {"from": "human", "value": "a\r\nb"},
            {"from": "function_call", "value": '{"name": "add", "arguments": "{\\"a\\": 1}"}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "one"},
        ],
    }
    found = read(row)
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[1]["content"] == "a\nb" and found.tools == [{"name": "add"}]
    assert found.messages[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert found.is_target == [False, False, True, False, True]
    call = {"type": "function", "function": {"name": "f", "arguments": "not json"}}
    given = [USER, {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call]}]
    message = read({"messages": given}).messages[1]
    assert message["content"] == "" and message["reasoning_content"] == "hm" and message["tool_calls"] == [call]


def test_calls_and_thinking_need_no_content():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    for more in ({"tool_calls": [call]}, {"reasoning_content": "hm"}, {"thinking": "hm"}):
        message = read({"messages": [USER, {"role": "assistant"} | more]}).messages[1]
        assert message["content"] == "" and message.items() >= more.items()
    given = [{"from": "human", "value": "a"}, {"from": "gpt", "thinking": "hm"}]
    assert read({"conversations": given}).messages[1]["reasoning_content"] == "hm"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "2 + 2?", "completion": "4"}, "Be short."),
        ({"prompt": [USER], "completion": [ANSWER]}, "Be short."),
        ({"messages": [USER, ANSWER]}, "Be short."),
        ({"prompt": [{"role": "system", "content": "Own."}, USER], "completion": "4"}, "Own."),
        ({"messages": [{"role": "developer", "content": "Own."}, USER, ANSWER]}, "Own."),
        ({"conversations": [{"from": "system", "value": "Own."}, USER, ANSWER]}, "Own."),
    ],
)
def test_the_system_text_of_a_row_stands_once_in_front(row, text):
    found = read(row | {"system": "Be short."})
    assert found.messages == [{"role": "system", "content": text}, USER, ANSWER]
    assert found.is_target == [False, False, True]


def test_only_completions_and_messages_with_weight_are_targets():
    found = read({"prompt": [USER, ANSWER, USER], "completion": "5"})
    assert found.is_target == [False, False, False, True]
    found = read({"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}]})
    assert found.is_target == [False, False, False, True] and "weight" not in found.messages[1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": None}, "null"),
        ({"messages": []}, "empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "null"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "null"),
        ({"messages": [USER, {"role": "assistant", "name": "bot"}]}, "null"),
        ({"conversations": [USER, {"from": "function_call"}]}, "null"),
        ({"conversations": [USER, {"from": "function_call", "value": " "}]}, "null"),
        ({"conversations": [USER, {"from": "tool_call", "value": "null"}]}, "null"),
        ({"prompt": None, "completion": "4"}, "null"),
        ({"prompt": " ", "completion": ""}, "empty"),
    ],
)
def test_rows_without_a_conversation(row, reason):
    with pytest.raises(NoContent, match=reason):
        read(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"no conversation \(fields: 'text'\); allowed: messages .role, content., conversations"),
        ("x", "expected an object with a conversation, got text"),
        ({"messages": "not a list"}, "'messages' must be a list of messages, got text"),
        ({"messages": ["a"]}, "'messages' must be a list of messages, got a list with other things"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "unknown role 'critic'; allowed: system, user, assistant"),
        ({"messages": [{"content": "x"}]}, "unknown role None; allowed"),
        ({"messages": [{"role": "user", "content": 3}]}, "the content must be text or a list of parts, got int"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url' cannot be"),
        ({"messages": [USER, ANSWER | {"tool_calls": "{"}]}, "'tool_calls' is text that is not JSON"),
        (
            {"messages": [USER, {"role": "tool_call", "content": "[3]"}]},
            "'tool_call' must be a list of objects, got a",
        ),
        ({"messages": [USER], "tools": {"a": 1}}, "'tools' must be a list, got dict"),
        ({"prompt": "a", "completion": 3}, "'completion' must be a list of messages, got int"),
    ],
)
def test_what_is_no_conversation_is_named(row, message):
    with pytest.raises(UserError, match=rf"a\.jsonl, line 7: {message}"):
        read(row)


def test_a_missing_field_is_named():
    with pytest.raises(UserError, match=r"a\.jsonl, line 7: no field 'chat' \(fields: 'text'\); set field"):
        read({"text": "x"}, messages="chat")
