"""A family as the server sees it: its budgets by name, and its tokenizer."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from elastic_core import NestedModel
from elastic_core.cost.metrics import num_parameters
from elastic_core.data.chat_template import Messages, knows_thinking, prompt_ids, render
from elastic_core.data.tokenizer import load_tokenizer, require_tokenizer
from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint
from elastic_core.export.conversation import new_cache
from elastic_core.model.hf import errors_of_transformers
from elastic_core.model.submodel import Submodel
from tasks.serving.batch import read
from tasks.serving.sampling import Chooser, Settings

LONGEST_NAME = 64  # characters of a budget
MOST_NAMES = 1000  # spellings of budgets that are remembered


@dataclass(frozen=True)
class Budget:
    """A member of the family. `label` names it in metrics and in the log, however it was spelled."""

    label: str
    submodel: Submodel
    model: PreTrainedModel
    num_parameters: int


class Family:
    """An elastic checkpoint with its tokenizer, in memory once."""

    def __init__(self, directory: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"):
        """Raises UserError unless `directory` is a family with a tokenizer, and its budgets are nested."""
        elastic_checkpoint.read(directory)
        require_tokenizer(directory)
        self.tokenizer = load_tokenizer(directory, trust_remote_code=False)
        self.model = NestedModel.from_pretrained(directory, dtype, device)
        self.config = self.model.config
        self._lock, self._found = threading.Lock(), {}
        self.budgets = {name: self.budget(name) for name in self.model.budgets}
        with torch.no_grad():
            for budget in self.budgets.values():
                _try(directory, budget)

    def budget(self, name: str) -> Budget:
        """The member for a budget's name or any spelling of a budget. Can be called from several threads.

        Raises UserError if there is none.
        """
        if len(name) > LONGEST_NAME:
            raise UserError(f"model: got {len(name)} characters; allowed: a budget, such as small, 0.55 or 9B")
        with self._lock:
            if name not in self._found:
                if len(self._found) == MOST_NAMES:
                    self._found.clear()
                self._found[name] = self._budget(name)
            return self._found[name]

    def _budget(self, name: str) -> Budget:
        submodel = self.model.submodel(name)
        number = num_parameters(self.config, submodel)
        label = next((known for known, trained in self.model.budgets.items() if trained == submodel), None)
        label = label or f"{number / num_parameters(self.config):.3f}"
        return Budget(label, submodel, self.model.at(submodel), number)

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text. Raises UserError if there are none."""
        ids = self.tokenizer(text)["input_ids"]
        if not ids:
            raise UserError("prompt: got no tokens; allowed: a text that is not empty")
        return ids

    def chat_tokens(self, messages: Messages, continued: bool = False, **options) -> list[int]:
        """The token ids of messages in the chat template, and of the beginning of the assistant's answer to them.

        continued: the last message is an answer to go on with, instead of one to answer. options: variables of the
        template. Raises UserError if the template refuses the messages.
        """
        if "enable_thinking" in options and self.tokenizer.chat_template and not knows_thinking(self.tokenizer):
            raise UserError("enable_thinking (--think, --no-think): the chat template has no such switch; leave it out")
        if not continued:
            return prompt_ids(self.tokenizer, messages, "messages", **options)
        text = render(self.tokenizer, messages, "messages", continue_final_message=True, **options)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        found = next(iter(self.budgets.values())).model.generation_config.eos_token_id
        return frozenset([] if found is None else [found] if isinstance(found, int) else found)


def _try(directory: Path, budget: Budget) -> None:
    """Choose a token with every setting. Raises UserError where transformers cannot use generation_config.json."""
    with errors_of_transformers(directory):
        logits = read(budget.model, new_cache(budget.model.config), [0], 0)
        if not logits.isfinite().all():
            raise UserError(f"{directory}: budget {budget.label} computes numbers that are not finite; train it again")
        for temperature in (None, 1.0):
            Chooser(budget.model, Settings(temperature=temperature), [0], 2).choose(logits, 0)
