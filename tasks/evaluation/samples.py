"""How a model continues a few prompts, for people to read: held-out text, and an item of each kind of task."""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from elastic_core.data.loader import TokenData
from tasks.evaluation.text_scores import first_tokens
from tasks.settings.sections import Evaluate

PROMPT_TOKENS = 32  # of held-out text
NEW_TOKENS = 40


def samples(section: Evaluate, data: TokenData, model) -> list[dict]:
    """A dictionary per prompt, the same prompts for every model: `source`, `prompt`, `continuation` and `expected`.

    The model decodes greedily, up to NEW_TOKENS tokens or to the end of the document. `expected` is how the held-out
    text goes on, or the answer of the task's item.
    """
    tokenizer = AutoTokenizer.from_pretrained(data.directory / "tokenizer")
    found = []
    for source in section.held_out:
        ids = first_tokens(data, source, PROMPT_TOKENS + NEW_TOKENS)
        prompt, rest = ids[:, :PROMPT_TOKENS], ids[:, PROMPT_TOKENS:]
        found.append({"source": source, "prompt": _text(tokenizer, prompt), "expected": _text(tokenizer, rest)})
        found[-1]["continuation"] = _text(tokenizer, _continue(model, prompt, data.manifest.eos_token_id))
    for task in first_of_each_kind(section.tasks):
        item = first_item(data.directory / "lm_eval" / f"{task}.jsonl")
        prompt = tokenizer(item["prompt"], return_tensors="pt")["input_ids"]
        found.append({"source": task, "prompt": item["prompt"], "expected": item["answer"]})
        found[-1]["continuation"] = _text(tokenizer, _continue(model, prompt, data.manifest.eos_token_id))
    return found


def first_of_each_kind(tasks: tuple[str, ...]) -> list[str]:
    """The first task of each kind: of chains_3, chains_5 and recall_8 the first and the last."""
    kinds: dict[str, str] = {}
    for task in tasks:
        kinds.setdefault(task.rpartition("_")[0], task)
    return list(kinds.values())


def first_item(path: Path) -> dict[str, str]:
    """The first item of a task, as stage prepare_data has written it: `prompt` and `answer`."""
    with open(path, encoding="utf-8") as file:
        return json.loads(file.readline())


@torch.no_grad()
def _continue(model, prompt: Tensor, end: int) -> Tensor:
    """The token ids (1, up to NEW_TOKENS) that follow `prompt` (1, L)."""
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )
    return output[:, prompt.shape[1] :]


def _text(tokenizer, ids: Tensor) -> str:
    return tokenizer.decode(ids[0].tolist(), skip_special_tokens=True)
