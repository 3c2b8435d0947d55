"""The source kind `conversations`: chats with an assistant, of which a model learns what the assistant says."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_core.config import Require, require
from elastic_core.data.token_files import TOO_LONG
from elastic_core.errors import UserError
from tasks.corpora.conversations.messages import Conversation, Fields, NoContent, conversation
from tasks.corpora.hub_datasets import HubDataset
from tasks.corpora.inputs import Input, Splitter, check_input, digest_of, group_of
from tasks.corpora.text_sources import (
    SPECIAL_TOKENS,
    check_max_characters,
    expected_characters,
    how_held_out,
    limit_characters,
)

TRAIN_ON = ("assistant", "all", "last_assistant")


@dataclass(frozen=True)
class Conversations:
    """Kind `conversations`: a conversation per row of files (in the formats of kind `files`) or of a data set.

    The form of a row is recognised by its fields: `messages` (OpenAI), `conversations` (ShareGPT), or `prompt` and
    `completion`. The tokenizer's chat template renders it. A conversation has exactly the tokens that the template
    writes. Rows without a conversation are skipped and counted.
    """

    path: str | None = None  # a glob: "chats/**/*.jsonl", relative to the working directory, or "s3://bucket/*.jsonl"
    kind: str = "conversations"
    dataset: str | None = None  # instead of `path`: a data set by its name on the hub, or a directory with one
    config: str | None = None  # of the data set
    revision: str | None = None  # of the data set: a commit, tag or branch
    split: str = "train"  # of the data set
    field: str | None = None  # the field with the list of messages; null: recognised by its name
    prompt_field: str | None = None  # names of prompt and completion, where they are others
    completion_field: str | None = None
    chat_template: str | None = None  # a Jinja file; null: the tokenizer's chat template
    template_variables: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # of the template, such as enable_thinking
    train_on: str = "assistant"  # assistant, all or last_assistant
    special_tokens: str = "text"  # the spelling of a special token in a message: text, or parse (it becomes its id)
    too_long: str = "drop"  # of a conversation that is longer than a training sequence: drop, truncate or split
    held_out: float = 0.02  # share of the conversations; a hash of the first user's message selects them
    held_out_path: str | None = None  # a glob: these files are held out, and all of `path` is for training
    group_field: str | None = None  # all rows with one value of this field are in one split
    max_characters: int | None = None  # of training conversations; held-out ones are limited to a twentieth of it
    strict: bool = False  # refuse the first row without a conversation, instead of skipping all of them

    is_generated: ClassVar[bool] = False

    def check(self, require: Require = require) -> None:
        check_max_characters(self.max_characters, require)
        check_input(self, require)
        choices = {"train_on": TRAIN_ON, "special_tokens": SPECIAL_TOKENS, "too_long": TOO_LONG}
        for name, allowed in choices.items():
            require(getattr(self, name) in allowed, name, getattr(self, name), ", ".join(allowed))
        is_pair = self.prompt_field is not None or self.completion_field is not None
        allowed = "null, because prompt_field or completion_field is given"
        require(not (self.field is not None and is_pair), "field", self.field, allowed)

    def documents(
        self, seed: int, skipped: Counter | None = None, notes: Counter | None = None
    ) -> Iterator[tuple[str, Conversation]]:
        """Yield (split, conversation), file by file in the order of their names, `held_out_path` first.

        `seed` has no effect. `skipped` counts rows without a conversation by reason, "null" or "empty"; `notes` counts
        training conversations whose first request is in `held_out_path` too.
        Raises UserError, which names the file and the line or row and says what is wrong. Raises StorageError for a
        URL that cannot be read.
        """
        found = self._read(Counter() if skipped is None else skipped, Counter() if notes is None else notes)
        return limit_characters(found, self.max_characters, how_held_out(self))

    def texts(self, seed: int) -> Iterator[tuple[str, str]]:
        """Yield (split, text of the messages), to train a tokenizer on."""
        return ((split, one.text()) for split, one in self.documents(seed))

    def expected_characters(self) -> int | None:
        """Estimate how many characters `documents` yields in all, for progress bars. None: nobody knows."""
        return expected_characters(self.inputs(), self.max_characters)

    def inputs(self) -> list[Input]:
        """The held-out files, if they are files of their own, and the others."""
        dataset = HubDataset(self.dataset, self.config, self.split, self.revision) if self.dataset else None
        own = [] if self.held_out_path is None else [Input(self.held_out_path)]
        return [*own, Input(self.path, dataset)]

    def _read(self, skipped: Counter, notes: Counter) -> Iterator[tuple[str, Conversation]]:
        splitter = Splitter(self.held_out, self.held_out_path is not None, notes)
        *own, others = self.inputs()
        for one in own:
            for found, _ in self._conversations(one, skipped):
                yield splitter.held_out(_digest(found)), found
        for found, group in self._conversations(others, skipped):
            yield splitter.split(_digest(found), group), found

    def _conversations(self, given: Input, skipped: Counter) -> Iterator[tuple[Conversation, str | None]]:
        """Yield (conversation, group). Raises UserError if there is none."""
        fields = Fields(self.field, self.prompt_field, self.completion_field)
        names = (*fields.names(), "tools", "system", *([self.group_field] if self.group_field else []))
        is_empty = True
        for place, row in given.rows(names):
            try:
                if row == "":  # an empty line
                    raise NoContent("empty")
                found = conversation(row, fields, place)
            except NoContent as reason:
                if self.strict:
                    raise UserError(
                        f"{place}: the conversation is {reason}; `strict: false` skips and counts such rows"
                    ) from None
                skipped[str(reason)] += 1
                continue
            is_empty = False
            yield found, group_of(row, self.group_field, place)
        if is_empty:
            raise UserError(f"{given}: holds no conversation")


def _digest(found: Conversation) -> bytes:
    try:
        return digest_of(found.first_request())
    except UnicodeEncodeError:
        raise UserError(f"{found.place}: holds a lone surrogate, which is not valid Unicode") from None
