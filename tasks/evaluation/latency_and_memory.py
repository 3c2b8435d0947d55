"""What a model takes to run: bytes of its weights and its cache, and its speed beside the parent's.

Seconds on a machine that does other things too are worth little by themselves. So the parent runs in the same process,
turn by turn with the model, and what is comparable between models and runs is the ratio of the two.
"""

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from tasks.settings.schema import LatencyOptions

CPU_INFO = Path("/proc/cpuinfo")  # of Linux, where `platform` does not know the model


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


class Sequence:
    """One sequence that a model reads and goes on with, greedily; it knows how many seconds every step took."""

    def __init__(self, model):
        self.model, self.cache, self.seconds = model, None, []

    @torch.no_grad()
    def step(self, input_ids: Tensor | None = None) -> None:
        """Read the prompt (1, L), or, where None, generate one token with the cache of all before."""
        start = time.perf_counter()
        output = self.model(
            self.token if input_ids is None else input_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.token, self.cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        self.seconds.append(time.perf_counter() - start)


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute on `number` threads. Several that wait for each other are at the mercy of what else a machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def latency(section: LatencyOptions, model, parent, prompt: Tensor) -> dict:
    """Median seconds of the model and of the parent, and the median of the ratios of their steps, one by one.

    The two take turns at every token, so that a slow spell of the machine meets both. `parent` None: the model is the
    parent, with ratio 1.
    """
    prefills, tokens = [], []  # (seconds of the model, of the parent) of every step
    with threads(section.threads):
        for repeat in range(section.repeats + 1):
            mine = Sequence(model)
            theirs = mine if parent is None else Sequence(parent)
            turns = [mine] if parent is None else [mine, theirs]
            for step in range(1 + section.new_tokens):
                for sequence in turns if (repeat + step) % 2 == 0 else turns[::-1]:
                    sequence.step(prompt if step == 0 else None)
            if repeat > 0:  # the first one warms up
                pairs = list(zip(mine.seconds, theirs.seconds, strict=True))
                prefills.append(pairs[0])
                tokens += pairs[1:]
    result = {**vars(section), "prompt_tokens": prompt.shape[1]}
    for name, pairs in (("prefill", prefills), ("per_token", tokens)):
        result |= {
            f"{name}_seconds": statistics.median(own for own, _ in pairs),
            f"parent_{name}_seconds": statistics.median(other for _, other in pairs),
            f"{name}_ratio": statistics.median(own / other for own, other in pairs),
        }
    return result


def environment() -> dict:
    """Where and with what the numbers were measured."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "lm_eval")},
    }
