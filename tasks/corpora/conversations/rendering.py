"""Renders conversations with a tokenizer's chat template, and finds what the assistant says in the rendered text.

The spans of the assistant are those that the template marks with `{% generation %}`. A template without these marks is
rendered turn by turn: what it writes before a turn (with `add_generation_prompt`) is the prompt, and what it adds is
the assistant's. This needs that the prompt is the start of the turn. A template may write earlier turns in another way
than the last one, for example without their thinking. Such turns become documents of their own, each as at inference:
the messages up to this turn.

A special token that stands in a message is ordinary text: a user must not be able to end a turn. Two characters for
private use mark it in the rendered text, as in transformers (`sanitize_control_tokens`). Exceptions are `<think>` and
`</think>` in the assistant's messages.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerFast

from elastic_core.data.chat_template import RENDER_ERRORS, end_of_turn_id
from elastic_core.errors import UserError
from tasks.corpora.conversations.jinja_templates import CompiledTemplate, Span
from tasks.corpora.conversations.markers import START, strings, with_markers
from tasks.corpora.conversations.messages import Conversation
from tasks.corpora.encoding import CONTROL_STRINGS, any_of, special_tokens

_LONGEST = 64  # characters of a special token
_BEGINNING = 32  # characters of a message
_THINKING = ("<think>", "</think>")

LOST_THINKING = "conversations whose thinking the chat template leaves out"
LOST_MESSAGES = "conversations with a message that the chat template leaves out"


@dataclass(slots=True)  # not frozen: that would take three times as long to make
class Rendered:
    """One document: rendered text, and the spans of it that are trained, in characters (None: all of it).

    The text has markers (START, END) around special tokens that are ordinary text, if `is_marked`.
    """

    text: str
    spans: list[Span] | None
    is_marked: bool = False

    def __len__(self) -> int:
        return len(self.text)


def read_template(path: str | None) -> str | None:
    """The text of a Jinja file; None for None, the tokenizer's own. Raises UserError if it cannot be read."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template {path!r}: cannot read it ({error})") from None


class ChatTemplate:
    """A chat template that renders conversations for training.

    - `template`: a Jinja template; None: the tokenizer's own.
    - `variables`: further variables of the template, such as `enable_thinking`.
    - `train_on`: "assistant": its messages; "last_assistant": the last of them; "all": every token.
    - `parse`: special tokens in messages become their ids, also those of users.

    Raises UserError if there is no template, or if it is not valid.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: str | None = None,
        variables: Mapping | None = None,
        train_on: str = "assistant",
        parse: bool = False,
        name: str = "the tokenizer's chat template",
    ):
        if template is None and not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; set chat_template to a Jinja file")
        self._tokenizer, self._template, self._name = tokenizer, template, name
        self._variables = dict(tokenizer.special_tokens_map) | dict(variables or {})
        self._train_on, self._parse = train_on, parse
        tokens = special_tokens(tokenizer)
        self.special = any_of(tokens)
        self._compiled: dict[str, CompiledTemplate] = {}  # text → template
        self._ends: dict[CompiledTemplate, str | None] = {}  # template → the token that ends a turn
        self._special_of_assistant = any_of(token for token in tokens if token not in _THINKING)
        self._check_syntax()

    def _check_syntax(self) -> None:
        try:
            self._template_for(None)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{self._name}: not a valid template (line {error.lineno}: {error})") from None
        except ValueError as error:
            raise UserError(f"{self._name}: {error}") from None

    def _template_for(self, tools: list | None) -> CompiledTemplate:
        """The template for conversations with these tools: some tokenizers have one of their own for them."""
        text = self._tokenizer.get_chat_template(self._template, tools)
        if text not in self._compiled:
            self._compiled[text] = CompiledTemplate(text, self._variables)
        return self._compiled[text]

    def documents(self, conversation: Conversation, counts: Counter) -> list[Rendered]:
        """The documents of a conversation; none, if nothing of it is trained. Mostly it is one.

        `counts` counts conversations of which the user should know. Raises UserError, which names the file and the
        line, for a conversation that cannot be rendered.
        """
        template = self._template_for(conversation.tools)
        self._check_tools(conversation, template)
        conversation, is_marked = (conversation, False) if self._parse else self._marked(conversation)
        if is_marked:
            counts[CONTROL_STRINGS] += 1
        targets = [i for i, is_target in enumerate(conversation.is_target) if is_target]
        num_messages = len(conversation.messages)
        if self._train_on == "all":
            found = [(self._render(conversation, template), None)]
        elif not targets:
            return []
        elif template.has_marks:
            found = [self._by_marks(conversation, template, targets)]
        else:
            found, has_all = self._by_turns(conversation, template, targets)
            num_messages = num_messages if has_all else targets[-1] + 1  # nothing learns from those behind
        self._check_complete(conversation, num_messages, [text for text, _ in found], counts)
        return [Rendered(text, spans, is_marked) for text, spans in found if spans != []]

    def _check_tools(self, conversation: Conversation, template: CompiledTemplate) -> None:
        """Raise UserError for tools and calls of which the template knows nothing: it would leave them out."""
        used = ["tools"] if conversation.tools else []
        used += ["tool_calls" for message in conversation.messages if "tool_calls" in message]
        for name in used:
            if name not in template.text:
                raise UserError(f"{conversation.place}: has {name}, but {self._name} has no place for them{_ADVICE}")

    def _marked(self, conversation: Conversation) -> tuple[Conversation, bool]:
        """The conversation with markers around special tokens in its messages, and whether there are any."""
        search = self.special.search
        if not any(map(search, strings(conversation.tools))) and not any(
            search(m["content"]) or (len(m) > 2 and any(map(search, strings(m)))) for m in conversation.messages
        ):
            return conversation, False
        messages = [
            with_markers(m, self._special_of_assistant if m["role"] == "assistant" else self.special)
            for m in conversation.messages
        ]
        tools = with_markers(conversation.tools, self.special)
        marked = replace(conversation, messages=messages, tools=tools)
        return marked, (messages, tools) != (conversation.messages, conversation.tools)

    def _render(
        self, conversation: Conversation, template: CompiledTemplate, end: int | None = None, prompt: bool = False
    ) -> str:
        """The text of the first `end` messages. `prompt`: with the start of an assistant's turn behind them."""
        try:
            return template.render(conversation.messages[:end], conversation.tools, prompt)
        except RENDER_ERRORS as error:
            raise self._refused(conversation, error) from None

    def _render_marked(
        self, conversation: Conversation, template: CompiledTemplate, end: int | None = None
    ) -> tuple[str, list[Span]]:
        """The text of the first `end` messages, and the spans that the template marks."""
        try:
            return template.render_marked(conversation.messages[:end], conversation.tools)
        except RENDER_ERRORS as error:
            raise self._refused(conversation, error) from None

    def _refused(self, conversation: Conversation, error: Exception) -> UserError:
        return UserError(f"{conversation.place}: {self._name} cannot render this conversation: {error}")

    def _by_marks(
        self, conversation: Conversation, template: CompiledTemplate, targets: list[int]
    ) -> tuple[str, list[Span]]:
        text, spans = self._render_marked(conversation, template)
        assistants = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        if self._train_on == "last_assistant" or len(targets) < len(assistants):
            if len(spans) != len(assistants):
                raise UserError(
                    f"{conversation.place}: {self._name} marks {len(spans)} parts for {len(assistants)} messages of "
                    "the assistant, so it is not clear which are trained; set another chat_template"
                )
            targets = targets[-1:] if self._train_on == "last_assistant" else targets
            assistants, spans = targets, [span for i, span in zip(assistants, spans, strict=True) if i in targets]
        places = assistants if len(spans) == len(assistants) else [assistants[-1]] * len(spans)
        found = [
            (start, end + len(self._left_out(text, end, conversation, template, i)))
            for i, (start, end) in zip(places, spans, strict=True)
        ]
        return text, [(start, end) for start, end in found if start < end]

    def _by_turns(
        self, conversation: Conversation, template: CompiledTemplate, targets: list[int]
    ) -> tuple[list[tuple[str, list[Span]]], bool]:
        """The documents, and whether one of them has all messages."""
        targets = targets[-1:] if self._train_on == "last_assistant" else targets
        whole, documents = self._render(conversation, template), []
        text = whole
        turns = {i: self._turn(conversation, template, i, text) for i in targets}
        while turns:
            inside = [i for i, (turn, _) in turns.items() if text.startswith(turn)]
            if inside:
                documents.append((text, [turns.pop(i)[1] for i in inside]))
            if turns:  # written in another way inside the whole: as at inference, when this was the last turn
                text = turns[max(turns)][0]
        return documents[::-1], any(text is whole for text, _ in documents)

    def _turn(self, conversation: Conversation, template: CompiledTemplate, index: int, whole: str) -> tuple[str, Span]:
        """The text of the messages up to the assistant's message `index`, and the span of this message in it."""
        is_last = index + 1 == len(conversation.messages)
        text = whole if is_last else self._render(conversation, template, index + 1)
        if index:
            prompt = self._render(conversation, template, index, prompt=True)
        else:  # many templates cannot render an empty list, so look for the start of a turn behind the message
            after = self._render(conversation, template, 1, prompt=True)
            header = after.removeprefix(text)
            at = text.find(header) if header and after.startswith(text) else -1
            prompt = text[: at + len(header)] if at >= 0 else "\0"
        if not text.startswith(prompt):
            raise UserError(
                f"{conversation.place}: {self._name} has no marks {{% generation %}}, and the prompt that it writes "
                f"for message {index + 1} is not the start of how it writes this message, so it is not clear what the "
                "assistant says; set chat_template to a Jinja file with these marks"
            )
        return text, (len(prompt), self._end_of_turn(text, len(prompt)))

    def _end_of_turn(self, text: str, start: int) -> int:
        """The end of a turn, without white space behind its last special token: nobody generates that."""
        ends = [token.end() for token in self.special.finditer(text, start)]
        return ends[-1] if ends and not text[ends[-1] :].strip() else len(text)

    def _token_behind(self, text: str, end: int) -> str | None:
        """The special token behind a marked span, unless the span itself ends with one."""
        following = self.special.match(text, end)
        if following is None:
            return None
        last = len(text[:end].rstrip())  # templates often mark a line end too
        is_inside = any(token.end() == last for token in self.special.finditer(text, max(0, last - _LONGEST), last))
        return None if is_inside else following.group()

    def _left_out(self, text: str, end: int, conversation: Conversation, template: CompiledTemplate, index: int) -> str:
        """The token that ends the turn of message `index`, if the template left it out of its mark; else "".

        It also stands behind a plain answer, or behind this message when nothing follows it. Another token begins the
        next message.
        """
        token = self._token_behind(text, end)
        if token is None:
            return ""
        if template not in self._ends:
            found = end_of_turn_id(self._tokenizer, chat_template=template.text, **self._variables)
            self._ends[template] = None if found is None else self._tokenizer.convert_ids_to_tokens(found)
        if token == self._ends[template]:
            return token
        try:
            text, spans = self._render_marked(conversation, template, index + 1)
        except UserError:  # some templates refuse to end there
            return ""
        return token if spans and self._token_behind(text, spans[-1][1]) == token else ""

    def _check_complete(self, conversation: Conversation, num_messages: int, texts: list[str], counts: Counter) -> None:
        """Count a conversation of which something is missing in `texts`; refuse a missing result of a tool.

        Of its messages, the first `num_messages` are looked for.
        """
        lost_message = lost_thinking = False
        text, at = texts[0], 0
        for number, message in enumerate(conversation.messages[:num_messages], 1):
            content = message["content"]
            begin = text.find(content[:_BEGINNING], at)  # to look for the whole of a long message takes much longer
            if begin >= 0 and text.startswith(content, begin):
                at = begin + len(content)
            elif content not in text and not _is_in(content, texts):
                if message["role"] == "tool":
                    raise UserError(
                        f"{conversation.place}: {self._name} leaves out message {number}, the result of a tool{_ADVICE}"
                    )
                lost_message |= "</think>" not in content
                lost_thinking |= "</think>" in content
            if "reasoning_content" in message:
                lost_thinking |= not _is_in(message["reasoning_content"], texts)
        if lost_message:
            counts[LOST_MESSAGES] += 1
        if lost_thinking:
            counts[LOST_THINKING] += 1


_ADVICE = "; use a tokenizer whose template knows tools, set chat_template, or remove the row"


def _is_in(text: str, texts: list[str]) -> bool:
    """Whether one of `texts` holds the text, as it is or as JSON text, which some templates write."""
    text = text.strip()
    if any(text in one for one in texts):
        return True
    # Not in ASCII if it has markers: these are gone then, so that its special tokens would become tokens.
    forms = {json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, START not in text)}
    return any(form in one for form in forms for one in texts)
