"""Measures a model's memory (bytes of weights and cache) and its speed relative to the parent.

Other processes on the machine change the measured seconds. So the parent is measured in the same process, alternately
with the model. Compare the ratio of the two between models and between runs, not the seconds.
"""

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version

import torch
from torch import Tensor

from tasks.runs.provenance import processor_name
from tasks.settings.sections import LatencyOptions


def tensors_in(value) -> Iterator[Tensor]:
    """Yield all tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def num_bytes(value) -> int:
    """Bytes of all tensors in nested lists, tuples and dictionaries."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(value))


@torch.no_grad()
def memory(model, input_ids: Tensor) -> dict:
    """Bytes of the weights, and of transformers' cache after the model has read `input_ids` (B, L).

    The stage reads one sequence (B = 1). The result also has the length L as `cache_tokens`, and the element type of
    the weights.
    """
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
    """Decodes one sequence greedily. `seconds` lists the duration of every step."""

    def __init__(self, model):
        self.model, self.cache, self.seconds = model, None, []

    @torch.no_grad()
    def step(self, input_ids: Tensor | None = None) -> None:
        """Process the prompt `input_ids` (1, L). With None, generate one token, using the cache."""
        start = now(self.model.device)
        output = self.model(
            self.token if input_ids is None else input_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.token, self.cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        self.seconds.append(now(self.model.device) - start)


def now(device: torch.device) -> float:
    """Seconds of a clock, after a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch compute on `number` threads inside the block.

    Threads wait for each other. With several threads, other processes on the machine therefore disturb more.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def latency(section: LatencyOptions, model, parent, prompt: Tensor) -> dict:
    """Seconds of the model and of the parent, and the ratios step by step: their median and quartiles.

    model, parent: transformers models. With `parent` None the model itself is the parent, and all ratios are 1.
    prompt: token ids (1, L).

    Model and parent alternate at every token, so a slow phase of the machine affects both equally. `prefill_…` is the
    time to process the prompt, `per_token_…` the decode time per token. Times are medians in seconds. The two numbers
    of `…_ratio_quartiles` have the middle half of all ratios between them.
    """
    prefills, tokens = [], []  # (seconds of the model, seconds of the parent) of every step
    with threads(section.threads):
        for repeat in range(section.repeats + 1):
            of_model = Sequence(model)
            of_parent = of_model if parent is None else Sequence(parent)
            order = [of_model] if parent is None else [of_model, of_parent]
            for step in range(1 + section.new_tokens):
                for sequence in order if (repeat + step) % 2 == 0 else order[::-1]:
                    sequence.step(prompt if step == 0 else None)
            if repeat > 0:  # the first repeat only warms up
                pairs = list(zip(of_model.seconds, of_parent.seconds, strict=True))
                prefills.append(pairs[0])
                tokens += pairs[1:]
    result = {**vars(section), "prompt_tokens": prompt.shape[1]}
    for name, pairs in (("prefill", prefills), ("per_token", tokens)):
        low, ratio, high = quartiles([seconds / parent_seconds for seconds, parent_seconds in pairs])
        result |= {
            f"{name}_seconds": statistics.median(seconds for seconds, _ in pairs),
            f"parent_{name}_seconds": statistics.median(parent_seconds for _, parent_seconds in pairs),
            f"{name}_ratio": ratio,
            f"{name}_ratio_quartiles": [low, high],
        }
    return result


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile; of a single value, that value three times."""
    if len(values) == 1:
        values = values * 2  # `statistics.quantiles` needs two
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def environment(device: torch.device | None = None) -> dict:
    """The device (None: the processor), and the versions of Python and of the packages that were used."""
    is_gpu = device is not None and device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else processor_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "lm_eval")},
    }
