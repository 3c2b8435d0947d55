"""A tokenizer's chat template: how it writes messages, and which token ends an assistant's turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError

from elastic_core.errors import UserError
from elastic_core.io.tokenizer_files import ADVICE

# What transformers and the template itself raise for messages that the template does not accept.
RENDER_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
ANSWER = "elastic answer"  # plain words, which no template changes

Messages = Sequence[Mapping]  # each with `role` and `content`, as in OpenAI's interface


def require_chat_template(tokenizer, where: str, name: str | None = None) -> None:
    """Raise UserError unless a transformers tokenizer has a chat template, and one called `name` if that is given.

    `where` starts the message.
    """
    template = tokenizer.chat_template
    if not template:
        raise UserError(f"{where}: the tokenizer has no chat template; {ADVICE}")
    if name is not None and not (isinstance(template, Mapping) and name in template):
        names = ", ".join(template) if isinstance(template, Mapping) else "true, because it has a single template"
        raise UserError(f"{where}: the tokenizer has no chat template {name!r}; allowed: {names}")


def render(tokenizer, messages: Messages, where: str = "chat template", **options) -> str:
    """The text that the tokenizer's chat template writes for `messages`.

    `options`: of transformers' `apply_chat_template`, such as ``add_generation_prompt=True`` or variables of the
    template, or `chat_template`, the text of another one. Raises UserError, which starts with `where`, if the template
    refuses the messages or there is none.
    """
    if options.get("chat_template") is None:
        require_chat_template(tokenizer, where)
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except RENDER_ERRORS as error:
        text = " ".join(str(error).split())
        raise UserError(f"{where}: cannot write these messages ({type(error).__name__}: {text})") from None


def prompt_ids(tokenizer, messages: Messages, where: str = "chat template", **options) -> list[int]:
    """The token ids of `messages` and of the beginning of the assistant's answer to them. See `render`."""
    text = render(tokenizer, messages, where, add_generation_prompt=True, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes bos itself


def knows_thinking(tokenizer) -> bool:
    """Whether the chat template has the switch `enable_thinking`."""
    template = tokenizer.chat_template or ""
    texts = template.values() if isinstance(template, Mapping) else [template]
    return any("enable_thinking" in text for text in texts)


def end_of_turn_id(tokenizer, **options) -> int | None:
    """The token that the chat template writes after an assistant's content, such as that of ``<|im_end|>``.

    `options`: see `render`. None without a template, if the template cannot write a plain conversation, and if it
    writes ordinary text there.
    """
    messages = [{"role": "user", "content": "elastic question"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = render(tokenizer, messages, **options)
    except UserError:
        return None
    _, found, rest = text.rpartition(ANSWER)
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None
