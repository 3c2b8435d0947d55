"""How a model continues a few prompts, for people to read: held-out documents, and an item of each kind of task."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from elastic_core.data.chat_template import prompt_ids
from elastic_core.data.loader import TokenData
from tasks.evaluation.text_scores import first_tokens, is_text
from tasks.settings.sections import Evaluate

PROMPT_TOKENS = 32  # of held-out text
MOST_PROMPT_TOKENS = 512  # of a held-out conversation, if one is so short
NEW_TOKENS = 40


def samples(section: Evaluate, data: TokenData, model) -> list[dict]:
    """A dictionary per prompt, the same prompts for every model: `source`, `prompt`, `continuation` and `expected`.

    The model decodes greedily, up to NEW_TOKENS tokens or to one of its stop ids. A prompt is the beginning of a
    held-out text, or a held-out conversation up to its first trained token; or the item of a task. `expected` is how
    the document goes on, or the answer of the task's item. Conversations show their special tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(data.directory / "tokenizer")
    stop = model.generation_config.eos_token_id
    stop = data.manifest.eos_token_id if stop is None else stop
    found = []
    for sample, ids, is_chat in _prompts(section, data, tokenizer):
        found.append(sample | {"continuation": _text(tokenizer, _continue(model, ids, stop), is_chat)})
    return found


def _prompts(section: Evaluate, data: TokenData, tokenizer) -> Iterator[tuple[dict, Tensor, bool]]:
    """(`source`, `prompt` and `expected` of a sample, the ids of the prompt (1, L), whether it is a conversation.)"""
    for source in section.held_out:
        if is_chat := not is_text(data, source):
            prompt, rest = first_turn(data, source, MOST_PROMPT_TOKENS, NEW_TOKENS)
        else:
            ids = first_tokens(data, source, PROMPT_TOKENS + NEW_TOKENS)
            prompt, rest = ids[:, :PROMPT_TOKENS], ids[:, PROMPT_TOKENS:]
        texts = {"prompt": _text(tokenizer, prompt, is_chat), "expected": _text(tokenizer, rest, is_chat)}
        yield {"source": source} | texts, prompt, is_chat
    directory = data.directory / "lm_eval"
    for task in first_of_each_kind(section.tasks):
        item = first_item(directory / f"{task}.jsonl")
        prompt = torch.tensor([prompt_ids(tokenizer, [{"role": "user", "content": item["prompt"]}])])
        shown = _text(tokenizer, prompt, is_chat=True)
        yield {"source": task, "prompt": shown, "expected": item["answer"]}, prompt, True


def first_turn(data: TokenData, source: str, most: int, number: int) -> tuple[Tensor, Tensor]:
    """(The prompt of a held-out conversation, the first `number` trained tokens or fewer that follow), (1, L) int64.

    Of the first conversation whose prompt has at most `most` tokens, else of the one with the shortest prompt.
    """
    tokens, offsets, trained = (read(source, "held_out") for read in (data.tokens, data.offsets, data.trained))
    best = None
    for start, end in itertools.pairwise(offsets.tolist()):
        length = max(1, int(np.argmax(trained[start:end])))
        if trained[start + length - 1 : end].any() and (best is None or length < best[1]):
            best = start, length, end
        if best is not None and best[1] <= most:
            break
    assert best is not None  # its loss was measured
    start, length, end = best
    follows = trained[start + length : min(start + length + number, end)]
    count = len(follows) if follows.all() else int(np.argmin(follows))
    ids = torch.from_numpy(tokens[start : start + length + count].astype(np.int64))[None]
    return ids[:, :length], ids[:, length:]


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
def _continue(model, prompt: Tensor, stop: int | list[int]) -> Tensor:
    """The token ids (1, up to NEW_TOKENS) that follow `prompt` (1, L)."""
    prompt = prompt.to(model.device)
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop[0] if isinstance(stop, list) else stop,
    )
    return output[:, prompt.shape[1] :]


def _text(tokenizer, ids: Tensor, is_chat: bool) -> str:
    return tokenizer.decode(ids[0].tolist(), skip_special_tokens=not is_chat)
