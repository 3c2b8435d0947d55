"""Whether a tokenizer has the chat template that test tasks and benchmarks need; checked before anything trains."""

from collections.abc import Sequence
from pathlib import Path

from elastic_core.config import ConfigError
from elastic_core.data.chat_template import knows_thinking, render, require_chat_template
from elastic_core.data.tokenizer import load_tokenizer
from tasks.settings.sections import Benchmarks


def check_chat_template(
    section: Benchmarks | None, tokenizer: str | Path, where: str = "evaluate.benchmarks", name: str | None = None
) -> None:
    """Raise UserError if prompts need a chat template that the tokenizer in a directory does not have.

    The template has to write a prompt of the section, and to know `enable_thinking` if that is set. `where` starts the
    message. `name`: that of the tokenizer in messages.
    """
    if section is None or not section.apply_chat_template:
        return
    key, found = f"{where}.apply_chat_template", load_tokenizer(tokenizer)
    template = section.apply_chat_template
    require_chat_template(found, f"{key} ({name or tokenizer})", template if isinstance(template, str) else None)
    if isinstance(template, str):
        found.chat_template = found.get_chat_template(template)
    system = [{"role": "system", "content": section.system_instruction}] if section.system_instruction else []
    render(found, [*system, {"role": "user", "content": "question"}], key, add_generation_prompt=True)
    if section.enable_thinking is not None and not knows_thinking(found):
        raise ConfigError(
            f"{where}.enable_thinking: got {section.enable_thinking!r}; allowed: null, because the chat template has "
            "no switch of this name; some models are told in system_instruction, by /think or /no_think"
        )


def check_tasks_template(
    tasks: Sequence[str], tokenizer: str | Path, where: str = "evaluate.tasks", name: str | None = None
) -> None:
    """The same for the test tasks that prepare_data writes: all of them are conversations."""
    if tasks:
        where = f"{where} ({name or tokenizer})"
        render(load_tokenizer(tokenizer), [{"role": "user", "content": "7+5"}], where, add_generation_prompt=True)
