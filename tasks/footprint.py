"""What a model takes to run: bytes of its weights and its cache, and its speed beside the parent's.

Seconds on a machine that does other things too are worth little by themselves. So the parent runs in the same process,
turn by turn with the model, and what is comparable between models and runs is the ratio of the two.
"""

import os
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from elastic_core.config import require

CPU_INFO = Path("/proc/cpuinfo")  # of Linux, where `platform` does not know the model


@dataclass(frozen=True)
class Latency:
    """How speed is measured: one sequence, greedy, with a cache."""

    prompt_tokens: int = 128
    new_tokens: int = 16
    repeats: int = 5  # after one that does not count

    def check(self) -> None:
        for name, value in vars(self).items():
            require(value >= 1, name, value, "1 or more")


def tensors_in(value) -> Iterator[Tensor]:
    """The tensors in nested lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def num_bytes(value) -> int:
    """Bytes of all tensors in nested lists and dictionaries."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(value))


@torch.no_grad()
def memory(model, input_ids: Tensor) -> dict:
    """Bytes of the weights, and of what one sequence (1, L) keeps in transformers' cache once it has been read."""
    cache = model(input_ids, use_cache=True, logits_to_keep=1).past_key_values
    states = {"keys": 0, "values": 0, "recurrent_states": 0, "conv_states": 0}
    for layer in cache.layers:
        for name in states:
            states[name] += num_bytes(getattr(layer, name, None))
    return {
        "weight_bytes": num_bytes(list(model.parameters())),
        "cache_tokens": input_ids.shape[1],
        "kv_cache_bytes": states["keys"] + states["values"],
        "ssm_state_bytes": states["recurrent_states"],
        "conv_state_bytes": states["conv_states"],
        "cache_bytes": sum(states.values()),
        "element_type": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


@torch.no_grad()
def generation_seconds(model, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to read the prompt (1, L), and seconds for each token generated after it."""
    start = time.perf_counter()
    output = model(prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        output = model(token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
    return prefilled - start, (time.perf_counter() - prefilled) / new_tokens


def latency(section: Latency, model, parent, prompt: Tensor) -> dict:
    """Medians over the repeats of the model's seconds, the parent's, and the ratio of the two in each repeat.

    `parent` None: the model is the parent, with ratio 1.
    """
    models = [model] if parent is None else [model, parent]
    for each in models:
        generation_seconds(each, prompt, 1)
    repeats = []
    for repeat in range(section.repeats):
        order = models if repeat % 2 == 0 else models[::-1]  # a slow spell shall not always meet the same one
        seconds = {id(each): generation_seconds(each, prompt, section.new_tokens) for each in order}
        repeats.append([seconds[id(each)] for each in (model, models[-1])])
    result = {"prompt_tokens": prompt.shape[1], "new_tokens": section.new_tokens, "repeats": section.repeats}
    for i, name in enumerate(("prefill", "per_token")):
        result |= {
            f"{name}_seconds": statistics.median(mine[i] for mine, _ in repeats),
            f"parent_{name}_seconds": statistics.median(parents[i] for _, parents in repeats),
            f"{name}_ratio": statistics.median(mine[i] / parents[i] for mine, parents in repeats),
        }
    return result


def environment() -> dict:
    """Where and with what the numbers were measured."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "lm_eval")},
    }
