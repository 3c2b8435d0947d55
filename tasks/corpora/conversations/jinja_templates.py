"""Chat templates, compiled as transformers does it, and rendered with less work.

A short conversation takes longer to render than to tokenise if Jinja looks up every message as an unknown object, and
if it copies its own functions for every conversation. The text is the same, and so is what the sandbox allows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import BuiltinMethodType, MethodType

from jinja2.runtime import LoopContext
from jinja2.sandbox import SandboxedEnvironment
from transformers.utils.chat_template_utils import _cached_compile_jinja_template

Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OF_DICT = frozenset(dir(dict))
# What the sandbox gives as it is. It replaces `format` and `format_map` of a text, and hides names with underscores.
_PLAIN = frozenset(
    {(str, name) for name in dir(str) if name[0] != "_" and not name.startswith("format")}
    | {(LoopContext, name) for name in ("first", "last", "index", "index0", "revindex", "revindex0", "length")}
)


class CompiledTemplate:
    """A chat template. It has a state while it renders, so it renders one conversation at a time.

    - `variables`: its variables, the same for all conversations.
    - `has_marks`: whether it has `{% generation %}`, around what the assistant says.

    Raises jinja2.TemplateSyntaxError if it is not valid.
    """

    def __init__(self, text: str, variables: Mapping):
        self._compiled = _cached_compile_jinja_template(text)  # a new one: `quick_lookups` changes its environment
        quick_lookups(self._compiled.environment)
        functions, self._compiled.globals = dict(self._compiled.globals), {}
        self._variables = dict(variables)
        # One context for all conversations: to make one takes as long as to render a short conversation.
        self._context = self._compiled.new_context({**functions, "documents": None}, shared=True)
        self.text = text
        self.has_marks = _GENERATION.search(text) is not None

    def render(self, messages: list[dict], tools: list | None, prompt: bool = False) -> str:
        """The text of the messages, and with `prompt` the start of an assistant's turn behind them.

        Raises one of RENDER_ERRORS for what the template refuses.
        """
        return "".join(self._blocks(messages, tools, prompt))

    def render_marked(self, messages: list[dict], tools: list | None) -> tuple[str, list[Span]]:
        """The text of the messages, and the spans that the template marks, in characters. Errors: see `render`."""
        blocks, spans = [], []
        with self._compiled.environment.activate_tracker(blocks, spans):
            blocks.extend(self._blocks(messages, tools, False))
        return "".join(blocks), spans

    def _blocks(self, messages: list[dict], tools: list | None, prompt: bool) -> Iterator[str]:
        context = self._context
        given = {"tools": tools, "add_generation_prompt": prompt}
        context.parent.update({**given, **self._variables, "messages": messages})
        context.vars, context.exported_vars = {}, set()  # what the last conversation has set
        return self._compiled.root_render_func(context)


def quick_lookups(environment: SandboxedEnvironment) -> None:
    """Make an environment do with less work what most templates do for every message.

    That is: fields of objects, methods of texts, the place in a loop, and `{% generation %}`. The sandbox decides about
    all other attributes, and about all other calls.
    """
    of_sandbox, call_of_sandbox, undefined = environment.getattr, environment.call, environment.undefined
    tracker = environment.activate_tracker.__self__

    def attribute_of(obj, attribute: str):
        kind = type(obj)
        if kind is dict and attribute not in _OF_DICT:
            return obj[attribute] if attribute in obj else undefined(obj=obj, name=attribute)
        return getattr(obj, attribute) if (kind, attribute) in _PLAIN else of_sandbox(obj, attribute)

    def call(context, function, *args, **options):
        kind = type(function)
        if kind is MethodType and function.__self__ is tracker:
            return function(context.eval_ctx, caller=options["caller"])
        if kind is BuiltinMethodType and type(function.__self__) is str:
            options.pop("_loop_vars", None)
            options.pop("_block_vars", None)
            return function(*args, **options)
        return call_of_sandbox(context, function, *args, **options)

    environment.getattr, environment.call = attribute_of, call
