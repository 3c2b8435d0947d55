"""Measures the seconds of every layer of a model while it decodes with a cache.

The models are transformers' own modules with random weights. A hook at the start of every layer notes the time: from
the clock on a CPU, from CUDA events on a GPU. tasks/commands/measure.py uses this module.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_core.config import require
from elastic_core.export.view_model import empty_model, set_parameter
from elastic_core.model import architectures
from elastic_core.model.submodel import Submodel

DTYPES = ("float32", "bfloat16", "float16")
WARM_UP = 2  # decoding steps that are not counted


@dataclass(frozen=True)
class MeasureSetting:
    """How to measure: `steps` decoding steps in each of `rounds` rounds, after prompts of `contexts` tokens.

    Every axis is measured at up to `points` sizes. `batch` is the number of sequences. Raises ConfigError.
    """

    contexts: tuple[int, ...]
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    points: int = 3
    rounds: int = 15
    steps: int = 8

    def __post_init__(self):
        for name in ("batch", "threads", "points", "rounds", "steps"):
            least = 2 if name == "points" else 1
            require(getattr(self, name) >= least, name, getattr(self, name), f"{least} or more")
        require(min(self.contexts) >= 1, "context", min(self.contexts), "tokens, 1 or more")
        require(self.dtype in DTYPES, "dtype", self.dtype, ", ".join(DTYPES))
        known = self.device == "cpu" or (self.device == "cuda" and torch.cuda.is_available())
        other = ", or cuda (choose the GPU by CUDA_VISIBLE_DEVICES)" if torch.cuda.is_available() else ""
        require(known, "device", self.device, f"cpu{other}")


class Models:
    """Builds transformers models of submodels. All share the same random numbers as weights.

    Together they therefore need only the memory of the largest.
    """

    def __init__(self, config, setting: MeasureSetting):
        self.config, self.setting = config, setting
        self.numbers: dict[str, Tensor] = {}

    def build(self, submodel: Submodel):
        """The model of a submodel. Build the largest one first: later models use a prefix of its numbers."""
        model, dtype = empty_model(self.config, submodel), getattr(torch, self.setting.dtype)
        for name in architectures.parameter_layout(model.config):
            owner, leaf = name.rpartition(".")[::2]
            shape = getattr(model.get_submodule(owner), leaf).shape
            if name not in self.numbers:
                numbers = 0.02 * torch.randn(shape.numel(), generator=torch.Generator().manual_seed(0))
                if leaf in model.get_submodule(owner)._buffers:
                    numbers.zero_()  # the router's correction; with random values all tokens choose the same experts
                self.numbers[name] = numbers.to(self.setting.device, dtype)
            set_parameter(model, name, self.numbers[name][: shape.numel()].view(shape))
        architectures.of(self.config).finish(model, torch.device(self.setting.device))
        return model.eval()


class Clock:
    """Notes points in time: of this process on a CPU, of the CUDA stream on a GPU.

    On a GPU the process only queues the work, so its own clock would measure nothing useful.
    """

    def __init__(self, device: str):
        self.on_gpu, self.marks = device == "cuda", []

    def mark(self, *_) -> None:
        """Note the time. Can serve as a hook of a module."""
        if self.on_gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """The seconds between the marks. Then all marks are deleted."""
        marks, self.marks = self.marks, []
        if self.on_gpu:
            torch.cuda.synchronize()
            return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(marks)]
        return [after - before for before, after in itertools.pairwise(marks)]


class Decoder:
    """Decodes a batch of random prompts greedily with a cache. `tokens` (B, L) are the input of the next step."""

    def __init__(self, model, setting: MeasureSetting, context: int):
        vocabulary = model.config.vocab_size
        generator = torch.Generator().manual_seed(context)
        self.tokens = torch.randint(vocabulary, (setting.batch, context), generator=generator).to(setting.device)
        self.model, self.cache, self.clock = model, None, Clock(setting.device)

    def step(self) -> float:
        """Process the prompt, or in later steps generate one token. Returns the seconds."""
        return sum(self._step())

    def step_by_layer(self) -> list[float]:
        """Like `step`, but returns the seconds of every layer and, as the last entry, of the rest."""
        trunk = self.model.get_submodule("model")
        begins = [*trunk.layers, trunk.get_submodule(architectures.of(self.model.config).FINAL_NORM)]
        hooks = [module.register_forward_pre_hook(self.clock.mark) for module in begins]
        first, *layers, last = self._step()
        for hook in hooks:
            hook.remove()
        return [*layers, first + last]

    @torch.no_grad()
    def _step(self) -> list[float]:
        self.clock.mark()
        output = self.model(self.tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.tokens, self.cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        self.clock.mark()
        return self.clock.seconds()


def timed_steps(model, reference, setting: MeasureSetting, context: int) -> Iterator[tuple[str, list[float], float]]:
    """Yield (phase, ratios, reference seconds) for the prompt ("prefill") and for every decoding step ("decode").

    The ratios are the seconds of every layer and, as the last entry, of the rest, each divided by the seconds of the
    reference's step right before. A slow phase of the machine affects both, so ratios from different times can be
    compared.
    """
    decoder, reference_decoder = Decoder(model, setting, context), Decoder(reference, setting, context)
    base = reference_decoder.step()
    yield "prefill", [seconds / base for seconds in decoder.step_by_layer()], base
    for number in range(WARM_UP + setting.steps):
        base = reference_decoder.step()
        # The reference has just filled the processor's caches with its weights. A served model finds its own weights
        # there, so one step before the measured one fills the caches again.
        decoder.step()
        parts = decoder.step_by_layer()
        if number >= WARM_UP:
            yield "decode", [seconds / base for seconds in parts], base
