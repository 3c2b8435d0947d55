"""Conversations from rows of data: OpenAI's `messages`, ShareGPT's `conversations`, and pairs of prompt and completion.

All become messages as a chat template reads them: `role`, `content`, and where present `reasoning_content`,
`tool_calls` and `name`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from elastic_core.errors import UserError
from tasks.corpora.json_rows import find_field, nested_names, quoted

ROLES = {  # as the data say → as chat templates say
    **{name: name for name in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"},
    **{"developer": "system", "function": "tool", "function_response": "tool", "observation": "tool"},
    **{"tool_response": "tool", "function_call": "assistant", "tool_call": "assistant"},
}
_CALL_ROLES = ("function_call", "tool_call")  # roles of messages that hold a call as JSON
_REASONING = ("reasoning_content", "reasoning", "thinking")  # names of the same field
_LISTS = ("messages", "conversations", "conversation")  # fields that may hold a list of messages
_KEPT = ("name", "tool_call_id")
_MAIN = frozenset(("role", "content", "from", "value"))  # what most messages have, and nothing else
FORMS = "messages (role, content), conversations (from, value), or prompt and completion"


@dataclass(slots=True)  # not frozen: that would take three times as long to make
class Conversation:
    """One conversation: `messages` as a chat template reads them, and `tools` that the assistant may call.

    `place` is its file and line. `is_target` says for each message whether it may be trained: True for the assistant's
    messages, except those of a prompt, and those with `weight` 0.
    """

    place: str
    messages: list[dict]
    tools: list | None
    is_target: list[bool]

    def __len__(self) -> int:
        """The number of characters of its messages."""
        return sum(len(message["content"]) + len(message.get("reasoning_content", "")) for message in self.messages)

    def text(self) -> str:
        """The messages' texts, one after the other."""
        parts = [part for m in self.messages for part in (m.get("reasoning_content"), m["content"]) if part]
        return "\n".join(parts)

    def first_request(self) -> str:
        """The first user's message, or the first message if there is none."""
        messages = [message for message in self.messages if message["role"] == "user"] or self.messages
        return messages[0]["content"]


class NoContent(Exception):
    """A row without a conversation. The text is the reason: null or empty."""


@dataclass(frozen=True)
class Fields:
    """The names of the fields of a row that hold a conversation. All None: they are recognised by their names."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None

    def names(self) -> tuple[str, ...]:
        """Names that may occur once only in a row."""
        given = tuple(name for name in (self.messages, self.prompt, self.completion) if name)
        return given or (*_LISTS, "prompt", "completion")


def conversation(record, fields: Fields, place: str) -> Conversation:
    """The conversation of a row.

    Raises NoContent for a row without one, and UserError, which names `place`, for what is not a conversation.
    """
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected an object with a conversation, got {_kind(record)}")
    tools = _parsed(record.get("tools"), "tools", place) or None
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{place}: 'tools' must be a list, got {_kind(tools)}")
    name = fields.messages or next((name for name in _LISTS if name in record), None)
    if fields.prompt or fields.completion or (name is None and {"prompt", "completion"} <= record.keys()):
        prompt = _side(record, fields.prompt or "prompt", "user", "prompt_field", place)
        completion = _side(record, fields.completion or "completion", "assistant", "completion_field", place)
        messages, num_prompts = [*prompt, *completion], len(prompt)
    elif name is None:
        found = quoted(nested_names(record))
        raise UserError(f"{place}: no conversation (fields: {found}); allowed: {FORMS}; or set `field`")
    else:
        messages, num_prompts = _messages(find_field(record, name, place, "field"), name, place), 0
    converted = [_message(message, place) for message in messages]
    if not any(message["content"].strip() or len(message) > 2 for message in converted):
        raise NoContent("empty")
    targets = [
        message["role"] == "assistant" and i >= num_prompts and given.get("weight", 1) != 0
        for i, (message, given) in enumerate(zip(converted, messages, strict=True))
    ]
    if isinstance(system := record.get("system"), str) and system and converted[0]["role"] != "system":
        converted, targets = [{"role": "system", "content": _text(system, place)}, *converted], [False, *targets]
    return Conversation(place, converted, tools, targets)


def _side(record: dict, name: str, role: str, parameter: str, place: str) -> list[dict]:
    """The messages of a prompt or a completion, which is a text or a list of messages."""
    value = find_field(record, name, place, parameter)
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, name, place)


def _messages(value, name: str, place: str) -> list[dict]:
    """The list of messages in a field."""
    if value is None:
        raise NoContent("null")
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value, name, place)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        found = "a list with other things" if isinstance(value, list) else _kind(value)
        raise UserError(f"{place}: {name!r} must be a list of messages, got {found}; allowed: {FORMS}")
    if not value:
        raise NoContent("empty")
    return value


def _message(given: dict, place: str) -> dict:
    """A message as a chat template reads it. Raises NoContent if it has no content."""
    is_sharegpt = "role" not in given and "from" in given
    role = given.get("from" if is_sharegpt else "role")
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{place}: unknown role {role!r}; allowed: {', '.join(ROLES)}")
    message = {"role": ROLES[role], "content": _text(given.get("value" if is_sharegpt else "content"), place)}
    if role in _CALL_ROLES:
        calls = _parsed(message["content"], role, place) or []
        calls = _objects(calls if isinstance(calls, list) else [calls], role, place)
        message["tool_calls"] = [_call({"type": "function", "function": call}) for call in calls]
        message["content"] = None
    if not given.keys() <= _MAIN:
        _add_more(message, given, place)
    if message["content"] is None:
        if message["role"] != "assistant" or not (message.get("tool_calls") or message.get("reasoning_content")):
            raise NoContent("null")
        message["content"] = ""  # an assistant that only thinks or calls tools; many templates cannot render a null
    return message


def _add_more(message: dict, given: dict, place: str) -> None:
    """Add what a message has besides its role and content."""
    reasoning = next((given[name] for name in _REASONING if given.get(name) is not None), None)
    if reasoning is not None:
        message["reasoning_content"] = message["thinking"] = _text(reasoning, place)
    if calls := _parsed(given.get("tool_calls"), "tool_calls", place):
        message["tool_calls"] = [_call(call) for call in _objects(calls, "tool_calls", place)]
    message |= {name: given[name] for name in _KEPT if given.get(name) is not None}


def _text(value, place: str) -> str | None:
    """The text of a content: a string, or parts of type text."""
    if value is None:
        return None
    if type(value) is str and "\r" not in value:
        return value
    if isinstance(value, list):
        parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in value]
        others = [part for part in parts if part.get("type", "text") != "text" or not isinstance(part.get("text"), str)]
        if others:
            kind = others[0].get("type", "text")
            raise UserError(f"{place}: a part of type {kind!r} cannot be rendered; allowed: parts of type 'text'")
        value = "".join(part["text"] for part in parts)
    if not isinstance(value, str):
        raise UserError(f"{place}: the content must be text or a list of parts, got {_kind(value)}")
    return value.replace("\r\n", "\n") if "\r" in value else value


def _objects(calls, name: str, place: str) -> list[dict]:
    """The calls of tools in a field. Raises UserError if they are not a list of objects."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        found = "a list with other things" if isinstance(calls, list) else _kind(calls)
        raise UserError(f"{place}: {name!r} must be a list of objects, got {found}")
    return calls


def _call(call: dict) -> dict:
    """A call of a tool. Arguments that are JSON text become an object, which is what chat templates expect."""
    if isinstance(call.get("function"), dict):
        return call | {"function": _call(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except json.JSONDecodeError:
            return call  # the model wrote it so; a template may still print it
        return call | {"arguments": parsed} if isinstance(parsed, dict) else call
    return call


def _parsed(value, name: str, place: str):
    """The value itself, or what its JSON text holds: columns of tables often hold text."""
    if not isinstance(value, str):
        return value or None
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {name!r} is text that is not JSON ({error})") from None


def _kind(value) -> str:
    return "null" if value is None else "text" if isinstance(value, str) else type(value).__name__
