"""How long the layers of a model take: transformers' own modules with random weights, decoding with a cache.

Hooks mark where layers begin, on a CPU by its clock and on a GPU by events. For tasks/commands/measure.py.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_core.config import require
from elastic_core.export.nested import empty_model, set_parameter
from elastic_core.model import architectures
from elastic_core.model.submodel import Submodel

DTYPES = ("float32", "bfloat16", "float16")
WARM_UP = 2  # steps, before those that count


@dataclass(frozen=True)
class Setting:
    """How it is measured: `steps` of decoding in each of `rounds`, behind prompts of `contexts` tokens.

    Every axis is measured at up to `points` sizes.
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
        other = ", or cuda (CUDA_VISIBLE_DEVICES says which)" if torch.cuda.is_available() else ""
        require(known, "device", self.device, f"cpu{other}")


class Models:
    """transformers' models of submodels, on the same random numbers: together they take the memory of the largest."""

    def __init__(self, config, setting: Setting):
        self.config, self.setting = config, setting
        self.numbers: dict[str, Tensor] = {}

    def build(self, submodel: Submodel):
        """The model of a submodel; of several the largest comes first."""
        model, dtype = empty_model(self.config, submodel), getattr(torch, self.setting.dtype)
        for name in architectures.parameter_layout(model.config):
            owner, leaf = name.rpartition(".")[::2]
            shape = getattr(model.get_submodule(owner), leaf).shape
            if name not in self.numbers:
                numbers = 0.02 * torch.randn(shape.numel(), generator=torch.Generator().manual_seed(0))
                if leaf in model.get_submodule(owner)._buffers:
                    numbers.zero_()  # a correction of scores, with which all tokens would ask the same experts
                self.numbers[name] = numbers.to(self.setting.device, dtype)
            set_parameter(model, name, self.numbers[name][: shape.numel()].view(shape))
        architectures.of(self.config).finish(model, torch.device(self.setting.device))
        return model.eval()


class Clock:
    """Marks in time: of this process on a CPU, of the stream on a GPU, where work is only asked for."""

    def __init__(self, device: str):
        self.on_gpu, self.marks = device == "cuda", []

    def mark(self, *_) -> None:
        """Note the time; can be a hook of a module."""
        if self.on_gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between the marks, which are forgotten."""
        marks, self.marks = self.marks, []
        if self.on_gpu:
            torch.cuda.synchronize()
            return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(marks)]
        return [after - before for before, after in itertools.pairwise(marks)]


class Text:
    """A batch of texts that a model reads and goes on with."""

    def __init__(self, model, setting: Setting, context: int):
        vocabulary = model.config.vocab_size
        generator = torch.Generator().manual_seed(context)
        self.tokens = torch.randint(vocabulary, (setting.batch, context), generator=generator).to(setting.device)
        self.model, self.cache, self.clock = model, None, Clock(setting.device)

    def step(self) -> float:
        """Read the prompt, or then generate a token; its seconds."""
        return sum(self._step())

    def step_by_layer(self) -> list[float]:
        """The same: seconds of every layer and, last, of the rest."""
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


def turns(model, reference, setting: Setting, context: int) -> Iterator[tuple[str, list[float], float]]:
    """Of a prompt that is read, and of every step of decoding behind it: phase, seconds by part, and the reference's.

    Those of the layers and, last, of the rest are over the seconds of a step of the reference right before, so that
    points which were measured at different times can be compared (as in tasks/evaluation/latency_and_memory.py).
    """
    text, other = Text(model, setting, context), Text(reference, setting, context)
    base = other.step()
    yield "prefill", [seconds / base for seconds in text.step_by_layer()], base
    for number in range(WARM_UP + setting.steps):
        base = other.step()
        text.step()  # the other one has been in the processor's caches; who serves one model finds them warm
        parts = text.step_by_layer()
        if number >= WARM_UP:
            yield "decode", [seconds / base for seconds in parts], base
